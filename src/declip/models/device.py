"""The device that a model computes on: by name, its precision, and its random state."""

from collections.abc import Mapping

import torch
from torch import Tensor

from declip.errors import UserError
from declip.recipe.schema import known_device

GENERATORS = ("cuda", "mps")  # devices with another generator than the CPU's
COMPILED_ON = ("cuda",)  # on a CPU compiling gained 3 to 5 % with small towers, else nothing
CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16")  # instructions of Intel and AMD, Intel, Arm


def pick_device(name: str) -> torch.device:
    """Find a device by name; "auto" is CUDA, else Apple's MPS, else the CPU."""
    if known_device(str(name)) == "auto":  # also of a torch.device
        name = _fastest()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"The device '{name}' cannot be used: {reason}. Give auto or cpu: train.device for a recipe, --device to "
            "evaluate."
        ) from error
    return device


def _fastest() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def computes_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself; elsewhere torch emulates it, up to 80 times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if (
        device.type != "cpu"
        or not torch.backends.mkldnn.is_available()
        or not hasattr(torch.cpu, "get_capabilities")
    ):
        return False  # not every torch tells its instructions
    return any(torch.cpu.get_capabilities().get(name) for name in CPU_BF16)


def compiles(device: torch.device) -> bool:
    """Whether `torch.compile` makes towers faster on a device."""
    return device.type in COMPILED_ON


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
