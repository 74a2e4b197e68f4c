"""The device that a model computes on, by name."""

import torch

from declip.errors import UserError


def pick_device(name: str) -> torch.device:
    """The device by name; "auto" takes CUDA where it is.

    Raises:
        UserError: a name that torch does not know, or a device that is not there.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"The device '{name}' can't be used: {reason}. Give auto or cpu: train.device for a recipe, --device to "
            "evaluate."
        ) from error
    return device
