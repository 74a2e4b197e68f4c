"""Interpolation between pretrained and fine-tuned weights: WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903)."""

import copy
from pathlib import Path

import torch

from declip.errors import UserError
from declip.interchange import declip_file
from declip.interchange.read import is_published, read_checkpoint, read_start, weights_of
from declip.interchange.weights import first_difference
from declip.models.device import pick_device
from declip.models.dual_encoder import DualEncoder
from declip.runs.folder import KEPT


def interpolate(start: DualEncoder, end: DualEncoder, alpha: float) -> DualEncoder:
    """Interpolate two models of one architecture: (1 - alpha) · start + alpha · end (equation 1 of the paper).

    The new model is in evaluation mode. Running statistics of batch norm are interpolated like weights.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha is {alpha:g}; give a number from 0, the pretrained model, to 1, the fine-tuned model.")
    first, last = start.state_dict(), end.state_dict()
    if difference := first_difference(first, last):
        raise UserError(
            f"These models cannot be interpolated: {difference}. Give a model and the weights it started from."
        )
    mixed = copy.deepcopy(end)
    mixed.load_state_dict(
        {name: torch.lerp(first[name], t, alpha) if t.is_floating_point() else t for name, t in last.items()}
    )
    return mixed.eval()


def ends_of(run: str | Path, device: str = "auto") -> tuple[DualEncoder, DualEncoder]:
    """Load the pretrained and the fine-tuned model of a run."""
    folder = Path(run).expanduser()
    kept, end = folder / KEPT, weights_of(read_checkpoint(folder, mixed=False), str(run)).build()
    name = end.recipe.finetune.pretrained if end.recipe is not None else None
    weights = None
    if kept.is_file():
        weights = declip_file.read_part(str(kept))
    elif name is not None and is_published(name):
        weights = read_start(name)
    if weights is None or not end.state_dict().keys() <= weights.tensors.keys():
        raise UserError(
            f"'{run}' did not start from a model with all its tensors (text tower, projections, heads), so there is "
            "nothing to interpolate with."
        )
    return weights.check().build().to(pick_device(device)).eval(), end.to(pick_device(device)).eval()
