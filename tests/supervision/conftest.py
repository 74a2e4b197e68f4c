"""What the tests of the terms share: golden cases, random unit vectors, and what every term must do."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from golden_cases import GOLDEN


@pytest.fixture(scope="session")
def golden():
    """Read one case of the authors' values: golden("infonce/0")["loss"]."""
    arrays = np.load(GOLDEN / "loss_cases.npz")

    def case(name):
        found = {k.removeprefix(f"{name}/"): torch.tensor(arrays[k]) for k in arrays if k.startswith(f"{name}/")}
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


class NoDeviceReads(TorchDispatchMode):
    """Fails at operations whose outcome the host must read, and on a GPU wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select"), name
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_device_reads():
    """A context in which nothing may wait for the device: with no_device_reads(): ..."""
    return NoDeviceReads
