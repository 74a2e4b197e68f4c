"""The examples in docstrings of public names, run in a folder with a run, eight images and a table of them."""

import doctest
import shutil
from inspect import Parameter, signature
from pathlib import Path

import pytest
from PIL import Image

import declip
from conftest import write_table
from declip.data.sources.open import open_source
from declip.models.dual_encoder import DualEncoder
from fixtures.make import PAIRS

RUN = Path(__file__).parents[1] / "fixtures" / "stored_run" / "run"
WITHOUT = {"PairBatch", "Term", "UserError", "compare", "finetune", "interchange"}
"""Names without an example: those that cost more than a second, and those that need more than five lines."""

OBJECTS = {name: getattr(declip, name) for name in declip.__all__ if name not in WITHOUT}
OBJECTS |= {"DualEncoder": DualEncoder, "open_source": open_source}
GLOBS = {"declip": declip, "Image": Image, "open_source": open_source}
EXAMPLES = {
    test.name: test
    for name, value in OBJECTS.items()
    for test in doctest.DocTestFinder(exclude_empty=True).find(value, name, globs=GLOBS)
    if test.examples
}


def test_every_name_has_an_example():
    assert OBJECTS.keys() <= {name.split(".")[0] for name in EXAMPLES}
    assert [name for name in WITHOUT if getattr(declip, name, None) is None] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """runs/demo, photos, pairs.csv, labels.csv, and indices/photos."""
    path = tmp_path_factory.mktemp("examples")
    shutil.copytree(RUN, path / "runs" / "demo")
    (path / "photos").mkdir()
    for image, caption in PAIRS:
        image.save(path / f"photos/{caption.split()[1]}.png")
    write_table(
        path / "pairs.csv", [f"photos/{caption.split()[1]}.png,{caption}" for _, caption in PAIRS]
    )
    (path / "labels.csv").write_text("image,label\nphotos/red.png,red\nphotos/blue.png,blue\n")
    declip.embed(
        path / "runs" / "demo", path / "photos", out=path / "indices" / "photos", workers=0
    )
    return path


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_prints_what_it_says(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    printed = []
    doctest.DocTestRunner().run(EXAMPLES[name], out=printed.append)
    assert not printed, "".join(printed)


@pytest.mark.parametrize("name", ["compare", "evaluate"])
def test_every_argument_is_named(name):
    unnamed = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    assert [
        each
        for each in signature(getattr(declip, name)).parameters.values()
        if each.kind in unnamed
    ] == []
