"""Mixtures of a fine-tuned model and its pretrained one: WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903).

Weights on the straight line between the two keep much of the pretrained model's accuracy, and are often better than the
fine-tuned model on its own task.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from declip.errors import UserError
from declip.evaluation.protocols import Options, evaluate_all
from declip.evaluation.results import Result, short_names
from declip.interchange import declip_file
from declip.interchange.export import write_folder
from declip.interchange.model_card import NO_LICENSE
from declip.interchange.provenance import Provenance
from declip.interchange.read import load
from declip.interchange.weights import first_difference
from declip.io.text import percent
from declip.models.dual_encoder import DualEncoder
from declip.runs.folder import KEPT


def interpolate(start: DualEncoder, end: DualEncoder, alpha: float) -> DualEncoder:
    """Mix two models: (1 - alpha) · start + alpha · end in every tensor (equation 1 of the paper).

    Args:
        start: The pretrained model.
        end: The fine-tuned model, of the same architecture, on the same device.

    Returns:
        A new model, in evaluation mode. Running statistics of batch norm are mixed like weights.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha is {alpha:g}; give a number from 0 to 1, the fine-tuned model.")
    first, last = start.state_dict(), end.state_dict()
    if difference := first_difference(first, last):
        raise UserError(f"These models can't be mixed: {difference}. Give a model and what it was fine-tuned from.")
    mixed = copy.deepcopy(end)
    mixed.load_state_dict(
        {name: torch.lerp(first[name], t, alpha) if t.is_floating_point() else t for name, t in last.items()}
    )
    return mixed.eval()


def ends_of(run: str | Path, device: str = "auto") -> tuple[DualEncoder, DualEncoder]:
    """Load a fine-tuned run's start and end."""
    kept = Path(run) / KEPT
    weights = declip_file.read_part(str(kept)) if kept.is_file() else None
    if weights is None or not weights.whole:
        raise UserError(f"'{run}' is no fine-tuned run, or started from an image tower alone: nothing to mix with.")
    end = load(run, device)
    assert isinstance(end, DualEncoder), "a run's model is ours"
    return weights.check().build().to(end.device).eval(), end


class Mixed(NamedTuple):
    """The results of one mixture, in the order of the data sets; alpha is the fraction of fine-tuned weights."""

    alpha: float
    results: tuple[Result, ...]


def measure_mixtures(
    run: str | Path,
    alphas: Sequence[float],
    datasets: Sequence[str],
    task: str = "zero-shot",
    device: str = "auto",
    options: Options | None = None,
) -> Iterator[Mixed]:
    """Measure mixtures of a fine-tuned run on data sets, by one task; for the options see `evaluate_all`."""
    start, end = ends_of(run, device)
    for alpha in alphas:
        model = interpolate(start, end, alpha)
        yield Mixed(alpha, tuple(evaluate_all(model, name, (task,), options)[0] for name in datasets))


def first_measure(result: Result) -> str:
    """The main measure of a result, such as "top-1 32.8 %"."""
    measure = result.measures()[0]
    return f"{measure.name} {percent(measure.value)}"


def write_mixture(
    run: str | Path, alpha: float, out: str | Path, *, license: str = NO_LICENSE, overwrite: bool = False
) -> Path:
    """Write a mixture as a folder that `declip.load` reads and `declip.export` turns into other formats."""
    model = interpolate(*ends_of(run, "cpu"), alpha)
    origin = f"the run `{Path(run).name}`, {alpha:g} of it and {1 - alpha:g} of its start (WiSE-FT)"
    assert model.recipe is not None, "a run's model has one"
    write_folder(model, Provenance(model.recipe, origin=origin), Path(out), None, license, overwrite)
    return Path(out)


def draw_mixtures(mixtures: Iterable[Mixed], path: Path) -> None:
    """Draw the first measure of each data set over alpha, as PNG or SVG by the file's name."""
    from matplotlib.figure import Figure

    mixtures = list(mixtures)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    names = short_names(result.dataset for result in mixtures[0].results)
    for number, result in enumerate(mixtures[0].results):
        measures = [mixed.results[number].measures()[0] for mixed in mixtures]
        label = f"{names[result.dataset]}, {measures[0].name}, n = {measures[0].n:,}"
        values = [100 * measure.value for measure in measures]
        axes.plot([mixed.alpha for mixed in mixtures], values, marker="os^Dv"[number % 5], label=label)
    axes.set(xlabel="alpha: 0 is the pretrained model, 1 the fine-tuned one", ylabel="%")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=130)
