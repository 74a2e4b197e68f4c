import math

import pytest
import torch
import torch.nn.functional as F

from declip.supervision import late_interaction as module
from declip.supervision.contrastive import info_nce
from declip.supervision.late_interaction import late_interaction, select_tokens, similarity
from golden_cases import loss_cases


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def loop_similarity(tokens, keys, mask, key_mask):
    result = []
    for sample, counted in zip(tokens.tolist(), mask.tolist(), strict=True):
        row = []
        for key, key_counted in zip(keys.tolist(), key_mask.tolist(), strict=True):
            best = [
                max(dot(token, other) for other, c in zip(key, key_counted, strict=True) if c)
                for token, c in zip(sample, counted, strict=True)
                if c
            ]
            row.append(sum(best) / len(best))
        result.append(row)
    return result


def loop_loss(to_text, to_image, scale, offset):
    total = 0.0
    for logits in (to_text, to_image):
        for b, row in enumerate(logits):
            total += math.log(sum(math.exp(scale * v) for v in row)) - scale * row[offset + b]
    return total / (2 * len(to_text))


def lengths_mask(lengths, longest):
    return torch.arange(longest) < torch.tensor(lengths)[:, None]


def everything(tokens):
    return torch.ones(tokens.shape[:2], dtype=torch.bool)


@pytest.mark.golden
@pytest.mark.parametrize("name", loss_cases("filip_dense"))
def test_equals_the_authors_logits_loss_and_gradients(golden, name):
    """Theirs: 16 tokens on the keys' side, all on the own side, padding counted."""
    case = golden(name)
    raw = [case[f"feat_{side}"].requires_grad_() for side in (1, 2)]
    log_scale = case["logit_scale_dense"].requires_grad_()
    images, words = (F.normalize(x, dim=-1) for x in raw)
    k = int(case["top_k"])
    image_keys, _ = select_tokens(images, words, k)
    word_keys, _ = select_tokens(words, images, k)
    for tokens, keys, name in ((images, image_keys, "selected_1"), (words, word_keys, "selected_2")):
        chosen = case[name].sort(dim=1).values
        same = (tokens.unsqueeze(2) == keys.unsqueeze(1)).all(dim=-1).any(dim=2)
        assert torch.equal(same.nonzero()[:, 1].reshape(chosen.shape), chosen)
    scale = log_scale.exp()
    torch.testing.assert_close(scale * similarity(images, word_keys), case["logits_1"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scale * similarity(words, image_keys), case["logits_2"], rtol=1e-5, atol=1e-5)
    nothing = ~everything(words)
    loss = late_interaction(images, words, nothing, image_keys, word_keys, nothing[:, :k], scale, include_padding=True)
    loss.backward()
    torch.testing.assert_close(loss, case["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(raw[0].grad, case["grad_1"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(raw[1].grad, case["grad_2"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(log_scale.grad, case["grad_scale"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("offset", [0, 2])
def test_equals_a_plain_loop(units, offset):
    images, words, image_keys, word_keys = units(2, 3, 5), units(2, 4, 5), units(4, 3, 5), units(4, 6, 5)
    mask, key_mask = lengths_mask([2, 4], 4), lengths_mask([6, 1, 3, 5], 6)
    to_text = loop_similarity(images, word_keys, everything(images), key_mask)
    to_image = loop_similarity(words, image_keys, mask, everything(image_keys))
    expected = loop_loss(to_text, to_image, 7.0, offset)
    found = late_interaction(images, words, mask, image_keys, word_keys, key_mask, 7.0, offset)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_what_stands_in_the_padding_does_not_matter(units):
    images, words = units(3, 4, 5), units(3, 6, 5)
    mask = lengths_mask([3, 6, 1], 6)
    other = torch.where(mask.unsqueeze(-1), words, 50 * units(3, 6, 5))
    losses = [late_interaction(images, w, mask, images, w, mask, 7.0).item() for w in (words, other)]
    assert losses[0] == losses[1]
    counted = [
        late_interaction(images, w, mask, images, w, mask, 7.0, include_padding=True).item() for w in (words, other)
    ]
    assert abs(counted[0] - counted[1]) > 0.1


def test_counting_padding_equals_a_mask_of_true(units):
    images, words = units(3, 4, 5), units(3, 6, 5)
    mask = lengths_mask([3, 6, 1], 6)
    counted = late_interaction(images, words, mask, images, words, mask, 7.0, include_padding=True)
    full = late_interaction(images, words, everything(words), images, words, everything(words), 7.0)
    assert counted.item() == pytest.approx(full.item(), rel=1e-12)


def test_single_tokens_make_it_info_nce(units):
    image, text = units(4, 5), units(4, 5)
    a, b, mask = image[:, None], text[:, None], torch.ones(4, 1, dtype=torch.bool)
    found = late_interaction(a, b, mask, a, b, mask, 20.0)
    assert found.item() == pytest.approx(info_nce(image, text, image, text, 20.0).item(), rel=1e-12)


def test_blocks_do_not_change_values_or_gradients(units, monkeypatch):
    tokens, keys = units(3, 4, 5), units(7, 6, 5)
    key_mask = lengths_mask([6, 1, 3, 5, 2, 2, 4], 6)
    found = []
    for scores in (2**26, 4 * 3 * 6 * 2, 1):
        monkeypatch.setattr(module, "SCORES_AT_ONCE", scores)
        leaves = [x.clone().requires_grad_() for x in (tokens, keys)]
        value = similarity(*leaves, key_mask=key_mask)
        found.append([value.detach(), *torch.autograd.grad(value.square().sum(), leaves)])
    for other in found[1:]:
        for x, expected in zip(other, found[0], strict=True):
            torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("masked", [False, True])
def test_selection_equals_a_plain_loop(units, masked):
    tokens, paired = units(3, 5, 6), units(3, 4, 6)
    mask, paired_mask = everything(tokens), everything(paired)
    if masked:
        mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1], [0, 0, 0, 1, 0]]).bool()
        paired_mask = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0], [0, 1, 0, 1]]).bool()
    selected, counted = select_tokens(tokens, paired, 2, mask, paired_mask)
    assert selected.shape == (3, 2, 6)
    for b in range(3):
        others = [p for p, c in zip(paired[b].tolist(), paired_mask[b], strict=True) if c]
        scores = {
            sum(dot(token, other) for other in others): token
            for token, c in zip(tokens[b].tolist(), mask[b], strict=True)
            if c
        }
        expected = [scores[s] for s in sorted(scores, reverse=True)[:2]]
        found = [t for t, c in zip(selected[b].tolist(), counted[b], strict=True) if c]
        assert found == expected


def test_selection_keeps_all_when_there_are_fewer(units):
    tokens = units(2, 3, 4)
    selected, counted = select_tokens(tokens, units(2, 5, 4), 16)
    assert selected.shape == (2, 3, 4)
    assert counted.all()
    torch.testing.assert_close(selected.sum(dim=1), tokens.sum(dim=1))


def test_selecting_all_words_changes_nothing(units):
    images, words = units(3, 4, 5), units(3, 6, 5)
    mask = lengths_mask([3, 6, 1], 6)
    word_keys, key_mask = select_tokens(words, images, 6, mask)
    plain = late_interaction(images, words, mask, images, words, mask, 7.0)
    selected = late_interaction(images, words, mask, images, word_keys, key_mask, 7.0)
    assert selected.item() == pytest.approx(plain.item(), rel=1e-12)


def test_gradients(units, check_gradients):
    mask, key_mask = lengths_mask([2, 3], 3), lengths_mask([3, 1, 2], 3)

    def term(images, words, image_keys, word_keys, scale):
        keys, _ = select_tokens(image_keys, word_keys, 2)
        return late_interaction(images, words, mask, keys, word_keys, key_mask, scale, 1)

    scale = torch.tensor(3.0, dtype=torch.float64)
    check_gradients(term, units(2, 3, 4), units(2, 3, 4), units(3, 3, 4), units(3, 3, 4), scale)


def test_ranks_together_equal_the_whole_batch(units, check_ranks):
    mask = lengths_mask([2, 5, 1, 4, 3, 5], 5)

    def term(images, words, image_keys, word_keys, offset):
        own = mask[offset : offset + len(words)]
        return late_interaction(images, words, own, image_keys, word_keys, mask, 9.0, offset)

    check_ranks(term, units(6, 4, 5), units(6, 5, 5))


def test_never_waits_for_the_device(units, no_device_reads):
    images, words, mask = units(3, 4, 5), units(3, 6, 5), lengths_mask([3, 6, 1], 6)
    with no_device_reads():
        keys, key_mask = select_tokens(words, images, 2, mask)
        late_interaction(images, words, mask, images, keys, key_mask, 7.0)


def test_precision_and_range(units, check_precision):
    mask = lengths_mask([2, 5, 1], 5)
    check_precision(lambda i, w: late_interaction(i, w, mask, i, w, mask, 100.0), units(3, 4, 8), units(3, 5, 8))
    images = torch.eye(3)[:, None].requires_grad_()
    words = -images.detach().expand(3, 2, 3)
    loss = late_interaction(images, words, mask[:, :2], images, words, mask[:, :2], torch.tensor(100.0))
    loss.backward()
    assert loss.item() == pytest.approx(100 + math.log(2), rel=1e-6)
    assert images.grad.isfinite().all()
