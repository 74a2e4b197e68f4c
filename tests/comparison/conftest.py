"""A comparison small enough for seconds: two recipes on a table of colored shapes, measured by retrieval."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import TINY, WEIGHTS
from declip.api import compare
from declip.comparison.outcome import Outcome


@pytest.fixture
def recipes(table: Path, tmp_path: Path) -> dict[str, str]:
    """Recipe files by name."""
    files = {}
    for name in ("clip", "declip"):
        tree: dict[str, Any] = {**TINY, "loss_weights": WEIGHTS[name], "data": {"source": str(table)}}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        files[name] = str(path)
    return files


def tiny(recipes: dict[str, str], table: Path, out: Path, **more: Any) -> Outcome:
    """Compare them: two sizes, one seed, equal samples, in this process unless said otherwise."""
    options: dict[str, Any] = {
        "pairs": (8, 16),
        "seeds": 1,
        "datasets": [str(table)],
        "tasks": ["retrieval"],
        "budgets": ["samples"],
        "jobs": 0,
        "quiet": True,
        **more,
    }
    return compare(list(recipes.values()), out=out, **options)
