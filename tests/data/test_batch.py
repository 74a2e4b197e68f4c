"""The batch: what it accepts, how it moves."""

import pytest
import torch

from declip.data.batch import Draw, PairBatch, Photometric
from declip.data.pair import BrokenPair
from declip.errors import UserError

PLAIN = Draw(1.0, 1.0, 1.0, 0.0, (3, 1, 0, 2), True, False, 0.5, 1)


def parts(pairs: int = 3, length: int = 8, **other) -> dict:
    whole = {
        "images": torch.zeros(2, pairs, 3, 4, 4),
        "texts": torch.ones(2, pairs, length, dtype=torch.int64),
        "masked": torch.ones(pairs, length, dtype=torch.int64),
        "labels": torch.full((pairs, length), -100),
        "tags": torch.arange(pairs),
    }
    return whole | other


def photometric(views: int = 2, pairs: int = 3) -> Photometric:
    return Photometric.stack([[PLAIN] * pairs] * views)


def test_length_is_the_number_of_pairs():
    assert len(PairBatch(**parts(5))) == 5
    assert len(PairBatch(images=torch.zeros(1, 2, 3, 4, 4), texts=torch.zeros(1, 2, 16, dtype=torch.int64))) == 2
    assert len(PairBatch(**parts(0))) == 0


def test_moving_takes_every_tensor_along_and_keeps_the_rest():
    broken = BrokenPair("missing image", "a.png")
    images = torch.zeros(2, 3, 3, 4, 4, dtype=torch.uint8)
    batch = PairBatch(**parts(images=images), photometric=photometric(), skipped=[broken])
    moved = batch.to("meta")
    for name in ("images", "texts", "masked", "labels", "tags"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).shape == getattr(batch, name).shape
        assert getattr(batch, name).device.type == "cpu"
    assert moved.photometric is batch.photometric
    assert moved.skipped == [broken]
    assert PairBatch(images=torch.zeros(1, 2, 3, 4, 4), texts=batch.texts[:1, :2]).to("meta").masked is None


def test_what_is_planned_by_stays_on_the_host():
    labels = torch.full((3, 8), -100)
    labels[0, 2] = labels[2, 5] = 7
    batch = PairBatch(**parts(labels=labels, lengths=torch.tensor([[4, 8, 6], [4, 3, 6]])))
    assert batch.places is None
    moved = batch.to("meta")
    assert moved.lengths is batch.lengths
    assert moved.places.shape == (2,)
    here = batch.to("cpu")
    assert here.places.tolist() == [2, 21]
    part = here.rows(1, 3)
    assert part.lengths.tolist() == [[8, 6], [3, 6]]
    assert part.places is None
    assert part.to("cpu").places.tolist() == [13]


def test_pinning_pins_every_tensor(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    pinned = PairBatch(**parts()).pin_memory()
    assert (pinned.images == 1).all()
    assert (pinned.texts == 2).all()
    assert (pinned.tags == torch.arange(3) + 1).all()


def test_stacked_draws_keep_their_places():
    draws = [[PLAIN._replace(hue=view + sample / 10) for sample in range(3)] for view in range(2)]
    stacked = Photometric.stack(draws)
    torch.testing.assert_close(stacked.hue, torch.tensor([[0.0, 0.1, 0.2], [1.0, 1.1, 1.2]]))
    assert stacked.order.tolist() == [[[3, 1, 0, 2]] * 3] * 2
    assert (stacked.jitter.dtype, stacked.order.dtype, stacked.sigma.dtype) == (
        torch.bool,
        torch.int64,
        torch.float32,
    )
    assert Photometric.stack([[], []]).order.shape == (2, 0, 4)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"images": torch.zeros(3, 3, 4, 4)}, r"`images` has shape \(3, 3, 4, 4\); it must be \(V, B, 3, H, W\)"),
        ({"images": torch.zeros(2, 3, 4, 4, 3)}, "channels"),
        ({"images": torch.zeros(2, 3, 3, 4, 4, dtype=torch.int64)}, "`images` is torch.int64; it must be float"),
        ({"images": torch.zeros(2, 3, 3, 4, 4, dtype=torch.uint8)}, "uint8 and `photometric` is missing"),
        ({"photometric": photometric()}, "`photometric` goes with uint8 images"),
        ({"texts": torch.ones(3, 8, dtype=torch.int64)}, r"`texts` has shape \(3, 8\); it must be \(T, B, L\)"),
        ({"texts": torch.ones(3, 3, 8, dtype=torch.int64)}, "T 1 or 2"),
        ({"texts": torch.ones(2, 4, 8, dtype=torch.int64)}, "`images` holds 3 pairs.* and `texts` 4"),
        ({"texts": torch.ones(2, 3, 8)}, r"`texts` is torch.float32; it must be int64"),
        ({"masked": torch.ones(3, 7, dtype=torch.int64)}, r"`masked` has shape \(3, 7\).* must be \(3, 8\)"),
        ({"masked": None}, "`labels` was given without `masked`"),
        ({"labels": None}, "`masked` was given without `labels`"),
        ({"labels": torch.full((3, 8), -100, dtype=torch.int32)}, "`labels` is torch.int32"),
        ({"tags": torch.arange(4)}, r"`tags` has shape \(4,\).* must be \(3,\)"),
    ],
)
def test_what_does_not_fit_is_refused(given, says):
    with pytest.raises(UserError, match=says):
        PairBatch(**parts(**given))


def test_photometric_parameters_must_fit_images_and_each_other():
    images = torch.zeros(2, 3, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(UserError, match=r"`photometric` is for \(views, pairs\) = \(1, 3\); `images` has \(2, 3\)"):
        PairBatch(**parts(images=images), photometric=photometric(1))
    good = vars(photometric())
    with pytest.raises(UserError, match=r"`jitter` has \(2, 3\) and `sigma` has \(2, 2\)"):
        Photometric(**(good | {"sigma": torch.zeros(2, 2)}))
