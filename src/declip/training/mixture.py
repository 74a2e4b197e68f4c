"""Interpolation between pretrained and fine-tuned weights: WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903)."""

import copy
import json
from pathlib import Path
from statistics import fmean

import torch

from declip.interchange import declip_file
from declip.interchange.read import read_checkpoint, read_start, weights_of
from declip.io.atomic import atomic_write, save_tensors, write_text
from declip.models.device import pick_device
from declip.models.dual_encoder import DualEncoder
from declip.runs.checkpoint import prefixed
from declip.runs.folder import EVALUATIONS, KEPT, MIXED, MIXTURE, append_row, log, read_recipe, read_run
from declip.training.pairs import evaluate_tasks, evaluation_tasks, tasks_to_keep

ALPHAS = (1.0, 0.75, 0.5, 0.25)
"""Fractions of the fine-tuned weights that are tried. Of equal ones the first, which is nearest to them, is taken."""


def interpolate(start: DualEncoder, end: DualEncoder, alpha: float) -> DualEncoder:
    """Interpolate two models of one architecture: (1 - alpha) · start + alpha · end (equation 1 of the paper).

    The new model is in evaluation mode. Running statistics of batch norm are interpolated like weights.
    """
    first, last, mixed = start.state_dict(), end.state_dict(), copy.deepcopy(end)
    mixed.load_state_dict(
        {name: torch.lerp(first[name], t, alpha) if t.is_floating_point() else t for name, t in last.items()}
    )
    return mixed.eval()


def ends_of(folder: Path, device: str = "auto") -> tuple[DualEncoder, DualEncoder]:
    """Load the pretrained and the fine-tuned model of a run that started from a whole model."""
    kept, to = folder / KEPT, pick_device(device)
    published = str(read_recipe(folder).finetune.pretrained)
    start = declip_file.read_part(str(kept)) if kept.is_file() else read_start(published)
    end = weights_of(read_checkpoint(folder, mixed=False), str(folder))
    return start.check().build().to(to).eval(), end.build().to(to).eval()


def mix_with_start(folder: Path, quiet: bool = False) -> DualEncoder | None:
    """Choose a mixture on the validation sets and `evaluation.keep`, and write it into the folder of a finished run.

    `declip.load` reads it instead of the best checkpoint. The score is the mean, over the sets, of R@1 of both
    directions or of top-1. None if the fine-tuned weights alone are best.
    """
    run = read_run(folder)
    if "alpha" in run.mixture:
        return None
    tasks = evaluation_tasks(run.recipe, final=False) | tasks_to_keep(run.recipe)
    start, end = ends_of(folder)
    scores = dict[float, dict[str, float]]()
    for alpha in ALPHAS:
        model = interpolate(start, end, alpha)
        scores[alpha] = {
            name: fmean(result.headline.value for result in evaluate_tasks(model, {name: found}, not quiet))
            for name, found in tasks.items()
        }
    best = max(ALPHAS, key=lambda alpha: fmean(scores[alpha].values()))
    mixed = interpolate(start, end, best) if best < 1 else None
    if mixed is not None:
        with atomic_write(folder / MIXED) as temporary:
            save_tensors(prefixed("model", mixed.state_dict()), temporary)
        for result in evaluate_tasks(mixed, evaluation_tasks(run.recipe, final=True), not quiet):
            append_row(folder / EVALUATIONS, {"step": run.step, "best_step": run.best_step, **result.to_dict()})
    # Written last: a run that is stopped before chooses again.
    write_text(folder / MIXTURE, json.dumps({"alpha": best, "scores": scores}, indent=1))
    log.info("Mixture with the start (WiSE-FT): %g of the fine-tuned weights is best.", best)
    return mixed
