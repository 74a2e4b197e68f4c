"""Image towers of many kinds: features, sizes, and a step of every loss."""

from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
from torch import nn

from conftest import TINY, refuses
from conftest import WEIGHTS as METHODS
from declip.models.dual_encoder import DualEncoder
from declip.models.image_tower import ImageTower
from declip.models.layers import blocks_of, depths
from declip.models.text_tower import TextTower
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe, TextTowerConfig
from declip.supervision.objective import Objective
from declip.training.parallel import build_learner
from declip.training.step import training_step
from supervision.test_objective import random_batch


@pytest.mark.parametrize(
    "name", ["open_clip:ViT-B-32/openai", "timm:vit_tiny_patch16_224.augreg_in21k"]
)
def test_the_name_of_weights_is_not_an_image_tower(name):
    recipe = load_recipe("few-clip", {"image.model": name})
    refuses(rf"image.model={name}.*finetune.pretrained", DualEncoder, recipe)


def test_a_size_that_a_tower_cannot_take_is_named_and_trying_it_changes_nothing():
    tower = ImageTower("resnet50_clip", size=100, embed_dim=24, options={"depths": [1, 1, 1, 1]})
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    random = torch.get_rng_state()
    said = r"'resnet50_clip' does not take images of 100 × 100 pixels"
    refuses(said, tower.refuse_size, "resnet50_clip", 100)
    tower.refuse_size("resnet50_clip", 96)
    assert tower.training
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in tower.state_dict().items())


def test_a_wrong_tower_is_named():
    said = r"tower 'resnet5O'.*Near it: resnet50, .*of your own must be registered"
    refuses(said, ImageTower, "resnet5O", 32, 8)
    for name, options in (("resnet18", {"color": 3}), ("declip_vit_tiny", {"patch_size": "big"})):
        refuses(f"timm cannot build the image tower '{name}'", ImageTower, name, 32, 8, options)
    frozen = partial(ImageTower, size=32, embed_dim=8, freeze_patch_embed=True)
    assert not frozen("declip_vit_tiny").trunk.patch_embed.proj.weight.requires_grad
    refuses("image.freeze_patch_embed=false", frozen, "declip_conv_tiny")


def test_an_image_much_smaller_than_the_tower_was_made_for_is_said_once(caplog):
    for _ in range(2):
        ImageTower("vit_tiny_patch16_224", 48, 8)
        ImageTower("declip_vit_tiny", 48, 8)
    said = [record.message for record in caplog.records if "48" in record.message]
    assert len(said) == 1
    assert "'vit_tiny_patch16_224'" in said[0]


OPENAI = {
    "vit_base_patch32_clip_quickgelu_224": 151_277_313,
    "vit_base_patch16_clip_quickgelu_224": 149_620_737,
    "resnet50_clip": 102_007_137,
}
"""Parameters of OpenAI's CLIP; ours has a word more, the mask, and a bias of the text projection."""


@pytest.mark.parametrize("image", OPENAI)
def test_towers_have_the_size_of_openai(image):
    width = 1024 if image == "resnet50_clip" else 512
    keys = {"image.model": image, "image.freeze_patch_embed": False, "embed_dim": width}
    with torch.device("meta"):
        model = DualEncoder(load_recipe("clip-yfcc15m-vitb32", keys))
    assert sum(p.numel() for p in model.parameters()) == OPENAI[image] + 512 + width


@pytest.mark.parametrize("name", ["declip_vit_tiny", "declip_vit_small", "declip_vit_base"])
def test_heads_of_small_towers_have_64_channels(name):
    with torch.device("meta"):
        block = ImageTower(name, 32, 16).trunk.blocks[0]
    assert block.attn.head_dim == 64


def plain(fan):
    """Standard deviation of PyTorch's default weights and biases."""
    return (3 * fan) ** -0.5


def spreads(module):
    return {
        name: float(p.detach().std()) for name, p in module.named_parameters() if p.numel() > 500
    }


def test_clips_vit_starts_as_the_official_one():
    """With the standard deviations of visual_transformer.py of Sense-GVT/DeCLIP."""
    tower = ImageTower("vit_base_patch32_clip_quickgelu_224", 64, 512, {"depth": 2})
    scale, out = 768**-0.5, 768**-0.5 / 2
    block = {"attn.qkv.weight": scale, "attn.qkv.bias": 0}
    block |= {"attn.proj.weight": out, "attn.proj.bias": 0}
    block |= {"mlp.fc1.weight": 1536**-0.5, "mlp.fc1.bias": plain(768)}
    block |= {"mlp.fc2.weight": out, "mlp.fc2.bias": plain(3072)}
    block |= {f"norm{number}.{kind}": 0 for number in (1, 2) for kind in ("weight", "bias")}
    expected = {"trunk.cls_token": scale, "trunk.pos_embed": 0.01}
    expected |= {"trunk.patch_embed.proj.weight": plain(3 * 32 * 32)}
    for number in (0, 1):
        expected |= {f"trunk.blocks.{number}.{name}": std for name, std in block.items()}
    for norm in ("norm", "trunk.norm_pre"):
        expected |= {f"{norm}.weight": 0, f"{norm}.bias": 0}
    assert spreads(tower) == pytest.approx({**expected, "proj.weight": scale}, rel=0.12)


def test_clips_resnet_starts_as_the_official_one():
    """With the standard deviations of modified_resnet.py of Sense-GVT/DeCLIP."""
    tower = ImageTower("resnet50_clip", 64, 1024)
    expected = {}
    for name, module in tower.named_modules():
        if isinstance(module, nn.Conv2d):
            expected[f"{name}.weight"] = plain(module.weight[0].numel())
    head = {"trunk.head.pos_embed": 2048**-0.5, "proj.weight": 2048**-0.5, "proj.bias": plain(2048)}
    head |= {f"trunk.head.{name}.weight": 2048**-0.5 for name in "qkv"}
    head |= {f"trunk.head.{name}.bias": plain(2048) for name in "qkv"}
    found = {name: std for name, std in spreads(tower).items() if ".bn." not in name}
    assert found == pytest.approx({**expected, **head}, rel=0.12)
    for name, gain in tower.named_parameters():
        if name.endswith("bn.weight"):
            assert float(gain.detach().mean()) == (0.0 if "conv3_1x1" in name else 1.0), name


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("vit_base_patch32_clip_quickgelu_224", "Block", 12),
        ("resnet50_clip", "BottleneckBlock", 16),
        ("fastvit_mci0", "FastVitStage", 4),
        ("mobilenetv4_conv_small", "UniversalInvertedResidual", 12),
    ],
)
def test_blocks_of_towers(name, kind, count):
    with torch.device("meta"):
        tower = timm.create_model(name)
    blocks = blocks_of(tower)
    assert (type(blocks[0]).__name__, len(blocks)) == (kind, count)


def test_blocks_of_the_text_tower_and_of_a_plain_layer():
    tower = TextTower(10, 9, TextTowerConfig(width=8, layers=3, heads=2), embed_dim=4)
    assert blocks_of(tower) == list(tower.transformer.resblocks)
    assert blocks_of(nn.Linear(2, 2)) == []


VIT = {"embed_dim": 64, "depth": 2, "num_heads": 2}
TOWERS = {
    "vit_large_patch14_clip_224": (28, VIT, 4, False),
    "vit_base_patch16_siglip_224": (32, VIT, 4, False),
    "deit_tiny_distilled_patch16_224": (32, VIT, 4, False),  # pools two tokens
    "vit_base_mci_224": (32, {"depth": 1}, 4, True),
    "convnext_tiny": (64, {"depths": [1, 1, 2, 1], "dims": [16, 32, 64, 128]}, 4, False),
    "swin_tiny_patch4_window7_224": (
        64, {"depths": [1, 1, 2, 1], "embed_dim": 24, "num_heads": [1, 2, 4, 8]}, 4, False,
    ),
    "regnety_002": (64, {}, 4, True),
    "fastvit_mci0": (64, {"layers": [1, 1, 2, 1], "embed_dims": [16, 32, 64, 128]}, 4, True),
    "test_efficientnet": (64, {}, 4, True),
}  # fmt: skip
"""Name → image size, options, tokens, whether it has batch norm."""


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_is_timms_and_learns_from_every_term(name):
    """No parameter is left without a gradient, which DDP would wait for, and a step changes the trunk."""
    size, options, cells, batch_norm = TOWERS[name]
    terms = {**METHODS["defilip"], "simclr": 0.1}
    image = {"model": name, "size": size, "model_kwargs": options}
    recipe = Recipe.model_validate({**TINY, "image": image, "loss_weights": terms})
    torch.manual_seed(0)
    model = DualEncoder(recipe)
    tower, images = model.image_tower, torch.randn(2, 4, 3, size, size)
    assert tower.has_batch_norm == batch_norm
    assert depths(model).keys() == {n for n, _ in model.named_parameters()} - {"logit_scale"}
    fixed = {"img_size": size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    theirs = timm.create_model(name, num_classes=0, **options, **fixed)
    _check_features(tower.eval(), theirs, images[0], cells)

    objective = Objective(recipe, model)
    batch = replace(random_batch(4), views={"first": images[0], "second": images[1]})
    learner = build_learner(model.train(), objective.train())
    before = {name: weight.clone() for name, weight in tower.trunk.named_parameters()}
    optimizer = torch.optim.SGD(learner.parameters(), lr=1.0)
    found = training_step(learner, optimizer, batch)
    assert set(found) == {*terms, "loss", "grad_norm"}
    assert all(torch.isfinite(value) for value in found.values())
    assert [name for name, weight in learner.named_parameters() if weight.grad is None] == []
    after = dict(tower.trunk.named_parameters())
    assert not all(torch.equal(after[name], weight) for name, weight in before.items())


def _check_features(tower, theirs, images, cells):
    norm = {f"norm.{part}": weight for part, weight in tower.norm.state_dict().items()}
    theirs.load_state_dict({**tower.trunk.state_dict(), **norm})
    features = tower(images)
    torch.testing.assert_close(features.pre_logits, theirs.eval()(images), rtol=1e-5, atol=1e-5)
    assert features.pooled.shape == (4, 16)
    assert features.tokens.shape == (4, cells, tower.token_width)
