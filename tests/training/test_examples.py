"""What a run writes of its training pairs for the report."""

import base64
import io

import pytest
import torch
from PIL import Image

from declip.data.batch import PairBatch, Plan, TextSpec, ViewSpec
from declip.data.text.tokenizer import Tokenizer
from declip.recipe.schema import ImageView, TextView
from declip.training.examples import example_views
from evaluation.conftest import painted

__all__ = ["painted"]


def test_views_are_unnormalized_and_texts_decoded(painted):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    tokenizer = Tokenizer(context=16, merges=4000)
    ids, changed = (tokenizer.encode(text) for text in ("a red cat sat", "a cat red sat"))
    masked, labels = list(ids), [-100] * len(ids)
    cat, sat = (tokenizer.encode(word)[1] for word in ("cat", "sat"))
    masked[ids.index(cat)], labels[ids.index(cat)] = tokenizer.mask, cat
    masked[ids.index(sat)], labels[ids.index(sat)] = cat, sat
    batch = PairBatch(
        views={"first": torch.zeros(1, 3, 8, 8), "second": torch.ones(1, 3, 8, 8)},
        texts=torch.tensor([[ids], [changed]]),
        masked=torch.tensor([masked]),
        labels=torch.tensor([labels]),
        sample_ids=torch.tensor([4 + 1]),
    )
    specs = tuple(ViewSpec(name, 8, ImageView()) for name in ("first", "second"))
    plan = Plan(specs, TextSpec(2, TextView(), 0.15), mean, std)
    (pair,) = example_views(batch, painted(["red", "green", "blue", "cyan"]), plan, tokenizer)
    assert pair["image"]["alt"] == "green"
    assert _pixel(pair["views"][0]["src"]) == pytest.approx(tuple(round(255 * m) for m in mean), abs=1)
    second = tuple(min(255, round(255 * (m + s))) for m, s in zip(mean, std, strict=True))
    assert _pixel(pair["views"][1]["src"]) == pytest.approx(second, abs=1)
    assert {name: text.replace(" ", "") for name, text in pair["texts"].items()} == {
        "caption": "aredcatsat",
        "augmented": "acatredsat",
        "masked": "ared[mask:cat][cat:sat]",
    }


def _pixel(src):
    return Image.open(io.BytesIO(base64.b64decode(src.partition(",")[2]))).getpixel((3, 3))
