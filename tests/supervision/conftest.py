"""What the tests of the terms share: golden cases, random unit vectors, and the losses in one form."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from declip.supervision import contrastive
from declip.supervision.contrastive import info_nce, sigmoid_loss
from declip.supervision.late_interaction import late_interaction
from declip.supervision.multi_view import multi_view
from declip.supervision.nearest_neighbor import neighbor_contrast
from declip.supervision.simclr import nt_xent
from golden_cases import GOLDEN


@pytest.fixture(scope="session")
def golden():
    """Read one case of the authors' values: golden("infonce/0")["loss"]."""
    arrays = np.load(GOLDEN / "loss_cases.npz")

    def case(name):
        found = {
            k.removeprefix(f"{name}/"): torch.tensor(arrays[k])
            for k in arrays
            if k.startswith(f"{name}/")
        }
        assert found, f"no golden case {name}"
        return found

    return case


@pytest.fixture
def units():
    """Draw float64 vectors of length 1, the same ones in every run: units(2, 5, 8)."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)

    return draw


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Compute losses in blocks of one or two rows where a test sets a limit of 0."""
    monkeypatch.setattr(contrastive, "BLOCK_BYTES", 2 * BATCH * 8)


class NoDeviceReads(TorchDispatchMode):
    """A context that fails at operations whose outcome the host must read, and on a GPU wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in (
            "_local_scalar_dense",
            "nonzero",
            "is_nonzero",
            "equal",
            "masked_select",
        ), name
        return func(*args, **(kwargs or {}))


BATCH = 6
LENGTHS = torch.tensor([2, 5, 1, 4, 3, 5])
NEIGHBORS = F.normalize(
    torch.randn(2, BATCH, 5, generator=torch.Generator().manual_seed(9)), dim=-1
).bfloat16()


def views(z1, z2, keys1, keys2, scale, offset, limit):
    return nt_xent(z1, z2, keys1, keys2, 1 / scale, offset, limit)


def late(images, words, image_keys, word_keys, scale, offset, limit):
    mask = torch.arange(words.shape[1]) < LENGTHS[: len(word_keys), None]
    own = mask[offset : offset + len(words)]
    return late_interaction(
        images, words, own, image_keys, word_keys, mask, scale, offset, max_logit_bytes=limit
    )


def neighbors(images, keys, scale, offset, limit):
    return neighbor_contrast(images, NEIGHBORS[:, : keys.shape[1]].to(images), scale, offset, limit)


def sigmoid(images, texts, image_keys, text_keys, scale, offset, limit):
    """With a bias that follows the scale, so that the scale's gradient shows both."""
    return sigmoid_loss(images, text_keys, scale, -0.4 * scale, offset, limit)


TERMS = {
    "info_nce": (info_nce, [(BATCH, 5)] * 2),
    "multi_view": (multi_view, [(2, BATCH, 5)] * 2),
    "nt_xent": (views, [(BATCH, 5)] * 2),
    "late_interaction": (late, [(BATCH, 4, 5), (BATCH, 5, 5)]),
    "sigmoid": (sigmoid, [(BATCH, 5)] * 2),
    "neighbors": (neighbors, [(2, BATCH, 5)]),
}
"""Name → loss, and shapes of its features."""

WITHOUT_MATRIX = {"neighbors"}  # no matrix of rows and keys, so the test of memory does not apply


def batch_axis(shape):
    """Axis of the pairs: views come before them."""
    return int(shape[0] == 2)
