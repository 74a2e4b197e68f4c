"""What tests of training share."""

import pytest

from conftest import once
from training.starts import CONV, start_from


@pytest.fixture(scope="session")
def start(table, tmp_path_factory):
    return once(tmp_path_factory, "start", lambda folder: start_from(table, folder / "run")) / "run"


@pytest.fixture(scope="session")
def conv_start(table, tmp_path_factory):
    return (
        once(tmp_path_factory, "conv", lambda folder: start_from(table, folder / "run", CONV))
        / "run"
    )


@pytest.fixture(autouse=True)
def without_exports(request, monkeypatch):
    """Leave out the exports of a fine-tuned model, which take longer than a fit."""
    if "exports" not in request.keywords:
        for module in ("fitting.run", "finetuning.outputs"):
            monkeypatch.setattr(f"declip.{module}.export_complete", lambda *_: None)
