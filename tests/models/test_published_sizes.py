"""The published recipes build models of exactly the authors' size."""

import json

import pytest
import torch

from declip.models.dual_encoder import DualEncoder
from declip.recipe.load import load_recipe
from declip.supervision.objective import Objective
from golden_cases import require_file

VOCABULARY, WIDTH = 49_409, 512
UNUSED_LANGUAGE_HEAD = WIDTH * VOCABULARY + VOCABULARY
UNUSED_CLASSIFIER = 2048 * 1024 + 1024
UNUSED_NORM = 2 * 4096


def count(name: str) -> int:
    recipe = load_recipe(name)
    with torch.device("meta"):
        model = DualEncoder.from_recipe(recipe)
        objective = Objective(recipe, model)
    return sum(p.numel() for module in (model, objective) for p in module.parameters())


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "file", "key", "unused"),
    [
        ("clip-yfcc15m-vitb32", "keys_other.json", "clip_vitb32", 0),
        ("slip-yfcc15m-vitb32", "keys_other.json", "slip_vitb32", UNUSED_NORM),
        ("filip-yfcc15m-vitb32", "keys_other.json", "filip_vitb32", UNUSED_LANGUAGE_HEAD),
        ("defilip-yfcc15m-vitb32", "keys_other.json", "defilip_vitb32", 0),
        ("declip-yfcc15m-vitb32", "keys_vitb32.json", None, 0),
        ("declip-yfcc15m-r50", "keys_r50.json", None, UNUSED_CLASSIFIER),
        ("clip-yfcc15m-r50", "keys_other.json", "clip_res50", UNUSED_CLASSIFIER),
    ],
)
def test_parameters_are_the_authors_without_what_they_never_use(
    name: str, file: str, key: str | None, unused: int
) -> None:
    published = json.loads(require_file(file).read_text())
    assert count(name) == (published[key] if key else published)["n_parameters"] - unused
