"""Which precision a run computes in, where its recipe leaves that to the device."""

from pathlib import Path

import torch

from declip.recipe.schema import Recipe
from declip.runs.folder import RECIPE, log, read_recipe


def computes_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself.

    Where it does not, torch goes through other types: right, but slower than float32. On a processor with AVX2
    alone, matrix products took 80 times as long.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return False


def resolve_precision(recipe: Recipe, device: torch.device, folder: Path, resume: bool) -> Recipe:
    """The recipe with `train.precision=auto` settled; a run that goes on keeps what it began with, on any device."""
    precision = recipe.train.precision
    if precision == "auto":
        precision = "bf16" if computes_bf16(device) else "fp32"
        if resume and (folder / RECIPE).is_file():
            precision = read_recipe(folder).train.precision
    if precision == "bf16" and not computes_bf16(device):
        log.warning(
            "This device (%s) does not compute in bfloat16 itself, so steps may take many times as long as in float32. "
            "train.precision=auto takes what the device can.",
            device,
        )
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": precision})})
