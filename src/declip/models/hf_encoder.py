"""Hugging Face text encoders; BERT's, once trained, without transformers, whose import takes longer than torch's."""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip.data.pair import printable
from declip.data.text.tokenizer import HuggingfaceTokenizer
from declip.errors import UserError, check_installed, unknown
from declip.io.hub import fetch
from declip.io.text import one_line
from declip.models.text_tower import AnyTextTower, SelfContained, row_at
from declip.recipe.schema import TextTowerConfig

log = logging.getLogger("declip")
PREFIX = "huggingface:"
CONFIG = "config.json"
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model")
FETCHED = ("*.json", "vocab.txt", "merges.txt", "sentencepiece.bpe.model")

POOLING = "1_Pooling/config.json"  # file in which sentence-transformers stores a sentence encoder's pooling
POOLINGS = {
    "cls": "cls",
    "cls_token": "cls",
    "mean": "mean",
    "mean_tokens": "mean",
    "lasttoken": "eos",
}
"""Poolings of sentence-transformers → `text.pooling` of a recipe."""

ENTRY = "text_tower._extra_state"
"""Name of the entry of a model's state that holds the encoder's configuration and tokenizer, as bytes of JSON."""

# Architectures whose first position is the padding id + 1
OFFSET = ("roberta", "xlm-roberta", "camembert")
KINDS = ("bert", *OFFSET, "distilbert")  # known architectures
SIZES = {
    *(
        "vocab_size",
        "max_position_embeddings",
        "type_vocab_size",
        "pad_token_id",
        "initializer_range",
    ),
    *(
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "hidden_act",
        "layer_norm_eps",
    ),
    *(
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "dropout",
        "attention_dropout",
        "activation",
    ),
    *("dim", "n_layers", "n_heads", "hidden_dim", "sinusoidal_pos_embds"),
}
"""Keys of a configuration that are read: sizes, dropout, activation; others name other tasks, files or code."""


class Bert(nn.Module):
    """BERT's embeddings and blocks (Devlin et al. 2019, arXiv 1810.04805).

    Parameters are named, and numbers are computed, as in transformers' `BertModel`; the initial ones have another
    distribution. Sizes have the names of transformers, see `SIZES`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width = config["hidden_size"]
        parts = {
            "word_embeddings": nn.Embedding(
                config["vocab_size"], width, padding_idx=config["pad_token_id"]
            ),
            "position_embeddings": nn.Embedding(config["max_position_embeddings"], width),
            "token_type_embeddings": nn.Embedding(config["type_vocab_size"], width),
            "LayerNorm": nn.LayerNorm(width, config["layer_norm_eps"]),
        }
        self.embeddings: Any = nn.ModuleDict(parts)
        blocks = nn.ModuleList(BertBlock(config) for _ in range(config["num_hidden_layers"]))
        self.encoder: Any = nn.ModuleDict({"layer": blocks})
        self.dropout = config["hidden_dropout_prob"]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        """Encode ids (B, L), with a mask (B, 1, 1, L) that is true where there is no padding."""
        parts = self.embeddings
        # (B, L, width)
        x = parts.word_embeddings(input_ids) + parts.token_type_embeddings.weight[0]
        positions = parts.position_embeddings.weight[: input_ids.shape[1]]
        x = parts.LayerNorm(x + positions)
        x = F.dropout(x, self.dropout, self.training)
        for block in self.encoder.layer:
            x = block(x, attention_mask)
        return SimpleNamespace(last_hidden_state=x)


class BertBlock(nn.Module):
    """Post-norm block: attention, then two layers."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width = config["hidden_size"]
        inner = config["intermediate_size"]

        def output(features: int) -> nn.ModuleDict:
            norm = nn.LayerNorm(width, config["layer_norm_eps"])
            return nn.ModuleDict({"dense": nn.Linear(features, width), "LayerNorm": norm})

        names = ("query", "key", "value")
        maps = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        self.attention: Any = nn.ModuleDict({"self": maps, "output": output(width)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = output(inner)
        self.heads = config["num_attention_heads"]
        self.dropout = config["hidden_dropout_prob"]
        self.attention_dropout = config["attention_probs_dropout_prob"]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        maps = self.attention["self"]
        query = self._per_head(maps["query"](x))
        key = self._per_head(maps["key"](x))
        value = self._per_head(maps["value"](x))
        dropout = self.attention_dropout if self.training else 0.0
        # (B, heads, L, width / heads), padding masked
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        joined = mixed.transpose(1, 2).flatten(2)  # (B, L, width)
        x = self._add(self.attention["output"], joined, x)
        inner = F.gelu(self.intermediate["dense"](x))
        return self._add(self.output, inner, x)

    def _per_head(self, x: Tensor) -> Tensor:
        """(B, L, width) → (B, heads, L, width / heads)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def _add(self, output: Any, inner: Tensor, x: Tensor) -> Tensor:
        """Project a layer's output, drop out, add its input and normalize."""
        projected = F.dropout(output["dense"](inner), self.dropout, self.training)
        added: Tensor = output["LayerNorm"](projected + x)
        return added


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder without its weights."""

    config: Mapping[str, Any]  # "model_type" and `SIZES`
    tokenizer: str  # content of tokenizer.json
    specials: Mapping[str, int]  # ids, see `declip.data.text.tokenizer.SPECIALS`
    folder: Path | None = None  # of its weights; None for random ones
    # That it was trained with, a value of `POOLINGS` or an unknown name; None if not stored
    pooling: str | None = None
    # Whether weights will be loaded into it, so that the initial ones do not matter
    filled_later: bool = False

    def to_tensor(self) -> Tensor:
        """Configuration and tokenizer as bytes, (n,) uint8."""
        tree = {"config": self.config, "tokenizer": self.tokenizer, "specials": self.specials}
        if self.pooling is not None:
            tree["pooling"] = self.pooling
        content = json.dumps(tree)
        return torch.frombuffer(bytearray(content, "utf-8"), dtype=torch.uint8)

    @classmethod
    def from_tensor(cls, stored: Tensor) -> "TextEncoder":
        """Read the result of `to_tensor`; raises exceptions of any kind where the bytes are something else."""
        tree = json.loads(stored.numpy().tobytes())
        config = {
            name: value
            for name, value in tree["config"].items()
            if name in SIZES or name == "model_type"
        }
        return cls(config, tree["tokenizer"], tree["specials"], pooling=tree.get("pooling"))

    def build(self) -> nn.Module:
        """Build the encoder without its pooler, with the weights of `folder` or random ones."""
        kind = self.config["model_type"]
        is_bert = kind == "bert" and self.config.get("hidden_act") == "gelu"
        if self.filled_later and is_bert:
            return Bert(self.config)  # which computes what transformers computes
        options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa"}
        if kind != "distilbert":  # which has no pooler
            options["add_pooling_layer"] = False
        remedy = " Only safetensors are read, as save_pretrained(FOLDER) writes them; others can run code."
        problem = f"The text encoder in '{self.folder}' cannot be built"
        with quiet_transformers(problem, remedy if self.folder else "") as library:
            config = _configuration(library, kind, self.config)
            if self.folder is None:
                return library.AutoModel.from_config(config, **options)
            options |= {
                "use_safetensors": True,
                "local_files_only": True,
                "output_loading_info": True,
            }
            model, notes = library.AutoModel.from_pretrained(self.folder, config=config, **options)
        more = sorted(name for name in notes["unexpected_keys"] if ".layer." in name)
        if more:
            raise UserError(
                f"{CONFIG} has fewer layers than the weights in '{self.folder}', which hold '{more[0]}'."
            )
        missing = sorted(notes["missing_keys"])
        if missing:
            raise UserError(
                f"The weights in '{self.folder}' lack '{missing[0]}' and {len(missing) - 1} more. Give the encoder's "
                "own weights, or text.pretrained=false for random ones."
            )
        return model


def read_encoder(given: str, pretrained: bool) -> TextEncoder:
    """Read a text encoder's configuration and tokenizer from a folder, or from "huggingface:NAME", which is fetched."""
    folder = Path(given).expanduser()
    if given.startswith(PREFIX):
        log.info("Fetching '%s'.", given)
        files = [*FETCHED, "model*.safetensors"] if pretrained else [*FETCHED]

        def get(offline: bool) -> str:
            name = given.removeprefix(PREFIX)
            return huggingface_hub.snapshot_download(
                name, allow_patterns=files, local_files_only=offline
            )

        folder = Path(fetch(given, get, "their folder"))
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZERS)
    if not has_tokenizer or not (folder / CONFIG).is_file():
        raise UserError(
            f"text.hf_model '{given}' is not a folder with {CONFIG} and a tokenizer ({', '.join(TOKENIZERS)}). Give "
            f"one as transformers' save_pretrained writes it, or {PREFIX}NAME for a model of the Hub."
        )
    # Only sizes of the configuration are read, no code and no addresses.
    config = _config(given, folder)
    names = {"start": "cls_token", "end": "sep_token", "mask": "mask_token", "padding": "pad_token"}
    with quiet_transformers(f"The tokenizer or {POOLING} of '{given}' cannot be read") as library:
        pooling = _pooling(folder)
        tokenizer = library.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        definition = tokenizer.backend_tokenizer.to_str()
        specials = {special: getattr(tokenizer, f"{name}_id") for special, name in names.items()}
        lacking = [names[special] for special, number in specials.items() if number is None]
        if lacking:
            raise ValueError(f"it has no {', '.join(lacking)}")
    return TextEncoder(config, definition, specials, folder if pretrained else None, pooling)


def check_context(config: Mapping[str, Any], context: int) -> None:
    """Refuse captions of more ids than an encoder has positions; those of some encoders have no end."""
    longest = config.get("max_position_embeddings", math.inf) or math.inf
    if config["model_type"] in OFFSET:
        longest -= config["pad_token_id"] + 1
    if context > longest:
        raise UserError(
            f"The encoder has positions for {longest} ids. Set text.context_length to {longest} or less."
        )


@contextmanager
def quiet_transformers(problem: str, remedy: str = "") -> Iterator[Any]:
    """Yield transformers without its logs and progress bars, and say in one line what failed, an error of any class."""
    check_installed("transformers", "hf", "A Hugging Face text encoder")
    import transformers
    from transformers.utils import logging as hf_logging

    disabled = logging.root.manager.disable
    bars = hf_logging.is_progress_bar_enabled()
    logging.disable(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield transformers
    except Exception as error:
        reason = printable(one_line(error)).removesuffix(".")
        raise UserError(f"{problem}: {reason}.{remedy}") from error
    finally:
        logging.disable(disabled)
        if bars:
            hf_logging.enable_progress_bar()


def _configuration(library: Any, kind: str, sizes: Mapping[str, Any]) -> Any:
    known = {name: size for name, size in sizes.items() if name in SIZES}
    return library.AutoConfig.for_model(kind, **known)


def _config(given: str, folder: Path) -> dict[str, Any]:
    """Read "model_type" and `SIZES`, with the architecture's defaults for keys that the file lacks."""
    with quiet_transformers(
        f"'{folder / CONFIG}' is not the configuration of a supported encoder"
    ) as library:
        tree = json.loads((folder / CONFIG).read_bytes())
        kind = "decoder" if tree.get("is_decoder") else tree.get("model_type")
        positions = tree.get("position_embedding_type") or "absolute"
        if kind in KINDS and positions == "absolute":
            whole = _configuration(library, kind, tree).to_dict()
            return {
                "model_type": kind,
                **{name: whole[name] for name in sorted(SIZES & whole.keys())},
            }
    raise UserError(
        f"text.hf_model '{given}' is of the kind {kind!r} with {positions!r} positions; known are the encoders "
        f"{', '.join(KINDS)} with absolute ones. For a causal text tower leave text.hf_model out."
    )


def _pooling(folder: Path) -> str | None:
    """Read a sentence encoder's pooling from either form of the file: a flag for each mode, or the modes' names."""
    if not (folder / POOLING).is_file():
        return None
    tree = json.loads((folder / POOLING).read_bytes())
    prefix = "pooling_mode_"
    flags = [
        name.removeprefix(prefix)
        for name, on in tree.items()
        if name.startswith(prefix) and on is True
    ]
    modes = tree.get("pooling_mode", flags or ["mean"])
    if isinstance(modes, str):
        modes = [modes]
    return " and ".join(POOLINGS.get(mode, mode) for mode in modes)


class HuggingfaceTextTower(SelfContained, AnyTextTower):
    """transformers' encoder with a projection into the shared space.

    Attention is bidirectional and masks padding, so a batch may be truncated to its longest caption. The encoder's
    pooler is left out: every parameter of the tower gets a gradient. The pooling "auto" is that which the encoder was
    trained with as a sentence encoder, else "cls".
    """

    def __init__(
        self,
        encoder: TextEncoder,
        tokenizer: HuggingfaceTokenizer,
        text: TextTowerConfig,
        embed_dim: int,
    ) -> None:
        super().__init__()
        # Configuration and tokenizer may be a stranger's.
        config = encoder.config
        self.encoder_config = config
        kind = str(config.get("model_type"))
        if kind not in KINDS:
            raise unknown("text encoder", kind, KINDS)
        if (
            tokenizer.vocabulary > config["vocab_size"]
            or tokenizer.padding != config["pad_token_id"]
        ):
            raise UserError(
                f"The text encoder's tokenizer has {tokenizer.vocabulary:,} ids and pads with id {tokenizer.padding}; "
                f"{CONFIG} says vocab_size {config['vocab_size']:,}, pad_token_id {config['pad_token_id']}. Save both "
                "of one model."
            )
        check_context(config, tokenizer.context)
        self.encoder: Any = encoder.build()
        self.stored = encoder.to_tensor()
        self.padding = tokenizer.padding
        self.context = tokenizer.context
        self.pooling: str = text.pooling
        if text.pooling == "auto":
            self.pooling = encoder.pooling or "cls"
        if self.pooling not in POOLINGS.values():
            raise UserError(
                f"{POOLING} has an unknown pooling, {encoder.pooling}. Set text.pooling=mean, cls or eos."
            )
        self.width = int(config.get("hidden_size") or config["dim"])  # DistilBERT's is "dim"
        self.text_projection: nn.Linear = nn.Linear(
            self.width, embed_dim, bias=text.projection_bias
        )
        nn.init.normal_(self.text_projection.weight, std=self.width**-0.5)
        if text.projection_bias:
            nn.init.zeros_(self.text_projection.bias)

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode token ids (B, L), padded on the right."""
        real = tokens != self.padding
        # A (B, 1, 1, L) mask is used as it is; given (B, L), transformers waits for the device to ask if all is real.
        states = self.encoder(
            input_ids=tokens, attention_mask=real[:, None, None, :]
        ).last_hidden_state
        # (B,)
        lengths = real.sum(dim=1)
        if self.pooling == "cls":
            pooled = states[:, 0]
        elif self.pooling == "eos":
            pooled = row_at(states, (lengths - 1).clamp(min=0))
        else:
            total = (states * real.unsqueeze(-1)).sum(dim=1)  # (B, width)
            pooled = total / lengths.unsqueeze(-1)
        return pooled, states, lengths

    def language_head(self) -> nn.Module:
        """Build a masked-language head that starts as the word embeddings, as in BERT."""
        words: Tensor = self.encoder.embeddings.word_embeddings.weight  # (vocabulary, width)
        head = nn.Linear(*words.mT.shape)
        head.weight.data.copy_(words)
        nn.init.zeros_(head.bias)
        return head
