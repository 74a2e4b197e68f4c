"""The losses against the official implementation's values and gradients, and against plain loops in float64."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from conftest import TINY
from declip.models import token_scorer
from declip.models.dual_encoder import DualEncoder
from declip.models.token_scorer import token_similarity
from declip.recipe.schema import Recipe
from declip.supervision import objective
from declip.supervision.contrastive import (
    Contrastive,
    Sigmoid,
    cross_entropy_to_keys,
    info_nce,
    sigmoid_loss,
)
from declip.supervision.late_interaction import late_interaction, select_tokens
from declip.supervision.masked_language import MaskedLanguage, chosen_rows, cross_entropy
from declip.supervision.nearest_neighbor import neighbor_contrast
from declip.supervision.simclr import SimCLR, nt_xent
from declip.supervision.simsiam import negative_cosine
from declip.supervision.term import Rows, Similarity
from golden_cases import loss_cases
from supervision.conftest import BATCH, LENGTHS, NEIGHBORS, TERMS, NoDeviceReads, batch_axis


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def loop(logits, offset, smoothing=0.0):
    """Cross-entropy of rows whose own key is `offset` + their number."""
    losses = []
    for b, row in enumerate(logits):
        target = (1 - smoothing) * row[offset + b] + smoothing * sum(row) / len(row)
        losses.append(math.log(sum(math.exp(x) for x in row)) - target)
    return sum(losses) / len(losses)


def dots(rows, keys, scale):
    return [[scale * dot(row, key) for key in keys.tolist()] for row in rows.tolist()]


def loop_info_nce(image, text, image_keys, text_keys, scale, offset, smoothing=0.0):
    to_text = loop(dots(image, text_keys, scale), offset, smoothing)
    to_image = loop(dots(text, image_keys, scale), offset, smoothing)
    return (to_text + to_image) / 2


def loop_multi_view(images, texts, image_keys, text_keys, scale, offset, smoothing=0.0):
    losses = []
    for i, j in ((1, 0), (0, 1), (1, 1)):
        features = images[i], texts[j], image_keys[i], text_keys[j]
        losses.append(loop_info_nce(*features, scale, offset, smoothing))
    return sum(losses) / 3


def loop_nt_xent(z1, z2, keys1, keys2, scale, offset):
    z1, z2, keys1, keys2 = (F.normalize(x, dim=1) for x in (z1, z2, keys1, keys2))

    def view(own, own_keys, other_keys):
        others, same = dots(own, other_keys, scale), dots(own, own_keys, scale)
        for b, row in enumerate(same):
            others[b] += row[: offset + b] + row[offset + b + 1 :]
        return loop(others, offset)

    return (view(z1, keys1, keys2) + view(z2, keys2, keys1)) / 2


def loop_late(images, words, image_keys, word_keys, scale, offset):
    def logits(samples, keys, lengths, key_lengths):
        return [
            [
                scale * sum(max(dot(t, k) for k in key[:m]) for t in sample[:n]) / len(sample[:n])
                for key, m in zip(keys.tolist(), key_lengths, strict=True)
            ]
            for sample, n in zip(samples.tolist(), lengths, strict=True)
        ]

    every, lengths = [4] * BATCH, LENGTHS.tolist()
    own = lengths[offset : offset + len(words)]
    to_text = logits(images, word_keys, every[: len(own)], lengths)
    to_image = logits(words, image_keys, own, every)
    return (loop(to_text, offset) + loop(to_image, offset)) / 2


def loop_neighbors(images, image_keys, scale, offset, smoothing=0.0, found=None):
    found = NEIGHBORS.double() if found is None else found
    losses = []
    for view, neighbors in product(images, found):
        losses.append(loop(dots(view, neighbors, scale), offset, smoothing))
    return sum(losses) / 4


def loop_sigmoid(images, texts, image_keys, text_keys, scale, offset):
    logits = enumerate(dots(images, text_keys, scale), offset)
    signed = [
        (x - 0.4 * scale) * (-1 if n == b else 1) for b, row in logits for n, x in enumerate(row)
    ]
    return sum(math.log1p(math.exp(x)) for x in signed) / len(images)


LOOPS = {
    "sigmoid": loop_sigmoid,
    "info_nce": loop_info_nce,
    "multi_view": loop_multi_view,
    "nt_xent": loop_nt_xent,
    "late_interaction": loop_late,
    "neighbors": loop_neighbors,
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("limit", [None, 0], ids=["whole", "blocks"])
def test_equals_a_plain_loop(units, name, offset, limit):
    term, shapes = TERMS[name]
    keys = [units(*shape) for shape in shapes]
    if name == "nt_xent":
        keys = [keys[0] * 0.3, keys[1] * 4]  # vectors of any length
    rows = [units(*shape).narrow(batch_axis(shape), offset, 3) for shape in shapes]
    expected = LOOPS[name](*rows, *keys, 14.3, offset)
    assert term(*rows, *keys, 14.3, offset, limit).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["contrastive", "multi_view", "nearest_neighbor"])
def test_every_contrastive_loss_of_a_recipe_is_smoothed(units, name):
    tree = {**TINY, "loss_weights": {name: 1.0}, "contrastive": {"label_smoothing": 0.3}}
    recipe = Recipe.model_validate(tree)
    term = objective.TERMS[name](recipe, DualEncoder(recipe)).double()
    images, texts = units(2, 6, recipe.embed_dim), units(2, 6, recipe.embed_dim)
    own = Rows(("first", "second"), images[:, 1:4], texts[:, 1:4], {})
    keys = Rows(("first", "second"), images, texts, {})
    pairs = own.images, own.texts, keys.images, keys.texts
    options = 14.3, 1, 0.3
    if name == "contrastive":
        expected = loop_info_nce(*(features[0] for features in pairs), *options)
    elif name == "multi_view":
        expected = loop_multi_view(*pairs, *options)
    else:
        stored = units(20, recipe.embed_dim)
        term.queue.push(stored)
        rows = torch.arange(12).view(6, 2)  # of each pair's two texts
        keys = replace(keys, extra={"queue_indices": rows})
        expected = loop_neighbors(own.images, None, *options, found=stored[rows.T])
    found = term.loss(own, keys, Similarity(torch.tensor(14.3, dtype=torch.float64)), 1)
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("limit", [None, 0], ids=["whole", "blocks"])
def test_label_smoothing_spreads_a_part_of_the_target_over_all_keys(units, limit):
    rows, keys = units(6, 4).requires_grad_(), units(6, 4).requires_grad_()
    losses = []
    for b, row in enumerate(rows[1:5], 1):
        log_probabilities = torch.stack([3.0 * row @ key for key in keys]).log_softmax(0)
        losses.append(-sum((0.7 * (n == b) + 0.3 / 6) * x for n, x in enumerate(log_probabilities)))
    expected = torch.stack(losses).mean()
    found = cross_entropy_to_keys(rows[1:5], keys, 3.0, 1, limit, smoothing=0.3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(loss, (rows, keys)) for loss in (found, expected))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("limit", [None, 0], ids=["whole", "blocks"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_keys_that_share_an_id_are_left_out(units, limit, smoothing):
    rows, keys = units(6, 4).requires_grad_(), units(6, 4).requires_grad_()
    ids = torch.tensor([[5, 0], [6, 9], [5, 0], [5, 2**63 - 1], [8, 9], [0, 2**63 - 1]])
    kept = {1: (0, 1, 2, 3, 5), 2: (1, 2, 4, 5), 3: (1, 3, 4), 4: (0, 2, 3, 4, 5)}
    losses = []
    for b, numbers in kept.items():
        log_probabilities = torch.stack([3.0 * rows[b] @ keys[n] for n in numbers]).log_softmax(0)
        targets = [(1 - smoothing) * (n == b) + smoothing / len(numbers) for n in numbers]
        losses.append(-sum(t * x for t, x in zip(targets, log_probabilities, strict=True)))
    with NoDeviceReads():
        found = cross_entropy_to_keys(rows[1:5], keys, 3.0, 1, limit, smoothing, (ids[1:5], ids))
    torch.testing.assert_close(found, torch.stack(losses).mean(), rtol=1e-12, atol=0)
    gradients = (
        torch.autograd.grad(loss, (rows, keys)) for loss in (found, torch.stack(losses).mean())
    )
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def assert_gradients(case, loss, names, atol):
    """Compare the loss, and the gradients of its inputs by their names in the case."""
    loss.backward()
    torch.testing.assert_close(loss, case["loss"], rtol=1e-5, atol=1e-8)
    for name, x in names.items():
        torch.testing.assert_close(x.grad, case[name], rtol=1e-5, atol=atol)


@pytest.mark.golden
@pytest.mark.parametrize("name", loss_cases("infonce", "infonce_gathered"))
def test_info_nce_equals_the_authors(golden, name):
    case = golden(name)
    image, text = (case[f"logits_{side}"].requires_grad_() for side in "it")
    keys, offset = torch.eye(image.shape[1]), int(case["labels"][0])
    assert offset == case.get("rank", torch.tensor(0)) * len(image)
    loss = info_nce(image, text, keys, keys, 1.0, offset)
    assert_gradients(case, loss, {"grad_i": image, "grad_t": text}, 1e-7)


@pytest.mark.golden
@pytest.mark.parametrize("name", loss_cases("nt_xent", "nt_xent_gather"))
def test_nt_xent_equals_the_authors(golden, name):
    case = golden(name)
    inputs = {
        name.replace("z", "grad"): z.requires_grad_()
        for name, z in case.items()
        if name.startswith("z_")
    }
    z1, z2, *keys = inputs.values()
    offset = int(case.get("rank", 0)) * len(z1)
    loss = nt_xent(z1, z2, *(keys or (z1, z2)), case["temperature"].item(), offset)
    assert_gradients(case, loss, inputs, 1e-6)


@pytest.mark.golden
@pytest.mark.parametrize("name", loss_cases("simsiam"))
def test_negative_cosine_equals_the_authors(golden, name):
    case = golden(name)
    p1, p2, z1, z2 = (case[k].requires_grad_() for k in ("p1", "p2", "z1", "z2"))
    assert_gradients(case, negative_cosine(p1, p2, z1, z2), {"grad_p1": p1, "grad_p2": p2}, 1e-7)
    assert z1.grad is None
    assert z2.grad is None


@pytest.mark.golden
@pytest.mark.parametrize("name", loss_cases("filip_dense"))
def test_late_interaction_equals_the_authors(golden, name):
    """Theirs: 16 tokens on the keys' side, all on the own side, padding counted."""
    case = golden(name)
    raw = [case[f"feat_{side}"].requires_grad_() for side in (1, 2)]
    log_scale = case["logit_scale_dense"].requires_grad_()
    images, words = (F.normalize(x, dim=-1) for x in raw)
    k = int(case["top_k"])
    image_keys, _ = select_tokens(images, words, k)
    word_keys, _ = select_tokens(words, images, k)
    for tokens, keys, name in (
        (images, image_keys, "selected_1"),
        (words, word_keys, "selected_2"),
    ):
        chosen = case[name].sort(dim=1).values
        same = (tokens.unsqueeze(2) == keys.unsqueeze(1)).all(dim=-1).any(dim=2)
        assert torch.equal(same.nonzero()[:, 1].reshape(chosen.shape), chosen)
    scale = log_scale.exp()
    torch.testing.assert_close(
        scale * token_similarity(images, word_keys), case["logits_1"], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        scale * token_similarity(words, image_keys), case["logits_2"], rtol=1e-5, atol=1e-5
    )
    nothing = torch.zeros(words.shape[:2], dtype=torch.bool)
    loss = late_interaction(
        images, words, nothing, image_keys, word_keys, nothing[:, :k], scale, include_padding=True
    )
    assert_gradients(case, loss, {"grad_1": raw[0], "grad_2": raw[1]}, 1e-7)
    torch.testing.assert_close(log_scale.grad, case["grad_scale"], rtol=1e-4, atol=1e-7)


def constant(x):
    """Masked-language loss with the same targets whatever the logits."""
    return cross_entropy(x, torch.tensor([3, -100, 5, 0, 2]))


@pytest.mark.parametrize("loss", [constant, lambda x: negative_cosine(x, x.flip(0), x.flip(1), x)])
def test_losses_of_halves_are_float32_and_deaf_to_autocast(units, loss):
    halves = units(5, 8).bfloat16()
    expected = loss(halves.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(halves), expected)
    assert expected.dtype == torch.float32


def test_neighbors_get_no_gradient(units):
    images, keys = units(2, 2, 3).requires_grad_(), units(2, 4, 3).requires_grad_()
    neighbor_contrast(images, keys, 5.0, 1).backward()
    assert images.grad.abs().sum() > 0
    assert keys.grad is None


def test_chance_of_the_sigmoid_loss_is_that_of_equal_logits_with_the_best_bias():
    alike = torch.ones(7, 1, dtype=torch.float64)
    losses = [
        sigmoid_loss(alike, alike, 0.0, -math.log(6) + shift).item() for shift in (-0.1, 0.0, 0.1)
    ]
    assert Sigmoid.chance(None, 7) == pytest.approx(losses[1], rel=1e-12)
    assert losses[1] < min(losses[0], losses[2])


def test_chance_is_the_loss_of_equal_features():
    alike = torch.ones(7, 3, dtype=torch.float64)
    for loss, term in ((info_nce, Contrastive), (nt_xent, SimCLR)):
        assert term.chance(None, 7) == pytest.approx(
            loss(alike, alike, alike, alike, 0.5).item(), rel=1e-12
        )


def test_negative_cosine(units):
    p1, p2, z1, z2 = (units(5, 6) * length for length in (0.5, 3.0, 7.0, 0.1))
    cosines = [
        dot(a, b) / math.hypot(*a) / math.hypot(*b)
        for p, z in ((p1, z2), (p2, z1))
        for a, b in zip(p.tolist(), z.tolist(), strict=True)
    ]
    assert negative_cosine(p1, p2, z1, z2).item() == pytest.approx(-sum(cosines) / 10, rel=1e-12)
    assert negative_cosine(p1, 2 * p1, 3 * p1, p1).item() == pytest.approx(-1)
    leaves = p1.requires_grad_(), p2.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: negative_cosine(a, b, z1, z2), leaves)
    collapsed = torch.zeros(3, 4, requires_grad=True)
    loss = negative_cosine(collapsed, collapsed, units(3, 4).float(), units(3, 4).float())
    loss.backward()
    assert loss.item() == 0
    assert collapsed.grad.isfinite().all()


def test_chosen_rows_equal_a_plain_loop(units):
    words = units(3, 4, 5).requires_grad_()
    labels = torch.tensor([[-100, 7, -100, 3], [-100] * 4, [0, -100, -100, -100]])
    rows, targets = chosen_rows(words, labels)
    expected = [
        words[b, position] for b in range(3) for position in range(4) if labels[b, position] != -100
    ]
    assert torch.equal(rows, torch.stack(expected))
    assert targets.tolist() == [7, 3, 0]
    rows.sum().backward()
    assert torch.equal(words.grad[..., 0], (labels != -100).double())


def test_masked_language_loss(units):
    logits, targets = 5 * units(6, 9), torch.tensor([3, -100, 8, -100, -100, 2])
    chosen = targets != -100
    rows = logits[chosen].tolist()
    losses = [
        loop([row], target) for row, target in zip(rows, targets[chosen].tolist(), strict=True)
    ]
    for given in ((logits, targets), (logits[chosen], targets[chosen])):
        assert cross_entropy(*given).item() == pytest.approx(sum(losses) / 3, rel=1e-12)
    ranks = [
        cross_entropy(logits[part], targets[part], count=3 / 2)
        for part in (slice(0, 1), slice(1, 6))
    ]
    assert (sum(ranks) / 2).item() == pytest.approx(sum(losses) / 3, rel=1e-12), (
        "a shared count makes ranks equal"
    )
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets), logits.requires_grad_())
    with NoDeviceReads():
        cross_entropy(logits, targets)


def test_the_mean_over_ranks_is_the_mean_over_masked_words(units):
    logits, targets = 5 * units(4, 9), torch.tensor([3, 8, 2, 0])
    keys = Rows(
        (), torch.empty(0), torch.empty(1, 4, 0), {"count": torch.tensor([1.0, 0.0, 2.0, 1.0])}
    )
    losses = []
    for words in (slice(0, 1), slice(1, 4)):  # of two pairs each
        extra = {"logits": logits[words], "targets": targets[words]}
        own = Rows((), torch.empty(0), torch.empty(1, 2, 0), extra)
        losses.append(MaskedLanguage.loss(None, own, keys, None, 0).item())
    assert sum(losses) / 2 == pytest.approx(cross_entropy(logits, targets).item(), rel=1e-12)


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_predict_costs_zero_within_the_graph(rows):
    logits = torch.randn(rows, 7, requires_grad=True)
    loss = cross_entropy(logits, torch.full((rows,), -100))
    loss.backward()
    assert (loss.item(), loss.dtype) == (0, torch.float32)
    assert torch.equal(logits.grad, torch.zeros(rows, 7))


def lengths_mask(lengths, longest):
    return torch.arange(longest) < torch.tensor(lengths)[:, None]


def test_what_stands_in_the_padding_does_not_matter_unless_it_is_counted(units):
    images, words, mask = units(3, 4, 5), units(3, 6, 5), lengths_mask([3, 6, 1], 6)
    other = torch.where(mask.unsqueeze(-1), words, 50 * units(3, 6, 5))

    def loss(words, mask=mask, **options):
        return late_interaction(images, words, mask, images, words, mask, 7.0, **options)

    assert loss(words) == loss(other)
    assert loss(words, include_padding=True) == loss(words, torch.ones_like(mask)) != loss(words)


def test_blocks_of_keys_do_not_change_values_or_gradients(units, monkeypatch):
    tokens, keys = units(3, 4, 5), units(7, 6, 5)
    key_mask = lengths_mask([6, 1, 3, 5, 2, 2, 4], 6)
    found = []
    for scores in (2**26, 4 * 3 * 6 * 2, 1):
        monkeypatch.setattr(token_scorer, "SCORES_AT_ONCE", scores)
        leaves = [x.clone().requires_grad_() for x in (tokens, keys)]
        value = token_similarity(*leaves, key_mask=key_mask)
        found.append([value.detach(), *torch.autograd.grad(value.square().sum(), leaves)])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("masked", [False, True])
def test_selection_equals_a_plain_loop(units, masked):
    tokens, paired = units(3, 5, 6), units(3, 4, 6)
    mask, paired_mask = torch.ones(3, 5, dtype=torch.bool), torch.ones(3, 4, dtype=torch.bool)
    if masked:
        mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1], [0, 0, 0, 1, 0]]).bool()
        paired_mask = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0], [0, 1, 0, 1]]).bool()
    with NoDeviceReads():
        selected, counted = select_tokens(tokens, paired, 2, mask, paired_mask)
    for b in range(3):
        others = paired[b][paired_mask[b]].tolist()
        scores = {
            sum(dot(token, other) for other in others): token
            for token in tokens[b][mask[b]].tolist()
        }
        assert selected[b][counted[b]].tolist() == [
            scores[s] for s in sorted(scores, reverse=True)[:2]
        ]
    everything, counted = select_tokens(tokens, paired, 16, mask)
    assert everything.shape == tokens.shape
    assert counted.sum() == mask.sum()
