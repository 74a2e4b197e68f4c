"""Hugging Face text encoders: read from a folder or the Hub, and kept with the weights, which then need neither.

No code of a folder's own is run: configurations are read for known architectures alone, weights as safetensors alone.
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
"""Where a sentence encoder's folder says how it was trained to pool (sentence-transformers)."""

MODE = "pooling_mode_"
POOLINGS = {"cls": "cls", "cls_token": "cls", "mean": "mean", "mean_tokens": "mean", "lasttoken": "eos"}
"""Its names of the poolings that are known here, and the recipe's."""

ENTRY = "text_tower._extra_state"
"""Under this name a model's state holds its encoder's configuration and tokenizer, as bytes of JSON."""

HEADS: Mapping[str, Callable[[Any], nn.Module]] = {
    "bert": lambda model: model.cls,
    "roberta": lambda model: model.lm_head,
    "xlm-roberta": lambda model: model.lm_head,
    "camembert": lambda model: model.lm_head,
    "distilbert": lambda model: nn.Sequential(
        model.vocab_transform, model.activation, model.vocab_layer_norm, model.vocab_projector
    ),
}
"""The architectures that are known, and their masked-language heads: (M, width) → (M, vocabulary)."""

OFFSET = {"roberta", "xlm-roberta", "camembert"}
"""Architectures whose positions begin behind the id of padding."""

SIZES = {
    *("vocab_size", "max_position_embeddings", "type_vocab_size", "pad_token_id", "initializer_range"),
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "activation"),
    *("dim", "n_layers", "n_heads", "hidden_dim", "sinusoidal_pos_embds"),
}
"""What is read of a configuration: sizes, dropout, activation; the rest concerns other tasks, files or code."""


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder without its weights.

    Attributes:
        config: Its architecture, "model_type", and `SIZES`.
        tokenizer: What tokenizer.json holds.
        specials: Ids, see `declip.data.text.hf_tokenizer.SPECIALS`.
        folder: Where its weights are; None for random ones.
        pooling: The recipe's word for how it was trained to pool, or other libraries' words for what is not known
            here; None where its folder does not say.
    """

    config: Mapping[str, Any]
    tokenizer: str
    specials: Mapping[str, int]
    folder: Path | None = None
    pooling: str | None = None

    @property
    def longest(self) -> int:
        """The most ids that it has positions for."""
        taken = self.config["pad_token_id"] + 1 if self.config["model_type"] in OFFSET else 0
        return int(self.config["max_position_embeddings"]) - taken

    def to_tensor(self) -> Tensor:
        """Configuration and tokenizer as bytes, (n,) uint8."""
        kept = {"config": self.config, "tokenizer": self.tokenizer, "specials": self.specials}
        kept |= {"pooling": self.pooling} if self.pooling is not None else {}
        return torch.frombuffer(bytearray(json.dumps(kept), "utf-8"), dtype=torch.uint8)

    @classmethod
    def from_tensor(cls, kept: Tensor) -> "TextEncoder":
        """Read back what `to_tensor` gave.

        Raises:
            Exception: of whatever kind, where it did not.
        """
        found = json.loads(kept.numpy().tobytes())
        config = {name: value for name, value in found["config"].items() if name in SIZES or name == "model_type"}
        return cls(config, found["tokenizer"], found["specials"], pooling=found.get("pooling"))

    def build(self) -> nn.Module:
        """transformers' model with a masked-language head, with its weights, or random ones where it has no folder.

        Raises:
            UserError: the configuration or the weights cannot be used, or transformers is missing.
        """
        transformers = _transformers()
        sizes = {name: value for name, value in self.config.items() if name != "model_type"}
        masked_language, options = transformers.AutoModelForMaskedLM, {"attn_implementation": "sdpa"}
        try:
            with quietly():
                config = transformers.AutoConfig.for_model(self.config["model_type"], **sizes)
                if self.folder is None:
                    return masked_language.from_config(config, dtype=torch.float32, **options)
                found, notes = masked_language.from_pretrained(
                    self.folder, config=config, dtype=torch.float32, use_safetensors=True, local_files_only=True,
                    output_loading_info=True, **options,
                )  # fmt: skip
        except Exception as error:  # transformers has errors of many kinds for files that are damaged or do not fit
            where = f" in '{self.folder}'" if self.folder else ""
            raise UserError(f"The text encoder{where} cannot be built: {_one_line(error)}") from error
        missing = sorted(notes["missing_keys"])
        of_encoder = [name for name in missing if name.startswith(f"{found.base_model_prefix}.")]
        if of_encoder:
            more = f" and {len(of_encoder) - 1:,} more" if len(of_encoder) > 1 else ""
            raise UserError(
                f"The weights in '{self.folder}' lack '{of_encoder[0]}'{more} of its {CONFIG}. Give the encoder's own "
                "weights, or text.pretrained=false for random ones."
            )
        if missing:
            log.info("'%s' holds no masked-language head; where the recipe wants one it starts at random.", self.folder)
        return found


def read_encoder(given: str, pretrained: bool) -> TextEncoder:
    """Read a text encoder's configuration and tokenizer.

    Args:
        given: A folder, or "huggingface:NAME", which is fetched from the Hub.
        pretrained: Whether its weights will be wanted.

    Raises:
        UserError: there is nothing, something is missing or of another kind, or it cannot be fetched.
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
            f"text.hf_model '{given}' has no {WEIGHTS[0]}. Other files of weights, such as pytorch_model.bin, can run "
            "code and are not read: open the encoder with transformers where you trust it and write it anew by "
            "save_pretrained(FOLDER). text.pretrained=false starts from random weights."
        )
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise UserError(
            f"text.hf_model '{given}' has no tokenizer: none of {', '.join(TOKENIZERS)}. Save it there too."
        )
    try:
        with quietly():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            definition = tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # of many kinds; a tokenizer without `tokenizers` is an AttributeError
        raise UserError(f"The tokenizer of '{given}' cannot be read: {_one_line(error)}") from error
    names = {"start": "cls_token", "end": "sep_token", "mask": "mask_token", "padding": "pad_token"}
    specials = {ours: getattr(tokenizer, f"{theirs}_id") for ours, theirs in names.items()}
    if lacking := [names[ours] for ours, number in specials.items() if number is None]:
        raise UserError(f"The tokenizer of '{given}' has no {', '.join(lacking)}; a text encoder's has all four.")
    return TextEncoder(config, definition, specials, folder if pretrained else None, _pooling(folder))


def encoder_kept_in(weights: Mapping[str, Tensor], recipe: Recipe, path: Path) -> TextEncoder | None:
    """Read the encoder that a model's weights came with; None where its recipe has CLIP's text tower.

    Raises:
        UserError: it is missing or damaged. It is never looked for elsewhere: the recipe may be a stranger's.
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
    """Keep notes and progress bars of transformers, and of the Hub's client, from the terminal."""
    from transformers.utils import logging as theirs

    hub = logging.getLogger("huggingface_hub")
    levels, shows = (theirs.get_verbosity(), hub.level), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.CRITICAL)
    hub.setLevel(logging.CRITICAL)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(levels[0])
        hub.setLevel(levels[1])
        if shows:
            theirs.enable_progress_bar()


def _config(given: str, folder: Path) -> dict[str, Any]:
    """A configuration's `SIZES`, with the architecture's own values where the file is silent."""
    try:
        found = json.loads((folder / CONFIG).read_bytes())
        kind = found.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"'{folder / CONFIG}' is no configuration of transformers: {_one_line(error)}") from error
    if kind not in HEADS or found.get("is_decoder"):
        shown = "a decoder" if kind in HEADS else f"of the kind {kind!r}"
        raise UserError(
            f"text.hf_model '{given}' is {shown}; known are the encoders {', '.join(HEADS)}. For a causal text tower "
            "leave text.hf_model out: CLIP's own is one."
        )
    if found.get("position_embedding_type") not in (None, "absolute"):
        raise UserError(f"text.hf_model '{given}' has positions of the kind {found['position_embedding_type']!r}.")
    try:
        whole = _transformers().AutoConfig.for_model(kind, **{k: v for k, v in found.items() if k in SIZES}).to_dict()
    except Exception as error:  # transformers checks types by errors of its own
        raise UserError(f"'{folder / CONFIG}' cannot be used: {_one_line(error)}") from error
    return {"model_type": kind, **{name: whole[name] for name in sorted(SIZES & whole.keys())}}


def _pooling(folder: Path) -> str | None:
    """Read how a sentence encoder pools, from either form of the file: a flag for each mode, or the modes' names."""
    if not (folder / POOLING).is_file():
        return None
    try:
        found = json.loads((folder / POOLING).read_bytes())
        flags = [name.removeprefix(MODE) for name, on in found.items() if name.startswith(MODE) and on is True]
        modes = found.get("pooling_mode", flags or ["mean"])
        modes = [modes] if isinstance(modes, str) else list(modes)
    except (OSError, ValueError, AttributeError, TypeError):
        return "unreadable"
    return " and ".join(POOLINGS.get(str(mode), str(mode)) for mode in modes)


def _fetched(given: str, pretrained: bool) -> Path:
    """Where the Hub's files are on this machine, fetched where they are not."""
    from huggingface_hub import snapshot_download

    weights = ["model*.safetensors"] if pretrained else []
    log.info("Fetching '%s', or what is missing of it here.", given)
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
        raise UserError(
            "A Hugging Face text encoder needs transformers. Install it: pip install 'declip[hf]'."
        ) from error
    return transformers


def _one_line(error: Exception, longest: int = 200) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    text = f"{text[:longest]} …" if len(text) > longest else text
    return text if text.endswith((".", "…")) else f"{text}."
