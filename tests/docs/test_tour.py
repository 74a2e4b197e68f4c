"""The notebook trains, evaluates and searches."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from docs.blocks import ROOT

TOUR = ROOT / "docs" / "tour.ipynb"
STEPS, FEW = "STEPS, BATCH = 200, 64", "STEPS, BATCH = 2, 8"


def test_the_tour_runs(emoji_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECLIP_CACHE", str(emoji_cache))
    monkeypatch.chdir(tmp_path)
    cells = json.loads(TOUR.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert sum(STEPS in source for source in code) == 1
    names = {"__name__": "tour"}
    with plt.rc_context({"backend": "agg"}):
        for source in code:
            exec(source.replace(STEPS, FEW), names)
    assert len(plt.get_fignums()) == 3
    plt.close("all")
    assert (tmp_path / "runs/tour/report.html").is_file()
    assert TOUR.stat().st_size < 300_000
