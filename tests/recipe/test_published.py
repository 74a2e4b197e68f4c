"""Every published recipe against the official configuration files (Sense-GVT/DeCLIP at 5d99a85, experiments/)."""

import math

import pytest
import torch

from declip.data.plan import plan_views
from declip.models.dual_encoder import DualEncoder
from declip.recipe.load import load_recipe, recipe_names
from declip.recipe.schema import ImageView
from declip.supervision.objective import Objective, needs_of
from declip.training.optimizer import build_optimizer, decays, learning_rate, named_trainable

TABLE = """
recipe                 embed optimizer decay first peak warmup steps  pairs ranks images        scale weights
clip-yfcc15m-vitb32    512   adamw     0.1   1e-4  1e-3 2500   128001 128   32    STANDARD_SLIP 3-6   clip=1
clip-yfcc15m-r50       1024  adamw     0.1   1e-4  1e-3 2500   128001 128   32    STANDARD_SLIP 3-6   clip=1
slip-yfcc15m-vitb32    512   adamw     0.5   1e-4  5e-4 2500   128001 128   32    SLIP          3-6   clip=1,simclr=1
slip-yfcc15m-r50       1024  adamw     0.5   1e-4  5e-4 2500   128001 128   32    SLIP          3-6   clip=1,simclr=1
filip-yfcc15m-vitb32   768   adamw     0.5   1e-4  5e-4 2500   128001 128   32    MOCOV2        3-6   filip=1
filip-yfcc15m-r50      1024  adamw     0.5   1e-4  5e-4 2500   128001 128   32    MOCOV2        3-6   filip=1
declip-yfcc15m-vitb32  512   adamw     0.1   1e-4  1e-3 2500   128001 128   32    MOCOV2        3-6   clip=0.4
declip-yfcc15m-r50     1024  adamw     0.1   1e-4  1e-3 2500   128001 128   32    MOCOV2        3-6   clip=0.4
defilip-yfcc15m-vitb32 512   adamw     0.1   1e-4  1e-3 2500   128001 128   32    MOCOV2        3-6   clip=0.4,filip=0.2
declip-88m-vitb32      3072  sgd       0     1e-3  0.2  5000   300001 64    64    MOCOV2        3-3   clip=0.6
declip-88m-r50         1024  sgd       1e-4  1e-3  0.2  2500   46001  128   32    MOCOV2        3-    clip=0.4
"""
"""`pairs` are per process; the files have no number of processes (`ranks`): 32 are the README's for YFCC15M. A scale of
3-3 is one that starts at 3 and has the learning rate 0. The files of DeCLIP and DeFILIP also have `DECLIP`."""

HEAD, *ROWS = (line.split() for line in TABLE.strip().splitlines())
ROWS = {row[0]: dict(zip(HEAD, row, strict=True)) for row in ROWS}
DECLIP = {"nearest_neighbor": 0.2, "simsiam": 0.2, "masked_language": 0.2}
NAMES = {"clip": "contrastive", "simclr": "simclr", "filip": "late_interaction"}

MOCOV2 = ImageView(
    scale=(0.2, 1), color_jitter=(0.4, 0.4, 0.4, 0.1), color_jitter_prob=0.8, grayscale_prob=0.2, blur_prob=0.5,
    hflip_prob=0.5,
)  # fmt: skip
STANDARD_SLIP = ImageView(
    scale=(0.5, 1), color_jitter_prob=0, grayscale_prob=0, blur_prob=0, hflip_prob=0
)
VIEWS = {
    "STANDARD_SLIP": [STANDARD_SLIP],
    "SLIP": [STANDARD_SLIP, MOCOV2, MOCOV2],
    "MOCOV2": [MOCOV2, MOCOV2],
}
"""`prototype/data/imagenet_dataloader.py`"""


@pytest.fixture(params=ROWS)
def published(request):
    """A recipe, and its row."""
    return load_recipe(request.param), ROWS[request.param]


def test_the_table_has_every_published_recipe():
    official = {name for name in recipe_names() if "-yfcc15m-" in name or "-88m-" in name}
    assert set(ROWS) == {name for name in official if not name.endswith("-vitb16")}


@pytest.mark.parametrize("pairs", ["yfcc15m", "cc3m"])
def test_two_views_against_one_caption_count_a_half_each(pairs):
    recipe = load_recipe(f"multi-view-{pairs}-vitb16")
    assert recipe.active_losses == {"contrastive": 0.5, "multi_view": 0.5}
    mild = MOCOV2.model_copy(update={"scale": (0.5, 1), "blur_prob": 0, "hflip_prob": 0})
    plan = plan_views(recipe, needs_of(recipe))
    assert ([view.augmentation for view in plan.views], plan.texts) == ([mild, mild], 1)
    single = load_recipe(recipe.name, {"loss_weights": {"contrastive": 1.0}})
    control = plan_views(single, needs_of(single))
    assert ([view.augmentation for view in control.views], control.texts) == ([mild], 1)


@pytest.mark.parametrize("method", ["clip", "declip"])
def test_smaller_patches_change_the_tower_alone(method):
    large, small = (load_recipe(f"{method}-yfcc15m-vitb{patch}") for patch in (32, 16))
    image = large.image.model_copy(update={"model": "vit_base_patch16_clip_quickgelu_224"})
    assert small == large.model_copy(update={"image": image, "name": small.name})


def test_losses_and_sizes(published):
    recipe, row = published
    weights = {
        NAMES[name]: float(weight)
        for name, weight in (part.split("=") for part in row["weights"].split(","))
    }
    if recipe.name.startswith("de"):  # the mean of four pairings
        clip = weights.pop("contrastive")
        weights |= {"contrastive": clip / 4, "multi_view": clip * 3 / 4, **DECLIP}
    assert recipe.active_losses == pytest.approx(weights)
    towers = {
        "vitb32": ("vit_base_patch32_clip_quickgelu_224", True),
        "r50": ("resnet50_clip", False),
    }
    image, text = recipe.image, recipe.text
    assert (image.model, image.freeze_patch_embed) == towers[recipe.name.rsplit("-")[-1]]
    assert (text.width, text.layers, text.heads, text.context_length) == (512, 12, 8, 77)
    assert recipe.embed_dim == int(row["embed"])
    assert (recipe.simsiam.widths, recipe.simclr.widths) == ((1024, 1024, 512), (4096, 256))
    assert (recipe.nearest_neighbor.queue_size, recipe.contrastive.label_smoothing) == (2**16, 0)
    assert recipe.nearest_neighbor.queue_per_process == recipe.name.startswith("de")
    filip = recipe.late_interaction
    assert "filip" not in row["weights"] or (filip.width, filip.top_k, filip.include_padding) == (
        256,
        16,
        True,
    )
    low, high = row["scale"].split("-")
    scale = recipe.logit_scale
    assert scale.min == float(low)
    largest = math.log(100)  # where the forward pass of the others caps it
    if high == "3" or recipe.name.startswith(("slip", "filip")):
        largest = float(high)
    assert scale.max == pytest.approx(largest)
    assert scale.init == (3 if high == "3" else pytest.approx(math.log(1 / 0.07)))


def test_pixels_and_captions(published):
    recipe, row = published
    plan, image = plan_views(recipe, needs_of(recipe)), recipe.image
    views = VIEWS[row["images"]][
        : 1 if recipe.name.startswith("filip") else None
    ]  # theirs drops the second
    assert [view.augmentation for view in plan.views] == views
    assert {(view.size, view.interpolation) for view in plan.views} == {(224, "bilinear")}
    assert (plan.mean, plan.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (image.size, image.interpolation, image.size / image.crop_pct) == (224, "bilinear", 256)
    masks = not recipe.name.startswith(("clip", "slip"))
    assert (plan.mask_probability, plan.texts) == (
        0.15 if masks else None,
        2 if recipe.name.startswith("de") else 1,
    )
    assert recipe.views.text.second_view == "eda"


def test_optimizer_and_schedule(published):
    recipe, row = published
    train = recipe.train
    assert train.batch_size == int(row["pairs"]) * int(row["ranks"])
    assert (train.steps, train.warmup_steps) == (int(row["steps"]) - 1, int(row["warmup"]))
    rates = [learning_rate(step, train) for step in (0, train.warmup_steps - 1, train.steps - 1)]
    assert rates == pytest.approx([float(row["first"]), float(row["peak"]), 0], abs=1e-12)
    assert train.grad_clip_norm is None
    optimizer = build_optimizer([("weight", torch.nn.Parameter(torch.ones(2, 2)))], train)
    sgd = {"momentum": 0.9, "nesterov": True, "dampening": 0}
    expected = {"adamw": {"betas": (0.9, 0.98), "eps": 1e-8}, "sgd": sgd}[row["optimizer"]]
    (group,) = optimizer.param_groups
    assert {name: group[name] for name in expected} == expected
    assert group["weight_decay"] == float(row["decay"])


@pytest.mark.parametrize("name", ["defilip-yfcc15m-vitb32", "declip-yfcc15m-r50"])
def test_weight_decay_differs_in_positions_and_biases_of_attention_alone(name):
    """Theirs spares biases of layers, norms and logit scales (`param_group_all`); docs/method.md has the difference."""
    recipe = load_recipe(name)
    with torch.device("meta"):
        model = DualEncoder(recipe)
        named = named_trainable(model, Objective(recipe, model))
    fused = ("in_proj_bias", "qkv.bias")
    theirs = {key for key, p in named if p.ndim > 1 or key.endswith(fused)}
    ours = {key for key, p in named if decays(key, p)}
    assert ours <= theirs
    spared = {"cls_token", "pos_embed", "positional_embedding", "in_proj_bias", "bias"}
    assert {key.rpartition(".")[2] for key in theirs - ours} <= spared
    assert all(key.endswith(fused) for key in theirs - ours if key.endswith("bias"))
