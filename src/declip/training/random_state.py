"""States of torch's random generators on one rank."""

from collections.abc import Mapping

import torch
from torch import Tensor

from declip.training import distributed

GENERATORS = ("cuda", "mps")  # devices with a generator of their own


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Get the states of torch's generators: "cpu" and that of the device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type in GENERATORS:
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Set the states of torch's generators."""
    torch.set_rng_state(states["cpu"])
    if device.type in GENERATORS and device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type], device)


def seed_rank(seed: int, step: int) -> None:
    """Seed torch's generators differently on each rank, so that no two ranks sample equal dropout masks."""
    torch.manual_seed(seed + 7919 * (distributed.rank() + 1) + step)
