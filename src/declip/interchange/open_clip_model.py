"""Models built by open_clip (Ilharco et al. 2021, github.com/mlfoundations/open_clip), and those with its towers.

The latter are SigLIP, MobileCLIP 2, EVA, PE-Core and the towers of CoCa.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import huggingface_hub
import torch

from declip.data.text.tokenizer import WrappedTokenizer
from declip.errors import UserError, check_installed, unknown
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
from declip.models.wrapped import WrappedOpenClip, plain
from declip.recipe.load import load_recipe

log = logging.getLogger("declip")

PREFIX, FOLDER = "open_clip:", "local-dir:"
CONFIG = "open_clip_config.json"
ENCODER = "config.json"  # of a text encoder of transformers
HERE = "."  # "hf_model_name" of a text encoder whose config.json is in the same folder
IN_FOLDER = (
    "*.safetensors",
    "*.bin",
    "*.pth",
)  # patterns of weights that open_clip reads in a folder
PREFIXES = ("visual.", "text.")  # prefixes of tensors of open_clip's image and text tower


class OpenClipModel(NamedTuple):
    """A model of open_clip: a CLIP, CustomTextCLIP or CoCa, with its preprocessing, tokenizer and "model_cfg"."""

    name: str  # in open_clip
    model: Any
    preprocess: Any
    tokenizer: Any
    config: Mapping[str, Any]
    # Shorter side before the crop, in an export of declip where it is not the image size
    resize: int | None = None


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
        name, files, options = _resolve(open_clip, given)
        try:
            # Check files and configuration, then build and load.
            config = open_clip.get_model_config(name)
            counts = [check_file(file) for file in files]
            resize = None
            if name.startswith(FOLDER):
                options |= _check_config(open_clip, name, config, sum(counts), files)
                stored = json.loads(files[0].with_name(CONFIG).read_text(encoding="utf-8"))
                resize = stored.get("preprocess_cfg", {}).get("resize")
            tokenizer = _tokenizer(open_clip, given, name, config.get("text_cfg", {}))
            model: Any = open_clip.create_model(name, weights_only=True, **options)
            if not name.startswith(FOLDER):
                _check_positions(open_clip, model, files[0])
            prepared = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)
        except UserError:
            raise
        except ImportError as error:
            raise UserError(f"'{given}' needs {error.name}: pip install {error.name}.") from error
        except Exception as error:  # a wrong file or configuration raises any class
            raise UserError(
                f"Cannot load '{given}': {reason(error)} Give weights of that model."
            ) from error
    config = config | ({"quick_gelu": True} if options.get("force_quick_gelu") else {})
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
    if json.loads(file.read_text(encoding="utf-8")).get("model_type") not in arch_dict:
        return {}
    return {"text_cfg": {**text, "hf_model_name": str(folder), "hf_model_pretrained": False}}


def _check_config(
    open_clip: ModuleType, name: str, config: Mapping[str, Any], tensors: int, files: list[Path]
) -> dict[str, Any]:
    """Compare the configuration of a folder with its weights before memory is allocated; see `encoder_from`."""
    folder, text = files[0].parent, config.get("text_cfg", {})
    sections = [section for key, section in config.items() if key.endswith("_cfg")]
    if (folder / ENCODER).is_file():
        sections.append(json.loads((folder / ENCODER).read_text(encoding="utf-8")))
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


def _tokenizer(open_clip: ModuleType, given: str, name: str, text: Mapping[str, Any]) -> Any:
    # Options of a tokenizer go to transformers, which runs Python code of a folder if this one says so.
    if (text.get("tokenizer_kwargs") or {}).get("trust_remote_code"):
        raise UserError(
            f"'{given}' asks to run its own code (trust_remote_code), which is refused."
        )
    fetched = "hf_tokenizer_name" in text and not name.startswith(FOLDER)
    try:
        return open_clip.get_tokenizer(
            name, **({"local_files_only": True} if fetched and not online() else {})
        )
    except (OSError, ValueError) as error:  # transformers tries several ways, and names the last
        if "hf_tokenizer_name" not in text:
            raise
        raise UserError(
            f"Cannot read the tokenizer of '{given}'. Put its tokenizer.json next to {CONFIG}."
        ) from error


def _resolve(open_clip: ModuleType, given: str) -> tuple[str, list[Path], dict[str, Any]]:
    """Name of a model in open_clip, its files of weights, and options for creating it."""
    spec = given.removeprefix(PREFIX)
    # A folder
    if spec == given or spec.startswith(FOLDER):
        folder = Path(spec.removeprefix(FOLDER)).expanduser()
        files = [file for pattern in IN_FOLDER for file in folder.glob(pattern)]
        if not (folder / CONFIG).is_file() or not files:
            raise UserError(
                f"'{folder}' is not a folder with {CONFIG} and weights ({', '.join(IN_FOLDER)})."
            )
        return f"{FOLDER}{folder}", files, {"require_pretrained": True}
    name, _, weights = spec.partition("/")
    if name not in open_clip.list_models():
        raise unknown("open_clip model", name, open_clip.list_models())
    tags = open_clip.list_pretrained_tags_by_model(name)
    # A published tag
    if open_clip.is_pretrained_cfg(name, weights):
        tag = open_clip.get_pretrained_cfg(name, weights)
        file = Path(
            fetch(
                given,
                partial(_published_file, open_clip, tag),
                f"{PREFIX}MODEL/FILE or as a folder",
            )
        )
        options = {"force_preprocess_cfg": tag, "force_quick_gelu": bool(tag.get("quick_gelu"))}
        return name, [file], {"pretrained": str(file), **options}
    # A file of weights, which does not contain its preprocessing
    file = Path(weights).expanduser()
    if not file.is_file():
        raise UserError(
            f"'{given}' does not say which weights: there is no tag or file '{weights}'. Write {PREFIX}{name}/TAG, "
            f"which downloads, or {PREFIX}{name}/FILE. Tags: {', '.join(tags) or 'none'}."
        )
    transform: Any = open_clip.transform
    usual = asdict(transform.PreprocessCfg())
    published = [
        transform.merge_preprocess_dict(usual, open_clip.get_pretrained_cfg(name, tag))
        for tag in tags
    ]
    if published and usual not in published:
        log.warning(
            "'%s' is used with CLIP's preprocessing, unlike the published weights of %s.",
            file,
            name,
        )
    return name, [file], {"pretrained": str(file)}


def _published_file(open_clip: ModuleType, tag: Mapping[str, Any], offline: bool) -> str:
    """The weights of a published tag, downloaded or cached."""
    if not offline or tag.get("file"):
        return open_clip.download_pretrained(tag)
    repo, _, file = tag["hf_hub"].rpartition("/")
    files = [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    cached = (huggingface_hub.try_to_load_from_cache(repo, file) for file in files)
    return next(path for path in cached if isinstance(path, str))


def _check_positions(open_clip: ModuleType, model: torch.nn.Module, file: Path) -> None:
    """Refuse position embeddings of another size, which open_clip resamples silently."""
    held = open_clip.factory.load_state_dict(str(file), weights_only=True)
    for name, tensor in model.state_dict().items():
        if (
            name.endswith(("positional_embedding", "pos_embed"))
            and held.get(name, tensor).shape != tensor.shape
        ):
            raise ValueError(
                f"{name!r} has shape {tuple(held[name].shape)} instead of {tuple(tensor.shape)}"
            )


def wrap_open_clip(opened: OpenClipModel, origin: str) -> Weights:
    """Wrap the towers of any model of open_clip, with its tokenizer and preprocessing."""
    from open_clip.model import convert_to_custom_text_state_dict

    prepared = opened.preprocess
    config = {k: v for k, v in opened.config.items() if k != "multimodal_cfg"}
    sides = {prepared.size} if isinstance(prepared.size, int) else set(prepared.size)
    if prepared.resize_mode not in ("shortest", "squash") or len(sides) > 1:
        raise UserError(
            f"its images are resized {prepared.resize_mode} to {prepared.size}, not to a square"
        )
    size, text = sides.pop(), config["text_cfg"]
    stored = WrappedOpenClip(
        config,
        {"squash": prepared.resize_mode == "squash"},
        _tokenizer_arguments(opened.tokenizer, text),
        plain(opened.model.text.config.to_dict()) if text.get("hf_model_name") else None,
    )
    state = convert_to_custom_text_state_dict(opened.model.state_dict())
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        modules = stored.build(size)
    # Assign the tensors to the modules, which name them as in declip
    for prefix, module in zip(PREFIXES, modules, strict=True):
        own = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        module.load_state_dict(own, assign=True)
    tokenizer = WrappedTokenizer(**stored.tokenizer)
    towers = stored.towers(modules, tokenizer)
    tensors = {
        f"{start}{n}": t.detach()
        for start, tower in zip((IMAGE, TEXT), towers, strict=True)
        for n, t in tower.state_dict().items()
    }
    tensors |= {n: state[n].squeeze() for n in ("logit_scale", "logit_bias") if n in state}
    name = PREFIX + short_name(opened.name)
    keys = {
        **{
            "name": "from-open-clip",
            "embed_dim": config["embed_dim"],
            "image.model": name,
            "text.hf_model": name,
        },
        **image_keys(opened, size),
        **{"text.pretrained": False, "text.context_length": tokenizer.context},
        "logit_bias": float(tensors["logit_bias"]) if "logit_bias" in tensors else None,
    }
    return Weights(load_recipe("few-clip", keys), tensors, origin)


def image_keys(opened: OpenClipModel, size: int) -> dict[str, Any]:
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
    return next(
        (part.removeprefix("models--") for part in parts if part.startswith("models--")), parts[-1]
    )


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
    return {
        "definition": library.backend_tokenizer.to_str(),
        "context": tokenizer.context_length,
        "clean": options.get(
            "clean", "canonicalize" if isinstance(tokenizer, SigLipTokenizer) else "whitespace"
        ),
        "padding": library.pad_token_id,
        "zeroed": library.sep_token_id if getattr(tokenizer, "strip_sep_token", False) else None,
    }
