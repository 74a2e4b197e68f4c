"""The eleven datasets of papers on YFCC15M in one table with published results: ``paper11:FOLDER``."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

from declip.errors import UserError, unknown
from declip.evaluation.datasets import NAMED
from declip.evaluation.encode import Encoder
from declip.evaluation.protocols import Options, evaluate_all
from declip.evaluation.results import METRICS, Result
from declip.recipe.yaml_text import read_yaml

PREFIX = "paper11:"
SETS: Mapping[str, str] = {
    "cifar10": "C10", "cifar100": "C100", "food101": "Food", "pets": "Pets", "flowers102": "Flowers", "sun397": "SUN",
    "cars": "Cars", "dtd": "DTD", "caltech101": "Caltech", "aircraft": "Aircraft", "imagenet": "ImageNet",
}  # fmt: skip
"""Datasets → their short names. The folder has one folder per dataset, as for `NAME:PATH`: `pets` contains
`oxford-iiit-pet`, `cifar10` contains `cifar-10-batches-py`, `imagenet` contains `val`."""


@dataclass(frozen=True)
class SuiteResult:
    """Results on the datasets that could be evaluated."""

    task: str
    results: Mapping[str, Result]  # by dataset
    missing: Mapping[str, str]  # the other datasets → the reason

    @property
    def values(self) -> dict[str, float]:
        """The conventional metric of each dataset, a fraction."""
        return {name: float(getattr(result, NAMED[name].metric)) for name, result in self.results.items()}

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain data for JSON."""
        values = self.values
        rows = {name: {"metric": NAMED[name].metric, **result.to_dict()} for name, result in self.results.items()}
        average = {"average": fmean(values.values()), "values": values}
        return {"task": self.task, **average, "results": rows, "missing": dict(self.missing)}

    def markdown(self, name: str = "this model") -> str:
        """Format the measured row, the published rows and notes as Markdown, in percent."""
        tree, shown = published(self.task), list(self.results)
        # --- rows: the measured one, then the published ones over the same datasets
        rows = [(name, "measured", self.values, fmean(self.values.values()))]
        for row in tree["rows"]:
            reported = dict(zip(tree["sets"], (value / 100 for value in row["values"]), strict=True))
            values = {dataset: reported[dataset] for dataset in shown if dataset in reported}
            if values:
                # On all of its datasets, the published average, which was computed before rounding.
                average = row["average"] / 100 if len(values) == len(reported) else fmean(values.values())
                rows.append((row["name"], "published", values, average))
        # --- table
        lines = [["", "", *(SETS[dataset] for dataset in shown), "average"], ["---"] * 2 + ["---:"] * (len(shown) + 1)]
        for label, origin, values, average in rows:
            fewer = "" if len(values) == len(shown) else f" ({len(values)} of {len(shown)})"
            cells = [f"{100 * values[dataset]:.1f}" if dataset in values else "" for dataset in shown]
            lines.append([label, origin, *cells, f"{100 * average:.1f}{fewer}"])
        # --- notes
        per_class = [SETS[dataset] for dataset in shown if NAMED[dataset].metric == "mean_per_class"]
        notes = [
            f"published: {tree['model']}; {tree['source']}",
            f"{METRICS['mean_per_class']}: {', '.join(per_class) or 'none'}; the others {METRICS['top1']}",
            f"averages are over the datasets shown, {len(shown)} of {len(SETS)}; one with (n of "
            f"{len(shown)}) is over fewer and does not compare",
            *(f"not measured: {dataset}: {reason}" for dataset, reason in self.missing.items()),
        ]
        table = ["| " + " | ".join(line) + " |" for line in lines]
        return "\n".join([*table, "", *(f"- {note}" for note in notes), ""])


def published(task: str) -> dict[str, Any]:
    """Read the published rows, in percent, with their `model`, `source` and the names of the `sets`."""
    text = (resources.files("declip.evaluation") / "published.yaml").read_text(encoding="utf-8")
    return read_yaml(text)["paper11"][task]


def evaluate_suite(
    model: Encoder, dataset: str, task: str = "zero-shot", options: Options | None = None
) -> SuiteResult:
    """Evaluate a model on all datasets of ``paper11:FOLDER`` that are there, by "zero-shot" or "linear"."""
    if task not in ("zero-shot", "linear"):
        raise unknown("task of paper11", task, ("zero-shot", "linear"))
    root = Path(dataset.removeprefix(PREFIX)).expanduser()
    results: dict[str, Result] = {}
    missing: dict[str, str] = {}
    for name in SETS:
        try:
            (results[name],) = evaluate_all(model, f"{name}:{root / name}", (task,), options)
        except UserError as error:
            missing[name] = str(error)  # not raised: earlier datasets may have taken hours
    if not results:
        raise UserError(f"No dataset of paper11 in '{root}' could be evaluated. " + " ".join(missing.values()))
    return SuiteResult(task, results, missing)
