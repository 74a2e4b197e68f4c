"""Interpolation between pretrained and fine-tuned weights: WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903)."""

import copy
import json
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import save_file

from declip.errors import UserError
from declip.evaluation.protocols import Options, evaluate_all
from declip.evaluation.results import Result
from declip.interchange import declip_file
from declip.interchange.read import is_published, read_checkpoint, read_start, weights_of
from declip.interchange.weights import first_difference
from declip.io.atomic import atomic_write, write_text
from declip.models.device import pick_device
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.runs.checkpoint import prefixed
from declip.runs.folder import EVALUATIONS, KEPT, MIXED, MIXTURE, append_row, log, read_run
from declip.training.pairs import evaluation_tasks, tasks_to_keep

ALPHAS = (1.0, 0.75, 0.5, 0.25)
"""Fractions of the fine-tuned weights that are tried. Of equal ones the first, which is nearest to them, is taken."""


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


def mix_with_start(folder: Path, quiet: bool = False) -> DualEncoder | None:
    """Choose a mixture on the validation sets and `evaluation.keep`, and write it into the folder of a finished run.

    `declip.load` reads it instead of the best checkpoint. The score is the mean, over the sets, of R@1 of both
    directions or of top-1. None if the fine-tuned weights alone are best.
    """
    run = read_run(folder)
    if "alpha" not in run.mixture:
        recipe = run.recipe
        tasks = evaluation_tasks(recipe, final=False) | tasks_to_keep(recipe)
        start, end = ends_of(folder)
        scores = dict[float, dict[str, float]]()
        for alpha in ALPHAS:
            model = interpolate(start, end, alpha)
            scores[alpha] = {name: score(_evaluate(model, name, found, quiet)) for name, found in tasks.items()}
        best = max(ALPHAS, key=lambda alpha: fmean(scores[alpha].values()))
        if best < 1:
            mixed = interpolate(start, end, best)
            with atomic_write(folder / MIXED) as temporary:
                weights = prefixed("model", mixed.state_dict())
                save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, temporary)
            _append_results(folder, mixed, recipe, run.step, run.best_step, quiet)
        # Written last: a run that is stopped before chooses again.
        write_text(folder / MIXTURE, json.dumps({"alpha": best, "scores": scores}, indent=1))
        log.info("Mixture with the start (WiSE-FT): %g of the fine-tuned weights is best.", best)
        return mixed if best < 1 else None
    return None


def score(results: list[Result]) -> float:
    """The mean R@1 of both directions, or the top-1 of zero-shot classification."""
    return fmean(result.headline.value for result in results)


def _evaluate(model: DualEncoder, name: str, tasks: list[str], quiet: bool) -> list[Result]:
    return list(evaluate_all(model, name, tasks, Options(progress=not quiet)))


def _append_results(folder: Path, mixed: DualEncoder, recipe: Recipe, step: int, best: int, quiet: bool) -> None:
    for name, tasks in evaluation_tasks(recipe, final=True).items():
        for result in _evaluate(mixed, name, tasks, quiet):
            append_row(folder / EVALUATIONS, {"step": step, "best_step": best, **result.to_dict()})
