"""transformers' `CLIPModel` and `CLIPProcessor`: a folder of theirs as a model of ours, and ours as such a folder.

`SiglipModel` and `Siglip2Model` keep their own towers, see `declip.interchange.wrapped_weights`.

A folder holds config.json, model.safetensors (or several, with an index), preprocessor_config.json or
processor_config.json, and tokenizer.json. ``huggingface:OWNER/NAME``, also with ``@REVISION``, fetches these files
from the Hub, or our declip.safetensors; no pickle. Reading needs no transformers. The vocabulary must be CLIP's, or one
of CLIP's first merges as our exports have it.
"""

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import tokenizers
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from declip.data.text.tokenizer import Tokenizer
from declip.errors import UserError
from declip.interchange import declip_file, layouts, open_clip_model
from declip.interchange.files import fetch
from declip.interchange.foreign import TO_CLIP_VIT, Refusal, Reread, clip_text_tower, refuse_mlp_heads
from declip.interchange.tokenizer_files import backend, write_tokenizer
from declip.interchange.weights import Weights, one_line
from declip.interchange.wrapped_weights import express_wrapped, read_siglip, wrapped_in
from declip.io.atomic import save_tensors
from declip.models.dual_encoder import DualEncoder
from declip.models.hf_encoder import as_user_error
from declip.models.wrapped import SIGLIP
from declip.models.wrapped_towers import WrappedImageTower
from declip.recipe.load import load_recipe

LIBRARY = "transformers"
PREFIX = "huggingface:"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PREPROCESSOR, PROCESSOR, TOKENIZER = "preprocessor_config.json", "processor_config.json", "tokenizer.json"
FETCHED = [
    CONFIG, WEIGHTS, INDEX, "model-*.safetensors", PREPROCESSOR, PROCESSOR, TOKENIZER, "tokenizer_config.json",
    declip_file.FILE, declip_file.CARD, open_clip_model.CONFIG,
]  # fmt: skip
"""The files that are fetched from the Hub, where they exist."""

EPS = 1e-5
"""Epsilon of CLIP's layer norms."""

TEXT: Mapping[str, Any] = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
    "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": EPS, "eos_token_id": 49_407,
}  # fmt: skip
VISION: Mapping[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": EPS,
}  # fmt: skip
PREPROCESSING: Mapping[str, Any] = {
    "do_resize": True, "size": 224, "resample": 3, "do_center_crop": True, "crop_size": 224, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
"""transformers' defaults where a file is silent; 3 is bicubic."""

TEXT_KEYS: Mapping[str, str] = {
    "width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "context_length": "max_position_embeddings", "activation": "hidden_act",
}  # fmt: skip
"""Key of a recipe's section "text" → key of text_config."""

VISION_KEYS: Mapping[str, str] = {
    "width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads", "patch": "patch_size",
    "hidden": "intermediate_size", "activation": "hidden_act",
}  # fmt: skip
"""Argument of `vit_keys` → key of vision_config."""

POOLS_AT_HIGHEST = 2
"""This end token in a text_config, the first releases', means pooling at the highest id: CLIP's end token."""

POSITION_IDS = "embeddings.position_ids"
"""A buffer in older files."""

CAPTIONS = ("a red circle", "Two CATS, 12 dogs: asleep on a sofa!", "日本語 😀", "")
"""No cleaning changes them, so that they distinguish tokenizers."""

LARGEST_BIAS = 50
"""Largest ratio of a moved bias to what it is added to: up to it float32 keeps features to 1e-5."""


def matches(where: str) -> bool:
    """Whether this is a name on the Hub, or a folder that transformers may have written."""
    if where.startswith(PREFIX):
        return True
    folder = Path(where).expanduser()
    weights = (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()
    # open_clip keeps the configuration of a text encoder under this name.
    return (folder / CONFIG).is_file() and (weights or not (folder / open_clip_model.CONFIG).is_file())


def read(where: str) -> Weights:
    """Read a folder or a name on the Hub, which may also hold a model in our format."""
    folder = Path(where).expanduser()
    if where.startswith(PREFIX):
        repo, revision = name_and_revision(where.removeprefix(PREFIX))
        get = partial(huggingface_hub.snapshot_download, repo, allow_patterns=FETCHED, **revision)
        folder = Path(fetch(where, get, "a folder's path alone"))
    if declip_file.matches(str(folder)):
        return declip_file.read(str(folder))
    kind = "CLIPModel"
    try:
        config = _read_json(folder / CONFIG)
        if config.get("model_type") in SIGLIP:
            kind = f"{SIGLIP[config['model_type']]}Model"
            return read_siglip(folder, config, _read_weights(folder), where)
        keys, weights = _keys(folder, config), _read_weights(folder)
        if max(keys["text.layers"], keys["image.model_kwargs"]["depth"]) > len(weights):
            raise UserError(f"{CONFIG} has more layers than the weights")  # no model of so many is built
        recipe = load_recipe("clip", {"name": "from-huggingface", **keys})
        return layouts.from_layout(recipe, layouts.TRANSFORMERS, weights, where)
    except SafetensorError as error:
        raise _refused(where, folder, f"its weights are damaged or cut ({one_line(error, 120)})", kind) from error
    except (UserError, OSError) as error:
        raise _refused(where, folder, one_line(error, 400), kind) from error
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise _refused(where, folder, f"{CONFIG}: {type(error).__name__}: {one_line(error, 200)}", kind) from error


def name_and_revision(given: str) -> tuple[str, dict[str, Any]]:
    """Split OWNER/NAME@REVISION into the name and the keyword argument of the Hub's functions, empty without one."""
    name, _, revision = given.partition("@")
    return name, {"revision": revision} if revision else {}


def _keys(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's keys."""
    _expect("model_type", config.get("model_type"), "clip")
    # The first releases wrote each section under a second name too, which counts alone.
    given = {name: config.get(f"{name}_dict") or config.get(name) or {} for name in ("text_config", "vision_config")}
    text, vision = {**TEXT, **given["text_config"]}, {**VISION, **given["vision_config"]}
    for name, section in (("text_config", text), ("vision_config", vision)):
        _expect(f"{name}.hidden_act", section["hidden_act"], "quick_gelu", "gelu")
        _expect(f"{name}.layer_norm_eps", section["layer_norm_eps"], EPS)
    _expect("text_config.intermediate_size", text["intermediate_size"], 4 * text["hidden_size"])
    tokenizer = _read_tokenizer(folder / TOKENIZER)
    _expect("text_config.eos_token_id", text["eos_token_id"], tokenizer.end, POOLS_AT_HIGHEST)
    preprocessing = _preprocessing(folder, vision["image_size"])
    return {
        **layouts.vit_keys(**{name: vision[key] for name, key in VISION_KEYS.items()}),
        **{f"text.{name}": text[key] for name, key in TEXT_KEYS.items()},
        "image.size": vision["image_size"],
        "image.mean": preprocessing["image_mean"],
        "image.std": preprocessing["image_std"],
        "embed_dim": config.get("projection_dim", 512),
        "text.bpe_merges": layouts.merges_key(layouts.NO_MERGES + tokenizer.merges),
    }


def _expect(key: str, value: Any, *allowed: Any) -> None:
    near = isinstance(value, float) and any(math.isclose(value, number, rel_tol=1e-4) for number in allowed)
    if value not in allowed and not near:
        raise UserError(f"{key} is {value!r}, and ours has {' or '.join(map(repr, allowed))}")


def _preprocessing(folder: Path, side: int) -> dict[str, Any]:
    """The image preprocessing, which must be CLIP's."""
    alone = (folder / PREPROCESSOR).is_file()
    given = _read_json(folder / PREPROCESSOR) if alone else _read_json(folder / PROCESSOR).get("image_processor") or {}
    kind = given.get("image_processor_type") or given.get("feature_extractor_type") or "CLIP"
    if not kind.startswith("CLIP"):
        raise UserError(f"its images are prepared by a {kind}, not CLIP's way")
    given = {**PREPROCESSING, **given}
    sizes = {"size": (side, {"shortest_edge": side}), "crop_size": (side, {"height": side, "width": side})}
    for key, expected in PREPROCESSING.items():
        if not key.startswith("image_"):
            _expect(f"image preprocessing: {key}", given[key], *sizes.get(key, (expected,)))
    return given


def _read_tokenizer(file: Path) -> Tokenizer:
    """Ours with the same vocabulary, which also cuts captions the same."""
    try:
        theirs = tokenizers.Tokenizer.from_file(str(file))
        theirs.no_truncation()
        theirs.no_padding()
        encoded = [theirs.encode(caption).ids for caption in CAPTIONS]
    except Exception as error:  # of the library's own kind
        raise UserError(f"{file.name} cannot be read: {one_line(error, 160)}") from error
    vocabulary = theirs.get_vocab()
    if 0 <= len(vocabulary) - layouts.NO_MERGES <= layouts.CLIP_MERGES:
        ours = Tokenizer(merges=len(vocabulary) - layouts.NO_MERGES)
        if vocabulary == backend(ours).get_vocab() and encoded == [ours.encode(caption) for caption in CAPTIONS]:
            return ours
    raise UserError(f"{file.name} is of another tokenizer than CLIP's, or one of CLIP's first merges")


def _read_weights(folder: Path) -> dict[str, Tensor]:
    files = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        files = sorted(set(_read_json(folder / INDEX)["weight_map"].values()))
    weights: dict[str, Tensor] = {}
    for file in files:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{INDEX} names '{file}', which is no safetensors file of the folder")
        if not (folder / file).is_file():
            raise UserError(f"there is no {file}; weights in a pickle are not read: save them as safetensors")
        weights |= load_file(folder / file)
    return {name: tensor for name, tensor in weights.items() if not name.endswith(POSITION_IDS)}


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _refused(where: str, folder: Path, reason: str, kind: str) -> UserError:
    hint = ""
    if where.startswith(PREFIX) and (folder / open_clip_model.CONFIG).is_file():
        hint = f" Load it as {open_clip_model.PREFIX}{open_clip_model.HUB}{where.removeprefix(PREFIX)}."
    return UserError(f"'{where}' cannot be read as a {kind} of transformers': {reason.rstrip('.')}.{hint}")


def express(model: DualEncoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Give `CLIPModel`'s configuration and tensors.

    A bias after the text projection, which `CLIPModel` lacks, moves into the last norm where that can be solved.
    """
    if (wrapped := wrapped_in(model)) is not None:
        if wrapped.library != "transformers":
            raise Refusal("its towers are open_clip's")
        return express_wrapped(model)
    refuse_mlp_heads(model)
    text, keys = clip_text_tower(model), layouts.clip_keys(model.image_tower)
    if keys is None or "num_heads" not in keys["image.model_kwargs"]:
        kind = type(model.image_tower.trunk).__name__
        raise Refusal(f"CLIPModel has CLIP's vision transformer only, and this image tower is a {kind}; {TO_CLIP_VIT}")
    state = dict(model.state_dict())
    bias = state.pop("text_tower.text_projection.bias", None)
    if bias is not None:
        moved = fold_bias(text.text_projection.weight, bias, float(text.ln_final.weight.norm()))
        state["text_tower.ln_final.bias"] = (state["text_tower.ln_final.bias"].double().cpu() + moved).float()
    return _config(model, keys), layouts.TRANSFORMERS.write(state)


def write(model: DualEncoder, folder: Path) -> None:
    """Write config.json, model.safetensors, preprocessor_config.json and the tokenizer's files."""
    config, tensors = express(model)
    image, wrapped = model.recipe.image, wrapped_in(model)  # type: ignore[union-attr]
    preprocessor: dict[str, Any] = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        **PREPROCESSING,
        "size": {"shortest_edge": image.size},
        "crop_size": {"height": image.size, "width": image.size},
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }
    if wrapped is not None:
        name = SIGLIP[config["model_type"]]
        resample = Image.Resampling[wrapped.image["interpolation"].upper()].value
        sizes = {"size": {"height": image.size, "width": image.size}, "do_center_crop": False, "resample": resample}
        del preprocessor["crop_size"]
        preprocessor |= {
            "image_processor_type": f"{name}ImageProcessor",
            "processor_class": f"{name}Processor",
            **sizes,
        }
    for name, content in ((CONFIG, config), (PREPROCESSOR, preprocessor)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(model.tokenizer, folder)
    floats = {name: tensor.detach().cpu().float().contiguous() for name, tensor in tensors.items()}
    save_tensors(floats, folder / WEIGHTS, {"format": "pt"})


def reread(folder: Path) -> Reread:
    """Load the folder with transformers."""
    import transformers

    with as_user_error(f"transformers cannot read '{folder}'"):
        model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    by, kind = f"transformers {transformers.__version__}", model.config.model_type
    if kind in SIGLIP:
        image = WrappedImageTower(model.vision_model, model.config.vision_config.hidden_size)
        return Reread(by, image.pool, lambda tokens: model.text_model(input_ids=tokens).pooler_output)
    return Reread(
        by,
        lambda pixels: model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output),
        lambda tokens: model.text_projection(model.text_model(input_ids=tokens).pooler_output),
    )


def fold_bias(weight: Tensor, bias: Tensor, size: float) -> Tensor:
    """Solve weight (d, width) · x = bias (d,) in float64: added before a linear map, x replaces the bias after it.

    Refused where there is no solution, or where float32 would lose digits by it, to inputs of the length `size`.
    """
    weight, bias = weight.detach().double().cpu(), bias.detach().double().cpu()
    moved = torch.linalg.pinv(weight) @ bias
    exact = torch.allclose(weight @ moved, bias, rtol=1e-7, atol=1e-9 * float(bias.abs().max()))
    if not exact or moved.norm() > LARGEST_BIAS * size:
        raise Refusal(
            "CLIPModel has no bias after the text projection, and this one cannot move before it, since the projection "
            "cannot be inverted or nearly so; train with text.projection_bias=false"
        )
    return moved


def _config(model: DualEncoder, keys: Mapping[str, Any]) -> dict[str, Any]:
    recipe, tokenizer, vit = model.recipe, model.tokenizer, keys["image.model_kwargs"]
    assert recipe is not None, "a model without one was refused"
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": recipe.embed_dim,
        "logit_scale_init_value": model.logit_scale.item(),
        "torch_dtype": "float32",
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": tokenizer.vocabulary - 1,
            "intermediate_size": 4 * recipe.text.width,
            "projection_dim": recipe.embed_dim,
            "layer_norm_eps": EPS,
            "bos_token_id": tokenizer.start,
            "eos_token_id": tokenizer.end,
            "pad_token_id": tokenizer.end,
            **{key: getattr(recipe.text, name) for name, key in TEXT_KEYS.items()},
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "projection_dim": recipe.embed_dim,
            "image_size": recipe.image.size,
            "layer_norm_eps": EPS,
            "hidden_size": vit["embed_dim"],
            "intermediate_size": int(vit["embed_dim"] * vit["mlp_ratio"]),
            "num_hidden_layers": vit["depth"],
            "num_attention_heads": vit["num_heads"],
            "patch_size": vit["patch_size"],
            "hidden_act": layouts.activation_of(keys),
        },
    }
