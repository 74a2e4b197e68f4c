"""A project folder that was moved: its lists of pairs, runs and indices still work, from wherever they are called."""

from pathlib import Path

import declip
from conftest import refuses, texture
from interchange.towers import build


def test_a_project_works_after_it_was_moved(tmp_path, monkeypatch, command):
    project = tmp_path / "before"
    (project / "images").mkdir(parents=True)
    rows = ["image,caption"]
    for number in range(40):
        texture(number).save(project / "images" / f"{number}.png")
        rows.append(f"{number}.png,texture number {number}")
    (project / "pairs.csv").write_text("\n".join(rows) + "\n")
    declip.export(build("conv"), "safetensors", project / "start")
    monkeypatch.chdir(project)
    keys = {"train.steps": 4, "train.batch_size": 8, "data.workers": 0, "train.report_to": []}
    keys["data.image_root"] = "images"
    run = project / "runs" / "tuned"  # an absolute path, which the recipe of the run holds
    first = declip.finetune("pairs.csv", "start", out=run, quiet=True, **keys)
    embed = ["embed", "start/declip.safetensors", "images", "--out", "indices/images", "--quiet"]
    assert command(*embed).status == 0
    monkeypatch.chdir(tmp_path)
    moved = project.rename(tmp_path / "after")
    monkeypatch.chdir(moved)
    split = moved / "runs" / "tuned" / "val.pairs"
    assert declip.evaluate("runs/tuned", split, "retrieval", batch_size=8).images > 0
    again = declip.finetune("pairs.csv", "start", out="runs/tuned", resume=True, quiet=True)
    assert (again.finished, again.step) == (True, first.step)
    assert command("search", "indices/images", "red", "--json", "hits.json").status == 0
    assert str(moved / "images") in Path("hits.json").read_text()
    assert declip.Index.open("indices/images").image(0).size == (48, 48)
    before = Path("indices/images/generation-1/vectors.npy").stat()
    assert command(*embed).status == 0
    assert Path("indices/images/generation-1/vectors.npy").stat() == before, "nothing is embedded again"
    away = (moved / "indices/images").rename(tmp_path / "away")
    assert "--model" in command("search", away, "red").err
    refuses("--source", declip.Index.open(away).image, 0)
