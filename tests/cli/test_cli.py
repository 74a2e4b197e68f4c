"""The command, as a shell starts it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import declip
from conftest import TINY, WEIGHTS
from declip.api import resolve_recipe
from declip.cli import app as cli


def write_recipe(folder: Path, table: Path, name: str = "mine") -> Path:
    tree = {**TINY, "data": {"source": str(table)}, "loss_weights": WEIGHTS["declip"]}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the command and return its exit status."""
    monkeypatch.setattr("sys.argv", ["declip", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_trains_evaluates_and_resumes(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe, out = write_recipe(tmp_path, tmp_path / "replaced by --data"), tmp_path / "run"
    words = ["train", str(recipe), "train.steps=6", "--data", str(table), "--val", str(table), "--out", str(out)]
    assert run([*words, "--quiet"], monkeypatch) == 0
    printed = capfd.readouterr().out
    assert "48 samples" in printed
    assert str(out / "report.html") in printed, "a path is not broken into lines"
    assert (out / "report.html").is_file()
    assert run([*words, "--resume", "--quiet"], monkeypatch) == 0, "a finished run is shown again"

    evaluate = ["evaluate", str(out), "--dataset", str(table), "--task", "retrieval", "--batch-size", "8", "--json"]
    assert run([*evaluate, str(tmp_path / "result.json")], monkeypatch) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    last = json.loads((out / "evaluations.jsonl").read_text().splitlines()[-1])
    assert result == {key: value for key, value in last.items() if key != "step"}

    other, both = tmp_path / "other.csv", tmp_path / "both.json"
    other.write_text(f"image,caption\n{table.parent}/red-bar.png,a red bar\n{table.parent}/blue-bar.png,a blue bar\n")
    capfd.readouterr()
    assert run([*evaluate, str(both), "--dataset", str(other)], monkeypatch) == 0
    printed = capfd.readouterr().out
    assert printed.count("shapes.jsonl") == printed.count("other.csv") == 1
    rows = json.loads(both.read_text())
    assert [(row["dataset"], row["images"]) for row in rows] == [(str(table), 24), (str(other), 2)]
    assert rows[0] == result
    for wrong in (str(table), f"paper11:{tmp_path}", "missing.csv"):
        both.unlink(missing_ok=True)
        assert run([*evaluate, str(both), "--dataset", wrong], monkeypatch) == 2
        assert wrong in capfd.readouterr().err
        assert not both.exists()


def test_held_out_sets_are_evaluated_by_what_they_have(table: Path, tmp_path: Path) -> None:
    images = [f"{table.parent}/{color}-bar.png" for color in ("red", "blue", "green", "black")]
    rows = [f"{image},a bar number {n},{'warm' if n % 2 else 'cold'}" for n, image in enumerate(images)]
    (tmp_path / "both.csv").write_text("image,caption,label\n" + "\n".join(rows) + "\n")
    rows = [f"{image},{'warm' if n % 2 else 'cold'}" for n, image in enumerate(images)]
    (tmp_path / "classes.csv").write_text("image,label\n" + "\n".join(rows) + "\n")
    both, classes, captions = str(tmp_path / "both.csv"), str(tmp_path / "classes.csv"), str(table)
    recipe = resolve_recipe("demo-clip", data="a [b]: c.csv", val=[both, classes, captions])
    assert recipe.data.source == "a [b]: c.csv"
    assert recipe.evaluation.zero_shot == (both, classes)
    assert recipe.evaluation.retrieval == (both, captions)
    assert recipe.evaluation.final_zero_shot == (), "the demo's sets go with the demo's pairs"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "declop"], "'declip'"),
        (["train", "clip", "train.stepps=3"], "'train.steps'"),
        (["train", "clip", "learning_rate=3"], "'train.lr'"),
        (["train", "clip", "steps"], "train.steps=500"),
        (["train", "clip"], "--data"),
        (["train", "clip", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["train", "clip", "data.source=builtin:emojii"], "emoji"),
        (["train", "clip", "image.model=resnet50_klip", "--data", "TABLE"], "resnet50_clip"),
        (["evaluate", "nowhere", "--dataset", "builtin:emoji-test"], "'nowhere'"),
        (["evaluate", "nowhere", "--dataset", "builtin:emoji-test", "--task", "zeroshot"], "'zero-shot'"),
        (["data", "download", "builtin:emojy"], "emoji"),
        (["data", "shard", "nowhere.csv", "--out", "made"], "nowhere.csv"),
        (["train", "demo-declip"], "declip data download builtin:emoji"),
    ],
)
def test_a_mistake_ends_with_one_line_and_no_traceback(
    table: Path,
    words: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path / "cache"))
    assert run([word.replace("TABLE", str(table)) for word in words], monkeypatch) == 2
    errors = capfd.readouterr().err
    assert says in errors
    assert errors.startswith("Error: ")
    assert errors.count("\n") == 1


def test_recipes_are_listed_shown_and_described(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["recipes"], monkeypatch) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == declip.recipe.load.recipe_names()
    assert run(["recipes", "show", "clip", "train.steps=7"], monkeypatch) == 0
    assert yaml.safe_load(capfd.readouterr().out)["train"]["steps"] == 7
    assert run(["recipes", "schema"], monkeypatch) == 0
    assert "loss_weights" in json.loads(capfd.readouterr().out)["properties"]


def test_the_version_is_printed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"], monkeypatch) == 0
    assert capfd.readouterr().out == f"declip {declip.__version__}\n"


@pytest.mark.parametrize(
    "words", [["train", "nosuch"], ["train", "clip", "--data", "no.csv"], ["evaluate", "no", "--dataset", "no.csv"]]
)
def test_wrong_paths_are_answered_without_torch(words: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from declip.cli.app import main\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "2 False\n"


def test_the_public_names_are_there() -> None:
    assert [name for name in declip.__all__ if getattr(declip, name, None) is None] == []
