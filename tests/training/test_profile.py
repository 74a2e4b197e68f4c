import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from declip.cli.app import app
from declip.errors import UserError
from declip.training import profile as profiling
from declip.training.profile import Clock, Profile, profile
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
def test_the_parts_of_a_step_are_told_apart_and_add_up(
    table: Path, tmp_path: Path, keys: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    found = profile(recipe_for(table, **keys), out=tmp_path, quiet=True)
    losses = {"terms and backward"} if keys else {"terms", "backward"}
    assert set(found.seconds) == {"data", "sync", "views", "image tower", "text tower", "optimizer"} | losses
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert sum(found.seconds.values()) <= found.step_seconds
    assert found.samples_per_second == pytest.approx(8 / found.step_seconds)
    written = json.loads((tmp_path / "profile.json").read_text())
    assert written["step_seconds"] == found.step_seconds
    trace = json.loads((tmp_path / "trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {f"declip: {name}" for name in found.seconds} <= names


def test_operations_are_those_of_the_matrix_products(table: Path, tmp_path: Path) -> None:
    """Of both towers' blocks: 2 views × 8 pairs, 6 operations a weight and token, and more for heads and attention."""
    recipe = recipe_for(table)
    found = profile(recipe, out=tmp_path, quiet=True)
    image_tokens, text_tokens, patch = 17, 16, 3 * 8 * 8 * 64
    image = 16 * (image_tokens * 12 * 64 * 64 + 16 * patch)
    text = 16 * text_tokens * 12 * 32 * 32
    assert found.flops is not None
    assert 0.9 * 6 * (image + text) < found.flops < 3 * 6 * (image + text)


def test_what_is_said_about_the_loader(tmp_path: Path) -> None:
    seconds = {"data": 0.5, "sync": 0.0, "views": 0.1, "terms": 0.4}
    starved = Profile(
        "name", "CPU", 8, 2, seconds, 1.0, None, 10**9, 0, workers_needed=1, free_cores=1, folder=tmp_path
    )
    assert "data.workers=1 would keep up, 0 now" in starved.remarks()
    assert "workers" not in replace(starved, seconds={**seconds, "data": 0.2}).remarks()
    assert "workers" not in replace(starved, free_cores=0).remarks()


def test_the_command_shows_a_table_and_keeps_no_run(table: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(recipe_for(table).to_yaml())
    result = CliRunner().invoke(app, ["train", str(recipe), "--profile", "--quiet", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0
    assert "image tower" in result.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["profile.json", "trace.json"]


def test_profiling_resumes_nothing(table: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(recipe_for(table).to_yaml())
    result = CliRunner().invoke(app, ["train", str(recipe), "--profile", "--resume"])
    assert isinstance(result.exception, UserError)


def test_a_folder_that_cannot_be_written_is_said_first(table: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        profile(recipe_for(table), out=tmp_path / "file", quiet=True)
