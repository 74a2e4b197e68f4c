"""The folder of a fit in closed form: its files, and reading them."""

import csv
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open

from declip.errors import UserError
from declip.evaluation.results import Result, read_result
from declip.io.text import one_line
from declip.recipe.starts import OWN, is_own
from declip.runs.existing import HEADS
from declip.runs.folder import read_json

MEASURES = "cross_validation.json"
RANKS = "out_of_fold.csv"  # of each caption
KNOWN = "neighbors.csv"  # the pairs and classes that images and captions are compared with
RESULTS = "results.json"  # of validation sets, before and after
FACTS = "fit.json"  # pairs, skipped pairs, some captions, mixture
REPORT = "report.html"
EXPORTS = "exported"

# Keys of the metadata
RECIPE_KEY = "declip.recipe"
BASE_KEY = "declip.base"
BASE_FINGERPRINT_KEY = "declip.base_fingerprint"
FINGERPRINT_KEY = "declip.fingerprint"


def is_fitted(path: Path) -> bool:
    """Whether this is the folder of a fit."""
    return (path / HEADS).is_file()


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of saved heads; raises `UserError` if they are damaged."""
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except Exception as error:  # safetensors has its own classes
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> UserError:
    """The error for saved heads that cannot be read."""
    return UserError(f"'{path}' is damaged: {one_line(error, 200)}. Fit it again.")


def fit_folder(model: str | Path) -> Path:
    """The folder in the name of a fitted model: FOLDER, or FILE.py:function+FOLDER."""
    own = OWN.fullmatch(str(model))
    return Path((own and own["fit"]) or model).expanduser()


def write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a table as CSV; no file without rows."""
    if not rows:
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(header)
        table.writerows(rows)


@dataclass(frozen=True)
class FittedRun:
    """The folder of a fit. Files are read once, when first needed."""

    folder: Path
    is_rank_zero: bool = True
    finished = True  # the folder appears when it is complete

    @property
    def report(self) -> Path:
        """Path of the report."""
        return self.folder / REPORT

    @property
    def name(self) -> str:
        """What opens the model: the folder, after the encoder of the user's own that it was fitted to."""
        base = read_metadata(self.folder / HEADS)[BASE_KEY]
        if is_own(base):
            return f"{base}+{self.folder}"
        return str(self.folder)

    @cached_property
    def cross_validation(self) -> dict[str, Any]:
        """The choice of heads, and what cross-validation says about it."""
        return read_json(self.folder / MEASURES)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The pairs ("source"), "skipped" pairs by reason, the "mixture", and captions for the report.

        "queries": some, with the images that came first before and now; "worst": the worst.
        """
        return read_json(self.folder / FACTS)

    @property
    def mixture(self) -> dict[str, Any]:
        """The fraction "alpha" of the fitted heads, and "scores" of all by set; empty without --keep."""
        return dict(self.facts.get("mixture", {}))

    @property
    def skipped(self) -> dict[str, Any]:
        """Number of pairs "seen", and "reasons": count and example keys."""
        return dict(self.facts.get("skipped", {}))

    @cached_property
    def results(self) -> list[Result]:
        """Results on validation sets."""
        return self._results("fitted")

    @cached_property
    def results_of_start(self) -> list[Result]:
        """Results on the same sets without any fitting; empty unless sets were to be kept."""
        return self._results("start")

    @cached_property
    def caption_ranks(self) -> dict[tuple[str, str], float]:
        """Out-of-fold ranks of captions by key and caption, the worst first: 0 best, 1 worst."""
        rows = self._table(RANKS, 3)
        return {(key, caption): float(rank) for key, caption, rank in rows}

    @cached_property
    def known(self) -> list[tuple[str, str]]:
        """Key and caption of each anchor of `Neighbors`, in order; the key of a class is ""."""
        return [(key, caption) for key, caption in self._table(KNOWN, 2)]

    def _results(self, key: str) -> list[Result]:
        rows = [read_result(row) for row in read_json(self.folder / RESULTS).get(key, [])]
        return [row for row in rows if row is not None]

    def _table(self, name: str, columns: int) -> list[list[str]]:
        """The complete rows of a table, without its header; none without the file."""
        path = self.folder / name
        if not path.is_file():
            return []
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            rows = itertools.islice(csv.reader(file), 1, None)
            return [row for row in rows if len(row) == columns]
