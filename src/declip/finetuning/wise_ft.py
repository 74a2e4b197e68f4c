"""WiSE-FT: interpolation between pretrained and fine-tuned weights (Wortsman et al. 2022, arXiv 2109.01903)."""

import copy
import json
from pathlib import Path
from statistics import fmean

import torch

from declip.evaluation.held_out import HeldOutSets
from declip.fitting.run import ALPHAS, best_mixture
from declip.interchange.run_folder import read_checkpoint
from declip.io.atomic import atomic_write, save_tensors, write_text
from declip.models.device import pick_device
from declip.models.dual_encoder import DualEncoder
from declip.models.encoder import Encoder
from declip.recipe.schema import Evaluation
from declip.runs import folder as run_folder
from declip.runs.checkpoint import with_prefix
from declip.training.pretrained import load_pretrained


def interpolate(start: DualEncoder, end: DualEncoder, alpha: float) -> DualEncoder:
    """Interpolate two models of one architecture: (1 - alpha) · start + alpha · end (equation 1 of the paper).

    The new model is in evaluation mode. Running statistics of batch norm are interpolated like weights.
    """
    first = start.state_dict()
    last = end.state_dict()
    mixed = copy.deepcopy(end)
    interpolated = {
        name: torch.lerp(first[name], tensor, alpha)
        for name, tensor in last.items()
        if tensor.is_floating_point()
    }
    mixed.load_state_dict(last | interpolated)
    return mixed.eval()


def ends_of(folder: Path, device: str = "auto") -> tuple[DualEncoder, DualEncoder]:
    """Load the pretrained and the fine-tuned model of a run that started from a whole model."""
    start = load_pretrained(run_folder.read_recipe(folder).finetune, folder, resume=True)
    assert start is not None, "the run started from weights"
    pretrained = start.check().build()
    tuned = read_checkpoint(folder, mixed=False).check().build()
    target = pick_device(device)
    return pretrained.to(target).eval(), tuned.to(target).eval()


def mix_with_start(
    folder: Path, held_out: HeldOutSets, progress: bool = True
) -> DualEncoder | None:
    """Choose a mixture on the validation sets and `evaluation.keep`, and write it into the folder of a finished run.

    `declip.load` reads it instead of the best checkpoint. The score is the mean, over the sets, of R@1 of both
    directions or of top-1. None if the fine-tuned weights alone are best.
    """
    run = run_folder.read_run(folder)
    if "alpha" in run.mixture:
        return None
    start, end = ends_of(folder)
    scores = {}
    for alpha in ALPHAS:
        mixed = interpolate(start, end, alpha)
        scores[alpha] = set_scores(mixed, run.recipe.evaluation, progress, held_out)
    mixture = best_mixture(scores)
    best = mixture["alpha"]
    kept: DualEncoder | None = None
    if best < 1:
        kept = mixed = interpolate(start, end, best)
        with atomic_write(folder / run_folder.MIXED) as temporary:
            save_tensors(with_prefix("model", mixed.state_dict()), temporary)
        for result in held_out.measure(
            mixed, held_out.tasks(run.recipe.evaluation, final=True), progress
        ):
            row = {"step": run.step, "best_step": run.best_step, **result.to_dict()}
            run_folder.append_row(folder / run_folder.EVALUATIONS, row)
    # Written last: a run that is stopped before chooses again.
    write_text(folder / run_folder.MIXTURE, json.dumps(mixture, indent=1))
    return kept


def set_scores(
    model: Encoder, wanted: Evaluation, progress: bool, held_out: HeldOutSets
) -> dict[str, float]:
    """R@1 (mean of both directions) or top-1 on each validation set and each set of `evaluation.keep`."""
    tasks = held_out.tasks(wanted, final=False) | held_out.tasks_to_keep(wanted)
    scores = {}
    for name, protocols in tasks.items():
        results = held_out.measure(model, {name: protocols}, progress)
        scores[name] = fmean(result.headline.value for result in results)
    return scores
