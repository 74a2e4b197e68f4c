"""The stated chance levels are the mean scores of models whose features are random."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from declip.evaluation.linear_probe import Labeled, ProbeData, linear_probe
from declip.evaluation.retrieval import retrieve
from declip.evaluation.zero_shot import classify
from evaluation.conftest import features_of

EQUAL = np.arange(120) % 12
UNEQUAL = np.r_[np.zeros(70, dtype=int), np.ones(30, dtype=int), 2 + np.arange(20) % 10]
CAPTIONS = {
    "class names": [(f"class {row % 10}",) for row in range(100)],
    "unequal class names": [(f"class {label}",) for label in UNEQUAL],
    "sentences": [tuple(f"{row} {number}" for number in range(5)) for row in range(30)],
    "both": [(f"class {row % 7}", f"own {row}") if row % 3 else (f"class {row % 2}",) for row in range(80)],
}


def _random(rows, generator):
    return normalize(torch.randn(rows, 16, generator=generator), dim=1)


def _near(results):
    values = np.array([[measure.value for measure in result.measures()] for result in results])  # (models, measures)
    chance = np.array([[measure.chance for measure in result.measures()] for result in results]).mean(0)
    error = values.std(0, ddof=1) / len(results) ** 0.5
    assert (np.abs(values.mean(0) - chance) < 4 * error + 1e-6).all(), (values.mean(0), chance)


@pytest.mark.parametrize("captions", CAPTIONS.values(), ids=CAPTIONS)
def test_retrieval_in_both_directions(captions):
    generator = torch.Generator().manual_seed(0)
    row_of = {caption: row for row, caption in enumerate(dict.fromkeys(each for own in captions for each in own))}
    rows = [row_of[caption] for own in captions for caption in own]
    images = len(captions)
    _near([
        retrieve(features_of(_random(images, generator), captions, _random(len(row_of), generator)[rows]))
        for _ in range(100)
    ])  # fmt: skip


@pytest.mark.parametrize("labels", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_classification_by_names(labels):
    generator = torch.Generator().manual_seed(0)
    _near([
        classify(features_of(_random(len(labels), generator)), labels, _random(12, generator))
        for _ in range(100)
    ])  # fmt: skip


def test_a_linear_probe_predicts_the_most_frequent_class():
    generator = torch.Generator().manual_seed(0)
    splits = [Labeled(_random(len(UNEQUAL), generator), torch.from_numpy(UNEQUAL)) for _ in range(3)]
    top1, per_class = linear_probe(ProbeData("random", 12, *splits)).measures()
    assert top1.chance == pytest.approx(70 / 120)
    assert top1.value == pytest.approx(top1.chance, abs=0.05)
    assert per_class.chance == pytest.approx(1 / 12)
