"""Models built by open_clip (Ilharco et al. 2021, github.com/mlfoundations/open_clip), and those with its towers.

The latter are SigLIP, MobileCLIP 2, EVA, PE-Core and the towers of CoCa.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import torch
from torch import Tensor

from declip.data.text.tokenizer import WrappedTokenizer
from declip.errors import UserError, check_installed, unknown
from declip.interchange.json_files import read_json
from declip.interchange.weights import (
    Weights,
    check_file,
    check_layers,
    memory_of,
    reason,
    refuse_growth,
)
from declip.io.hub import fetch, online
from declip.io.progress import quiet
from declip.models.layers import IMAGE, TEXT
from declip.models.tensor_names import add_prefix, named_below, only
from declip.models.wrapped import WrappedOpenClip, plain
from declip.recipe.load import load_recipe

log = logging.getLogger("declip")

PREFIX = "open_clip:"  # of names in declip
FOLDER = "local-dir:"  # of folders in open_clip
CONFIG = "open_clip_config.json"
ENCODER = "config.json"  # of a text encoder of transformers
CACHED = "models--"  # prefix of a repository's folder in the Hub's cache
HERE = "."  # "hf_model_name" of a text encoder whose config.json is in the same folder
IN_FOLDER = ("*.safetensors", "*.bin", "*.pth")
"""Patterns of weights that open_clip reads in a folder."""

VISUAL, TEXTUAL = "visual.", "text."
"""Prefixes of tensors of open_clip's image and text tower."""


class OpenClipModel(NamedTuple):
    """A model of open_clip: a CLIP, CustomTextCLIP or CoCa, with its preprocessing, tokenizer and "model_cfg"."""

    name: str  # in open_clip
    model: Any
    preprocess: Any
    tokenizer: Any
    config: Mapping[str, Any]
    # Shorter side before the crop, in an export of declip where it is not the image size
    resize: int | None = None


class Chosen(NamedTuple):
    """Weights for a model of open_clip."""

    name: str  # of the model in open_clip
    files: list[Path]
    options: dict[str, Any]  # of `open_clip.create_model`


def matches(where: str) -> bool:
    """Whether this is a name of an open_clip model, or a folder that open_clip wrote."""
    return where.startswith(PREFIX) or (Path(where).expanduser() / CONFIG).is_file()


def load_open_clip(given: str) -> OpenClipModel:
    """Build a model of open_clip by its name or folder, in evaluation mode, on the CPU, in float32.

    Nothing in a file or folder can run code. The activation is the tag's: open_clip itself computes
    ``ViT-B-32/openai``, and 26 more of its tags, with GELU although the weights were trained with QuickGELU, and only
    warns. With a file the name decides: ``ViT-B-32-quickgelu/FILE`` for weights trained with QuickGELU.
    """
    check_installed("open_clip", "open_clip", f"'{given}'")
    import open_clip

    with quiet("huggingface_hub"), torch.random.fork_rng(devices=[]):
        name, files, options = _resolve(given)
        try:
            # Check files and configuration, then build and load.
            config = open_clip.get_model_config(name)
            tensors = sum(check_file(file) for file in files)
            resize = None
            if name.startswith(FOLDER):
                options |= _check_config(name, config, tensors, files)
                stored = read_json(files[0].with_name(CONFIG))
                resize = stored.get("preprocess_cfg", {}).get("resize")
            tokenizer = _tokenizer(given, name, config.get("text_cfg", {}))
            model: Any = open_clip.create_model(name, weights_only=True, **options)
            if not name.startswith(FOLDER):
                _check_positions(model, files[0])
            prepared = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)
        except UserError:
            raise
        except ImportError as error:
            raise UserError(f"'{given}' needs {error.name}: pip install {error.name}.") from error
        except Exception as error:  # a wrong file or configuration raises any class
            raise UserError(
                f"Cannot load '{given}': {reason(error)} Give weights of that model."
            ) from error
    if options.get("force_quick_gelu"):
        config = {**config, "quick_gelu": True}
    return OpenClipModel(name, model.eval(), prepared, tokenizer, config, resize)


def encoder_from(folder: Path, text: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `open_clip.create_model` to build a text encoder by the config.json in the model's folder, if any.

    The name in the model's configuration may be a path on another machine, or need a network.
    """
    from open_clip.hf_configs import arch_dict

    file = folder / ENCODER
    if "hf_model_name" not in text or not file.is_file():
        return {}
    # Of another model
    if read_json(file).get("model_type") not in arch_dict:
        return {}
    return {"text_cfg": {**text, "hf_model_name": str(folder), "hf_model_pretrained": False}}


def _check_config(
    name: str, config: Mapping[str, Any], tensors: int, files: list[Path]
) -> dict[str, Any]:
    """Compare the configuration of a folder with its weights before memory is allocated; see `encoder_from`."""
    import open_clip

    folder = files[0].parent
    text = config.get("text_cfg", {})
    sections = [section for key, section in config.items() if key.endswith("_cfg")]
    sections.append(read_json(folder / ENCODER))
    check_layers(sections, tensors, CONFIG)
    encoder = encoder_from(folder, text)
    if text.get("hf_model_name") and not encoder:
        return {}  # of the Hub, by its name
    with torch.device("meta"):
        model = open_clip.create_model(
            name, load_weights=False, pretrained_text=False, device="meta", **encoder
        )
    refuse_growth(CONFIG, memory_of(model), sum(file.stat().st_size for file in files))
    return encoder


def _tokenizer(given: str, name: str, text: Mapping[str, Any]) -> Any:
    import open_clip

    # Options of a tokenizer go to transformers, which runs Python code of a folder if this one says so.
    if (text.get("tokenizer_kwargs") or {}).get("trust_remote_code"):
        raise UserError(
            f"'{given}' asks to run its own code (trust_remote_code), which is refused."
        )
    options = {}
    if "hf_tokenizer_name" in text and not name.startswith(FOLDER) and not online():
        options["local_files_only"] = True
    try:
        return open_clip.get_tokenizer(name, **options)
    except (OSError, ValueError) as error:  # transformers tries several ways, and names the last
        if "hf_tokenizer_name" not in text:
            raise
        raise UserError(
            f"Cannot read the tokenizer of '{given}'. Put its tokenizer.json next to {CONFIG}."
        ) from error


def _resolve(given: str) -> Chosen:
    """The weights of a folder, of a published tag or in a file."""
    import open_clip

    spec = given.removeprefix(PREFIX)
    if spec == given or spec.startswith(FOLDER):
        return _in_folder(Path(spec.removeprefix(FOLDER)).expanduser())
    name, _, weights = spec.partition("/")
    if name not in open_clip.list_models():
        raise unknown("open_clip model", name, open_clip.list_models())
    if open_clip.is_pretrained_cfg(name, weights):
        return _published(given, name, weights)
    file = Path(weights).expanduser()
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not file.is_file():
        raise UserError(
            f"'{given}' does not say which weights: there is no tag or file '{weights}'. Write {PREFIX}{name}/TAG, "
            f"which downloads, or {PREFIX}{name}/FILE. Tags: {', '.join(tags) or 'none'}."
        )
    # A file does not contain its preprocessing
    transform: Any = open_clip.transform
    usual = asdict(transform.PreprocessCfg())
    published = []
    for tag in tags:
        config = open_clip.get_pretrained_cfg(name, tag)
        published.append(transform.merge_preprocess_dict(usual, config))
    if published and usual not in published:
        log.warning(
            "'%s' is used with CLIP's preprocessing, unlike the published weights of %s.",
            file,
            name,
        )
    return Chosen(name, [file], {"pretrained": str(file)})


def _in_folder(folder: Path) -> Chosen:
    files = [file for pattern in IN_FOLDER for file in folder.glob(pattern)]
    if not (folder / CONFIG).is_file() or not files:
        raise UserError(
            f"'{folder}' is not a folder with {CONFIG} and weights ({', '.join(IN_FOLDER)})."
        )
    return Chosen(f"{FOLDER}{folder}", files, {"require_pretrained": True})


def _published(given: str, name: str, tag: str) -> Chosen:
    """The weights of a published tag, downloaded or cached."""
    import open_clip

    config = open_clip.get_pretrained_cfg(name, tag)
    get = partial(_published_file, config)
    file = fetch(given, get, f"{PREFIX}MODEL/FILE or as a folder")
    options = {
        "pretrained": file,
        "force_preprocess_cfg": config,
        "force_quick_gelu": bool(config.get("quick_gelu")),
    }
    return Chosen(name, [Path(file)], options)


def _published_file(tag: Mapping[str, Any], offline: bool) -> str:
    """Download the weights of a tag, or return those in the cache."""
    import open_clip

    if not offline or tag.get("file"):
        return open_clip.download_pretrained(tag)
    repo, _, file = tag["hf_hub"].rpartition("/")
    files = [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    cached = [huggingface_hub.try_to_load_from_cache(repo, file) for file in files]
    return next(path for path in cached if isinstance(path, str))


def _check_positions(model: torch.nn.Module, file: Path) -> None:
    """Refuse position embeddings of another size, which open_clip resamples silently."""
    import open_clip

    stored = open_clip.factory.load_state_dict(str(file), weights_only=True)
    for name, tensor in model.state_dict().items():
        if not name.endswith(("positional_embedding", "pos_embed")):
            continue
        given = tuple(stored.get(name, tensor).shape)
        expected = tuple(tensor.shape)
        if given != expected:
            raise ValueError(f"{name!r} has shape {given} instead of {expected}")


def wrap_open_clip(opened: OpenClipModel, origin: str) -> Weights:
    """Wrap the towers of any model of open_clip, with its tokenizer and preprocessing."""
    from open_clip.model import convert_to_custom_text_state_dict

    size = _side(opened.preprocess)
    config = dict(opened.config)
    config.pop("multimodal_cfg", None)
    text_config = config["text_cfg"]
    encoder = None
    if text_config.get("hf_model_name"):
        encoder = plain(opened.model.text.config.to_dict())
    stored = WrappedOpenClip(
        config,
        {"squash": opened.preprocess.resize_mode == "squash"},
        _tokenizer_arguments(opened.tokenizer, text_config),
        encoder,
    )
    state = convert_to_custom_text_state_dict(opened.model.state_dict())
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        image, text = stored.build(size)
    # Assign the tensors to the modules, which name them as in declip
    image.load_state_dict(named_below(VISUAL, state), assign=True)
    text.load_state_dict(named_below(TEXTUAL, state), assign=True)
    tokenizer = WrappedTokenizer(**stored.tokenizer)
    image_tower, text_tower = stored.towers((image, text), tokenizer)
    tensors = add_prefix(IMAGE, image_tower.state_dict()) | add_prefix(
        TEXT, text_tower.state_dict()
    )
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    tensors |= scalars(state)
    name = PREFIX + short_name(opened.name)
    keys = {
        "name": "from-open-clip",
        "embed_dim": config["embed_dim"],
        "image.model": name,
        **preprocessing_keys(opened, size),
        "text.hf_model": name,
        "text.pretrained": False,
        "text.context_length": tokenizer.context,
        **bias_key(tensors),
    }
    return Weights(load_recipe("few-clip", keys), tensors, origin)


def _side(prepared: Any) -> int:
    """Side of the square that images are resized or cropped to."""
    sides = {prepared.size} if isinstance(prepared.size, int) else set(prepared.size)
    if prepared.resize_mode not in ("shortest", "squash") or len(sides) > 1:
        raise UserError(
            f"its images are resized {prepared.resize_mode} to {prepared.size}, not to a square"
        )
    return sides.pop()


def scalars(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logit scale and bias, which some models of open_clip hold as tensors of one dimension."""
    return {name: tensor.squeeze() for name, tensor in only("logit_", state).items()}


def bias_key(tensors: Mapping[str, Tensor]) -> dict[str, float | None]:
    """The recipe key of the logit bias, which is None in a model without one."""
    bias = tensors.get("logit_bias")
    return {"logit_bias": None if bias is None else float(bias)}


def preprocessing_keys(opened: OpenClipModel, size: int) -> dict[str, Any]:
    """Recipe keys of open_clip's preprocessing; "random" interpolation is bicubic in evaluation."""
    prepared = opened.preprocess
    if opened.resize is not None and (type(opened.resize) is not int or opened.resize < size):
        raise UserError(
            f"preprocess_cfg.resize is {opened.resize!r}; it must be an integer of {size} or more"
        )
    return {
        "image.size": size,
        "image.mean": list(prepared.mean),
        "image.std": list(prepared.std),
        "image.interpolation": "bilinear" if prepared.interpolation == "bilinear" else "bicubic",
        "image.crop_pct": size / (opened.resize or size),
    }


def short_name(name: str) -> str:
    """The name of a model, a folder or, in the Hub's cache, a repository."""
    parts = Path(name.removeprefix(FOLDER)).parts
    for part in parts:
        if part.startswith(CACHED):
            return part.removeprefix(CACHED)
    return parts[-1]


def _tokenizer_arguments(tokenizer: Any, text: Mapping[str, Any]) -> dict[str, Any]:
    from open_clip.tokenizer import SigLipTokenizer, SimpleTokenizer

    options = text.get("tokenizer_kwargs") or {}
    if isinstance(tokenizer, SimpleTokenizer):
        return {
            "definition": None,
            "context": tokenizer.context_length,
            "clean": options.get("clean", "lower"),
        }
    library = tokenizer.tokenizer
    if getattr(tokenizer, "tokenizer_mode", "") or library.padding_side != "right":
        raise UserError(
            f"its tokenizer pads on the {library.padding_side}, with the mode '{tokenizer.tokenizer_mode}'"
        )
    cleaning = "canonicalize" if isinstance(tokenizer, SigLipTokenizer) else "whitespace"
    return {
        "definition": library.backend_tokenizer.to_str(),
        "context": tokenizer.context_length,
        "clean": options.get("clean", cleaning),
        "padding": library.pad_token_id,
        "zeroed": library.sep_token_id if getattr(tokenizer, "strip_sep_token", False) else None,
    }
