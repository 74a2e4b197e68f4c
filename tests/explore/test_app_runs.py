import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from declip.app.curves import MOST_POINTS, thinned
from declip.app.run_folders import GrowingRows, RunFolders, differences, flat_recipe
from declip.errors import UserError


def test_a_short_line_is_left_as_it_is() -> None:
    values = np.array([1.0, np.nan, 3.0, np.inf])
    assert thinned(np.arange(4), values) == [(0, 1.0), (2, 3.0)]
    assert thinned(np.arange(0), np.empty(0)) == []


def test_a_long_line_is_thinned_to_means_and_ends_with_its_last_row() -> None:
    steps = np.arange(10, 100_010, 10)
    values = np.sin(steps / 9_000) + np.random.default_rng(0).normal(0, 0.5, len(steps))
    line = thinned(steps, values)
    assert len(line) == MOST_POINTS
    assert line[-1] == (100_000, values[-1])
    first = 10_000 // (MOST_POINTS - 1)
    assert line[0][1] == pytest.approx(values[: first + 1].mean(), abs=0.1)
    assert [step for step, _ in line] == sorted({step for step, _ in line})
    smooth = [abs(value - np.sin(step / 9_000)) for step, value in line[:-1]]
    assert max(smooth) < 0.5 < np.abs(values - np.sin(steps / 9_000)).max()


def test_rows_are_read_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = GrowingRows(path)
    assert rows.look() == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [row["step"] for row in rows.look()] == [1, 2]
    with path.open("a") as file:
        file.write('ep": 3}\nnonsense\n[1]\n{"no": 1}\n')
    assert [row["step"] for row in rows.look()] == [1, 2, 3]
    path.write_text('{"step": 1}\n')  # a resumed run drops rows
    assert [row["step"] for row in rows.look()] == [1]
    (tmp_path / "other").write_text('{"step": 5}\n{"step": 6}\n{"step": 7}\n')
    os.replace(tmp_path / "other", path)
    assert [row["step"] for row in rows.look()] == [5, 6, 7]


def test_recipes_are_compared_by_key() -> None:
    one, other = flat_recipe("train: {steps: 3, batch: 8}\nseed: 0"), flat_recipe("train: {steps: 4, batch: 8}")
    assert differences([one, other]) == [("train.steps", [3, 4]), ("seed", [0, None])]
    assert flat_recipe("a: [") == {}
    assert flat_recipe("- 1") == {}
    assert flat_recipe("name: 2001-99-99") == {}


def test_a_recipe_of_aliases_is_not_written_out() -> None:
    bomb = [f"a{n}: &a{n} {{{', '.join(f'{k}: *a{n - 1}' for k in range(10))}}}" for n in range(1, 5)]
    assert flat_recipe("\n".join(["a0: &a0 {x: 1}", *bomb])) == {}


def test_runs_are_found_one_folder_deep_and_again_when_new_ones_come(tmp_path: Path) -> None:
    for name in ("one", "deep/two"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "recipe.yaml").write_text("name: x")
    runs = RunFolders([tmp_path])
    assert {each.folder.name for each in runs.look()} == {"one", "two"}
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "recipe.yaml").write_text("name: x")
    assert len(runs.look()) == 3
    assert len({each.id for each in runs.look()}) == 3
    with pytest.raises(UserError, match="There is no folder"):
        RunFolders([tmp_path / "nowhere"])


def test_a_run_is_shown_with_its_results_and_curves(client: Any, gallery: Any, run_folder: Path) -> None:
    tree = client.get("/api/runs").json()
    (line,) = tree["runs"]
    assert (line["name"], line["state"], line["step"], line["steps"]) == ("tiny", "finished", 8, 8)
    rows = [json.loads(text) for text in (run_folder / "metrics.jsonl").read_text().splitlines()]
    total = next(each for each in tree["curves"] if each["title"] == "Total")
    assert total["lines"] == [[[row["step"], pytest.approx(row["loss"], rel=1e-5)] for row in rows]]
    titles = {each["title"] for each in tree["curves"]}
    assert {"Nearest neighbor", "Learning rate", "Gradient norm"} <= titles


def test_two_runs_are_compared_and_followed(client: Any, gallery: Any, run_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run_folder, other, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    os.utime(other / "metrics.jsonl")
    recipe = (other / "recipe.yaml").read_text().replace("steps: 8", "steps: 12")
    (other / "recipe.yaml").write_text(recipe)
    result = {"protocol": "zero-shot", "on": "set", "n": 9, "classes": 3, "top1": 0.5, "top5": 1.0,
              "mean_per_class": 0.5, "templates": "plain", "skipped": {}}  # fmt: skip
    with (other / "evaluations.jsonl").open("w") as file:
        file.writelines(json.dumps({"step": step, **result}) + "\n" for step in (4, 8))
        file.write('{"step": 9, "protocol": "zero-shot"}\n')
    gallery.runs, before = RunFolders([run_folder, other]), gallery.runs
    try:
        answer = client.get("/api/runs")
        tree = answer.json()
        names = [line["name"] for line in tree["runs"]]
        assert sorted(names) == ["other", "tiny"]
        states = {line["name"]: line["state"] for line in tree["runs"]}
        assert states == {"tiny": "finished", "other": "training"}
        order = [names[[line["id"] for line in tree["runs"]].index(id)] for id in tree["shown"]]
        steps = {"tiny": "8", "other": "12"}
        assert tree["differences"] == [["train.steps", [steps[name] for name in order]]]
        assert ["set", "top-1", pytest.approx(1 / 3), [None if n == "tiny" else 0.5 for n in order]] in tree["results"]
        (measured,) = tree["measured"]
        assert measured["lines"][order.index("other")] == [[4, 0.5], [8, 0.5]]
        tag = answer.headers["etag"]
        assert client.get("/api/runs", headers={"If-None-Match": tag}).status_code == 304
        row = json.loads((other / "metrics.jsonl").read_text().splitlines()[-1])
        with (other / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({**row, "step": 10}) + "\n")
        fresh = client.get("/api/runs", headers={"If-None-Match": tag})
        assert fresh.status_code == 200
        assert {line["name"]: line["step"] for line in fresh.json()["runs"]} == {"tiny": 8, "other": 10}
        one = client.get("/api/runs", params={"show": tree["shown"][0]}).json()
        assert one["shown"] == tree["shown"][:1]
        assert one["differences"] == []
        os.utime(other / "metrics.jsonl", (0, 0))
        stopped = client.get("/api/runs").json()["runs"]
        assert {line["name"]: line["state"] for line in stopped} == {"tiny": "finished", "other": "stopped"}
    finally:
        gallery.runs = before


def test_damaged_run_files_are_passed_over(client: Any, gallery: Any, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "recipe.yaml").write_bytes(b"\xff\xfe: [")
    (folder / "metrics.jsonl").write_text('{"step": 1, "total": "x", "terms": 3, "seconds": null}\n{"step": 2}\n')
    damaged = {"protocol": "zero-shot", "on": "set", "n": 1, "classes": 0, "top1": "x", "top5": 1,
               "mean_per_class": 1, "templates": "plain", "skipped": {}}  # fmt: skip
    rows = [{"step": 1, "protocol": []}, {"step": 2, "protocol": "retrieval"}, {"step": 3, **damaged}]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gallery.runs, before = RunFolders([folder]), gallery.runs
    try:
        tree = client.get("/api/runs").json()
        assert [line["name"] for line in tree["runs"]] == ["broken"]
        assert tree["runs"][0]["step"] == 2
        assert (tree["curves"], tree["measured"], tree["results"]) == ([], [], [])
    finally:
        gallery.runs = before
