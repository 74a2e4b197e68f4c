"""Read and write folders of transformers' `CLIPModel` and `CLIPProcessor`."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from safetensors.torch import load_file

from declip.data.text.tokenizer import Tokenizer
from declip.errors import UserError
from declip.interchange import layouts
from declip.interchange.format import Format, ReadBack, Refusal, Traced
from declip.interchange.layouts import TO_CLIP_VIT, backend, clip_text_tower, write_tokenizer
from declip.interchange.open_clip_model import CONFIG as OPEN_CLIP_CONFIG
from declip.interchange.weights import Weights, check_layers
from declip.io.atomic import save_tensors
from declip.io.text import one_line
from declip.models.dual_encoder import DualEncoder
from declip.models.hf_encoder import quiet_transformers
from declip.recipe.load import load_recipe

CONFIG, FILE = "config.json", "model.safetensors"
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
TOKENIZER = "tokenizer.json"

EPS = 1e-5  # epsilon of layer norms in CLIP

TEXT: Mapping[str, tuple[str, Any]] = {
    "width": ("hidden_size", 512), "layers": ("num_hidden_layers", 12), "heads": ("num_attention_heads", 8),
    "context_length": ("max_position_embeddings", 77), "activation": ("hidden_act", "quick_gelu"),
}  # fmt: skip
VISION: Mapping[str, tuple[str, Any]] = {
    "width": ("hidden_size", 768), "layers": ("num_hidden_layers", 12), "heads": ("num_attention_heads", 12),
    "patch": ("patch_size", 32), "hidden": ("intermediate_size", 3072), "activation": ("hidden_act", "quick_gelu"),
}  # fmt: skip
"""Recipe key in "text", or argument of `layouts.vit_keys` → key of transformers, with its default."""

PREPROCESSING: Mapping[str, Any] = {
    "do_resize": True, "size": 224, "resample": 3, "do_center_crop": True, "crop_size": 224, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
"""Defaults of transformers."""

RESAMPLE = {"bilinear": 2, "bicubic": 3}

# End token of early releases: pooling at the highest id, which is CLIP's end token
POOLS_AT_HIGHEST = 2
POSITION_IDS = "embeddings.position_ids"  # buffer in older files

CAPTIONS = ("a red circle", "Two CATS, 12 dogs: asleep on a sofa!", "日本語 😀", "")
"""Captions that cleaning does not change, to compare tokenizers."""


def matches(where: str) -> bool:
    """Whether this may be a folder of transformers."""
    folder = Path(where).expanduser()
    # open_clip stores the configuration of a text encoder by this name.
    return (folder / CONFIG).is_file() and (
        (folder / FILE).is_file() or not (folder / OPEN_CLIP_CONFIG).is_file()
    )


def read(where: str) -> Weights:
    """Read a folder of `CLIPModel`, without transformers.

    The vocabulary in tokenizer.json must be CLIP's, or that of its first merges, as in exports of declip.
    """
    folder = Path(where).expanduser()
    try:
        keys = _keys(folder, _read_json(folder / CONFIG))
        if not (folder / FILE).is_file():
            raise UserError(
                f"there is no {FILE}; other files are not read: save it as one safetensors file"
            )
        weights = {
            name: tensor
            for name, tensor in load_file(folder / FILE).items()
            if not name.endswith(POSITION_IDS)
        }
        check_layers(keys, len(weights), CONFIG)
        recipe = load_recipe("few-clip", {"name": "from-huggingface", **keys})
        return layouts.from_layout(recipe, layouts.TRANSFORMERS, weights, where)
    except Exception as error:  # wrong files raise any class
        name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        reason = f"{name}{one_line(error, 400)}".rstrip(".")
        raise UserError(
            f"'{where}' cannot be read as transformers' CLIPModel: {reason}."
        ) from error


def _keys(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    if (kind := config.get("model_type")) != "clip":
        others = "others, such as SigLIP, through open_clip: hf-hub:timm/ViT-B-16-SigLIP2"
        raise UserError(f"its model_type is {kind!r}; supported: clip; {others}")
    # Early releases wrote each section by a second name too, which takes precedence.
    text, vision = (
        config.get(f"{name}_dict") or config.get(name) or {}
        for name in ("text_config", "vision_config")
    )
    for name, section in (("text_config", text), ("vision_config", vision)):
        _expect(f"{name}.hidden_act", section.get("hidden_act", "quick_gelu"), "quick_gelu", "gelu")
        _expect(f"{name}.layer_norm_eps", section.get("layer_norm_eps", EPS), EPS)
    # Sizes
    text_keys = {
        f"text.{ours}": text.get(theirs, default) for ours, (theirs, default) in TEXT.items()
    }
    vision_keys = {ours: vision.get(theirs, default) for ours, (theirs, default) in VISION.items()}
    _expect(
        "text_config.intermediate_size",
        text.get("intermediate_size", 2048),
        4 * text_keys["text.width"],
    )
    tokenizer = _read_tokenizer(folder / TOKENIZER)
    _expect(
        "text_config.eos_token_id",
        text.get("eos_token_id", 49_407),
        tokenizer.end,
        POOLS_AT_HIGHEST,
    )
    return {
        **layouts.vit_keys(**vision_keys),
        **text_keys,
        **_image_keys(folder, vision.get("image_size", 224)),
        "embed_dim": config.get("projection_dim", 512),
        "text.bpe_merges": layouts.merges_key(layouts.NO_MERGES + tokenizer.merges),
    }


def _expect(key: str, value: Any, *allowed: Any) -> None:
    near = isinstance(value, float) and any(
        math.isclose(value, number, rel_tol=1e-4) for number in allowed
    )
    if value not in allowed and not near:
        raise UserError(f"{key} is {value!r}; supported: {' or '.join(map(repr, allowed))}")


def _image_keys(folder: Path, side: int) -> dict[str, Any]:
    """Recipe keys of the preprocessing, which must be CLIP's: resize, center crop, normalize."""
    # Like transformers 5, prefer processor_config.json to the older file.
    given = _read_json(folder / PROCESSOR).get("image_processor") or _read_json(
        folder / PREPROCESSOR
    )
    if not given:
        raise UserError(f"there is neither {PREPROCESSOR} nor an image_processor in {PROCESSOR}")
    kind = given.get("image_processor_type") or given.get("feature_extractor_type") or "CLIP"
    if not kind.startswith("CLIP"):
        raise UserError(f"its image processor is a {kind}, not CLIP's")
    given = {**PREPROCESSING, **given}
    resized, *more = (
        given["size"].values() if isinstance(given["size"], Mapping) else [given["size"]]
    )
    if more or type(resized) is not int or resized < side:
        raise UserError(
            f"image preprocessing: size is {given['size']!r}; supported: a shortest_edge of {side} or more"
        )
    others = {"crop_size": (side, {"height": side, "width": side}), "resample": RESAMPLE.values()}
    for key, expected in PREPROCESSING.items():
        if key != "size" and not key.startswith("image_"):
            _expect(f"image preprocessing: {key}", given[key], *others.get(key, (expected,)))
    return {
        **{"image.size": side, "image.mean": given["image_mean"], "image.std": given["image_std"]},
        "image.interpolation": next(
            name for name, number in RESAMPLE.items() if number == given["resample"]
        ),
        "image.crop_pct": side / resized,
    }


def _read_tokenizer(file: Path) -> Tokenizer:
    """Find the tokenizer of declip with the same vocabulary and the same ids."""
    try:
        theirs = tokenizers.Tokenizer.from_file(str(file))
        theirs.no_truncation()
        theirs.no_padding()
        encoded = [theirs.encode(caption).ids for caption in CAPTIONS]
    except Exception as error:  # tokenizers raises Exception itself
        raise UserError(
            f"{file.name} cannot be read: {one_line(error, 160)}. Put the model's own there"
        ) from error
    vocabulary = theirs.get_vocab()
    if 0 <= (merges := len(vocabulary) - layouts.NO_MERGES) <= layouts.CLIP_MERGES:
        ours = Tokenizer(merges=merges)
        if vocabulary == backend(ours).get_vocab() and encoded == [*map(ours.encode, CAPTIONS)]:
            return ours
    raise UserError(f"{file.name} is not CLIP's tokenizer, or one with its first merges")


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


class Huggingface(Format):
    """Folders of transformers' `CLIPModel` and `CLIPProcessor`."""

    name, library, linear = "huggingface", "transformers", True

    def holds(self, model: DualEncoder) -> None:
        """Refuse towers other than CLIP's, and a bias of the text projection or of the logits."""
        text, keys = clip_text_tower(model), layouts.clip_keys(model.image_tower)
        if keys is None or "num_heads" not in keys["image.model_kwargs"]:
            kind = type(model.image_tower.trunk).__name__
            raise Refusal(
                f"CLIPModel has CLIP's vision transformer only, and this image tower is a {kind}; {TO_CLIP_VIT}"
            )
        if text.text_projection.bias is not None:
            raise Refusal(
                "CLIPModel has no bias after the text projection; train with text.projection_bias=false"
            )
        if model.logit_bias is not None:
            raise Refusal("CLIPModel has no logit bias, which a sigmoid loss learns")

    def write(self, traced: Traced, folder: Path, repo: str | None) -> None:
        """Write config.json, model.safetensors, preprocessor_config.json and the tokenizer's files."""
        model, image = traced.model, traced.model.recipe.image
        tensors = layouts.TRANSFORMERS.write(model.state_dict())
        preprocessor = {
            **{
                "image_processor_type": "CLIPImageProcessor",
                "processor_class": "CLIPProcessor",
                "do_convert_rgb": True,
            },
            **{
                **PREPROCESSING,
                "resample": RESAMPLE[image.interpolation],
                "size": {"shortest_edge": image.resize},
            },
            "crop_size": {"height": image.size, "width": image.size},
            **{"image_mean": list(image.mean), "image_std": list(image.std)},
        }
        for file, content in ((CONFIG, _config(model)), (PREPROCESSOR, preprocessor)):
            (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        write_tokenizer(model.tokenizer, folder)
        save_tensors(
            {name: tensor.float() for name, tensor in tensors.items()},
            folder / FILE,
            {"format": "pt"},
        )

    def read_back(self, folder: Path) -> ReadBack:
        """Load an exported folder with transformers."""
        import transformers

        with quiet_transformers(f"transformers cannot read '{folder}'"):
            model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
        return ReadBack(
            f"transformers {transformers.__version__}",
            lambda pixels: model.visual_projection(
                model.vision_model(pixel_values=pixels).pooler_output
            ),
            lambda tokens: model.text_projection(model.text_model(input_ids=tokens).pooler_output),
        )


def _config(model: DualEncoder) -> dict[str, Any]:
    keys = layouts.clip_keys(model.image_tower)
    assert keys is not None  # checked in `holds`
    recipe, tokenizer, vit = model.recipe, model.tokenizer, keys["image.model_kwargs"]
    sizes = {
        "width": vit["embed_dim"], "layers": vit["depth"], "heads": vit["num_heads"], "patch": vit["patch_size"],
        "hidden": int(vit["embed_dim"] * vit["mlp_ratio"]), "activation": layouts.activation_of(keys),
    }  # fmt: skip
    common = {"projection_dim": recipe.embed_dim, "layer_norm_eps": EPS}
    return {
        **{"architectures": ["CLIPModel"], "model_type": "clip", "torch_dtype": "float32"},
        **{"projection_dim": recipe.embed_dim, "logit_scale_init_value": model.logit_scale.item()},
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": tokenizer.vocabulary - 1,
            "intermediate_size": 4 * recipe.text.width,
            "bos_token_id": tokenizer.start,
            "eos_token_id": tokenizer.end,
            "pad_token_id": tokenizer.end,
            **{theirs: getattr(recipe.text, ours) for ours, (theirs, _) in TEXT.items()},
            **common,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": recipe.image.size,
            **{theirs: sizes[ours] for ours, (theirs, _) in VISION.items()},
            **common,
        },
    }
