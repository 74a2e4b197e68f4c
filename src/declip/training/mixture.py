"""The mixture of fine-tuned weights with their start that is best on held-out sets: WiSE-FT (arXiv 2109.01903)."""

import json
from pathlib import Path
from statistics import fmean

from safetensors.torch import save_file

from declip.evaluation.protocols import Options, evaluate_all
from declip.evaluation.results import Result
from declip.interchange.interpolate import ends_of, interpolate
from declip.io.atomic import atomic_write, write_text
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.runs.checkpoint import prefixed
from declip.runs.folder import EVALUATIONS, MIXED, MIXTURE, append_row, log, read_run
from declip.training.pairs import evaluation_tasks, tasks_to_keep

ALPHAS = (1.0, 0.75, 0.5, 0.25)
"""Fractions of the fine-tuned weights that are tried. Of equal ones the first, which is nearest to them, is taken."""


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
