"""Duplicates and label smoothing of the contrastive losses, against plain loops in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from declip.data.batch import PairBatch
from declip.recipe.schema import Recipe
from declip.supervision import contrastive
from declip.supervision.contrastive import cross_entropy_to_keys, info_nce
from declip.supervision.multi_view import multi_view
from declip.supervision.nearest_neighbor import neighbor_contrast
from declip.supervision.soft_targets import SoftTargets, caption_hashes, pair_labels
from supervision.test_objective import parts, random_batch

LABELS = torch.tensor([[5, 0], [6, 9], [5, 9], [7, 0], [8, 0], [7, 0]])
"""Captions 0 and 2, 3 and 5 are equal, and 1 and 2 are of one group; 0 is no group."""
CASES = [{"mask": True}, {"label_smoothing": 0.3}, {"mask": True, "label_smoothing": 0.2}]


def loop_targets(b: int, case: dict[str, Any]) -> dict[int, float]:
    """The target of every key that row b is compared with."""
    equal = [n for n in range(6) if n != b and any(x == y != 0 for x, y in zip(*LABELS[[b, n]].tolist(), strict=True))]
    smoothing = case.get("label_smoothing", 0.0)
    kept = [n for n in range(6) if not ("mask" in case and n in equal)]
    return {n: (1 - smoothing) * (n == b) + smoothing / len(kept) for n in kept}


def loop_direction(rows: Tensor, keys: Tensor, offset: int, case: dict[str, Any]) -> Any:
    """A tensor, so that autograd gives the gradients; the targets are numbers."""
    losses = []
    for b, row in enumerate(rows, offset):
        logits = [3.0 * row @ key for key in keys]
        targets = loop_targets(b, case)
        total = torch.stack([logits[n] for n in targets]).logsumexp(0)
        losses.append(sum(target * (total - logits[n]) for n, target in targets.items()))
    return torch.stack(losses).mean()


def loop(image: Tensor, text: Tensor, image_keys: Tensor, text_keys: Tensor, offset: int, case: dict[str, Any]) -> Any:
    to_text = loop_direction(image, text_keys, offset, case)
    return (to_text + loop_direction(text, image_keys, offset, case)) / 2


def soft(case: dict[str, Any], offset: int = 0, count: int = 6) -> SoftTargets:
    labels = (LABELS[offset : offset + count], LABELS) if "mask" in case else ()
    return SoftTargets(case.get("label_smoothing", 0.0), *labels)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("limit", [None, 0], ids=["whole", "blocks"])
def test_values_and_gradients_are_those_of_a_plain_loop(
    units: Any, monkeypatch: Any, case: dict[str, Any], limit: float | None, no_device_reads: Any
) -> None:
    monkeypatch.setattr(contrastive, "BLOCK_BYTES", 2 * 6 * 8)
    features = [units(6, 4).requires_grad_() for _ in range(2)]
    rows = [x[1:5] for x in features]
    with no_device_reads():
        found = info_nce(*rows, *features, 3.0, 1, limit, soft(case, 1, 4))
        gradients = torch.autograd.grad(found, features)
    expected = loop(*rows, *features, 1, case)
    assert abs(found - info_nce(*rows, *features, 3.0, 1)) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for x, y in zip(gradients, torch.autograd.grad(expected, features), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_ranks_have_the_whole_batchs_loss_as_mean_and_halves_are_compared_in_float32(units: Any) -> None:
    image, text = units(6, 4), units(6, 4)
    for case in CASES:
        ranks = [
            info_nce(image[i : i + 3], text[i : i + 3], image, text, 9.0, i, None, soft(case, i, 3)) for i in (0, 3)
        ]
        whole = info_nce(image, text, image, text, 9.0, 0, None, soft(case))
        torch.testing.assert_close(sum(ranks) / 2, whole)
        halves = [x.bfloat16() for x in (image, text)]
        with torch.autocast("cpu", torch.bfloat16):
            found = info_nce(*halves, *halves, 9.0, 0, None, soft(case))
        singles = [x.float() for x in halves]
        assert torch.equal(found, info_nce(*singles, *singles, 9.0, 0, None, soft(case)))


def test_every_text_view_has_its_own_targets(units: Any) -> None:
    images, texts = units(2, 6, 4), units(2, 6, 4)
    targets = [soft({"mask": True}), None]
    found = multi_view(images, texts, images, texts, 3.0, soft=targets)
    pairings = [(images[i], texts[j], targets[j]) for i, j in ((0, 1), (1, 0), (1, 1))]
    expected = [info_nce(image, text, image, text, 3.0, soft=target) for image, text, target in pairings]
    torch.testing.assert_close(found, sum(expected) / 3)
    found = neighbor_contrast(images, texts, 3.0, soft=targets)
    directions = [
        cross_entropy_to_keys(images[i], texts[j], 3.0, soft=targets[j]) for i, j in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    torch.testing.assert_close(found, sum(directions) / 4)


@pytest.mark.parametrize("padding", [0, 1])
def test_equal_captions_have_equal_hashes_whatever_the_padding(padding: int) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(2, 50_000, (1, 2000, 6), generator=generator)
    texts[0, 7], texts[0, 8] = texts[0, 3], texts[0, 3].flip(0)
    hashes = caption_hashes(texts, padding)
    assert torch.equal(hashes, caption_hashes(F.pad(texts, (0, 5), value=padding), padding))
    assert hashes[0, 7] == hashes[0, 3]
    assert len(hashes.unique()) == 1999
    assert bool((hashes != 0).all())
    numbers = [(int(x) - padding) * 6364136223846793005 ** (n + 1) for n, x in enumerate(texts[0, 3])]
    assert int(hashes[0, 3]) % 2**64 == sum(numbers) % 2**64 | 1


def test_the_objective_finds_equal_captions_groups_and_equal_neighbors() -> None:
    batch = random_batch()
    batch.texts[:, 5] = batch.texts[:, 2]
    groups = torch.zeros(8, dtype=torch.int64)
    groups[[0, 7]] = 3
    batch = PairBatch(batch.views, batch.texts, sample_ids=batch.sample_ids, groups=groups)
    assert torch.equal(pair_labels(batch)[:, 2], groups)
    weights = {"contrastive": 0.5, "multi_view": 0.3, "nearest_neighbor": 0.2}
    found = {}
    for duplicates in ("negatives", "mask"):
        model, objective = parts(weights, contrastive={"duplicates": duplicates})
        objective(model, batch)
        objective.after_step(model)
        assert objective.queue is not None
        found[duplicates] = objective(model, batch)
    assert all(found["mask"][name] < found["negatives"][name] for name in weights)
    model, objective = parts(weights, contrastive={"duplicates": "mask"})
    images, texts = model.encode_image(batch.views["first"].pixels), model.encode_text(batch.texts[0])
    labels = torch.arange(1, 9)[:, None]
    labels[5], labels[7] = labels[2].clone(), labels[0].clone()
    given = SoftTargets(labels=labels, key_labels=labels)
    expected = info_nce(images, texts, images, texts, model.logit_scale.exp(), soft=given)
    torch.testing.assert_close(objective(model, batch)["contrastive"], expected)


def test_sections_without_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        Recipe.model_validate({"contrastive": {"label_smoothing": 1.0}})
    with pytest.raises(ValueError, match=r"data\.columns\.group=brand.*contrastive\.duplicates"):
        Recipe.model_validate({"data": {"columns": {"group": "brand"}}})
