"""The device that a model computes on, by name, and the precision that it computes in."""

import torch

from declip.errors import UserError


def pick_device(name: str) -> torch.device:
    """Find a device by name; "auto" is CUDA, else Apple's MPS, else the CPU."""
    try:
        device = torch.device(_best() if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"The device '{name}' cannot be used: {reason}. Give auto or cpu: train.device for a recipe, --device to "
            "evaluate."
        ) from error
    return device


def _best() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def computes_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself.

    Elsewhere torch goes through other types, which is right but slower than float32: on a processor with AVX2 alone,
    matrix products took 80 times as long.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return False
