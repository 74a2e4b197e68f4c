"""A folder of transformers' `CLIPModel` as a model of ours: read by names and sizes, without transformers.

A folder holds config.json, model.safetensors (or several, with an index), preprocessor_config.json or
processor_config.json, and tokenizer.json or vocab.json. The vocabulary must be CLIP's, or one of CLIP's first merges as
our exports have it. Captions are cleaned CLIP's way, by ftfy, which transformers leaves out.
``huggingface:OWNER/NAME`` fetches such a folder from the Hub, or one with our declip.safetensors: these files and no
others, so no pickle.

The mask's row of the vocabulary, which `CLIPModel` does not have, is the mean of the others.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from declip.data.text.tokenizer import Tokenizer
from declip.errors import UserError
from declip.interchange.clip_layout import CLIP_MERGES, NO_MERGES, VitSizes, merges_key, vit_keys
from declip.interchange.declip_file import CARD, FILE, first_difference, read_declip_file
from declip.interchange.huggingface import their_names, their_tensors
from declip.interchange.open_clip import CONFIG as OPEN_CLIP
from declip.interchange.open_clip import FOLDER, HUB
from declip.interchange.open_clip import PREFIX as OF_OPEN_CLIP
from declip.interchange.tokenizer_files import END, START
from declip.interchange.weights_file import outline
from declip.models.dual_encoder import DualEncoder
from declip.recipe.load import load_recipe
from declip.runs.checkpoint import part

PREFIX = "huggingface:"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
TOKENIZER, VOCABULARY = "tokenizer.json", "vocab.json"
FETCHED = [
    CONFIG, WEIGHTS, INDEX, "model-*.safetensors", PREPROCESSOR, PROCESSOR, TOKENIZER, VOCABULARY,
    FILE, OPEN_CLIP, CARD,
]  # fmt: skip
"""What is taken from the Hub, where it is there."""

TEXT: Mapping[str, Any] = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
    "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 49_407,
}  # fmt: skip
VISION: Mapping[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
PICTURES: Mapping[str, Any] = {
    "do_resize": True, "size": 224, "resample": 3, "do_center_crop": True, "crop_size": 224, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
"""What transformers takes where a file is silent."""

EPS = 1e-5
"""Of CLIP's layer norms."""

HIGHEST = 2
"""This end token in a text_config, the first releases', means pooling at the highest id: CLIP's end token."""

UNUSED = re.compile(r"(vision|text)_model\.embeddings\.position_ids$")
"""A buffer in older files."""

CAPTIONS = ("a red circle", "Two CATS, 12 dogs: asleep on a sofa!", "日本語 😀", "")
"""No cleaning changes them, so that one tokenizer is told from another."""


def is_huggingface(path: Path) -> bool:
    """Whether a path is a folder that may be one of transformers'."""
    return (path / CONFIG).is_file()


def fetch(name: str) -> Path:
    """Fetch a model's folder from the Hub, or from its cache.

    Args:
        name: ``huggingface:OWNER/NAME``.

    Raises:
        UserError: there is no such model, or no network.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name.removeprefix(PREFIX), allow_patterns=FETCHED))
    except Exception as error:  # hub, network and disk each have errors of their own
        said = " ".join(str(error).split())[:180] or type(error).__name__
        raise UserError(
            f"Cannot fetch '{name}': {said.rstrip('.')}. Check the network and the name, which is {PREFIX}OWNER/NAME; "
            "a folder on this machine is given by its path alone."
        ) from error


def read_folder(folder: Path) -> tuple[DualEncoder, Mapping[str, Tensor]]:
    """Read a folder of the Hub's: our own file and its heads where there is one, else a `CLIPModel`.

    Raises:
        UserError: see `read_declip_file` and `from_huggingface`.
    """
    if (folder / FILE).is_file():
        return read_declip_file(folder / FILE), part("objective", load_file(folder / FILE))
    return from_huggingface(folder), {}


def from_huggingface(folder: Path) -> DualEncoder:
    """Build our model with the weights, tokenizer, image statistics and logit scale of a `CLIPModel`.

    Args:
        folder: As `CLIPModel` and `CLIPProcessor` save it.

    Returns:
        The model, in training mode, on the CPU, in float32. Its recipe is that of CLIP with these sizes.

    Raises:
        UserError: it is another kind of model, or ours cannot express it, or a file is missing or damaged; what
            differs first is named.
    """
    try:
        config = _read_json(folder / CONFIG)
        if config.get("model_type") != "clip":
            raise UserError(f"{CONFIG} says model_type {config.get('model_type')!r}, and only 'clip' is read")
        keys = _keys(folder, config)
        weights = _read_weights(folder)
        _check_layers(keys, weights)
        recipe = load_recipe("clip", {"name": "from-huggingface", **keys})
        # Sizes come from the file, so the model is built without memory first, to see that the weights fit.
        if difference := first_difference(their_tensors(outline(recipe)), weights):
            raise UserError(f"its weights do not fit its {CONFIG}: {difference}")
    except UserError as error:
        raise _refused(folder, str(error)) from error
    except OSError as error:
        raise _refused(folder, f"{error.filename}: {error.strerror}") from error
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:  # JSON of another form
        raise _refused(folder, f"{CONFIG}: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    with torch.random.fork_rng(devices=[]):
        model = DualEncoder.from_recipe(recipe)
    model.load_state_dict({name: _ours(name, place, weights) for name, place in model.state_dict().items()})
    return model


def _keys(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's keys."""
    text, vision = _section(config, "text_config", TEXT), _section(config, "vision_config", VISION)
    for name, section in (("text_config", text), ("vision_config", vision)):
        _expect(f"{name}.hidden_act", section["hidden_act"], "quick_gelu", "gelu")
        _expect(f"{name}.layer_norm_eps", section["layer_norm_eps"], EPS)
    width = text["hidden_size"]
    _expect("text_config.intermediate_size", text["intermediate_size"], 4 * width)
    tokenizer = _tokenizer(folder, text["max_position_embeddings"])
    _expect("text_config.eos_token_id", text["eos_token_id"], tokenizer.end, HIGHEST)
    sizes = VitSizes(
        width=vision["hidden_size"],
        layers=vision["num_hidden_layers"],
        heads=vision["num_attention_heads"],
        patch=vision["patch_size"],
        hidden=vision["intermediate_size"],
        activation=vision["hidden_act"],
        eps=EPS,
    )
    pictures = _pictures(folder, vision["image_size"])
    return {
        **vit_keys(sizes),
        "image.size": vision["image_size"],
        "image.mean": pictures["image_mean"],
        "image.std": pictures["image_std"],
        "embed_dim": config.get("projection_dim", 512),
        "text.width": width,
        "text.layers": text["num_hidden_layers"],
        "text.heads": text["num_attention_heads"],
        "text.context_length": tokenizer.context,
        "text.bpe_merges": merges_key(NO_MERGES + tokenizer.merges),
        "text.activation": text["hidden_act"],
    }


def _section(config: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A tower's configuration; the first releases wrote it under a second name too, which counts alone."""
    return {**defaults, **(config.get(f"{name}_dict") or config.get(name) or {})}


def _expect(what: str, found: Any, *allowed: Any) -> None:
    near = isinstance(found, float) and any(math.isclose(found, each, rel_tol=1e-4) for each in allowed)
    if found not in allowed and not near:
        raise UserError(f"{what} is {found!r}, and ours has {' or '.join(map(repr, allowed))}")


def _pictures(folder: Path, side: int) -> dict[str, Any]:
    """How pictures are prepared, which must be CLIP's way."""
    if (folder / PREPROCESSOR).is_file():
        file, found = PREPROCESSOR, _read_json(folder / PREPROCESSOR)
    else:
        file, found = PROCESSOR, _read_json(folder / PROCESSOR).get("image_processor") or {}
    kind = found.get("image_processor_type") or found.get("feature_extractor_type") or "CLIP"
    if not kind.startswith("CLIP"):
        raise UserError(f"its pictures are prepared by a {kind}, not CLIP's way")
    found = {**PICTURES, **found}
    for key, expected in {**PICTURES, "size": side, "crop_size": side}.items():
        if not key.startswith("image_"):
            _expect(f"{file}: {key}", _side(key, found[key]), expected)
    return found


def _side(key: str, found: Any) -> Any:
    """The number of pixels, where a size or a crop says that and no more; height and width of a size squash."""
    if key == "size" and isinstance(found, Mapping) and set(found) == {"shortest_edge"}:
        return found["shortest_edge"]
    square = key == "crop_size" and isinstance(found, Mapping) and found.get("height") == found.get("width")
    return found["height"] if square else found


def _tokenizer(folder: Path, context: int) -> Tokenizer:
    """Ours with the same vocabulary.

    Raises:
        UserError: it is not made of CLIP's merges; the first token that differs is named.
    """
    file = TOKENIZER if (folder / TOKENIZER).is_file() else VOCABULARY
    read = _read_json(folder / file)
    model = read["model"] if file == TOKENIZER else {"vocab": read}
    vocabulary = {**model["vocab"], **{token["content"]: token["id"] for token in read.get("added_tokens", ())}}
    merges = len(vocabulary) - NO_MERGES
    if not 0 <= merges <= CLIP_MERGES:
        raise UserError(
            f"{file} has {len(vocabulary):,} tokens, and CLIP's has {NO_MERGES} to {NO_MERGES + CLIP_MERGES:,}"
        )
    ours = Tokenizer(context, merges)
    expected = json.loads(ours.library.to_str())["model"]
    tokens = {**expected["vocab"], START: ours.start, END: ours.end}
    for token, number in tokens.items():
        if vocabulary.get(token) != number:
            raise UserError(f"{file} is of another tokenizer: CLIP's token {token!r} is {number}, not there so")
    if file == TOKENIZER:
        _compare(folder / file, ours)
    return ours


def _compare(file: Path, ours: Tokenizer) -> None:
    """See that a tokenizer with our vocabulary also cuts texts as ours does."""
    try:
        theirs = tokenizers.Tokenizer.from_file(str(file))
        theirs.no_truncation()
        theirs.no_padding()
        found = {caption: theirs.encode(caption).ids for caption in CAPTIONS}
    except Exception as error:  # of the library's own kind
        raise UserError(f"{file.name} cannot be read: {' '.join(str(error).split())[:160]}") from error
    whole = Tokenizer(max(map(len, found.values())) + 1, ours.merges)
    for caption, ids in found.items():
        if ids != whole.encode(caption):
            raise UserError(f"{file.name} is of another tokenizer: it reads {caption!r} otherwise than CLIP's")


def _read_weights(folder: Path) -> dict[str, Tensor]:
    files = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        files = sorted(set(_read_json(folder / INDEX)["weight_map"].values()))
    weights: dict[str, Tensor] = {}
    for file in files:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{INDEX} names '{file}', which is no safetensors file of the folder")
        if not (folder / file).is_file():
            pickles = sorted(path.name for path in folder.glob("*.bin"))
            instead = f"; {pickles[0]} is a pickle, which is not read: let transformers save it anew" if pickles else ""
            raise UserError(f"there is no {file}{instead}")
        try:
            weights |= load_file(folder / file)
        except SafetensorError as error:
            raise UserError(f"{file} is damaged or cut ({' '.join(str(error).split())[:120]}); get it again") from error
    weights = {name: tensor for name, tensor in weights.items() if not UNUSED.match(name)}
    if quantised := next((name for name, tensor in weights.items() if not tensor.is_floating_point()), None):
        raise UserError(f"'{quantised}' holds whole numbers: quantised weights are not read")
    return weights


def _check_layers(keys: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """So that no model is built of more layers than the files explain."""
    given = {"vision": keys["image.model_kwargs"]["depth"], "text": keys["text.layers"]}
    for tower, layers in given.items():
        pattern = re.compile(rf"{tower}_model\.encoder\.layers\.(\d+)\.")
        found = len({match[1] for match in map(pattern.match, weights) if match})
        if found != layers:
            raise UserError(f"{CONFIG} has {layers} layers in {tower}_config, and the weights {found}")


def _ours(name: str, place: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """A tensor in our form, for its place in the model."""
    parts = [weights[their].float() for their in their_names(name)]
    if name == "text_tower.token_embedding.weight":
        parts.append(parts[0].mean(dim=0, keepdim=True))
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).reshape(place.shape)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"there is no {file.name}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file.name} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file.name} holds a {type(found).__name__}, not an object")
    return found


def _refused(folder: Path, reason: str) -> UserError:
    other = f" It is open_clip's: load it as {OF_OPEN_CLIP}{FOLDER}{folder}, or {OF_OPEN_CLIP}{HUB}OWNER/NAME."
    hint = other if (folder / OPEN_CLIP).is_file() else ""
    return UserError(f"'{folder}' cannot be read as a CLIPModel of transformers': {reason.rstrip('.')}.{hint}")
