import json
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from declip.cli.app import app
from declip.errors import UserError
from declip.training import profile as profiling
from declip.training.profile import Clock, profile
from training.starts import recipe_for


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "WARM", 1)
    monkeypatch.setattr(profiling, "TIMED", 2)
    monkeypatch.setattr(profiling, "TRACED", 1)


def test_a_clock_gives_inner_time_to_the_inner_part(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(torch.device("cpu"))
    now = iter([0.0, 1.0, 4.0, 10.0, 20.0, 21.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    with clock.span("terms"), clock.span("text tower"):
        pass
    with clock.span("terms"):
        pass
    assert clock.seconds == {"text tower": 3.0, "terms": 7.0 + 1.0}


@pytest.mark.parametrize("keys", [{}, {"grad_cache_chunk": 3}])
def test_the_command_shows_the_parts_of_a_step_and_keeps_no_run(
    table: Path, tmp_path: Path, keys: dict[str, object]
) -> None:
    recipe, out = tmp_path / "mine.yaml", tmp_path / "out"
    recipe.write_text(recipe_for(table, **keys).to_yaml())
    result = CliRunner().invoke(app, ["train", str(recipe), "--profile", "--quiet", "--out", str(out)])
    assert result.exit_code == 0
    assert "image tower" in result.stdout
    assert sorted(path.name for path in out.iterdir()) == ["profile.json", "trace.json"]
    measured = json.loads((out / "profile.json").read_text())
    losses = {"terms and backward"} if keys else {"terms", "backward"}
    parts = {"data", "sync", "views", "image tower", "text tower", "optimizer"} | losses
    assert measured["seconds"].keys() == parts | {"rest"}
    assert all(seconds > 0 for seconds in measured["seconds"].values())
    names = {event.get("name") for event in json.loads((out / "trace.json").read_text())["traceEvents"]}
    assert {f"declip: {name}" for name in parts} <= names


def test_a_folder_that_cannot_be_written_is_said_first(table: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        profile(recipe_for(table), tmp_path / "file", quiet=True)
