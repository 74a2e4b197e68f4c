"""Outputs of commands: a file that exists is replaced only with --overwrite, a folder of something else never."""

import shutil
from contextlib import chdir
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.main import get_command

import declip
from conftest import refuses, write_table
from declip.cli import app as cli
from declip.io.outputs import output_file
from indices import draw_shapes

READ = {"image", "image_root", "head", "cache", "terms", "index of choose", "index of app"}
"""Path parameters that name no output; the folders of indices are written as by `embed`."""

COMPARED = "demo-clip demo-slip data.source=pairs.csv --pairs 8 --dataset pairs.csv --task retrieval train.batch_size=8"
OUTPUTS = {
    "search --contact-sheet": "search index red",
    "search --json": "search index red",
    "search --out": "search index red",
    "choose --out": "choose MODEL shapes",
    "choose --contact-sheet": "choose MODEL shapes --out new.csv",
    "classify --out": "classify MODEL shapes --classes red,blue",
    "classify --save": "classify MODEL shapes --examples pairs.csv",
    "evaluate --json": "evaluate MODEL --dataset pairs.csv --task retrieval",
    "data inspect --json": "data inspect pairs.csv",
    "data inspect --html": "data inspect pairs.csv",
    "data inspect --without-copies": "data inspect pairs.csv --check-leakage one.csv",
    "app --caption": "app MODEL shapes --port 0",
    "embed --out": "embed MODEL shapes",
    "index from-parquet --out": "index from-parquet rows.parquet --model MODEL",
    "train --out": "train demo-clip train.batch_size=8 --data pairs.csv",
    "finetune --out": "finetune pairs.csv --from MODEL",
    "compare --out": f"compare {COMPARED}",
    "export --out": "export MODEL --format safetensors --overwrite",
}
"""Commands by the option that names what they write; it is the last argument where there is none."""


def path_parameters(command, name=""):
    for inner in getattr(command, "commands", {}).values():
        yield from path_parameters(inner, f"{name} {inner.name}".strip())
    for parameter in command.params:
        known = parameter.name in READ or f"{parameter.name} of {name}" in READ
        if parameter.metavar in ("FILE", "DIR") and not known:
            option = parameter.opts[0]
            yield f"{name} {option}" if option.startswith("--") else name


@pytest.fixture(scope="module")
def template(weights_file, tmp_path_factory):
    """A folder with images, tables of pairs, an index and rows of an embedder."""
    path = tmp_path_factory.mktemp("project")
    with chdir(path):
        names = [image.name for image in draw_shapes(Path("shapes"))]
        for table, some in (("pairs.csv", names), ("one.csv", names[:1])):
            write_table(Path(table), [f"shapes/{name},{Path(name).stem}" for name in some])
        labels = [f"shapes/{name},{Path(name).stem},{name.split('-')[0]}" for name in names]
        Path("labels.csv").write_text("\n".join(["image,caption,label", *labels]))
        declip.embed(weights_file, "shapes", out="index")
        rows = declip.Embedder(weights_file)({"id": ["red"], "image": ["shapes/red-bar.png"]})
        pq.write_table(pa.table({**rows, "vector": [*rows["vector"]]}), "rows.parquet")
    return path


@pytest.fixture
def project(template, tmp_path, monkeypatch):
    """A working folder that is a copy of the template."""
    monkeypatch.chdir(shutil.copytree(template, tmp_path, dirs_exist_ok=True))
    return tmp_path


def test_the_table_has_every_output():
    assert sorted(path_parameters(get_command(cli.app))) == sorted(OUTPUTS)


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_file_of_the_user_stays(name, project, weights_file, command):
    words = OUTPUTS[name].replace("MODEL", str(weights_file)).split()
    option = [name.split()[-1]] if "--" in name else []
    is_folder = name.endswith("--out") and name.split()[0] not in ("choose", "classify", "search")
    out = Path("mine" if is_folder else "mine.png" if name.endswith("sheet") else "mine.csv")
    written = out / "mine.csv" if is_folder else out
    written.parent.mkdir(exist_ok=True)
    written.write_text("image,notes\na.jpg,by hand\n")
    if is_folder:
        (out / "README.md").write_text("a folder of photographs")
    refused = command.refused([out.name], *words, *option, out)
    assert written.read_text() == "image,notes\na.jpg,by hand\n"
    assert is_folder or "app" in words or "--overwrite" in refused.err
    assert {path.name for path in out.parent.iterdir()} == {path.name for path in project.iterdir()}


COMMANDS = {
    "search": "search index red --contact-sheet b.png --json hits.json --out hits.csv",
    "choose": "choose MODEL shapes --contact-sheet a.png --out choose.csv",
    "classify": "classify MODEL shapes --examples labels.csv --save head --out x.csv",
    "evaluate": "evaluate MODEL --dataset pairs.csv --task retrieval --json result.json",
    "inspect": "data inspect pairs.csv --check-leakage one.csv --without-copies rest.pairs "
    "--json page.json --html page.html",
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_a_file_that_exists_is_replaced_only_with_overwrite(words, project, weights_file, command):
    before = {*project.iterdir()}
    words = words.replace("MODEL", str(weights_file)).split()
    first = command(*words)
    assert first.status == 0, first.err
    written = {path for path in project.iterdir() if path not in before and path.is_file()}
    contents = {path: path.read_bytes() for path in written}
    for path in written:
        command.refused(["--overwrite"], *words)
        assert {other: other.read_bytes() for other in written} == contents
        path.write_text("mine")
        replaced = command(*words, "--overwrite")
        assert (replaced.status, path.read_bytes() == b"mine") == (0, False), replaced.err
        contents = {other: other.read_bytes() for other in written}


def test_functions_replace_a_file_only_with_overwrite(project, model):
    path = project / "table.csv"
    choose = partial(declip.choose, model, "shapes", 5, index="index", out=path)
    classify = partial(declip.classify, model, "shapes", ["red", "blue"], out=path)
    for make in (choose, classify):
        path.write_text("image,caption\na.png,by hand\n")
        refuses("table.csv.*overwrite=True", make)
        assert path.read_text() == "image,caption\na.png,by hand\n"
        make(overwrite=True)
        assert "by hand" not in path.read_text()
        path.unlink()
        make()


def test_a_file_that_is_written_while_a_command_runs_stays(tmp_path):
    def run():
        with output_file(tmp_path / "x.csv", "--out") as partial:
            partial.write_text("computed")
            (tmp_path / "x.csv").write_text("image,caption\na.png,a cat\n")

    refuses("x.csv", run)
    assert (tmp_path / "x.csv").read_text() == "image,caption\na.png,a cat\n"


@pytest.mark.parametrize("name", ["sheet.pdf", "sheet.jpg", "sheet"])
def test_an_image_that_is_not_written_as_its_name_says_is_refused(name, project, command):
    command.refused([name, ".png"], "search", "index", "red", "--contact-sheet", name)
    assert not (project / name).exists()
