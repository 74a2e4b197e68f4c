import math

import pytest
import torch

from declip.supervision.contrastive import cross_entropy_to_keys, info_nce, scaled_similarity, to_float32
from declip.supervision.multi_view import multi_view
from golden_cases import loss_cases


def loop_one_way(rows, keys, scale, offset):
    total = 0.0
    for b, row in enumerate(rows.tolist()):
        logits = [scale * sum(x * y for x, y in zip(row, key, strict=True)) for key in keys.tolist()]
        total += math.log(sum(math.exp(logit) for logit in logits)) - logits[offset + b]
    return total / len(rows)


def loop_info_nce(image, text, image_keys, text_keys, scale, offset):
    to_text = loop_one_way(image, text_keys, scale, offset)
    return (to_text + loop_one_way(text, image_keys, scale, offset)) / 2


@pytest.mark.golden
@pytest.mark.parametrize("name", loss_cases("infonce", "infonce_gathered"))
def test_info_nce_equals_the_authors_loss_and_gradients(golden, name):
    case = golden(name)
    image, text = (case[f"logits_{side}"].requires_grad_() for side in "it")
    keys = torch.eye(image.shape[1])
    offset = int(case["labels"][0])
    assert offset == case.get("rank", torch.tensor(0)) * len(image)
    loss = info_nce(image, text, keys, keys, 1.0, offset)
    loss.backward()
    torch.testing.assert_close(loss, case["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(image.grad, case["grad_i"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(text.grad, case["grad_t"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("offset", [0, 3, 5])
def test_info_nce_equals_a_plain_loop(units, offset):
    image, text, image_keys, text_keys = units(4, 7), units(4, 7), units(9, 7), units(9, 7)
    expected = loop_info_nce(image, text, image_keys, text_keys, 14.3, offset)
    assert cross_entropy_to_keys(image, text_keys, 14.3, offset).item() == pytest.approx(
        loop_one_way(image, text_keys, 14.3, offset), rel=1e-12
    )
    found = info_nce(image, text, image_keys, text_keys, 14.3, offset)
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("offset", [0, 2])
def test_multi_view_equals_a_plain_loop_over_three_pairings(units, offset):
    images, texts, image_keys, text_keys = units(2, 3, 5), units(2, 3, 5), units(2, 6, 5), units(2, 6, 5)
    losses = [
        loop_info_nce(images[i], texts[j], image_keys[i], text_keys[j], 20.0, offset)
        for i, j in ((1, 0), (0, 1), (1, 1))
    ]
    found = multi_view(images, texts, image_keys, text_keys, 20.0, offset)
    assert found.item() == pytest.approx(sum(losses) / 3, rel=1e-12)


def test_multi_view_of_one_text_view_is_the_other_image(units):
    images, texts = units(2, 3, 5), units(1, 3, 5)
    found = multi_view(images, texts, images, texts, 20.0)
    assert found.item() == info_nce(images[1], texts[0], images[1], texts[0], 20.0).item()


def test_gradients(units, check_gradients):
    scale = torch.tensor(3.0, dtype=torch.float64)
    check_gradients(lambda *x: info_nce(*x, offset=1), units(2, 3), units(2, 3), units(4, 3), units(4, 3), scale)
    check_gradients(
        lambda *x: multi_view(*x, offset=1), units(2, 2, 3), units(2, 2, 3), units(2, 3, 3), units(2, 3, 3), scale
    )


def test_ranks_together_equal_the_whole_batch(units, check_ranks):
    check_ranks(lambda *x: info_nce(*x[:4], 10.0, x[4]), units(6, 5), units(6, 5))
    check_ranks(lambda *x: multi_view(*x[:4], 10.0, x[4]), units(2, 6, 5), units(2, 6, 5), batch_dim=1)


def test_precision(units, check_precision):
    check_precision(lambda *x: info_nce(*x, 100.0), *(units(6, 8) for _ in range(4)))
    check_precision(lambda *x: multi_view(*x, 100.0), *(units(2, 6, 8) for _ in range(4)))
    check_precision(lambda *x: scaled_similarity(*x, 100.0), units(6, 8), units(9, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_full_precision_of_halves_is_float32(dtype):
    assert to_float32(torch.ones(2, dtype=dtype)).dtype == torch.float32


def test_the_hardest_pairs_at_scale_100_stay_finite():
    image = torch.eye(4).requires_grad_()
    log_scale = torch.tensor(100.0).log().requires_grad_()
    opposite = -image.detach()
    loss = info_nce(image, opposite, image, opposite, log_scale.exp())
    loss.backward()
    assert loss.item() == pytest.approx(100 + math.log(3 + math.exp(-100)), rel=1e-6)
    assert image.grad.isfinite().all()
    assert log_scale.grad.item() == pytest.approx(100, rel=1e-5)


def test_never_waits_for_the_device(units, no_device_reads):
    images, texts, scale = units(2, 3, 5), units(2, 3, 5), torch.tensor(14.3)
    with no_device_reads():
        info_nce(images[0], texts[0], images[0], texts[0], scale)
        multi_view(images, texts, images, texts, scale)


def test_one_pair_alone_costs_nothing(units):
    image, text = units(1, 4), units(1, 4)
    assert info_nce(image, text, image, text, 100.0).item() == 0
