"""Mixtures of a fine-tuned model and its pretrained one: WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903).

Weights on the straight line between the two keep much of the pretrained model's accuracy, and are often better than the
fine-tuned model on its own task.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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
        alpha: From 0, the start, to 1, the end.

    Returns:
        A new model, in evaluation mode. Running statistics of batch norm are mixed like weights.

    Raises:
        UserError: the models differ in architecture, or alpha is not between 0 and 1.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha is {alpha:g}; give a number from 0 to 1, the fine-tuned model.")
    first, last = start.state_dict(), end.state_dict()
    if difference := first_difference(first, last):
        raise UserError(f"These models can't be mixed: {difference}. Give a model and what it was fine-tuned from.")
    mixed = copy.deepcopy(end)
    mixed.load_state_dict(
        {
            name: torch.lerp(first[name], tensor, alpha) if tensor.is_floating_point() else tensor
            for name, tensor in last.items()
        }
    )
    return mixed.eval()


def ends_of(run: str | Path, device: str = "auto") -> tuple[DualEncoder, DualEncoder]:
    """Load a fine-tuned run's start and end.

    Raises:
        UserError: it is no run, it was not fine-tuned, or started from an image tower alone.
    """
    kept = Path(run) / KEPT
    if not kept.is_file():
        raise UserError(f"'{run}' holds no {KEPT}: it is no fine-tuned run. Give the folder of one.")
    weights = declip_file.read_part(str(kept))
    if not weights.whole:
        raise UserError(f"'{run}' started from an image tower alone, so there is nothing to mix with.")
    end = load(run, device)
    assert isinstance(end, DualEncoder), "a run's model is ours"
    return weights.check().build().to(end.device).eval(), end


@dataclass(frozen=True)
class Mixed:
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
    """Measure mixtures of a fine-tuned run, one after the other.

    Args:
        run: The folder of a fine-tuned run.
        alphas: From 0 to 1.
        datasets: The data set that it was fine-tuned for, and those that it should not forget.
        task: The task of all data sets.
        device, options: See `declip.load` and `evaluate_all`.
    """
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
        axes.plot(
            [mixed.alpha for mixed in mixtures],
            [100 * measure.value for measure in measures],
            marker="os^Dv"[number % 5],
            label=label,
        )
    axes.set_xlabel("alpha: 0 is the pretrained model, 1 the fine-tuned one")
    axes.set_ylabel("%")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.22))
    figure.savefig(path, dpi=130)
