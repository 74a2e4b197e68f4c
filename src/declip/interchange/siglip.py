"""Read and write folders of transformers' `SiglipModel` and `SiglipProcessor`."""

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, normalizers
from tokenizers import Tokenizer as Backend
from torch import Tensor, nn

from declip.data.text.tokenizer import read_definition
from declip.errors import UserError
from declip.interchange.format import Refusal
from declip.interchange.json_files import read_json
from declip.interchange.layouts import SIGLIP
from declip.interchange.open_clip_model import short_name
from declip.interchange.transformers_files import (
    CONFIG,
    RESAMPLE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    expect,
    expect_settings,
    image_processor,
    image_settings,
    preprocessing_keys,
)
from declip.interchange.weights import Uninitialized, Weights, check_layers, empty
from declip.models.dual_encoder import DualEncoder
from declip.models.hf_encoder import ENTRY, quiet_transformers
from declip.models.siglip import (
    IMAGE_SECTION,
    MODEL_TYPE,
    SIZES,
    TEXT_SECTION,
    SiglipTextTower,
    WrappedSiglip,
    configuration,
)
from declip.models.tensor_names import all_but
from declip.recipe.load import load_recipe

__all__ = ["MODEL_TYPE", "config_of", "preprocessor_of", "read", "refuse", "tensors_of"]

PREPROCESSING: Mapping[str, Any] = {
    "do_resize": True, "size": {"height": 224, "width": 224}, "resample": 3, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip
"""Defaults of transformers."""

FIRST = "SiglipTokenizer"  # class of SigLIP 1, which transformers reads with sentencepiece alone
FIRST_PADDING = "</s>"  # its default
NO_TOKENIZER = (
    f"there is no {TOKENIZER}. SigLIP 1 may come with spiece.model alone, which is not read: put "
    f"the {TOKENIZER} of the same model there, such as that of Xenova/siglip-base-patch16-224, or "
    "use the model of open_clip, hf-hub:timm/ViT-B-16-SigLIP"
)


def read(
    folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], where: str
) -> Weights:
    """Read a `SiglipModel` with transformers' own towers, by its configuration and its tensors."""
    check_layers(config, len(weights), CONFIG)
    stored = _stored(folder, config)
    text = stored.config[TEXT_SECTION]
    side = stored.config[IMAGE_SECTION]["image_size"]
    name = f"huggingface:{short_name(str(folder.resolve()))}"
    keys = {
        "name": "from-huggingface",
        "image.model": name,
        "text.hf_model": name,
        **_image_keys(folder, side),
        "embed_dim": text["projection_size"],
        "text.pretrained": False,
        "text.context_length": text["max_position_embeddings"],
        "logit_bias": 0.0,
    }
    recipe = load_recipe("few-clip", keys)
    # The sizes may be a stranger's: they are compared before memory is allocated
    with torch.device("meta"), Uninitialized():
        outline = empty(recipe, stored).state_dict()
    del outline[ENTRY]
    tensors = SIGLIP.read(weights, outline)
    recipe = recipe.with_keys({"logit_bias": float(tensors["logit_bias"])})
    return Weights(recipe, {**tensors, ENTRY: stored.to_tensor()}, where)


def _stored(folder: Path, config: Mapping[str, Any]) -> WrappedSiglip:
    """The model without its weights: sizes and tokenizer."""
    built = configuration(config)
    sizes: dict[str, Any] = {"model_type": MODEL_TYPE}
    for section, names in SIZES.items():
        sizes[section] = {name: getattr(getattr(built, section), name) for name in names}
    text = sizes[TEXT_SECTION]
    width = sizes[IMAGE_SECTION]["hidden_size"]
    expect(f"{TEXT_SECTION}.projection_size", text["projection_size"], width)
    tokenizer = {**_tokenizer(folder), "context": text["max_position_embeddings"], "clean": ""}
    return WrappedSiglip(sizes, {"squash": True}, tokenizer)


def _image_keys(folder: Path, side: Any) -> dict[str, Any]:
    """Recipe keys of the preprocessing, which must be SigLIP's: resize to a square, normalize."""
    if type(side) is not int:
        raise UserError(f"{IMAGE_SECTION}.image_size is {side!r}; supported: an integer")
    given = image_settings(folder, "Siglip", PREPROCESSING)
    allowed = {"size": ({"height": side, "width": side},), "resample": RESAMPLE.values()}
    expect_settings(given, PREPROCESSING, allowed)
    expect("image preprocessing: do_center_crop", given.get("do_center_crop"), None, False)
    return preprocessing_keys(side, given)


def _tokenizer(folder: Path) -> dict[str, Any]:
    """Definition and padding of the tokenizer, as arguments of `WrappedTokenizer`."""
    if not (folder / TOKENIZER).is_file():
        raise UserError(NO_TOKENIZER)
    settings = read_json(folder / TOKENIZER_CONFIG)
    if settings.get("tokenizer_class", FIRST) == FIRST:
        return _first_tokenizer(folder, settings)
    with quiet_transformers("the tokenizer cannot be read") as library:
        tokenizer = library.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        definition = tokenizer.backend_tokenizer.to_str()
        padding = tokenizer.pad_token_id
        side = tokenizer.padding_side
    if side != "right":
        raise UserError(
            f'its tokenizer pads on the {side}; supported: right, by "padding_side": "right" in '
            f"{TOKENIZER_CONFIG}"
        )
    if padding is None:
        raise UserError(f"its tokenizer has no pad_token in {TOKENIZER_CONFIG}")
    # As SigLIP 2 was trained; transformers' GemmaTokenizer ignores it
    if settings.get("do_lower_case"):
        definition = _clean(read_definition(definition), [normalizers.Lowercase()])
    return {"definition": definition, "padding": padding}


def _first_tokenizer(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer of SigLIP 1, with the cleaning that transformers' class does."""
    library = read_definition((folder / TOKENIZER).read_text(encoding="utf-8"))
    token = settings.get("pad_token") or FIRST_PADDING
    text = token
    if isinstance(token, Mapping):
        text = token["content"]
    padding = library.token_to_id(text)
    if padding is None:
        raise UserError(f"{TOKENIZER} has no token {token!r}, the pad_token of {TOKENIZER_CONFIG}")
    if len(library.encode("").ids) != 1:
        raise UserError(
            f"{TOKENIZER} does not put one end token behind a text. Put the model's own there"
        )
    steps: list[Any] = []
    if settings.get("do_lower_case", True):
        steps.append(normalizers.Lowercase())
    steps.append(normalizers.Replace(Regex(f"[{_escape(string.punctuation)}]"), ""))
    steps.append(normalizers.Replace(Regex(r"\s+"), " "))
    steps.append(normalizers.Strip())
    return {"definition": _clean(library, steps), "padding": padding}


def _clean(library: Backend, steps: list[Any]) -> str:
    """Definition of a tokenizer with more steps before its own normalization."""
    if library.normalizer is not None:
        steps = [*steps, library.normalizer]
    library.normalizer = normalizers.Sequence(steps)
    return library.to_str()


def _escape(characters: str) -> str:
    return "".join(f"\\{character}" for character in characters)


def refuse(model: DualEncoder) -> None:
    """Raise a `Refusal` for a projection of images, which `SiglipModel` does not have."""
    if not isinstance(model.image_tower.proj, nn.Identity):
        raise Refusal(
            "SiglipModel has no projection of images, and a fit with frozen towers added one"
        )


def tensors_of(model: DualEncoder) -> dict[str, Tensor]:
    """The tensors of a model with SigLIP's towers, by the names of transformers."""
    return SIGLIP.write(all_but(ENTRY, model.state_dict()))


def config_of(model: DualEncoder, tower: SiglipTextTower) -> dict[str, Any]:
    """Content of config.json."""
    tokenizer = model.tokenizer
    own = tower.wrapped.config
    ids = {"pad_token_id": tokenizer.padding, "eos_token_id": tokenizer.end, "bos_token_id": None}
    image = {**own[IMAGE_SECTION], "image_size": model.preprocessor.size}
    return {
        "architectures": ["SiglipModel"],
        "model_type": MODEL_TYPE,
        "torch_dtype": "float32",
        TEXT_SECTION: {"model_type": "siglip_text_model", **own[TEXT_SECTION], **ids},
        IMAGE_SECTION: {"model_type": "siglip_vision_model", **image},
    }


def preprocessor_of(model: DualEncoder) -> dict[str, Any]:
    """Content of preprocessor_config.json."""
    image = model.recipe.image
    size = {"height": image.size, "width": image.size}
    return image_processor("Siglip", {**PREPROCESSING, "size": size}, image)
