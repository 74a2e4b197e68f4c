"""Models of open_clip as models of ours, and ours as folders of open_clip's.

Reading: CLIP's ViT, CLIP's ResNet and timm towers with a linear projection, with CLIP's text tower and tokenizer. The
result is compared with open_clip's, images and captions included. The mask's row of the vocabulary, which open_clip
does not have, is the mean of the others.

Writing: open_clip loads the folder by the name ``local-dir:FOLDER``. CLIP's ViT and CLIP's ResNet become open_clip's
own towers, whatever their sizes; every other timm model goes through open_clip's `TimmModel`, which takes a name alone:
neither options nor, where it matters, another image size. A BERT or RoBERTa makes the model open_clip's
`CustomTextCLIP`, whose text tower is built from a configuration that ``hf_model_name`` leads to.
"""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from declip.data.text.tokenizer import Tokenizer
from declip.errors import UserError
from declip.interchange.clip_layout import (
    CLIP_MERGES,
    NO_MERGES,
    RESNET_NAMES,
    VIT_NAMES,
    VitSizes,
    merges_key,
    rename,
    resnet_sizes,
    text_sizes,
    vit_keys,
    vit_sizes,
    without_mask,
)
from declip.interchange.foreign import CLIP_TEXT, CLIP_VIT, NO_BIAS, Refusal, Reread, clip_text_tower
from declip.interchange.open_clip_model import CONFIG, OpenClip, load_open_clip, matches
from declip.interchange.tokenizer_files import write_tokenizer
from declip.interchange.weights import Weights, first_difference, one_line
from declip.io.atomic import save_tensors
from declip.models.dual_encoder import DualEncoder
from declip.models.hf_encoder import CONFIG as ENCODER
from declip.models.hf_encoder import PREFIX as HUB_ENCODER
from declip.models.hf_encoder import TextEncoder
from declip.models.hf_text_tower import HuggingfaceTextTower
from declip.models.image_tower import ImageTower
from declip.models.text_tower import TextTower
from declip.recipe.load import load_recipe

__all__ = ["matches", "read", "write"]

log = logging.getLogger("declip")

WEIGHTS = "open_clip_model.safetensors"
CLOSE = 1e-4
"""Largest difference of features, of length 1, between a model here and in open_clip."""

CAPTIONS = ("a red circle", "Two CATS &amp; a dog, asleep on a sofa", "")

ENCODERS = ("bert", "roberta", "xlm-roberta")
"""Kinds of text encoders that both open_clip 3.3 and declip build."""

POOLERS = {"cls": "cls_last_hidden_state_pooler", "mean": "mean_pooler"}

USAGE = """
import open_clip, torch
from PIL import Image

folder = "."  # this folder
model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")  # needs transformers where there is a tokenizer.json
image = Image.new("RGB", (320, 240), "orange")  # your image
with torch.no_grad():
    images = model.eval().encode_image(preprocess(image)[None], normalize=True)
    texts = model.encode_text(tokenizer(["an orange square", "a cat"]), normalize=True)
print((model.logit_scale.exp() * images @ texts.T).softmax(dim=-1))
"""

Part = tuple[dict[str, Any], dict[str, Tensor]]
"""A part of open_clip's configuration, and its tensors."""


def read(where: str) -> Weights:
    """Read a name or folder of open_clip's as a model of ours.

    Raises:
        UserError: see `load_open_clip` and `convert`.
    """
    return convert(load_open_clip(where), where)


def convert(opened: OpenClip, origin: str = "the model") -> Weights:
    """Convert weights, tokenizer, image statistics and logit scale of a model of open_clip's."""
    try:
        keys, names = _towers(opened)
        recipe = load_recipe("clip", {"name": "from-open-clip", **keys})
        with torch.random.fork_rng(devices=[]):
            model = DualEncoder.from_recipe(recipe)
        theirs = {name: tensor.detach().cpu().float() for name, tensor in opened.model.state_dict().items()}
        expected = model.state_dict()
        places = {name: _their_name(name, names, theirs) for name in expected}
        ours = {
            name: _fitted(place, theirs.pop(place), expected[name]) for name, place in places.items() if place in theirs
        }
        difference = first_difference(expected, {**ours, **theirs})
    except UserError as error:
        raise _refused(str(error)) from error
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:  # a tower of another kind
        raise _refused(f"{type(error).__name__}: {one_line(error, 200)}") from error
    if difference:
        raise _refused(difference)
    model.load_state_dict(ours)
    _compare(model, opened)
    return Weights(recipe, model.state_dict(), origin)


def _towers(opened: OpenClip) -> tuple[dict[str, Any], Callable[[str], str]]:
    """The recipe's keys, and open_clip's name for each of our image tower's."""
    model, prepared = opened.model, opened.preprocessor.config
    if type(model).__name__ != "CLIP":
        raise UserError(f"it is a {type(model).__name__}, not a CLIP")
    size = prepared.size if isinstance(prepared.size, int) else prepared.size[0]
    if prepared.interpolation != "bicubic" or prepared.resize_mode != "shortest":
        raise UserError(f"its images are resized {prepared.resize_mode}, {prepared.interpolation}")
    block, projection = model.transformer.resblocks[0], model.text_projection
    image, names = _their_image_tower(model.visual)
    return {
        **image,
        "image.size": size,
        "image.mean": list(prepared.mean),
        "image.std": list(prepared.std),
        "embed_dim": projection.shape[1] if isinstance(projection, Tensor) else projection.out_features,
        "text.width": model.ln_final.normalized_shape[0],
        "text.layers": len(model.transformer.resblocks),
        "text.heads": block.attn.num_heads,
        "text.context_length": len(model.positional_embedding),
        "text.bpe_merges": merges_key(len(model.token_embedding.weight)),
        "text.projection_bias": getattr(projection, "bias", None) is not None,
        "text.activation": _activation(block),
    }, names


def _their_image_tower(tower: Any) -> tuple[dict[str, Any], Callable[[str], str]]:
    if hasattr(tower, "trunk"):
        name = tower.trunk.default_cfg["architecture"]
        places = {"proj.": "head.proj.", "norm.": "trunk.norm."}
        return {"image.model": name}, lambda ours: next(
            (theirs + ours.removeprefix(start) for start, theirs in places.items() if ours.startswith(start)), ours
        )
    if hasattr(tower, "attnpool"):
        options = {
            "depths": [len(getattr(tower, f"layer{stage}")) for stage in (1, 2, 3, 4)],
            "width_factor": len(tower.attnpool.c_proj.weight[0]) / 2048,
        }
        return {"image.model": "resnet50_clip", "image.model_kwargs": options}, lambda name: rename(name, RESNET_NAMES)
    block = tower.transformer.resblocks[0]
    width, _, patch, _ = tower.conv1.weight.shape
    sizes = VitSizes(
        width=width,
        layers=len(tower.transformer.resblocks),
        heads=block.attn.num_heads,
        patch=patch,
        hidden=len(block.mlp.c_fc.weight),
        activation=_activation(block),
        eps=block.ln_1.eps,
    )
    return vit_keys(sizes), lambda name: rename(name, VIT_NAMES)


def _their_name(name: str, image: Callable[[str], str], theirs: Mapping[str, Tensor]) -> str:
    tower, _, rest = name.partition(".")
    if tower == "image_tower":
        return f"visual.{image(rest)}"
    return "text_projection" if rest == "text_projection.weight" and "text_projection" in theirs else rest or tower


def _fitted(name: str, theirs: Tensor, ours: Tensor) -> Tensor:
    """Bring a tensor of theirs into our form: a mask follows the vocabulary, and some shapes differ."""
    if name == "token_embedding.weight":
        return torch.cat([theirs, theirs.mean(dim=0, keepdim=True)])
    if name in {"visual.proj", "text_projection"}:
        return theirs.T
    fits = name in {"visual.class_embedding", "visual.positional_embedding", "logit_scale"}
    return theirs.reshape(ours.shape) if fits and theirs.numel() == ours.numel() else theirs


def _activation(block: Any) -> str:
    return "quick_gelu" if type(block.mlp.gelu).__name__ == "QuickGELU" else "gelu"


def _compare(model: DualEncoder, opened: OpenClip) -> None:
    """Compare the features of images and captions with open_clip's."""
    noise = torch.randint(0, 256, (57, 91, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = [Image.fromarray(noise.numpy()), Image.fromarray(noise.numpy()).resize((40, 333))]
    model.eval()
    with torch.no_grad():
        visual = model.encode_image(model.preprocess(images)) - opened.encode_image(opened.preprocess(images))
        texts = model.encode_text(model.tokenize(CAPTIONS)) - opened.encode_text(opened.tokenize(list(CAPTIONS)))
    for kind, difference in (("images", visual), ("captions", texts)):
        if not float(difference.abs().max()) <= CLOSE:
            raise _refused(f"its features of {kind} come out differently, by {difference.abs().max():.1e}")


def _refused(reason: str) -> UserError:
    return UserError(
        f"This model of open_clip's cannot become one of ours: {reason.rstrip('.')}. It can be used as it is: "
        "declip evaluate open_clip:…"
    )


def write(model: DualEncoder, folder: Path, repo: str | None = None, home: Path | None = None) -> None:
    """Write open_clip_config.json, weights and, for a vocabulary other than CLIP's, a Hugging Face tokenizer.

    Args:
        model, folder: What to write and where.
        repo: The repository, OWNER/NAME, that the folder will be on the Hub: there open_clip finds tokenizer and text
            encoder by their names alone.
        home: Where the folder will be; `folder` by default.
    """
    config, tensors = express(model, repo or str((home or folder).absolute()))
    text_config = config["model_cfg"]["text_cfg"]
    if isinstance(model.text_tower, HuggingfaceTextTower):
        encoder = TextEncoder.from_tensor(model.text_tower.get_extra_state())
        (folder / ENCODER).write_text(json.dumps(dict(encoder.config), indent=2) + "\n", encoding="utf-8")
    if text_config.get("hf_model_name") or text_config["vocab_size"] != NO_MERGES + CLIP_MERGES:
        # Of a folder open_clip takes the tokenizer that lies in it, whatever the name; of a repository the name's.
        text_config["hf_tokenizer_name"] = repo or "tokenizer.json"
        write_tokenizer(model.tokenizer, folder)
        if repo is None:
            log.warning("This folder loads as local-dir:FOLDER alone. For the Hub export it with --repo OWNER/NAME.")
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_tensors(contiguous, folder / WEIGHTS, {"format": "pt"})


def express(model: DualEncoder, place: str = ".") -> Part:
    """Give open_clip's configuration and tensors; `place` is the folder or repository where the files will be."""
    if isinstance(model.text_tower, HuggingfaceTextTower):
        text_config, texts = _text_encoder(model, model.text_tower, place)
        sizes = vit_sizes(model.image_tower)
        activation = "gelu" if isinstance(sizes, str) else sizes.activation
    else:
        text = clip_text_tower(model)
        activation = text_sizes(text)["activation"]
        text_config, texts = _text_config(model, text), text_tensors(text)
    vision_config, images = image_tower(model, activation)
    preprocessor = model.preprocessor
    config = {
        "model_cfg": {
            "embed_dim": model.image_tower.proj.out_features,
            "quick_gelu": activation == "quick_gelu",
            "vision_cfg": {"image_size": preprocessor.size, **vision_config},
            "text_cfg": text_config,
        },
        "preprocess_cfg": {
            "size": preprocessor.size,
            "mode": "RGB",
            "mean": [round(value, 8) for value in preprocessor.mean.tolist()],
            "std": [round(value, 8) for value in preprocessor.std.tolist()],
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
    tensors = {f"visual.{name}": tensor for name, tensor in images.items()}
    return config, tensors | texts | {"logit_scale": model.logit_scale}


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


def _text_config(model: DualEncoder, text: TextTower) -> dict[str, Any]:
    assert isinstance(model.tokenizer, Tokenizer)
    sizes = text_sizes(text)
    config = {
        "context_length": sizes["context"],
        "vocab_size": len(without_mask(text)),
        "width": sizes["width"],
        "heads": sizes["heads"],
        "layers": sizes["layers"],
        "proj_bias": text.text_projection.bias is not None,
    }
    return config if model.tokenizer.merges == CLIP_MERGES else config | {"tokenizer_kwargs": {"clean": "lower"}}


def text_tensors(text: TextTower) -> dict[str, Tensor]:
    """CLIP's text tower by open_clip's names."""
    state = text.state_dict()
    state["token_embedding.weight"] = without_mask(text)
    if text.text_projection.bias is None:
        state["text_projection"] = state.pop("text_projection.weight").T
    return state


def _text_encoder(model: DualEncoder, tower: HuggingfaceTextTower, place: str) -> Part:
    """A text encoder of transformers'; its configuration is found by its name on the Hub, or lies in the folder."""
    encoder = TextEncoder.from_tensor(tower.get_extra_state())
    kind = encoder.config["model_type"]
    if kind not in ENCODERS:
        raise Refusal(f"its text encoder is a {kind}, and open_clip has {', '.join(ENCODERS)}", CLIP_TEXT)
    if tower.pooling not in POOLERS:
        raise Refusal(f"its text tower pools at the {tower.pooling}", "train with text.pooling=cls or mean")
    if tower.text_projection.bias is not None:
        raise Refusal("it has a bias after its text projection", NO_BIAS)
    given = (model.recipe.text.hf_model if model.recipe else None) or ""
    config = {
        "context_length": tower.context,
        "vocab_size": encoder.config["vocab_size"],
        "hf_model_name": given.removeprefix(HUB_ENCODER) if given.startswith(HUB_ENCODER) else place,
        "hf_proj_type": "linear",
        "hf_pooler_type": POOLERS[tower.pooling],
    }
    tensors = {f"text.transformer.{part}": tensor for part, tensor in tower.encoder.state_dict().items()}
    return config, tensors | {"text.proj.weight": tower.text_projection.weight}


def image_tower(model: DualEncoder, text_act: str) -> Part:
    """The image tower by open_clip's names: CLIP's ViT or ResNet, else a timm model by its name."""
    tower = model.image_tower
    state = tower.state_dict()
    vit, resnet = vit_sizes(tower), resnet_sizes(tower)
    if not isinstance(vit, str) and vit.activation == text_act and vit.width % vit.heads == 0:
        config = {
            "layers": vit.layers,
            "width": vit.width,
            "head_width": vit.width // vit.heads,
            "patch_size": vit.patch,
            "mlp_ratio": vit.hidden / vit.width,
            "norm_kwargs": {"eps": vit.eps},
        }
        tensors = {rename(name, VIT_NAMES): tensor for name, tensor in state.items()}
        shapes: dict[str, Callable[[Tensor], Tensor]] = {
            "class_embedding": torch.flatten, "positional_embedding": torch.squeeze, "proj": torch.t,
        }  # fmt: skip
        return config, {name: shapes.get(name, torch.Tensor.detach)(tensor) for name, tensor in tensors.items()}
    if not isinstance(resnet, str):
        head_width = resnet.width * 32 // resnet.heads
        config = {"layers": list(resnet.layers), "width": resnet.width, "head_width": head_width, "patch_size": None}
        return config, {rename(name, RESNET_NAMES): tensor for name, tensor in state.items()}
    if isinstance(vit, str):
        return _timm_tower(model, f"its image tower is not CLIP's ViT ({vit}) nor CLIP's ResNet", CLIP_VIT)
    reason = f"its image tower computes with {vit.activation}, its text tower with {text_act}"
    return _timm_tower(model, reason, f"train with text.activation={vit.activation}")


def _timm_tower(model: DualEncoder, reason: str, way_out: str) -> Part:
    """The tower as open_clip builds it: the trunk without classifier by its name alone, then a linear map."""
    tower, size = model.image_tower, model.preprocessor.size
    name = model.recipe.image.model if model.recipe else ""
    try:
        trunk, state = _by_name(tower, name)
        pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        expected, features = tower(pixels.to(model.device)).pre_logits.cpu(), trunk(pixels)
        if features.shape != expected.shape or trunk.num_features != features.shape[1]:
            raise ValueError(f"features of {trunk.num_features} instead of {expected.shape[1]} numbers")
        if not torch.allclose(features, expected, atol=CLOSE, rtol=CLOSE):
            raise ValueError(f"features that differ by {(features - expected).abs().max():.2g}")
    except Exception as error:  # of whatever kind: timm's models fail in their own ways where options are missing
        raise Refusal(
            f"{reason}, and of other towers open_clip takes a timm name alone, without image.model_kwargs and at the "
            f"timm model's own image size; that gives another network than this one ('{name}', {size} px): "
            f"{one_line(error, 160)}",
            way_out,
        ) from error
    tensors = {f"trunk.{part}": tensor for part, tensor in state.items()}
    tensors |= {f"head.proj.{part}": tensor for part, tensor in tower.proj.state_dict().items()}
    config = {"timm_model_name": name, "timm_pool": "", "timm_proj": "linear"}
    return config | {"timm_proj_bias": tower.proj.bias is not None}, tensors


def _by_name(tower: ImageTower, name: str) -> tuple[Any, dict[str, Tensor]]:
    """Build the trunk that timm gives for a name, with a tower's weights; also give these by its names."""
    if not timm.is_model(name):
        raise ValueError("it is none of timm's names")
    with torch.random.fork_rng(devices=[]):
        trunk: Any = timm.create_model(name, pretrained=False)
    trunk.reset_classifier(0)
    norm = {f"norm.{part}": tensor for part, tensor in tower.norm.state_dict().items()}
    state = {**tower.trunk.state_dict(), **norm}
    trunk.load_state_dict(state)
    return trunk.eval(), state
