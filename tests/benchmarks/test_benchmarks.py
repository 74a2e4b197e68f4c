"""The benchmarks run and say what they promise; no time is asserted."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
Runner = Callable[..., Any]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a file of benchmarks/ as its neighbors do."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return lambda name: __import__(name)


@pytest.fixture
def run(
    scripts: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runner:
    """Run a file of benchmarks/ as a command, and read its last line as JSON."""

    def called(name: str, *arguments: str) -> Any:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        scripts(name).main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return called


@pytest.mark.parametrize("option", ["--x-clip", "--apart"])
def test_step_and_its_peers(run: Runner, option: str) -> None:
    whole = run("step", "--tiny", "--batch-size", "4", "--repeats", "2", "--json", "--precision", "fp32", option)
    found = whole["measured"]["fp32"]
    muon, adamw = (found["raw_seconds"][f"clip: {name}"] for name in ("muon", "optimizer"))
    expected = 1 + (median(muon) - median(adamw)) / found["seconds"]["clip"]
    assert whole["muon_over_adamw"]["full"]["fp32"] == pytest.approx(expected)
    assert whole["muon_over_adamw"]["demo"]["fp32"] > 0
    for name in ("clip", "ours"):
        assert whole[f"{name}_over_open_clip"] == {"fp32": found[f"{name}_over_open_clip"]}
        ratio = found["seconds"][name] / found["seconds"]["open_clip"]
        assert found[f"{name}_over_open_clip"] == pytest.approx(ratio)
    assert found["text_length"]["open_clip"] == 77
    assert found["text_length"]["clip"] == -(-found["captions"]["tokens_longest_of_batch"] // 8) * 8
    assert {len(seconds) for seconds in found["raw_seconds"].values()} == {2}
    assert found["built"] == ("one by one" if option == "--apart" else "together")
    sides = found["parameters"]
    assert sides.keys() == found["optimizer_seconds"].keys() == found["seconds"].keys() >= {"clip", "ours"}
    # Ours has a row of 64 for the mask token and, as the authors' weights, a bias of 32 in the text projection.
    assert sides["clip"]["model"] - sides["open_clip"]["model"] == 64 + 32
    assert found["machine"]["versions"]["open_clip_torch"]
    assert found["views_seconds"].keys() == {"clip", "ours"}


def test_both_recipes_step_on_the_same_pairs(scripts: Callable[[str], ModuleType]) -> None:
    step = scripts("step")
    options = ["--tiny", "--batch-size", "4", "--captions", "full", "--precision", "fp32"]
    setting = step.prepare(step.parser().parse_args(options))
    clip, ours = setting.batches["clip"], setting.batches["ours"]
    assert clip.sample_ids.tolist() == ours.sample_ids.tolist()
    assert len(clip.views) == 1
    assert len(ours.views) == ours.texts.shape[0] == 2
    assert clip.texts.shape[-1] == 77
    queue = step.build(setting.recipes["ours"], setting.source).objective.queue
    assert len(queue) == 65536


def test_an_image_tower_without_equivalent_is_refused(run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("step", "--image", "vit_base_patch32_clip_quickgelu", "--json")
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "Did you mean 'vit_base_patch32_clip_quickgelu_224'" in said
    assert "RN50" in said


def test_growth_of_a_step_and_of_tables(
    scripts: Callable[[str], ModuleType], run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    growth = scripts("growth")
    monkeypatch.setattr(growth, "in_a_process", lambda call, *given, environment=None: growth.CALLS[call](*given))
    few = ("--batch", "8", "--image", "--queue", "--text", "--rows", "100", "--kinds", "parquet", "--repeats", "1")
    found = run("growth", *few, "--out", str(tmp_path))
    step, table = found["rows"]
    assert (step["part"], step["value"], step["pairs"]) == ("batch", 8, 8)
    assert step["added_mb"] >= 0
    assert (table["part"], table["value"]) == ("parquet", 100)
    assert {"first_seconds", "later_seconds", "later_private_mb", "microseconds_a_row"} <= table.keys()
    assert json.loads((tmp_path / "growth.json").read_text()) == found
    assert (tmp_path / "growth-step.png").exists()
    assert (tmp_path / "growth-tables.png").exists()


def test_fraction_of_loading_in_a_run(
    scripts: Callable[[str], ModuleType], table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = scripts("demo")
    for key, value in {"data.source": str(table), "train.batch_size": 8, "nearest_neighbor.queue_size": 32}.items():
        monkeypatch.setitem(demo.NOTHING_ELSE, key, value)
    found = demo.in_a_run("demo-declip", 0)
    assert found["count"] == 8 * (demo.STEPS - 1 - demo.WARM)
    assert 0 < found["loading_fraction"] < 1


def test_run_measures_the_parts_asked_for(
    scripts: Callable[[str], ModuleType], run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripts("text"), "CAPTIONS", 64)
    monkeypatch.setitem(sys.modules, "textaugment", None)
    found = run("run", "--only", "text", "--repeats", "1", "--json", str(tmp_path / "made" / "bench.json"))
    assert any("textaugment" in row["note"] for row in found["rows"] if "note" in row)
    assert json.loads((tmp_path / "made" / "bench.json").read_text()) == found
    assert {row["part"] for row in found["rows"]} == {"text", "text, cached?"}


def test_search_and_its_peers(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    words = ("--sizes", "1200", "--width", "32", "--batch-size", "1", "4", "--repeats", "1")
    found = run("search", *words)["rows"]
    assert any("sentence-transformers can't be imported" in row.get("note", "") for row in found)
    rows = [row for row in found if "note" not in row]
    ours = [row for row in rows if row["what"].startswith("declip, exact")]
    assert [row["count"] for row in ours] == [1, 1, 4, 4]
    assert min(row["recall_at_10"] for row in ours) > 0.97
    for row in rows:
        if row["what"] == "faiss, IndexFlatIP":
            assert row["recall_at_10"] == 1
        if row["what"] == "declip, approximate":
            assert row["made"]["image_recall"] >= 0.99
