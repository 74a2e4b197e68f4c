"""A package with entry points, installed as users install it, gives declip a loss, a source, a tracker and a recipe."""

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import refuses
from declip.io.plugins import load_plugin, plugins
from declip.recipe.load import load_recipe, recipe_names
from declip.supervision import objective

PLUGIN = Path(__file__).parents[2] / "examples" / "plugin"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    place = tmp_path_factory.mktemp("packages")
    words = ["install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--target", place, PLUGIN]
    subprocess.run([sys.executable, "-m", "pip", *map(str, words)], check=True)
    return place


def test_a_plugin_is_used_by_its_names(installed, tmp_path, command, monkeypatch):
    monkeypatch.syspath_prepend(str(installed))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(objective, "TERMS", dict(objective.TERMS))
    assert "sketch" in recipe_names()
    assert load_recipe("sketch").data.source == "circles:256"
    steps = ["train.steps=3", "train.log_every=1", "text.width=32", "data.workers=0"]
    done = command("train", "sketch", *steps, "--out", "run", "--quiet")
    assert done.status == 0, done.err
    logged = Path("run/lines.txt").read_text().splitlines()
    assert [line.split()[0] for line in logged] == ["1", "2", "3"]
    run = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert run.count('"alignment"') == 3
    again = command("train", "sketch", *steps, "--out", "run", "--quiet", "--resume")
    assert again.status == 0, again.err
    refused = command("train", "sketch", "--data", "circles:few", "--out", "other")
    assert (refused.status, "circles:few" in refused.err) == (2, True)


def test_damaged_plugins_are_named(tmp_path, monkeypatch):
    for package in ("one", "two"):
        about = tmp_path / f"{package}-1.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
        (about / "entry_points.txt").write_text(
            f"[declip.losses]\nsame = {package}_missing:Loss\n"
            + ("[declip.trackers]\nbroken = one_missing:X\n" if package == "one" else "")
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    refuses(r"'same': (one and two|two and one)", plugins, "losses")
    refuses("'broken' of the package one cannot be imported", load_plugin, "trackers", "broken")
