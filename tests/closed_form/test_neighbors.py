"""Neighbors among known pairs, compared with plain loops, and the choice of their weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from declip.closed_form import neighbors, related
from declip.closed_form.choice import choose_heads
from declip.closed_form.heads import Heads
from declip.closed_form.neighbors import Side, Similarities, both_resemble, leading_axes
from declip.closed_form.pairs import Pairs
from declip.closed_form.ranks import ranks_by
from declip.closed_form.related import choose_neighbors, known_pairs, with_neighbors
from declip.closed_form.solve import START
from pair_features import class_pairs, data_of, features, pairs_of, randn


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def slow_features(row, anchors, mean):
    """Features of one row, one anchor after the other."""
    cosines = [max(cosine(row - mean, anchor), 0.0) for anchor in anchors]
    smallest = sorted(cosines, reverse=True)[: neighbors.NEAREST][-1]
    kept = [value**neighbors.POWER if value >= smallest else 0.0 for value in cosines]
    length = sum(value**2 for value in kept) ** 0.5
    return torch.tensor([value / length for value in kept])


@pytest.mark.parametrize("nearest", [3, 50])
def test_similarities_are_weighted_sums_of_cosines(nearest, monkeypatch):
    """0.5 of the cosine of the neighbors among all known pairs, 0.25 of that of the classes, 1 of the projections."""
    monkeypatch.setattr(neighbors, "NEAREST", nearest)
    pairs, classes = pairs_of(20), class_pairs(6)
    pairs = Pairs(pairs.images.float(), pairs.texts.float(), pairs.owners)
    known = replace(known_pairs(pairs, classes), weights=torch.tensor([0.5, 0.25]))
    heads = Heads(torch.randn(5, 12), torch.randn(5, 7), neighbors=known)
    image, text = (side[0].float() for side in features(1, seed=3))
    centers = (classes.rows - classes.rows.mean(dim=0)).float()
    image_mean = classes.mean.float()
    image_anchors = [*(pairs.images - image_mean), *centers]
    names = torch.cat([pairs.texts, classes.texts.float()])
    text_anchors = list(names - names.mean(dim=0))
    parts = []
    for start in (0, 20):
        of_image = slow_features(image, image_anchors[start:], image_mean)
        of_text = slow_features(text, text_anchors[start:], names.mean(dim=0))
        parts.append(float(of_image @ of_text))
    projected = cosine(heads.image @ image, heads.text @ text)
    expected = (projected + 0.5 * parts[0] + 0.25 * parts[1]) / 1.75
    found = heads.embed_images(image[None]) @ heads.embed_texts(text[None]).mT
    assert float(found) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("with_classes", [True, False])
def test_parts_weighted_afterward_equal_cosines_of_embeddings(with_classes):
    classes = class_pairs(6) if with_classes else None
    pairs = pairs_of(20)
    pairs = Pairs(pairs.images.float(), pairs.texts.float(), pairs.owners)
    known = known_pairs(pairs, classes)
    heads = Heads(torch.randn(5, 12), torch.randn(5, 7))
    images, texts = (side.float() for side in features(4, seed=3))
    # resembles no known pair
    images[0] = known.images.mean - 1e3 * known.images.anchors.mean(dim=0)
    projected = heads.similarities(images, texts)
    parts = Similarities.of(projected, known, images, texts)
    for weights in ((0.5, 0.25), (1.0, 0.0)):
        complete = replace(known, weights=torch.tensor(weights))
        expected = heads._replace(neighbors=complete).similarities(images, texts)
        torch.testing.assert_close(parts.weighted(weights), expected)


def test_what_an_image_and_a_text_both_resemble_counts_most_in_their_cosine():
    axes = torch.eye(4)
    images, texts = Side(axes, torch.zeros(4)), Side(axes, torch.ones(4))
    image, text = torch.tensor([1.0, 0.9, 0.2, -1.0]), torch.tensor([1.2, 2.0, 2.5, 3.0])
    values, rows = images.nearest(image[None], 2)
    assert rows.tolist() == [[0, 1]]
    torch.testing.assert_close(values[0], normalize(image, dim=0)[:2])
    products = [0.2**3 * 1.0**3, 0.9**3 * 1.0**3, 0.2**3 * 1.5**3]
    assert products[1] > products[2] > products[0]
    assert both_resemble(images, texts, image, text, 2) == [1, 2]
    assert both_resemble(images, texts, image, text, 9) == [1, 2, 0], "3 is unlike the image"


def test_a_start_that_nothing_improves_stays_as_it_is(monkeypatch):
    groups = np.arange(60)
    data = data_of(pairs_of(60), groups, class_pairs())
    linear = choose_heads(data, keep_start=False)
    monkeypatch.setattr(related, "CAUTION", 99.0)  # the usual weights
    compared = []
    for better in (1, 2, 3):  # the first that is better than the start
        compared.clear()

        def beats(outcome, start, groups, better=better):
            assert start is linear.start
            compared.append(outcome)
            return len(compared) == better

        monkeypatch.setattr("declip.closed_form.choice.beats", beats)
        choice = choose_neighbors(linear, data)
        assert (choice.form == START) == (better > 1)
        assert len(compared) == min(better, 2)
        if better < 3:
            assert choice.outcome is compared[-1]
            assert len(choice.heads.neighbors.rows) == 60
        else:
            assert (choice.heads, choice.outcome) == (linear.start_heads, linear.start)


def test_heads_in_another_type_keep_their_neighbors():
    pairs = pairs_of(20)
    known = replace(known_pairs(pairs, None), weights=torch.tensor([0.5, 0.0]))
    heads = Heads(torch.randn(5, 12), torch.randn(5, 7), neighbors=known)
    inputs = pairs.images.float(), pairs.texts.float()
    converted = heads.to(torch.zeros(1, dtype=torch.float64)).to(inputs[0])
    expected = heads.embed_images(inputs[0]) @ heads.embed_texts(inputs[1]).mT
    torch.testing.assert_close(converted.similarities(*inputs), expected)


def test_an_image_with_several_captions_is_known_by_their_mean():
    pairs = pairs_of(6)
    twice = Pairs(pairs.images[:3], pairs.texts, torch.tensor([0, 0, 1, 1, 2, 2]))
    means = twice.texts.float().reshape(3, 2, -1).mean(dim=1)
    expected = normalize(means - means.mean(dim=0), dim=-1)
    torch.testing.assert_close(known_pairs(twice, None).texts.anchors, expected)


def test_of_many_pairs_some_are_known_image_and_text_together(monkeypatch):
    monkeypatch.setattr(related, "MOST", 8)
    pairs = pairs_of(30)
    known = known_pairs(pairs, None, seed=1)
    assert len(known.images.anchors) == len(known.texts.anchors) == 8
    text_rows = normalize(pairs.texts.float() - known.texts.mean, dim=-1)
    image_rows = normalize(pairs.images.float() - known.images.mean, dim=-1)
    where = [torch.cdist(known.images.anchors, image_rows).argmin(dim=1)]
    where.append(torch.cdist(known.texts.anchors, text_rows).argmin(dim=1))
    assert torch.equal(where[0], where[1])


def test_few_axes_keep_what_the_largest_singular_vectors_keep(monkeypatch):
    rows = randn(80, 30).float() * torch.logspace(0, -3, 30)
    assert torch.equal(leading_axes(rows), torch.eye(30))
    monkeypatch.setattr(neighbors, "WIDTH", 6)
    axes = leading_axes(rows)
    torch.testing.assert_close(axes.mT @ axes, torch.eye(6), rtol=0, atol=1e-5)
    kept = (rows @ axes).square().sum()
    best = torch.linalg.svdvals(rows)[:6].square().sum()
    assert float(kept / best) > 0.99


def clustered(count):
    """Pairs of 8 kinds; the projections are of no use, so that only known pairs tell the kinds."""
    kinds = torch.arange(count) % 8
    centers = 3 * randn(2, 8, 20, seed=5)
    images, texts = centers[:, kinds] + randn(2, count, 20, seed=6)
    return Pairs(images, texts, torch.arange(count))


def test_neighbors_are_taken_where_they_rank_left_out_pairs_better():
    pairs, groups = clustered(80), np.arange(80)
    data = data_of(pairs, groups)
    choice = choose_heads(data)
    useless = Heads(*randn(2, 4, 20))
    outcome = ranks_by(useless, pairs, data.folds)
    choice = replace(choice, heads=useless, whole=None, outcome=outcome)
    found = with_neighbors(choice, data)
    assert found.heads.neighbors is not None
    assert found.outcome.percentile(groups).value > 0.8


def test_a_left_out_pair_is_not_its_own_neighbor(monkeypatch):
    """Pairs at random have no neighbors that help: a pair that knew itself would rank first."""
    images, texts = randn(2, 60, 16, seed=2)
    pairs = Pairs(images, texts, torch.arange(60))
    data = data_of(pairs)
    choice = choose_heads(data)
    monkeypatch.setattr(related, "WEIGHTS", ((1.0, 0.0),))
    found = with_neighbors(choice, data)
    assert 0.35 < found.outcome.percentile(np.arange(60)).value < 0.65
