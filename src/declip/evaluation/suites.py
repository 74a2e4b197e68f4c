"""Several sets as one table, beside what is published: the eleven that papers on YFCC15M report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from declip.errors import UserError, unknown
from declip.evaluation.datasets import Dataset, open_dataset
from declip.evaluation.encode import Encoder
from declip.evaluation.probes.results import METRICS, LinearProbeResult
from declip.evaluation.protocols import Options, evaluate_all
from declip.evaluation.results import ZeroShotResult
from declip.recipe.load import read_yaml

SUITES: Mapping[str, Sequence[str]] = {
    "paper11": (
        "cifar10", "cifar100", "food101", "pets", "flowers102", "sun397", "cars", "dtd", "caltech101", "aircraft",
        "imagenet",
    ),
}  # fmt: skip
"""A suite's sets. In its folder each has a folder of its own name, which is what `NAME:PATH` expects: `pets` holds
`oxford-iiit-pet`, `cifar10` holds `cifar-10-batches-py`, `imagenet` holds `val`."""

PROTOCOLS = ("zero-shot", "linear")

SHORT: Mapping[str, str] = {
    "cifar10": "C10", "cifar100": "C100", "food101": "Food", "pets": "Pets", "flowers102": "Flowers", "sun397": "SUN",
    "cars": "Cars", "dtd": "DTD", "caltech101": "Caltech", "aircraft": "Aircraft", "imagenet": "ImageNet",
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A row that others reported.

    Attributes:
        name: Of the method.
        values: Set to share, for the sets that were reported.
        average: As published, over the sets of its own table.
    """

    name: str
    values: Mapping[str, float]
    average: float


@dataclass(frozen=True)
class PublishedTable:
    """Rows that others reported.

    Attributes:
        source: Where.
        model: What was measured there.
        rows: One a method.
    """

    source: str
    model: str
    rows: tuple[Published, ...]


@dataclass(frozen=True)
class SuiteRow:
    """One set of a suite.

    Attributes:
        on: Name of the set.
        metric: What its convention reports: "top1" or "mean_per_class".
        result: All that was measured.
    """

    on: str
    metric: str
    result: ZeroShotResult | LinearProbeResult

    @property
    def value(self) -> float:
        """The set's number, a share."""
        return float(getattr(self.result, self.metric))


@dataclass(frozen=True)
class SuiteResult:
    """A suite as it was measured.

    Attributes:
        suite: Its name.
        protocol: "zero-shot" or "linear".
        rows: The sets that were measured, in the suite's order.
        missing: The sets that were not: name to the reason.
    """

    suite: str
    protocol: str
    rows: tuple[SuiteRow, ...]
    missing: Mapping[str, str]

    @property
    def average(self) -> float:
        """Mean of the measured sets' numbers."""
        return sum(row.value for row in self.rows) / len(self.rows)

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of the measured sets."""
        return tuple(row.on for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "suite": self.suite,
            "protocol": self.protocol,
            "average": self.average,
            "averaged_over": list(self.measured),
            "rows": [
                {"on": row.on, "metric": row.metric, "value": row.value, "result": row.result.to_dict()}
                for row in self.rows
            ],
            "missing": dict(self.missing),
        }

    def table(self, name: str = "this model") -> Table:
        """The measured row and the published ones below it, in percent, for a terminal."""
        table = Table(title=f"{self.suite}, {self.protocol}, %")
        table.add_column("")
        table.add_column("")
        for on in self.measured:
            table.add_column(SHORT[on], justify="right")
        table.add_column("average", justify="right")
        for kind, who, *cells in self._lines(name):
            table.add_row(escape(who), kind, *cells, end_section=kind == "measured")
        table.caption = escape("\n".join(self._notes()))
        return table

    def markdown(self, name: str = "this model") -> str:
        """The same as a Markdown table, with its notes below."""
        head = ["", "", *(SHORT[on] for on in self.measured), "average"]
        lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
        lines += [[who, kind, *cells] for kind, who, *cells in self._lines(name)]
        rows = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return rows + "\n\n" + "\n".join(f"- {note}" for note in self._notes()) + "\n"

    def _lines(self, name: str) -> list[list[str]]:
        """Kind, name and cells of each row; an average over fewer sets than are shown says over how many."""
        shown = self.measured
        own = ["measured", name, *(_percent(row.value) for row in self.rows), _percent(self.average)]
        lines = [own]
        for row in published(self.suite, self.protocol).rows:
            values = [row.values[on] for on in shown if on in row.values]
            if not values:
                continue
            # Of a publication's own sets its own average, which was made before the numbers were rounded.
            average = _percent(row.average if len(values) == len(row.values) else sum(values) / len(values))
            fewer = f" ({len(values)} of {len(shown)})" if len(values) < len(shown) else ""
            cells = [_percent(row.values[on]) if on in row.values else "" for on in shown]
            lines.append(["published", row.name, *cells, average + fewer])
        return lines

    def _notes(self) -> list[str]:
        table, shown = published(self.suite, self.protocol), self.measured
        per_class = [SHORT[row.on] for row in self.rows if row.metric == "mean_per_class"]
        notes = [f"published: {table.model}; {table.source}"]
        if per_class:
            notes.append(f"{METRICS['mean_per_class']}: {', '.join(per_class)}; the others {METRICS['top1']}")
        whole = len(SUITES[self.suite])
        if len(shown) < whole:
            notes.append(
                f"averages are over the {len(shown)} sets shown, not the suite's {whole}, in the published rows too: "
                "they are not the averages that were published"
            )
        unpublished = [SHORT[on] for on in shown if not any(on in row.values for row in table.rows)]
        if unpublished:
            notes.append(
                f"nothing is published for {', '.join(unpublished)}: an average marked (n of {len(shown)}) is over "
                "fewer sets than the measured one, and the two do not compare"
            )
            both = [row.value for row in self.rows if SHORT[row.on] not in unpublished]
            if both:
                notes.append(f"measured average without {', '.join(unpublished)}: {_percent(sum(both) / len(both))}")
        return notes + [f"not measured: {on}: {why}" for on, why in self.missing.items()]


@cache
def published(suite: str, protocol: str) -> PublishedTable:
    """What others reported on a suite's sets; shares."""
    text = (resources.files("declip.evaluation") / "published.yaml").read_text(encoding="utf-8")
    tree = read_yaml(text)[suite][protocol]
    rows = tuple(
        Published(
            row["name"],
            {on: value / 100 for on, value in zip(tree["sets"], row["values"], strict=True)},
            row["average"] / 100,
        )
        for row in tree["rows"]
    )
    return PublishedTable(tree["source"], tree["model"], rows)


def is_suite(on: str) -> bool:
    """Whether `on` is written as a suite, ``NAME:/path``."""
    name, colon, _ = on.partition(":")
    return bool(colon) and name in SUITES


def evaluate_suite(model: Encoder, on: str, protocol: str = "zero-shot", options: Options | None = None) -> SuiteResult:
    """Measure a model on all sets of a suite that are there.

    Args:
        model: As for `declip.evaluation.protocols.evaluate`.
        on: ``paper11:/data``, where ``/data/pets``, ``/data/cifar10`` and so on are what ``pets:PATH`` and
            ``cifar10:PATH`` expect; see `SUITES`.
        protocol: "zero-shot" or "linear".
        options: How to measure. Templates given there would be used for every set; None takes each set's own.

    Returns:
        A row for each set that is there, and why the others are not measured.

    Raises:
        UserError: unknown suite or protocol, or not one set is there and can be measured.
    """
    name, _, place = on.partition(":")
    if name not in SUITES:
        raise unknown("suite", name, SUITES)
    if protocol not in PROTOCOLS:
        raise unknown("protocol of a suite", protocol, PROTOCOLS)
    root = Path(place).expanduser()
    if not place or not root.is_dir():
        raise UserError(f"There is no folder '{place}'. Write '{name}:PATH', with PATH/{SUITES[name][0]} and so on.")
    there, missing = _open(name, root, protocol)
    if not there:
        raise UserError(f"Not one set of '{name}' is in '{root}'. " + " ".join(missing.values()))
    rows = []
    for set_name, dataset in there.items():
        try:
            result = evaluate_all(model, dataset, (protocol,), options)[0]
        except UserError as error:
            # Hours may lie in the sets already measured.
            missing[set_name] = str(error)
            continue
        assert isinstance(result, ZeroShotResult | LinearProbeResult)
        rows.append(SuiteRow(set_name, dataset.metric, result))
    if not rows:
        raise UserError(f"Not one set of '{name}' could be measured. " + " ".join(missing[each] for each in there))
    return SuiteResult(name, protocol, tuple(rows), missing)


def _open(suite: str, root: Path, protocol: str) -> tuple[dict[str, Dataset], dict[str, str]]:
    """The sets that can be measured, opened before anything is encoded, and why the others cannot."""
    there: dict[str, Dataset] = {}
    missing: dict[str, str] = {}
    for name in SUITES[suite]:
        if not (root / name).is_dir():
            missing[name] = f"There is no folder '{root / name}'."
            continue
        try:
            dataset = open_dataset(f"{name}:{root / name}")
            if protocol == "linear":
                dataset.split("train")
        except UserError as error:
            missing[name] = str(error)
        else:
            there[name] = dataset
    return there, missing


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
