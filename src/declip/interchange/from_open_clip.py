"""A model of open_clip's as one of ours, where ours can express it: to train it further, measure it, export it.

CLIP's ViT, CLIP's ResNet and timm towers with a linear projection, with CLIP's text tower and tokenizer. The result is
compared with open_clip's, pictures and captions included, so that nothing is taken for what it is not. The mask's row
of the vocabulary, which open_clip does not have, is the mean of the others.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from declip.errors import UserError
from declip.interchange.clip_layout import RESNET_NAMES, VIT_NAMES, VitSizes, merges_key, rename, vit_keys
from declip.interchange.declip_file import first_difference
from declip.interchange.open_clip import OpenClip
from declip.models.dual_encoder import DualEncoder
from declip.recipe.load import load_recipe

FURTHEST = 1e-4
"""How far features, of length 1, may be from open_clip's."""

CAPTIONS = ("a red circle", "Two CATS &amp; a dog, asleep on a sofa", "")


def from_open_clip(opened: OpenClip) -> DualEncoder:
    """Build our model with the weights, tokenizer, image statistics and logit scale of one of open_clip's.

    Args:
        opened: What `read_open_clip` gave.

    Returns:
        The model, in training mode, on the CPU, in float32. Its recipe is that of CLIP with these sizes.

    Raises:
        UserError: ours cannot express it; what differs is named.
    """
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
        raise _refused(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    if difference:
        raise _refused(difference)
    model.load_state_dict(ours)
    _compare(model, opened)
    return model.train()


def _towers(opened: OpenClip) -> tuple[dict[str, Any], Callable[[str], str]]:
    """The recipe's keys, and open_clip's name for each of our image tower's."""
    model, prepared = opened.model, opened.preprocessor.config
    if type(model).__name__ != "CLIP":
        raise UserError(f"it is a {type(model).__name__}, not a CLIP")
    size = prepared.size if isinstance(prepared.size, int) else prepared.size[0]
    if prepared.interpolation != "bicubic" or prepared.resize_mode != "shortest":
        raise UserError(f"its pictures are resized {prepared.resize_mode}, {prepared.interpolation}")
    block = model.transformer.resblocks[0]
    image, names = _image_tower(model.visual)
    return {
        **image,
        "image.size": size,
        "image.mean": list(prepared.mean),
        "image.std": list(prepared.std),
        "embed_dim": _columns(model.text_projection),
        "text.width": model.ln_final.normalized_shape[0],
        "text.layers": len(model.transformer.resblocks),
        "text.heads": block.attn.num_heads,
        "text.context_length": len(model.positional_embedding),
        "text.bpe_merges": merges_key(len(model.token_embedding.weight)),
        "text.projection_bias": getattr(model.text_projection, "bias", None) is not None,
        "text.activation": _activation(block),
    }, names


def _image_tower(tower: Any) -> tuple[dict[str, Any], Callable[[str], str]]:
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
    """Bring a tensor of theirs into our form: a mask follows the vocabulary, and some shapes are not ours."""
    if name == "token_embedding.weight":
        return torch.cat([theirs, theirs.mean(dim=0, keepdim=True)])
    if name in {"visual.proj", "text_projection"}:
        return theirs.T
    fits = name in {"visual.class_embedding", "visual.positional_embedding", "logit_scale"}
    return theirs.reshape(ours.shape) if fits and theirs.numel() == ours.numel() else theirs


def _columns(projection: Any) -> int:
    return int(projection.shape[1] if isinstance(projection, Tensor) else projection.out_features)


def _activation(block: Any) -> str:
    return "quick_gelu" if type(block.mlp.gelu).__name__ == "QuickGELU" else "gelu"


def _compare(model: DualEncoder, opened: OpenClip) -> None:
    """From pictures and captions to features, both ways.

    Raises:
        UserError: they differ.
    """
    noise = torch.randint(0, 256, (57, 91, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pictures = [Image.fromarray(noise.numpy()), Image.fromarray(noise.numpy()).resize((40, 333))]
    model.eval()
    with torch.no_grad():
        images = model.encode_image(model.preprocess(pictures)) - opened.encode_image(opened.preprocess(pictures))
        texts = model.encode_text(model.tokenize(CAPTIONS)) - opened.encode_text(opened.tokenize(list(CAPTIONS)))
    for what, difference in (("pictures", images), ("captions", texts)):
        if not float(difference.abs().max()) <= FURTHEST:
            raise _refused(f"its features of {what} come out otherwise, by {difference.abs().max():.1e}")


def _refused(reason: str) -> UserError:
    return UserError(
        f"This model of open_clip's cannot become one of ours: {reason.rstrip('.')}. It can be used as it is: "
        "declip evaluate open_clip:…"
    )
