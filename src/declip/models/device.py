"""The device that a model computes on, by name, and the precision that it computes in."""

import torch

from declip.errors import UserError


def pick_device(name: str) -> torch.device:
    """Find a device by name; "auto" is CUDA, else Apple's MPS, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
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


def computes_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself; elsewhere torch emulates it, up to 80 times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    mkldnn = torch.backends.mkldnn.is_available()
    return device.type == "cpu" and mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
