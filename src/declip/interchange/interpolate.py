"""Between a model and what it was fine-tuned from: WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903).

Weights in a straight line from the start to the end keep much of what the start knew, and often do better than the end
on what it was fine-tuned for.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from declip.errors import UserError
from declip.evaluation.protocols import Options, evaluate_all
from declip.evaluation.results import Result, short_names
from declip.interchange.declip_file import CARD, FILE, USAGE, first_difference, read_declip_file, write_declip_file
from declip.interchange.export import check_out, folder_beside
from declip.interchange.load import load
from declip.interchange.model_card import NO_LICENCE, model_card
from declip.interchange.provenance import Provenance
from declip.io.text import percent
from declip.models.dual_encoder import DualEncoder
from declip.models.no_text import has_text
from declip.runs.folder import KEPT


def interpolate(start: DualEncoder, end: DualEncoder, share: float) -> DualEncoder:
    """Mix two models, (1 − share) · start + share · end in every tensor (equation 1 of the paper, share = α).

    Args:
        start: Where fine-tuning began.
        end: Where it ended; of the same architecture, on the same device.
        share: From 0, the start, to 1, the end.

    Returns:
        A new model, in evaluation mode. Running statistics of batch norm are mixed like weights.

    Raises:
        UserError: the models differ in architecture, or the share is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise UserError(f"The share of the fine-tuned weights is {share:g}; give a number from 0 to 1.")
    ours, theirs = start.state_dict(), end.state_dict()
    if difference := first_difference(ours, theirs):
        raise UserError(f"These models can't be mixed: {difference}. Give a model and what it was fine-tuned from.")
    mixed = copy.deepcopy(end)
    mixed.load_state_dict(
        {
            name: torch.lerp(ours[name], theirs[name], share) if theirs[name].is_floating_point() else theirs[name]
            for name in theirs
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
    end = load(run, device)
    assert isinstance(end, DualEncoder), "a run's model is ours"
    try:
        start = read_declip_file(kept)
    except UserError as error:
        raise UserError(
            f"'{run}' did not start from a whole model, so there is nothing to mix with: {error}"
        ) from error
    if not has_text(start):
        raise UserError(f"'{run}' started from an image tower alone, so there is nothing to mix with.")
    return start.to(end.device).eval(), end


@dataclass(frozen=True)
class Mixed:
    """What one mixture was measured at.

    Attributes:
        share: Of the fine-tuned weights.
        results: In the order of the sets.
    """

    share: float
    results: tuple[Result, ...]


def measure_mixtures(
    run: str | Path,
    shares: Sequence[float],
    on: Sequence[str],
    protocol: str = "zero-shot",
    device: str = "auto",
    options: Options | None = None,
) -> Iterator[Mixed]:
    """Measure mixtures of a fine-tuned run, one after the other.

    Args:
        run: See `ends_of`.
        shares: From 0 to 1.
        on: Sets: what it was fine-tuned for, and what it should not forget.
        protocol: How.
        device: Where.
        options: See `declip.evaluation.protocols.Options`.

    Raises:
        UserError: see `ends_of`, `interpolate` and `evaluate_all`.
    """
    start, end = ends_of(run, device)
    for share in shares:
        model = interpolate(start, end, share)
        yield Mixed(share, tuple(evaluate_all(model, name, (protocol,), options)[0] for name in on))


def first_measure(result: Result) -> str:
    """The measure by which results are told apart, such as "top-1 32.8 %"."""
    measure = result.measures()[0]
    return f"{measure.name} {percent(measure.value)}"


def write_mixture(
    run: str | Path, share: float, out: str | Path, *, license: str = NO_LICENCE, overwrite: bool = False
) -> Path:
    """Write a mixture as a folder that `declip.load` reads and `declip.export` turns into other formats.

    Raises:
        UserError: see `ends_of`, `interpolate`, and `declip.interchange.export.export` for the folder.
    """
    check_out(Path(out), overwrite)
    model = interpolate(*ends_of(run, "cpu"), share)
    origin = f"the run `{Path(run).name}`, {share:g} of it and {1 - share:g} of its start (WiSE-FT)"
    with folder_beside(Path(out)) as beside:
        write_declip_file(model, beside / FILE)
        card = model_card(model, Provenance(model.recipe, origin=origin), "declip", USAGE, license=license)
        (beside / CARD).write_text(card, encoding="utf-8")
    return Path(out)


def draw_mixtures(mixtures: Iterable[Mixed], path: Path) -> None:
    """Draw the first measure of each set over the share, as PNG or SVG by the file's name."""
    from matplotlib.figure import Figure

    found = list(mixtures)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    colors = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    names = short_names(result.on for result in found[0].results)
    for number, result in enumerate(found[0].results):
        measures = [mixed.results[number].measures()[0] for mixed in found]
        label = f"{names[result.on]}, {measures[0].name}, n = {measures[0].n:,}"
        axes.plot(
            [mixed.share for mixed in found],
            [100 * measure.value for measure in measures],
            marker="os^Dv"[number % 5],
            color=colors[number % len(colors)],
            label=label,
        )
    axes.set_xlabel("share of the fine-tuned weights: 0 is the start, 1 the end")
    axes.set_ylabel("%")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.22))
    figure.savefig(path, dpi=130)
