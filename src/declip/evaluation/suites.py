"""Several datasets as one table with published results: the eleven that papers on YFCC15M report."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from declip.errors import UserError, unknown
from declip.evaluation.datasets import open_dataset
from declip.evaluation.encode import Encoder
from declip.evaluation.protocols import Options, evaluate_all
from declip.evaluation.results import METRICS, LinearProbeResult, ZeroShotResult
from declip.recipe.load import read_yaml

SUITES: Mapping[str, Mapping[str, str]] = {
    "paper11": {
        "cifar10": "C10", "cifar100": "C100", "food101": "Food", "pets": "Pets", "flowers102": "Flowers",
        "sun397": "SUN", "cars": "Cars", "dtd": "DTD", "caltech101": "Caltech", "aircraft": "Aircraft",
        "imagenet": "ImageNet",
    },
}  # fmt: skip
"""Datasets of a suite → their short names. In the suite's folder each has a folder of its own name, which is what
`NAME:PATH` expects: `pets` holds `oxford-iiit-pet`, `cifar10` holds `cifar-10-batches-py`, `imagenet` holds `val`."""

SUITE_TASKS = ("zero-shot", "linear")


@dataclass(frozen=True)
class Published:
    """A method's published row.

    Attributes:
        values: Dataset → fraction, for the datasets that were reported.
        average: As published, over the datasets of its own table.
    """

    name: str
    values: Mapping[str, float]
    average: float


@dataclass(frozen=True)
class SuiteRow:
    """One dataset of a suite.

    Attributes:
        metric: Metric of the dataset's convention: "top1" or "mean_per_class".
    """

    dataset: str
    metric: str
    result: ZeroShotResult | LinearProbeResult

    @property
    def value(self) -> float:
        """The dataset's metric, a fraction."""
        return float(getattr(self.result, self.metric))


@dataclass(frozen=True)
class SuiteResult:
    """Results on a suite.

    Attributes:
        rows: The evaluated datasets, in the suite's order.
        missing: The other datasets → the reason.
    """

    suite: str
    task: str
    rows: tuple[SuiteRow, ...]
    missing: Mapping[str, str]

    @property
    def average(self) -> float:
        """Mean over the evaluated datasets."""
        return sum(row.value for row in self.rows) / len(self.rows)

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of the evaluated datasets."""
        return tuple(row.dataset for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain data for JSON."""
        return {
            "suite": self.suite,
            "task": self.task,
            "average": self.average,
            "averaged_over": list(self.measured),
            "rows": [
                {"dataset": row.dataset, "metric": row.metric, "value": row.value, "result": row.result.to_dict()}
                for row in self.rows
            ],
            "missing": dict(self.missing),
        }

    def table(self, name: str = "this model") -> Table:
        """The measured row and the published ones below it, in percent, for a terminal."""
        head, *lines = self._lines(name)
        table = Table(title=f"{self.suite}, {self.task}, %", caption=escape("\n".join(self._notes())))
        for number, title in enumerate(head):
            table.add_column(title, justify="right" if number > 1 else "left")
        for number, line in enumerate(lines):
            table.add_row(*map(escape, line), end_section=number == 0)
        return table

    def markdown(self, name: str = "this model") -> str:
        """The same as a Markdown table, with its notes below."""
        head, *lines = self._lines(name)
        lines = [head, ["---", "---", *["---:"] * (len(head) - 2)], *lines]
        rows = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return rows + "\n\n" + "\n".join(f"- {note}" for note in self._notes()) + "\n"

    def _lines(self, name: str) -> list[list[str]]:
        """Head, measured row and published rows; an average over fewer datasets than are shown says how many."""
        short, shown = SUITES[self.suite], self.measured
        lines = [
            ["", "", *(short[dataset] for dataset in shown), "average"],
            [name, "measured", *(_percent(row.value) for row in self.rows), _percent(self.average)],
        ]
        for row in published(self.suite, self.task)[1]:
            values = [row.values[dataset] for dataset in shown if dataset in row.values]
            if not values:
                continue
            # On the publication's own datasets its own average, which was made before the numbers were rounded.
            average = _percent(row.average if len(values) == len(row.values) else sum(values) / len(values))
            fewer = f" ({len(values)} of {len(shown)})" if len(values) < len(shown) else ""
            cells = [_percent(row.values[dataset]) if dataset in row.values else "" for dataset in shown]
            lines.append([row.name, "published", *cells, average + fewer])
        return lines

    def _notes(self) -> list[str]:
        short, shown = SUITES[self.suite], self.measured
        source, rows = published(self.suite, self.task)
        notes = [f"published: {source}"]
        per_class = [short[row.dataset] for row in self.rows if row.metric == "mean_per_class"]
        if per_class:
            notes.append(f"{METRICS['mean_per_class']}: {', '.join(per_class)}; the others {METRICS['top1']}")
        if len(shown) < len(short):
            notes.append(
                f"averages are over the {len(shown)} datasets shown, not the suite's {len(short)}, in the published "
                "rows too: they are not the averages that were published"
            )
        unpublished = [dataset for dataset in shown if not any(dataset in row.values for row in rows)]
        if unpublished:
            names = ", ".join(short[dataset] for dataset in unpublished)
            notes.append(
                f"nothing is published for {names}: an average marked (n of {len(shown)}) is over fewer datasets than "
                "the measured one, and the two do not compare"
            )
            both = [row.value for row in self.rows if row.dataset not in unpublished]
            if both:
                notes.append(f"measured average without {names}: {_percent(sum(both) / len(both))}")
        return notes + [f"not measured: {dataset}: {reason}" for dataset, reason in self.missing.items()]


@cache
def published(suite: str, task: str) -> tuple[str, tuple[Published, ...]]:
    """Read the published rows of a suite: model and source in one line, and the rows."""
    text = (resources.files("declip.evaluation") / "published.yaml").read_text(encoding="utf-8")
    tree = read_yaml(text)[suite][task]
    rows = []
    for row in tree["rows"]:
        values = {name: value / 100 for name, value in zip(tree["sets"], row["values"], strict=True)}
        rows.append(Published(row["name"], values, row["average"] / 100))
    return f"{tree['model']}; {tree['source']}", tuple(rows)


def is_suite(name: str) -> bool:
    """Whether a dataset is given as a suite, ``NAME:/path``."""
    return ":" in name and name.partition(":")[0] in SUITES


def evaluate_suite(
    model: Encoder, dataset: str, task: str = "zero-shot", options: Options | None = None
) -> SuiteResult:
    """Evaluate a model on all datasets of a suite that are there.

    Args:
        dataset: ``paper11:/data``, where ``/data/pets``, ``/data/cifar10`` and so on are what ``pets:PATH`` and
            ``cifar10:PATH`` expect; see `SUITES`.
        options: Templates given there are used for every dataset; None takes each dataset's own.
    """
    suite, _, place = dataset.partition(":")
    if suite not in SUITES:
        raise unknown("suite", suite, SUITES)
    if task not in SUITE_TASKS:
        raise unknown("task of a suite", task, SUITE_TASKS)
    root = Path(place).expanduser()
    if not place or not root.is_dir():
        raise UserError(f"There is no folder '{place}'. Write '{suite}:PATH', with PATH/cifar10 and so on.")
    rows, missing = [], {}
    for name in SUITES[suite]:
        if not (root / name).is_dir():
            missing[name] = f"There is no folder '{root / name}'."
            continue
        try:
            opened = open_dataset(f"{name}:{root / name}")
            result = evaluate_all(model, opened, (task,), options)[0]
        except UserError as error:
            missing[name] = str(error)  # and no end: hours may lie in the datasets already evaluated
            continue
        assert isinstance(result, ZeroShotResult | LinearProbeResult)
        rows.append(SuiteRow(name, opened.metric, result))
    if not rows:
        raise UserError(f"Not one dataset of '{suite}' in '{root}' could be evaluated. " + " ".join(missing.values()))
    return SuiteResult(suite, task, tuple(rows), missing)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"
