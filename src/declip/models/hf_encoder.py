"""Hugging Face text encoders: read from a folder or the Hub, and stored with the model's weights.

No code from a folder is run: only known architectures are built, and only safetensors are read.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from declip.errors import UserError
from declip.recipe.schema import Recipe

log = logging.getLogger("declip")

PREFIX = "huggingface:"
CONFIG = "config.json"
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
FETCHED = ("*.json", "vocab.txt", "merges.txt", "sentencepiece.bpe.model")

POOLING = "1_Pooling/config.json"
"""File in which sentence-transformers stores a sentence encoder's pooling."""

MODE = "pooling_mode_"
POOLINGS = {"cls": "cls", "cls_token": "cls", "mean": "mean", "mean_tokens": "mean", "lasttoken": "eos"}
"""Poolings of sentence-transformers → `text.pooling` of a recipe."""

ENTRY = "text_tower._extra_state"
"""Name of the entry of a model's state that holds the encoder's configuration and tokenizer, as bytes of JSON."""

HEADS: Mapping[str, Callable[[Any], nn.Module]] = {
    "bert": lambda model: model.cls,
    "roberta": lambda model: model.lm_head,
    "xlm-roberta": lambda model: model.lm_head,
    "camembert": lambda model: model.lm_head,
    "distilbert": lambda model: nn.Sequential(
        model.vocab_transform, model.activation, model.vocab_layer_norm, model.vocab_projector
    ),
}
"""Known architectures → their masked-language heads, (M, width) → (M, vocabulary)."""

OFFSET = {"roberta", "xlm-roberta", "camembert"}
"""Architectures whose first position is the padding id + 1."""

SIZES = {
    *("vocab_size", "max_position_embeddings", "type_vocab_size", "pad_token_id", "initializer_range"),
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "activation"),
    *("dim", "n_layers", "n_heads", "hidden_dim", "sinusoidal_pos_embds"),
}
"""Keys of a configuration that are read: sizes, dropout, activation; others name other tasks, files or code."""


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder without its weights.

    Attributes:
        config: "model_type" and `SIZES`.
        tokenizer: Content of tokenizer.json.
        specials: Ids, see `declip.data.text.hf_tokenizer.SPECIALS`.
        folder: Folder of its weights; None for random weights.
        pooling: Pooling that it was trained with, a value of `POOLINGS` or an unknown name; None if not stored.
    """

    config: Mapping[str, Any]
    tokenizer: str
    specials: Mapping[str, int]
    folder: Path | None = None
    pooling: str | None = None

    @property
    def longest(self) -> int:
        """Largest number of ids that it has positions for."""
        taken = self.config["pad_token_id"] + 1 if self.config["model_type"] in OFFSET else 0
        return int(self.config["max_position_embeddings"]) - taken

    def to_tensor(self) -> Tensor:
        """Configuration and tokenizer as bytes, (n,) uint8."""
        tree = {"config": self.config, "tokenizer": self.tokenizer, "specials": self.specials}
        tree |= {"pooling": self.pooling} if self.pooling is not None else {}
        return torch.frombuffer(bytearray(json.dumps(tree), "utf-8"), dtype=torch.uint8)

    @classmethod
    def from_tensor(cls, stored: Tensor) -> "TextEncoder":
        """Read the result of `to_tensor`; raises exceptions of any kind where the bytes are something else."""
        tree = json.loads(stored.numpy().tobytes())
        config = {name: value for name, value in tree["config"].items() if name in SIZES or name == "model_type"}
        return cls(config, tree["tokenizer"], tree["specials"], pooling=tree.get("pooling"))

    def build(self) -> nn.Module:
        """Build transformers' model with a masked-language head, with the weights of `folder` or random ones."""
        transformers = _transformers()
        sizes = dict(self.config)
        kind = sizes.pop("model_type")
        masked_language, options = transformers.AutoModelForMaskedLM, {"attn_implementation": "sdpa"}
        try:
            with quietly():
                config = transformers.AutoConfig.for_model(kind, **sizes)
                if self.folder is None:
                    return masked_language.from_config(config, dtype=torch.float32, **options)
                model, notes = masked_language.from_pretrained(
                    self.folder, config=config, dtype=torch.float32, use_safetensors=True, local_files_only=True,
                    output_loading_info=True, **options,
                )  # fmt: skip
        except Exception as error:  # transformers has errors of many kinds for files that are damaged or do not fit
            where = f" in '{self.folder}'" if self.folder else ""
            raise UserError(f"The text encoder{where} cannot be built: {_one_line(error)}") from error
        missing = sorted(notes["missing_keys"])
        of_encoder = [name for name in missing if name.startswith(f"{model.base_model_prefix}.")]
        if of_encoder:
            more = f" and {len(of_encoder) - 1:,} more" if len(of_encoder) > 1 else ""
            raise UserError(
                f"The weights in '{self.folder}' lack '{of_encoder[0]}'{more} of its {CONFIG}. Give the encoder's own "
                "weights, or text.pretrained=false for random ones."
            )
        if missing:
            log.info("'%s' holds no masked-language head; if the recipe needs one, it starts at random.", self.folder)
        return model


def read_encoder(given: str, pretrained: bool) -> TextEncoder:
    """Read a text encoder's configuration and tokenizer from a folder, or from "huggingface:NAME", which is fetched.

    With `pretrained` its weights must be there too; `TextEncoder.build` reads them.
    """
    transformers = _transformers()
    folder = _fetched(given, pretrained) if given.startswith(PREFIX) else Path(given).expanduser()
    if not (folder / CONFIG).is_file():
        problem = f"has no {CONFIG}" if folder.is_dir() else "is no folder"
        raise UserError(
            f"text.hf_model '{given}' {problem}. Give a folder as transformers' save_pretrained writes it, or "
            f"{PREFIX}NAME for a model of the Hub."
        )
    config = _config(given, folder)
    if pretrained and not any((folder / name).is_file() for name in WEIGHTS):
        raise UserError(
            f"text.hf_model '{given}' has no {WEIGHTS[0]}. Weights in other files, such as pytorch_model.bin, can run "
            "code and are not read: if you trust them, open the encoder with transformers and call "
            "save_pretrained(FOLDER). text.pretrained=false starts from random weights."
        )
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise UserError(f"text.hf_model '{given}' has no tokenizer: none of {', '.join(TOKENIZERS)}. Save it there.")
    try:
        with quietly():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            definition = tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # of many kinds; a tokenizer without `tokenizers` is an AttributeError
        raise UserError(f"The tokenizer of '{given}' cannot be read: {_one_line(error)}") from error
    names = {"start": "cls_token", "end": "sep_token", "mask": "mask_token", "padding": "pad_token"}
    specials = {special: getattr(tokenizer, f"{name}_id") for special, name in names.items()}
    if lacking := [names[special] for special, number in specials.items() if number is None]:
        raise UserError(f"The tokenizer of '{given}' has no {', '.join(lacking)}; a text encoder needs all four.")
    return TextEncoder(config, definition, specials, folder if pretrained else None, _pooling(folder))


def encoder_kept_in(weights: Mapping[str, Tensor], recipe: Recipe, path: Path) -> TextEncoder | None:
    """Read the encoder stored with a model's weights; None where its recipe has CLIP's text tower.

    Raises:
        UserError: it is missing or damaged. `text.hf_model` is never read instead: the recipe may be a stranger's.
    """
    if recipe.text.hf_model is None:
        return None
    if ENTRY not in weights:
        raise UserError(f"The weights in '{path}' came without their text encoder's configuration and tokenizer.")
    try:
        return TextEncoder.from_tensor(weights[ENTRY])
    except Exception as error:  # JSON of any shape
        raise UserError(f"The text encoder's configuration in '{path}' is damaged: {_one_line(error)}") from error


@contextmanager
def quietly() -> Iterator[None]:
    """Silence the logs and progress bars of transformers and of the Hub's client."""
    from transformers.utils import logging as hf_logging

    hub = logging.getLogger("huggingface_hub")
    levels, bars = (hf_logging.get_verbosity(), hub.level), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hub.setLevel(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(levels[0])
        hub.setLevel(levels[1])
        if bars:
            hf_logging.enable_progress_bar()


def _config(given: str, folder: Path) -> dict[str, Any]:
    """Read "model_type" and `SIZES`, with the architecture's defaults for keys that the file lacks."""
    try:
        tree = json.loads((folder / CONFIG).read_bytes())
        kind = tree.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"'{folder / CONFIG}' is no configuration of transformers: {_one_line(error)}") from error
    if kind not in HEADS or tree.get("is_decoder"):
        shown = "a decoder" if kind in HEADS else f"of the kind {kind!r}"
        raise UserError(
            f"text.hf_model '{given}' is {shown}; known are the encoders {', '.join(HEADS)}. For a causal text tower "
            "leave text.hf_model out."
        )
    if tree.get("position_embedding_type") not in (None, "absolute"):
        raise UserError(f"text.hf_model '{given}' has positions of the kind {tree['position_embedding_type']!r}.")
    try:
        whole = _transformers().AutoConfig.for_model(kind, **{k: v for k, v in tree.items() if k in SIZES}).to_dict()
    except Exception as error:  # transformers checks types by errors of its own
        raise UserError(f"'{folder / CONFIG}' cannot be used: {_one_line(error)}") from error
    return {"model_type": kind, **{name: whole[name] for name in sorted(SIZES & whole.keys())}}


def _pooling(folder: Path) -> str | None:
    """Read a sentence encoder's pooling from either form of the file: a flag for each mode, or the modes' names."""
    if not (folder / POOLING).is_file():
        return None
    try:
        tree = json.loads((folder / POOLING).read_bytes())
        flags = [name.removeprefix(MODE) for name, on in tree.items() if name.startswith(MODE) and on is True]
        modes = tree.get("pooling_mode", flags or ["mean"])
        modes = [modes] if isinstance(modes, str) else list(modes)
    except (OSError, ValueError, AttributeError, TypeError):
        return "unreadable"
    return " and ".join(POOLINGS.get(str(mode), str(mode)) for mode in modes)


def _fetched(given: str, pretrained: bool) -> Path:
    """Fetch the Hub's files, or what is missing of them here, and return their folder."""
    from huggingface_hub import snapshot_download

    weights = ["model*.safetensors"] if pretrained else []
    log.info("Fetching '%s'.", given)
    try:
        with quietly():
            return Path(snapshot_download(given.removeprefix(PREFIX), allow_patterns=[*FETCHED, *weights]))
    except Exception as error:  # of the network, the Hub and the disk, each has errors of its own
        raise UserError(
            f"Cannot fetch '{given}': {_one_line(error)} Check the network and the name, or give a folder."
        ) from error


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise UserError("A Hugging Face text encoder needs transformers: pip install 'declip[hf]'.") from error
    return transformers


def _one_line(error: Exception, longest: int = 200) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    text = f"{text[:longest]} …" if len(text) > longest else text
    return text if text.endswith((".", "…")) else f"{text}."
