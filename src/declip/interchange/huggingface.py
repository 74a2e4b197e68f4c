"""Read and write folders of transformers: `CLIPModel` and `CLIPProcessor`, or SigLIP's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from declip.data.text.tokenizer import Tokenizer
from declip.errors import UserError
from declip.interchange import layouts, siglip
from declip.interchange.format import Format, ModelRecord, ReadBack, Refusal
from declip.interchange.json_files import read_json, write_json
from declip.interchange.layouts import TO_CLIP_VIT, clip_text_tower
from declip.interchange.open_clip_model import CONFIG as OPEN_CLIP_CONFIG
from declip.interchange.tokenizer_files import clip_tokenizer, write_tokenizer
from declip.interchange.transformers_files import (
    CONFIG,
    FILE,
    PREPROCESSOR,
    RESAMPLE,
    TOKENIZER,
    expect,
    expect_settings,
    image_processor,
    image_settings,
    preprocessing_keys,
)
from declip.interchange.weights import Weights, check_layers
from declip.io.atomic import save_tensors
from declip.io.text import one_line
from declip.models.dual_encoder import DualEncoder
from declip.models.hf_encoder import quiet_transformers
from declip.models.siglip import SiglipTextTower
from declip.recipe.load import load_recipe

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
    """Read a folder of `CLIPModel`, without transformers, or of `SiglipModel`, with its towers.

    CLIP's vocabulary in tokenizer.json must be OpenAI's, or that of its first merges, as in exports of declip.
    """
    folder = Path(where).expanduser()
    name = "model"
    try:
        config = read_json(folder / CONFIG)
        kind = str(config.get("model_type"))
        if kind not in KINDS:
            raise UserError(f"its model_type is {kind!r}{KNOWN_KINDS.get(kind, '')}; {READ}")
        name, read_weights = KINDS[kind]
        if not (folder / FILE).is_file():
            raise UserError(
                f"there is no {FILE}; other files are not read: save it as one safetensors file"
            )
        return read_weights(folder, config, _finite_tensors(folder / FILE), where)
    except Exception as error:  # wrong files raise any class
        given = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        reason = f"{given}{one_line(error, 400)}".rstrip(".")
        raise UserError(f"'{where}' cannot be read as transformers' {name}: {reason}.") from error


def _finite_tensors(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a file, whose numbers must be finite."""
    tensors = {}
    for name, tensor in load_file(file).items():
        if name.endswith(POSITION_IDS):
            continue
        extremes = torch.stack(torch.aminmax(tensor))  # 40 times as fast as `isfinite` of all
        if not extremes.isfinite().all():
            raise UserError(f"'{name}' has numbers that are not finite")
        tensors[name] = tensor
    return tensors


def _read_clip(
    folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], where: str
) -> Weights:
    keys = _keys(folder, config)
    check_layers(keys, len(weights), CONFIG)
    recipe = load_recipe("few-clip", {"name": "from-huggingface", **keys})
    return layouts.from_layout(recipe, layouts.TRANSFORMERS, weights, where)


KINDS = {"clip": ("CLIPModel", _read_clip), siglip.MODEL_TYPE: ("SiglipModel", siglip.read)}
"""model_type → class in transformers, function that reads it."""

KNOWN_KINDS = {
    "siglip2": ", SigLIP 2 for images of any shape (NaFlex)",
    "siglip_vision_model": ", an image tower alone",
    "siglip_text_model": ", a text tower alone",
    "clip_vision_model": ", an image tower alone",
    "clip_text_model": ", a text tower alone",
}
READ = (
    "supported: clip, and siglip, which is SigLIP, and SigLIP 2 for one image size such as "
    "google/siglip2-base-patch16-224; others through open_clip, such as "
    "hf-hub:timm/ViT-B-16-SigLIP2"
)


def _keys(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    text = _section(config, "text_config")
    vision = _section(config, "vision_config")
    text_sizes = {ours: text.get(theirs, default) for ours, (theirs, default) in TEXT.items()}
    sizes = {ours: vision.get(theirs, default) for ours, (theirs, default) in VISION.items()}
    hidden = text.get("intermediate_size", 2048)
    expect("text_config.intermediate_size", hidden, 4 * text_sizes["width"])
    tokenizer = _read_tokenizer(folder / TOKENIZER)
    end = text.get("eos_token_id", 49_407)
    expect("text_config.eos_token_id", end, tokenizer.end, POOLS_AT_HIGHEST)
    return {
        **layouts.vit_keys(**sizes),
        **{f"text.{key}": size for key, size in text_sizes.items()},
        **_image_keys(folder, vision.get("image_size", 224)),
        "embed_dim": config.get("projection_dim", 512),
        "text.bpe_merges": layouts.merges_key(layouts.NO_MERGES + tokenizer.merges),
    }


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A tower's section, which early releases wrote by a second name too, which takes precedence."""
    section = config.get(f"{name}_dict") or config.get(name) or {}
    expect(f"{name}.hidden_act", section.get("hidden_act", "quick_gelu"), "quick_gelu", "gelu")
    expect(f"{name}.layer_norm_eps", section.get("layer_norm_eps", EPS), EPS)
    return section


def _image_keys(folder: Path, side: int) -> dict[str, Any]:
    """Recipe keys of the preprocessing, which must be CLIP's: resize, center crop, normalize."""
    given = image_settings(folder, "CLIP", PREPROCESSING)
    size = given["size"]
    sides = list(size.values()) if isinstance(size, Mapping) else [size]
    if len(sides) != 1 or type(sides[0]) is not int or sides[0] < side:
        raise UserError(
            f"image preprocessing: size is {size!r}; supported: a shortest_edge of {side} or more"
        )
    crops = [side, {"height": side, "width": side}]
    allowed = {"size": [size], "crop_size": crops, "resample": RESAMPLE.values()}
    expect_settings(given, PREPROCESSING, allowed)
    return {**preprocessing_keys(side, given), "image.crop_pct": side / sides[0]}


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
    ours = clip_tokenizer(theirs.get_vocab())
    if ours is not None and encoded == [ours.encode(caption) for caption in CAPTIONS]:
        return ours
    raise UserError(f"{file.name} is not CLIP's tokenizer, or one with its first merges")


class Huggingface(Format):
    """Folders of transformers' `CLIPModel` and `CLIPProcessor`, or of `SiglipModel` and `SiglipProcessor`."""

    name, library, linear = "huggingface", "transformers", True

    def holds(self, model: DualEncoder) -> None:
        """Refuse towers other than CLIP's and SigLIP's, and what these lack, such as a bias of CLIP's logits."""
        if model.has_text and isinstance(model.text_tower, SiglipTextTower):
            siglip.refuse(model)
            return
        text = clip_text_tower(model)
        keys = layouts.clip_keys(model.image_tower)
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

    def write(self, record: ModelRecord, folder: Path, repo: str | None) -> None:
        """Write config.json, model.safetensors, preprocessor_config.json and the tokenizer's files."""
        model = record.model
        if isinstance(model.text_tower, SiglipTextTower):
            tensors = siglip.tensors_of(model)
            config = siglip.config_of(model, model.text_tower)
            preprocessor = siglip.preprocessor_of(model)
        else:
            tensors = layouts.TRANSFORMERS.write(model.state_dict())
            config = _config(model)
            preprocessor = _preprocessor(model)
        write_json(folder / CONFIG, config)
        write_json(folder / PREPROCESSOR, preprocessor)
        write_tokenizer(model.tokenizer, folder)
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
        save_tensors(tensors, folder / FILE, {"format": "pt"})

    def read_back(self, folder: Path) -> ReadBack:
        """Load an exported folder with transformers."""
        import transformers

        with quiet_transformers(f"transformers cannot read '{folder}'"):
            model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
        if model.config.model_type == siglip.MODEL_TYPE:
            of_image = of_text = nn.Identity()  # its towers end with their projections
        else:
            of_image = model.visual_projection
            of_text = model.text_projection

        def encode_image(pixels: Tensor) -> Tensor:
            return of_image(model.vision_model(pixel_values=pixels).pooler_output)

        def encode_text(tokens: Tensor) -> Tensor:
            return of_text(model.text_model(input_ids=tokens).pooler_output)

        return ReadBack(f"transformers {transformers.__version__}", encode_image, encode_text)


def _preprocessor(model: DualEncoder) -> dict[str, Any]:
    image = model.recipe.image
    size = {"shortest_edge": image.resize}
    crop_size = {"height": image.size, "width": image.size}
    return image_processor("CLIP", {**PREPROCESSING, "size": size, "crop_size": crop_size}, image)


def _config(model: DualEncoder) -> dict[str, Any]:
    keys = layouts.clip_keys(model.image_tower)
    assert keys is not None  # checked in `holds`
    recipe = model.recipe
    tokenizer = model.tokenizer
    vit = keys["image.model_kwargs"]
    sizes = {
        "width": vit["embed_dim"], "layers": vit["depth"], "heads": vit["num_heads"], "patch": vit["patch_size"],
        "hidden": int(vit["embed_dim"] * vit["mlp_ratio"]), "activation": layouts.activation_of(keys),
    }  # fmt: skip
    common = {"projection_dim": recipe.embed_dim, "layer_norm_eps": EPS}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "torch_dtype": "float32",
        "projection_dim": recipe.embed_dim,
        "logit_scale_init_value": model.logit_scale.item(),
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
