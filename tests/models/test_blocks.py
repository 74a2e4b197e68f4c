"""Which parts of a tower count as its blocks."""

import pytest
import timm
import torch
from torch import nn

from declip.models.layers import blocks_of
from declip.models.text_tower import TextTower


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
    tower = TextTower(vocabulary=10, end=9, embed_dim=4, width=8, layers=3, heads=2)
    assert blocks_of(tower) == list(tower.transformer.resblocks)
    assert blocks_of(nn.Linear(2, 2)) == []
