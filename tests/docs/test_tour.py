"""The notebook trains, evaluates and searches."""

from pathlib import Path

import pytest

from docs.blocks import ROOT

nbclient = pytest.importorskip("nbclient")
TOUR = ROOT / "docs" / "tour.ipynb"
STEPS, FEW = "STEPS, BATCH = 200, 64", "STEPS, BATCH = 2, 8"


def test_the_tour_runs(emoji_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat

    monkeypatch.setenv("DECLIP_CACHE", str(emoji_cache))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    tour = nbformat.read(TOUR, as_version=4)
    nbformat.validate(tour)
    code = [cell for cell in tour.cells if cell.cell_type == "code"]
    assert sum(STEPS in cell.source for cell in code) == 1
    for cell in code:
        cell.source = cell.source.replace(STEPS, FEW)
    nbclient.NotebookClient(tour, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert {"image/png"} <= {kind for cell in code for output in cell.outputs for kind in output.get("data", {})}
    assert (tmp_path / "runs/tour/report.html").is_file()


def test_the_tour_is_small() -> None:
    assert TOUR.stat().st_size < 300_000
