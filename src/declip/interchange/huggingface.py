"""transformers' `CLIPModel` and `CLIPProcessor`: a folder of theirs as a model of ours, and ours as such a folder.

A folder holds config.json, model.safetensors (or several, with an index), preprocessor_config.json or
processor_config.json, and tokenizer.json or vocab.json. ``huggingface:OWNER/NAME`` (or ``hf-hub:OWNER/NAME``) fetches
these files from the Hub, or our declip.safetensors; no pickle.

Reading: by names and sizes, without transformers. The vocabulary must be CLIP's, or one of CLIP's first merges as our
exports have it. The mask's row of the vocabulary, which `CLIPModel` does not have, is the mean of the others.
Captions are cleaned CLIP's way, by ftfy, which transformers leaves out.

Writing: `CLIPModel` has CLIP's vision transformer only, and no bias after its text projection: such a bias moves into
the last norm of the text tower, where the projection can be solved for it.
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
from declip.interchange import declip_file, open_clip_model
from declip.interchange.clip_layout import (
    CLIP_MERGES,
    NO_MERGES,
    VIT_NAMES,
    Names,
    VitSizes,
    merges_key,
    rename,
    text_sizes,
    vit_keys,
    vit_sizes,
    without_mask,
)
from declip.interchange.foreign import CLIP_VIT, NO_BIAS, Refusal, Reread, clip_text_tower
from declip.interchange.tokenizer_files import END, START, write_tokenizer
from declip.interchange.weights import Weights, empty, first_difference, one_line
from declip.io.atomic import save_tensors
from declip.models.dual_encoder import DualEncoder
from declip.models.text_tower import TextTower
from declip.recipe.load import load_recipe

PREFIX, OTHER_PREFIX = "huggingface:", "hf-hub:"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
TOKENIZER, VOCABULARY = "tokenizer.json", "vocab.json"
FETCHED = [
    CONFIG, WEIGHTS, INDEX, "model-*.safetensors", PREPROCESSOR, PROCESSOR, TOKENIZER, VOCABULARY,
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

VIT_KEYS: Mapping[str, str] = {
    "hidden_size": "width", "intermediate_size": "hidden", "num_hidden_layers": "layers",
    "num_attention_heads": "heads", "patch_size": "patch", "hidden_act": "activation", "layer_norm_eps": "eps",
}  # fmt: skip
"""Key of vision_config → field of `VitSizes`."""

POOLS_AT_HIGHEST = 2
"""This end token in a text_config, the first releases', means pooling at the highest id: CLIP's end token."""

UNUSED = re.compile(r"(vision|text)_model\.embeddings\.position_ids$")
"""A buffer in older files."""

CAPTIONS = ("a red circle", "Two CATS, 12 dogs: asleep on a sofa!", "日本語 😀", "")
"""No cleaning changes them, so that they distinguish tokenizers."""

LARGEST_BIAS = 50
"""Largest ratio of a moved bias to what it is added to: up to it float32 keeps features to 1e-5."""

NAMES: Names = (
    ("class_embedding", "embeddings.class_embedding"),
    ("conv1.", "embeddings.patch_embedding."),
    ("token_embedding.", "embeddings.token_embedding."),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("ln_pre.", "pre_layrnorm."),
    ("ln_post.", "post_layernorm."),
    ("ln_final.", "final_layer_norm."),
    ("transformer.resblocks.#.ln_1.", "encoder.layers.#.layer_norm1."),
    ("transformer.resblocks.#.ln_2.", "encoder.layers.#.layer_norm2."),
    ("transformer.resblocks.#.attn.in_proj_", "encoder.layers.#.self_attn.?_proj."),
    ("transformer.resblocks.#.attn.out_proj.", "encoder.layers.#.self_attn.out_proj."),
    ("transformer.resblocks.#.mlp.c_fc.", "encoder.layers.#.mlp.fc1."),
    ("transformer.resblocks.#.mlp.c_proj.", "encoder.layers.#.mlp.fc2."),
)
"""CLIP's names and transformers', both without their towers' prefixes. "pre_layrnorm" is spelled so there; ? stands
for q, k and v, which lie in one tensor in CLIP."""

OUTSIDE_TOWERS = {
    "image_tower.proj.weight": "visual_projection.weight",
    "text_tower.text_projection.weight": "text_projection.weight",
    "logit_scale": "logit_scale",
}

USAGE = """
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

folder = "."  # this folder
model = CLIPModel.from_pretrained(folder).eval()
processor = CLIPProcessor.from_pretrained(folder, backend="pil")  # pixels as in training; leave it out before version 5
image = Image.new("RGB", (320, 240), "orange")  # your image
texts = ["an orange square", "a cat"]
inputs = processor(text=texts, images=image, padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    print(model(**inputs).logits_per_image.softmax(dim=-1))
"""


def matches(where: str) -> bool:
    """Whether this is a name on the Hub, or a folder that transformers may have written."""
    if where.startswith((PREFIX, OTHER_PREFIX)):
        return True
    folder = Path(where).expanduser()
    weights = (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()
    # open_clip keeps the configuration of a text encoder under this name.
    return (folder / CONFIG).is_file() and (weights or not (folder / open_clip_model.CONFIG).is_file())


def read(where: str) -> Weights:
    """Read a folder or a name on the Hub, which may also hold a model in our format.

    Raises:
        UserError: it cannot be fetched, it is another kind of model, or ours cannot express it, or a file is missing or
            damaged; the first difference is named.
    """
    folder = fetch(where) if where.startswith((PREFIX, OTHER_PREFIX)) else Path(where).expanduser()
    if declip_file.matches(str(folder)):
        return declip_file.read(str(folder))
    try:
        config = _read_json(folder / CONFIG)
        if config.get("model_type") != "clip":
            raise UserError(f"{CONFIG} says model_type {config.get('model_type')!r}, and only 'clip' is read")
        keys = _keys(folder, config)
        weights = _read_weights(folder)
        _check_layers(keys, weights)
        recipe = load_recipe("clip", {"name": "from-huggingface", **keys})
        with torch.device("meta"):  # sizes come from the file: compare before anything is allocated
            outline = empty(recipe)
        if difference := first_difference(their_tensors(outline), weights):
            raise UserError(f"its weights do not fit its {CONFIG}: {difference}")
    except UserError as error:
        raise _refused(where, folder, str(error)) from error
    except OSError as error:
        raise _refused(where, folder, f"{error.filename}: {error.strerror}") from error
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:  # JSON of another form
        raise _refused(where, folder, f"{CONFIG}: {type(error).__name__}: {one_line(error, 200)}") from error
    return Weights(recipe, {name: _ours(name, t, weights) for name, t in outline.state_dict().items()}, where)


def fetch(name: str) -> Path:
    """Fetch a model's folder from the Hub, or from its cache."""
    from huggingface_hub import snapshot_download

    repo = name.removeprefix(PREFIX).removeprefix(OTHER_PREFIX)
    try:
        return Path(snapshot_download(repo, allow_patterns=FETCHED))
    except Exception as error:  # hub, network and disk each have errors of their own
        raise UserError(
            f"Cannot fetch '{name}': {one_line(error, 180).rstrip('.')}. Check the network and the name, which is "
            f"{PREFIX}OWNER/NAME; a folder on this machine is given by its path alone."
        ) from error


def _keys(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's keys."""
    text, vision = _section(config, "text_config", TEXT), _section(config, "vision_config", VISION)
    for name, section in (("text_config", text), ("vision_config", vision)):
        _expect(f"{name}.hidden_act", section["hidden_act"], "quick_gelu", "gelu")
        _expect(f"{name}.layer_norm_eps", section["layer_norm_eps"], EPS)
    width = text["hidden_size"]
    _expect("text_config.intermediate_size", text["intermediate_size"], 4 * width)
    tokenizer = _tokenizer(folder, text["max_position_embeddings"])
    _expect("text_config.eos_token_id", text["eos_token_id"], tokenizer.end, POOLS_AT_HIGHEST)
    sizes = VitSizes(**{name: vision[key] for key, name in VIT_KEYS.items()})
    preprocessing = _preprocessing(folder, vision["image_size"])
    return {
        **vit_keys(sizes),
        "image.size": vision["image_size"],
        "image.mean": preprocessing["image_mean"],
        "image.std": preprocessing["image_std"],
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


def _expect(key: str, value: Any, *allowed: Any) -> None:
    near = isinstance(value, float) and any(math.isclose(value, number, rel_tol=1e-4) for number in allowed)
    if value not in allowed and not near:
        raise UserError(f"{key} is {value!r}, and ours has {' or '.join(map(repr, allowed))}")


def _preprocessing(folder: Path, side: int) -> dict[str, Any]:
    """The image preprocessing, which must be CLIP's."""
    if (folder / PREPROCESSOR).is_file():
        file, given = PREPROCESSOR, _read_json(folder / PREPROCESSOR)
    else:
        file, given = PROCESSOR, _read_json(folder / PROCESSOR).get("image_processor") or {}
    kind = given.get("image_processor_type") or given.get("feature_extractor_type") or "CLIP"
    if not kind.startswith("CLIP"):
        raise UserError(f"its images are prepared by a {kind}, not CLIP's way")
    given = {**PREPROCESSING, **given}
    for key, expected in {**PREPROCESSING, "size": side, "crop_size": side}.items():
        if not key.startswith("image_"):
            _expect(f"{file}: {key}", _side(key, given[key]), expected)
    return given


def _side(key: str, value: Any) -> Any:
    """The number of pixels of a shorter side or a square crop; a size with height and width would squash images."""
    if key == "size" and isinstance(value, Mapping) and set(value) == {"shortest_edge"}:
        return value["shortest_edge"]
    square = key == "crop_size" and isinstance(value, Mapping) and value.get("height") == value.get("width")
    return value["height"] if square else value


def _tokenizer(folder: Path, context: int) -> Tokenizer:
    """Ours with the same vocabulary."""
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
        encoded = {caption: theirs.encode(caption).ids for caption in CAPTIONS}
    except Exception as error:  # of the library's own kind
        raise UserError(f"{file.name} cannot be read: {one_line(error, 160)}") from error
    untruncated = Tokenizer(max(map(len, encoded.values())) + 1, ours.merges)
    for caption, ids in encoded.items():
        if ids != untruncated.encode(caption):
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
            instead = f"; {pickles[0]} is a pickle, which is not read: save it as safetensors" if pickles else ""
            raise UserError(f"there is no {file}{instead}")
        try:
            weights |= load_file(folder / file)
        except SafetensorError as error:
            raise UserError(f"{file} is damaged or cut ({one_line(error, 120)}); get it again") from error
    weights = {name: tensor for name, tensor in weights.items() if not UNUSED.match(name)}
    if quantized := next((name for name, tensor in weights.items() if not tensor.is_floating_point()), None):
        raise UserError(f"'{quantized}' holds integers: quantized weights are not read")
    return weights


def _check_layers(keys: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """So that no model is built of more layers than the files explain."""
    given = {"vision": keys["image.model_kwargs"]["depth"], "text": keys["text.layers"]}
    for tower, layers in given.items():
        pattern = re.compile(rf"{tower}_model\.encoder\.layers\.(\d+)\.")
        there = len({match[1] for match in map(pattern.match, weights) if match})
        if there != layers:
            raise UserError(f"{CONFIG} has {layers} layers in {tower}_config, and the weights {there}")


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
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file.name} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file.name} holds a {type(content).__name__}, not an object")
    return content


def _refused(where: str, folder: Path, reason: str) -> UserError:
    hint = ""
    if (folder / open_clip_model.CONFIG).is_file():
        hub = where.startswith((PREFIX, OTHER_PREFIX))
        name = f"{open_clip_model.HUB}{where.partition(':')[2]}" if hub else f"{open_clip_model.FOLDER}{folder}"
        hint = f" It is open_clip's: load it as {open_clip_model.PREFIX}{name}."
    return UserError(f"'{where}' cannot be read as a CLIPModel of transformers': {reason.rstrip('.')}.{hint}")


def express(model: DualEncoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Give `CLIPModel`'s configuration and tensors."""
    text = clip_text_tower(model)
    sizes = vit_sizes(model.image_tower)
    if isinstance(sizes, str):
        raise Refusal(f"CLIPModel has CLIP's vision transformer only; of this image tower {sizes}", CLIP_VIT)
    return _config(model, sizes, text), their_tensors(model)


def write(model: DualEncoder, folder: Path) -> None:
    """Write config.json, model.safetensors, preprocessor_config.json and the tokenizer's files."""
    config, tensors = express(model)
    for name, content in ((CONFIG, config), (PREPROCESSOR, _preprocessor(model))):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(model.tokenizer, folder)
    floats = {name: tensor.detach().cpu().float().contiguous() for name, tensor in tensors.items()}
    save_tensors(floats, folder / WEIGHTS, {"format": "pt"})


def reread(folder: Path) -> Reread:
    """Load the folder with transformers."""
    import transformers
    from transformers.utils import logging

    shows = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = transformers.CLIPModel.from_pretrained(folder, local_files_only=True).eval()
    finally:
        if shows:
            logging.enable_progress_bar()
    return Reread(
        f"transformers {transformers.__version__}",
        lambda pixels: model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output),
        lambda tokens: model.text_projection(model.text_model(input_ids=tokens).pooler_output),
    )


def fold_bias(weight: Tensor, bias: Tensor, size: float) -> Tensor:
    """Solve weight (d, width) · x = bias (d,): added before a linear map, x replaces the bias after it.

    Args:
        size: Length of the map's inputs.

    Returns:
        (width,) float64, the shortest solution.

    Raises:
        Refusal: there is none, or float32 would lose digits by it.
    """
    weight, bias = weight.detach().double().cpu(), bias.detach().double().cpu()
    rows, columns = weight.shape
    moved = torch.linalg.pinv(weight) @ bias
    ratio = float(moved.norm() / size)
    reason = None
    if rows > columns:
        reason = f"the projection goes from {columns:,} to {rows:,} numbers, so it cannot be inverted"
    elif not torch.allclose(weight @ moved, bias, rtol=1e-7, atol=1e-9 * float(bias.abs().max())):
        reason = "the projection is singular, so it cannot be inverted"
    elif ratio > LARGEST_BIAS:
        reason = f"the projection is nearly singular: it would be {ratio:,.0f} times as long as what it is added to"
    if reason:
        raise Refusal(
            f"CLIPModel has no bias after the text projection, and this one cannot move before it: {reason}", NO_BIAS
        )
    return moved


def their_names(name: str) -> tuple[str, ...]:
    """transformers' name for a tensor of ours; three where it has three tensors for it."""
    if name in OUTSIDE_TOWERS:
        return (OUTSIDE_TOWERS[name],)
    tower, _, rest = name.partition(".")
    if tower == "image_tower":
        renamed = f"vision_model.{rename(rename(rest, VIT_NAMES), NAMES)}"
    else:
        renamed = f"text_model.{rename(rest, NAMES)}"
    return tuple(renamed.replace("?", part) for part in "qkv") if "?" in renamed else (renamed,)


def their_tensors(model: DualEncoder) -> dict[str, Tensor]:
    """The tensors of a model with CLIP's ViT and text tower by transformers' names, in its shapes; also on "meta"."""
    assert isinstance(model.text_tower, TextTower)
    state = dict(model.state_dict())
    state["image_tower.trunk.cls_token"] = state["image_tower.trunk.cls_token"].flatten()
    state["image_tower.trunk.pos_embed"] = state["image_tower.trunk.pos_embed"][0]
    state["text_tower.token_embedding.weight"] = without_mask(model.text_tower)
    bias = state.pop("text_tower.text_projection.bias", None)
    if bias is not None:
        weight, norm = state["text_tower.text_projection.weight"], float(state["text_tower.ln_final.weight"].norm())
        moved = fold_bias(weight, bias, norm)
        state["text_tower.ln_final.bias"] = (state["text_tower.ln_final.bias"].double().cpu() + moved).float()
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        names = their_names(name)
        renamed |= zip(names, tensor.chunk(len(names)) if len(names) > 1 else [tensor], strict=True)
    return renamed


def _config(model: DualEncoder, vision: VitSizes, text: TextTower) -> dict[str, Any]:
    tokenizer, sizes = model.tokenizer, text_sizes(text)
    embed_dim = model.image_tower.proj.out_features
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": embed_dim,
        "logit_scale_init_value": model.logit_scale.item(),
        "torch_dtype": "float32",
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": len(without_mask(text)),
            "hidden_size": sizes["width"],
            "intermediate_size": 4 * sizes["width"],
            "projection_dim": embed_dim,
            "num_hidden_layers": sizes["layers"],
            "num_attention_heads": sizes["heads"],
            "max_position_embeddings": sizes["context"],
            "hidden_act": sizes["activation"],
            "layer_norm_eps": text.ln_final.eps,
            "bos_token_id": tokenizer.start,
            "eos_token_id": tokenizer.end,
            "pad_token_id": tokenizer.end,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "projection_dim": embed_dim,
            "image_size": model.preprocessor.size,
            **{key: getattr(vision, name) for key, name in VIT_KEYS.items()},
        },
    }


def _preprocessor(model: DualEncoder) -> dict[str, Any]:
    preprocessor = model.preprocessor
    side = preprocessor.size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        **PREPROCESSING,
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "image_mean": [round(value, 8) for value in preprocessor.mean.tolist()],
        "image_std": [round(value, 8) for value in preprocessor.std.tolist()],
    }
