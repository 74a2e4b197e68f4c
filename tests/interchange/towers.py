"""What the tests of exports and imports share: small models of each kind, real pictures of odd sizes, captions."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

import declip
from conftest import draw
from declip.interchange.classes import Classes
from declip.interchange.weights import Weights
from declip.models.dual_encoder import DualEncoder
from declip.models.layers import PROJECTIONS
from declip.models.neighbors import NeighborProjection
from declip.models.posteriors import PosteriorProjection
from declip.recipe.load import load_recipe

EXACT = 1e-5
TEXT = {
    "text.width": 32,
    "text.layers": 2,
    "text.heads": 2,
    "text.context_length": 16,
    "text.bpe_merges": 300,
}
TEXT |= {"embed_dim": 16}
VIT = {
    "image.model": "declip_vit_tiny",
    "image.size": 32,
    "image.model_kwargs": {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2},
}
KINDS = {
    "vit": {**VIT, **TEXT},
    "vit-mixed": {**VIT, **TEXT, "text.activation": "gelu"},
    "vit-bias": {
        **VIT, **TEXT, "image.model": "vit_base_patch32_clip_224", "text.activation": "gelu",
        "text.projection_bias": True, "image.mean": [0.5, 0.4, 0.3], "image.std": [0.2, 0.3, 0.4],
    },
    "vit-clip-words": {**VIT, **TEXT, "text.bpe_merges": None},
    "resnet": {
        "image.model": "resnet50_clip", "image.size": 64,
        "image.model_kwargs": {"depths": [1, 2, 1, 1], "width_factor": 1 / 8}, **TEXT,
    },
    "timm-vit": {"image.model": "test_vit", "image.size": 160, **TEXT},
    "timm-convnext": {"image.model": "test_convnext", "image.size": 64, **TEXT},
    "timm-vit-32": {"image.model": "test_vit", "image.size": 32, **TEXT},
    "conv": {"image.model": "declip_conv_tiny", "image.size": 32, **TEXT},
}  # fmt: skip
"""Recipe keys of small models, two layers deep."""

PIXELS = {"image.interpolation": "bilinear", "image.crop_pct": 0.875}
"""As in the official implementation."""

CAPTIONS = [
    "a red circle",
    "Two GREEN squares, on white!",
    "it's a dog's life; 1,234 ways to <b>sit</b> &amp; wait",
    "“curly” quotes, ‘single’ ones, and a naïve café",
    "日本語 and 😀",
    "a  tab\tand <|endoftext|> spelled out",
    "!",
    "",
    "nought " * 40,
]
TYPED = [
    "it’s a dog’s life",
    "“quoted” and ‘single’",
    "salt &amp;amp; pepper",
    " two  spaces,\ta tab",
    "naïve café",
]
"""Captions that tokenizer.json cleans; what it cannot repair are encodings and ligatures."""
BROKEN = ["schÃ¶n", "ﬁne"]


def build(kind, **changes):
    """A small model in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return spread(DualEncoder(load_recipe("few-clip", {**KINDS[kind], **changes})))


def spread(model):
    """Leave no weight at its start, so that all matter."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.nan_to_num_().add_(0.05 * torch.randn_like(weight))
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(0.3 * torch.rand_like(buffer))
    return model.eval()


def unprojected(kind="conv", size=64, **changes):
    """Weights of two towers without projections, with a classifier of 60 classes for images of a size."""
    torch.manual_seed(0)
    recipe = load_recipe("few-clip", {**KINDS[kind], **changes})
    model = DualEncoder(recipe)
    tensors = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(PROJECTIONS)
    }
    rows = torch.randn(60, model.image_tower.pre_logits_width)
    names = tuple(f"a thing of the kind {number}" for number in range(60))
    return Weights(
        recipe, tensors, "start", classes=Classes(rows, torch.rand(rows.shape[1]), names, size=size)
    )


def add_neighbors(model, count=70, width=24):
    """Let both projections of a model compare with known pairs, and with its classes if it has some."""
    image, text = model.image_tower, model.text_tower
    sides = [image.proj, text.text_projection]
    of_image, of_text = [getattr(side, "projection", side) for side in sides]
    classes = len(of_image.classes) if isinstance(of_image, PosteriorProjection) else 0
    known = count + classes
    axes = (len(of_image.weight) + known + classes, width)
    image.proj = NeighborProjection(of_image, known, image.pre_logits_width, axes)
    text.text_projection = NeighborProjection(of_text, known, text.width, axes)
    model.recipe = model.recipe.model_copy(update={"embed_dim": width})
    generator = torch.Generator().manual_seed(1)
    shared_axes = torch.randn(axes, generator=generator)
    for projection in (image.proj, text.text_projection):
        anchors = torch.randn(projection.anchors.shape, generator=generator)
        projection.anchors.copy_(normalize(anchors, dim=-1))
        projection.mean.copy_(torch.randn(projection.mean.shape, generator=generator))
        projection.weights.copy_(torch.tensor([1.0, 0.5]))
        projection.axes.copy_(shared_axes)
    return model


def pictures():
    """Photographs and drawings, wide and high, smaller and larger than what a tower takes, sides odd and even."""
    return [*_pictures()]


@cache
def _pictures():
    sklearn = Path(find_spec("sklearn").origin).parent  # not imported, which takes a second
    photographs = [
        Image.open(sklearn / "datasets/images" / name) for name in ("china.jpg", "flower.jpg")
    ]
    noise = np.random.default_rng(3).integers(0, 256, (51, 90, 3), np.uint8)
    return [
        *photographs,
        photographs[0].crop((7, 3, 340, 220)),
        photographs[1].crop((0, 0, 97, 401)),
        photographs[1].resize((33, 32)),
        photographs[0].resize((225, 224)),
        Image.fromarray(noise),
        draw("red", "bar", 21),
        photographs[0].convert("L"),
    ]


def largest(found, expected):
    """The largest difference of two tensors of the same shape."""
    assert found.shape == expected.shape
    return (found - expected).abs().max().item()


def export_exactly(model, form, out):
    """Export a model to a folder from which its library reads the same features."""
    exported = declip.export(model, form, out)
    assert exported.difference is not None
    assert exported.difference <= EXACT
    return out
