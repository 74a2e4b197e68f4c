"""Models of open_clip as models of ours, and ours as folders of open_clip's.

Reading: CLIP's ViT, CLIP's ResNet and timm towers with a linear projection, with CLIP's text tower and tokenizer, are
converted; the towers of all other models are wrapped, see `declip.interchange.wrapped_weights`. The result is compared
with open_clip's, images and captions included.

Writing: open_clip loads the folder by the name ``local-dir:FOLDER``. CLIP's ViT and CLIP's ResNet become open_clip's
own towers, whatever their sizes; every other timm model goes through open_clip's `TimmModel`, which takes a name alone:
neither options nor, where it matters, another image size. A BERT or RoBERTa makes the model open_clip's
`CustomTextCLIP`, whose text tower is built from a configuration that ``hf_model_name`` leads to.
"""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from declip.errors import UserError
from declip.interchange import layouts, open_clip_model
from declip.interchange.foreign import TO_CLIP_VIT, Refusal, Reread, clip_text_tower, refuse_mlp_heads
from declip.interchange.layouts import (
    TensorLayout,
    activation_of,
    clip_keys,
    from_layout,
    image_keys,
    merges_key,
    text_keys,
)
from declip.interchange.open_clip_model import CONFIG, OpenClip, load_open_clip, matches
from declip.interchange.tokenizer_files import write_tokenizer
from declip.interchange.weights import Weights, one_line
from declip.interchange.wrapped_weights import express_wrapped, wrap_open_clip, wrapped_in
from declip.io.atomic import save_tensors
from declip.models.dual_encoder import DualEncoder
from declip.models.hf_encoder import CONFIG as ENCODER
from declip.models.hf_encoder import PREFIX as HUB_ENCODER
from declip.models.hf_encoder import TextEncoder
from declip.models.hf_text_tower import HuggingfaceTextTower
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe

__all__ = ["express", "matches", "read", "reread", "write"]

log = logging.getLogger("declip")

LIBRARY = "open_clip"
WEIGHTS = "open_clip_model.safetensors"
CLOSE = 1e-4
"""Largest difference of features, of length 1, between a model here and in open_clip."""

CAPTIONS = ("a red circle", "Two CATS &amp; a dog, asleep on a sofa", "")

ENCODERS = ("bert", "roberta", "xlm-roberta")
"""Kinds of text encoders that both open_clip 3.3 and declip build."""

POOLERS = {"cls": "cls_last_hidden_state_pooler", "mean": "mean_pooler"}

Part = tuple[dict[str, Any], TensorLayout]
"""A section of open_clip's configuration, and the form of its tensors."""


def read(where: str) -> Weights:
    """Read a name, with or without "open_clip:", or a folder of open_clip's as a model of ours."""
    given = where.removeprefix(open_clip_model.PREFIX)
    if given == where and Path(where).expanduser().is_file():
        raise UserError(f"'{where}' does not say which model its weights are of. {open_clip_model.which_model(where)}")
    if given == where and not Path(where).expanduser().is_dir():
        where = open_clip_model.PREFIX + where
    return convert(load_open_clip(where), where)


def convert(opened: OpenClip, origin: str = "the model") -> Weights:
    """Convert a model of open_clip's to our towers where that is exact; else keep its own towers, wrapped."""
    with suppress(UserError):
        return _convert(opened, origin)
    try:
        weights = wrap_open_clip(opened, origin)
        _compare(weights.build().eval(), opened)
    except UserError as error:
        raise _refused(str(error)) from error
    except Exception as error:  # a tower of another kind
        raise _refused(f"{type(error).__name__}: {one_line(error, 200)}") from error
    return weights


def _convert(opened: OpenClip, origin: str) -> Weights:
    """Convert weights, tokenizer, image statistics and logit scale."""
    try:
        tensors = {n: t.cpu().float() if t.is_floating_point() else t for n, t in opened.model.state_dict().items()}
        tensors["logit_scale"] = tensors["logit_scale"].squeeze()
        keys, layout = _keys(opened, tensors)
        weights = from_layout(load_recipe("clip", {"name": "from-open-clip", **keys}), layout, tensors, origin)
        _compare(weights.build().eval(), opened)
    except UserError as error:
        raise _refused(str(error)) from error
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:  # a tower of another kind
        raise _refused(f"{type(error).__name__}: {one_line(error, 200)}") from error
    return weights


def _keys(opened: OpenClip, state: Mapping[str, Tensor]) -> Part:
    """The recipe's keys, and the form of the tensors."""
    model, prepared = opened.model, opened.preprocessor.config
    if type(model).__name__ != "CLIP":
        raise UserError(f"it is a {type(model).__name__}, not a CLIP")
    if prepared.interpolation != "bicubic" or prepared.resize_mode != "shortest":
        raise UserError(f"its images are resized {prepared.resize_mode}, {prepared.interpolation}")
    tower, block = model.visual, model.transformer.resblocks[0]
    if hasattr(tower, "trunk"):
        image, image_layout = {"image.model": tower.trunk.default_cfg["architecture"]}, layouts.TIMM
    elif hasattr(tower, "attnpool"):
        image, image_layout = image_keys(state, tower.attnpool.num_heads), layouts.CLIP_RESNET
    else:
        first = tower.transformer.resblocks[0]
        image, image_layout = image_keys(state, first.attn.num_heads, _activation(first)), layouts.CLIP_VIT
    bare = "text_projection" in state
    keys = {
        **image,
        **text_keys(state, "", block.attn.num_heads, mask=False),
        "text.activation": _activation(block),
        "image.size": prepared.size if isinstance(prepared.size, int) else prepared.size[0],
        "image.mean": list(prepared.mean),
        "image.std": list(prepared.std),
        "embed_dim": state["text_projection"].shape[1] if bare else len(state["text_projection.weight"]),
    }
    return keys, image_layout + (layouts.CLIP_TEXT if bare else layouts.CLIP_TEXT_WITH_BIAS)


def _activation(block: Any) -> str:
    return "quick_gelu" if type(block.mlp.gelu).__name__ == "QuickGELU" else "gelu"


def _compare(model: DualEncoder, opened: OpenClip) -> None:
    """Compare the features of images and captions with open_clip's."""
    noise = torch.randint(0, 256, (57, 91, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = [Image.fromarray(noise.numpy()), Image.fromarray(noise.numpy()).resize((40, 333))]
    with torch.no_grad():
        visual = model.encode_image(model.preprocess(images)) - opened.encode_image(opened.preprocess(images)).cpu()
        texts = model.encode_text(model.tokenize(CAPTIONS)) - opened.encode_text(opened.tokenize(CAPTIONS)).cpu()
    for kind, difference in (("images", visual), ("captions", texts)):
        if not float(difference.abs().max()) <= CLOSE:
            raise UserError(f"its features of {kind} come out differently, by {difference.abs().max():.1e}")


def _refused(reason: str) -> UserError:
    return UserError(
        f"This model of open_clip's cannot become one of ours: {reason.rstrip('.')}. It can be used as it is: "
        "declip evaluate open_clip:…"
    )


def write(model: DualEncoder, folder: Path, repo: str | None = None, home: Path | None = None) -> None:
    """Write open_clip_config.json, weights and, for a vocabulary other than CLIP's, a Hugging Face tokenizer.

    Args:
        repo: The repository, OWNER/NAME, that the folder will be on the Hub: there open_clip finds tokenizer and text
            encoder by their names alone.
        home: Where the folder will be.
    """
    config, tensors = express(model, repo or str((home or folder).absolute()))
    text_config = config["model_cfg"]["text_cfg"]
    encoder, wrapped = None, wrapped_in(model)
    if isinstance(model.text_tower, HuggingfaceTextTower):
        encoder = TextEncoder.from_tensor(model.text_tower.get_extra_state()).config
    elif wrapped is not None:
        encoder = wrapped.encoder
    if encoder is not None:
        (folder / ENCODER).write_text(json.dumps(dict(encoder), indent=2) + "\n", encoding="utf-8")
    needs_file = "hf_model_name" in text_config or "tokenizer_kwargs" in text_config
    if needs_file if wrapped is None else wrapped.tokenizer["definition"] is not None:
        # Of a folder open_clip takes the tokenizer that lies in it, whatever the name; of a repository the name's.
        text_config["hf_tokenizer_name"] = repo or "tokenizer.json"
        write_tokenizer(model.tokenizer, folder)
        if repo is None:
            log.warning("This folder loads as local-dir:FOLDER alone. For the Hub export it with --repo OWNER/NAME.")
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_tensors(contiguous, folder / WEIGHTS, {"format": "pt"})


def express(model: DualEncoder, place: str = ".") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Give open_clip's configuration and tensors; `place` is the folder or repository where the files will be."""
    recipe = model.recipe
    assert recipe is not None, "a model without one was refused"
    if (wrapped := wrapped_in(model)) is not None:
        if wrapped.library != "open_clip":
            raise Refusal("its towers are transformers'")
        model_config, tensors = express_wrapped(model)
        if wrapped.encoder is not None:
            model_config["text_cfg"]["hf_model_name"] = place
        mode = "squash" if wrapped.image["squash"] else "shortest"
        resize = {"interpolation": wrapped.image["interpolation"], "resize_mode": mode}
        return _config(recipe, model_config, resize), tensors
    refuse_mlp_heads(model)
    keys = clip_keys(model.image_tower)
    if isinstance(model.text_tower, HuggingfaceTextTower):
        activation = activation_of(keys) if keys else "gelu"
        text_config, text = _text_encoder(model.text_tower, recipe.text.hf_model or "", place)
    else:
        activation = recipe.text.activation
        text_config, text = _text_config(model)
    vision_config, image = _vision_config(model, keys, activation)
    model_config = {
        "embed_dim": recipe.embed_dim,
        "quick_gelu": activation == "quick_gelu",
        "vision_cfg": {"image_size": recipe.image.size, **vision_config},
        "text_cfg": text_config,
    }
    config = _config(recipe, model_config, {"interpolation": "bicubic", "resize_mode": "shortest"})
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("_extra_state")}
    return config, (image + text).write(state)


def _config(recipe: Recipe, model_config: dict[str, Any], resize: dict[str, str]) -> dict[str, Any]:
    image = recipe.image
    statistics = {"mean": list(image.mean), "std": list(image.std)}
    return {"model_cfg": model_config, "preprocess_cfg": {"size": image.size, "mode": "RGB", **statistics, **resize}}


def reread(folder: Path) -> Reread:
    """Load the folder with open_clip."""
    import open_clip

    text_config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_cfg"]["text_cfg"]
    changes: dict[str, Any] = {}
    if "hf_model_name" in text_config:  # the name leads here once the folder is at its place; no network until then
        changes["text_cfg"] = {**text_config, "hf_model_name": str(folder), "hf_model_pretrained": False}
    model: Any = open_clip.create_model(f"local-dir:{folder}", weights_only=True, **changes).eval()
    context = int(model.context_length)
    return Reread(
        f"open_clip {open_clip.__version__}",
        model.encode_image,
        lambda tokens: model.encode_text(tokens if changes else F.pad(tokens, (0, context - tokens.shape[1]))),
    )


def _text_config(model: DualEncoder) -> Part:
    tower, text = clip_text_tower(model), model.recipe.text  # type: ignore[union-attr]
    vocabulary = model.tokenizer.vocabulary - 1
    config: dict[str, Any] = {name: getattr(text, name) for name in ("context_length", "width", "heads", "layers")}
    config |= {"vocab_size": vocabulary, "proj_bias": text.projection_bias}
    if merges_key(vocabulary) is not None:
        config["tokenizer_kwargs"] = {"clean": "lower"}
    return config, layouts.CLIP_TEXT if tower.text_projection.bias is None else layouts.CLIP_TEXT_WITH_BIAS


def _text_encoder(tower: HuggingfaceTextTower, given: str, place: str) -> Part:
    """A text encoder of transformers'; its configuration is found by its name on the Hub, or lies in the folder."""
    encoder = TextEncoder.from_tensor(tower.get_extra_state())
    kind = encoder.config["model_type"]
    biased = tower.text_projection.bias is not None
    if kind not in ENCODERS or tower.pooling not in POOLERS or biased:
        raise Refusal(
            f"its text encoder is a {kind}, with {tower.pooling} pooling and {'a' if biased else 'no'} bias after its "
            f"projection; open_clip has {', '.join(ENCODERS)}, text.pooling={' or '.join(POOLERS)}, no bias"
        )
    config = {
        "context_length": tower.context,
        "vocab_size": encoder.config["vocab_size"],
        "hf_model_name": given.removeprefix(HUB_ENCODER) if given.startswith(HUB_ENCODER) else place,
        "hf_proj_type": "linear",
        "hf_pooler_type": POOLERS[tower.pooling],
    }
    return config, layouts.TRANSFORMERS_TEXT


def _vision_config(model: DualEncoder, keys: Mapping[str, Any] | None, activation: str) -> Part:
    """CLIP's ViT or ResNet, else a timm model by its name."""
    sizes = keys["image.model_kwargs"] if keys else {}
    if keys and "depths" in sizes:
        width = round(64 * sizes["width_factor"])
        return {"layers": sizes["depths"], "width": width, "patch_size": None}, layouts.CLIP_RESNET
    if keys and activation_of(keys) == activation:
        return {
            "layers": sizes["depth"],
            "width": sizes["embed_dim"],
            "head_width": sizes["embed_dim"] // sizes["num_heads"],
            "patch_size": sizes["patch_size"],
            "mlp_ratio": sizes["mlp_ratio"],
        }, layouts.CLIP_VIT
    name = model.recipe.image.model  # type: ignore[union-attr]
    try:
        _compare_by_name(model, name)
    except Exception as error:  # of whatever kind: timm's models fail in their own ways where options are missing
        way_out = f"train with text.activation={activation_of(keys)}" if keys else TO_CLIP_VIT
        raise Refusal(
            "its image tower is neither CLIP's ViT with the text tower's activation nor CLIP's ResNet, and of others "
            f"open_clip takes timm's name alone, which gives another network than this one ('{name}', "
            f"{model.preprocessor.size} px): {one_line(error, 160)}; {way_out}"
        ) from error
    config = {"timm_model_name": name, "timm_pool": "", "timm_proj": "linear"}
    return config | {"timm_proj_bias": model.image_tower.proj.bias is not None}, layouts.TIMM


def _compare_by_name(model: DualEncoder, name: str) -> None:
    """Compare the image tower with the trunk that timm builds of a name alone, without classifier."""
    if not timm.is_model(name):
        raise ValueError("it is none of timm's names")
    tower, size = model.image_tower, model.preprocessor.size
    with torch.random.fork_rng(devices=[]):
        trunk: Any = timm.create_model(name, pretrained=False)
    trunk.reset_classifier(0)
    norm = {f"norm.{part}": tensor for part, tensor in tower.norm.state_dict().items()}
    trunk.load_state_dict({**tower.trunk.state_dict(), **norm})
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected, features = tower(pixels.to(model.device)).pre_logits.cpu(), trunk.eval()(pixels)
    torch.testing.assert_close(features, expected, atol=CLOSE, rtol=CLOSE)
