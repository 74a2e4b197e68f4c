import json
from pathlib import Path

import pytest
import yaml

from conftest import TINY, WEIGHTS
from declip.cli import app as cli


def write_recipe(folder: Path, table: Path, name: str = "mine") -> Path:
    tree = {**TINY, "data": {"source": str(table)}, "loss_weights": WEIGHTS["declip"]}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The command as a shell starts it; its exit status."""
    monkeypatch.setattr("sys.argv", ["declip", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_trains_evaluates_and_resumes(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe, out = write_recipe(tmp_path, table), tmp_path / "run"
    words = ["train", str(recipe), "train.steps=6", "evaluation.retrieval=[" + str(table) + "]", "--out", str(out)]
    assert run([*words, "--quiet"], monkeypatch) == 0
    printed = capfd.readouterr().out
    assert "48 pairs seen in 6 steps" in printed
    assert "report.html" in printed.replace("\n", "")
    assert (out / "report.html").is_file()
    assert run([*words, "--resume", "--quiet"], monkeypatch) == 0, "a finished run is shown again"

    assert run(["evaluate", str(out), "--dataset", str(table), "--task", "retrieval", "--json",
                str(tmp_path / "result.json")], monkeypatch) == 0  # fmt: skip
    result = json.loads((tmp_path / "result.json").read_text())
    last = json.loads((out / "evaluations.jsonl").read_text().splitlines()[-1])
    assert result == {key: value for key, value in last.items() if key != "step"}

    other = tmp_path / "other.csv"
    other.write_text(f"image,caption\n{table.parent}/red-bar.png,a red bar\n{table.parent}/blue-bar.png,a blue bar\n")
    words = [
        "evaluate",
        str(out),
        "--dataset",
        str(table),
        "--task",
        "retrieval",
        "--json",
        str(tmp_path / "both.json"),
    ]
    capfd.readouterr()
    assert run([*words, "--dataset", str(other)], monkeypatch) == 0
    printed = capfd.readouterr().out
    assert [name for name in ("shapes.jsonl", "other.csv") if printed.count(name) == 1] == ["shapes.jsonl", "other.csv"]
    assert printed.count("chance") == 2, "the heads of one table: chance, × chance"
    both = json.loads((tmp_path / "both.json").read_text())
    assert [(row["on"], row["images"]) for row in both] == [(str(table), 24), (str(other), 2)]
    assert both[0] == result
    for twice, key in ((str(table), "twice"), (f"paper11:{tmp_path}", "alone"), ("missing.csv", "missing.csv")):
        (tmp_path / "both.json").unlink(missing_ok=True)
        assert run([*words, "--dataset", twice], monkeypatch) == 2
        assert key in capfd.readouterr().err
        assert not (tmp_path / "both.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "declop"], "Did you mean 'declip'"),
        (["train", "clip", "train.stepps=3"], "Did you mean 'train.steps'"),
        (["train", "clip", "steps"], "Write key=value"),
        (["train", "clip", "data.source=nowhere.jsonl"], "nowhere.jsonl"),
        (["train", "clip", "data.source=builtin:emojii"], "emoji"),
        (["train", "clip", "image.model=resnet50_klip", "data.source=TABLE"], "resnet50_clip"),
        (["evaluate", "nowhere", "--dataset", "builtin:emoji-test"], "no model at 'nowhere'"),
        (["data", "prepare", "builtin:emojy"], "emoji"),
    ],
)
def test_a_mistake_ends_with_its_message_and_no_traceback(
    table: Path,
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = [word.replace("TABLE", str(table)) for word in words]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path / "cache"))
    assert run(words, monkeypatch) == 2
    errors = capfd.readouterr().err
    assert message in errors.replace("\n", " ")
    assert "Traceback" not in errors
    assert errors.startswith("Error: ")


def test_an_unprepared_built_in_set_says_how_to_prepare_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path / "cache"))
    assert run(["train", "declip-demo"], monkeypatch) == 2
    assert "declip data prepare builtin:emoji" in capfd.readouterr().err.replace("\n", " ")


def test_lists_the_recipes(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes"], monkeypatch) == 0
    assert "declip-yfcc15m-r50" in capfd.readouterr().out


def test_the_import_is_light_and_public_names_are_there() -> None:
    import subprocess
    import sys

    code = (
        "import sys, declip, declip.cli.app; assert 'torch' not in sys.modules; "
        "print([getattr(declip, n) for n in declip.__all__])"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
