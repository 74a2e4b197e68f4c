"""What is known of the pairs that a model was trained on: warnings, and what is opened for them."""

import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import yaml

import declip
from conftest import TINY, texture, tiny_tree, write_table
from declip.interchange.declip_file import write_declip_file
from declip.recipe.schema import Recipe
from training.starts import quiet_train

PLAIN = {"data.workers": 0, "train.report_to": [], "train.steps": 1, "train.batch_size": 8}
WARNING = "was trained on pairs of"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    for number in range(40):
        texture(number).save(folder / f"{number}.png")
    rows = [f"{number}.png,texture number {number}" for number in range(40)]
    split = [f"{row},{'test' if number % 4 == 0 else 'train'}" for number, row in enumerate(rows)]
    (folder / "split.csv").write_text("\n".join(["image,caption,split", *split]) + "\n")
    return write_table(folder / "pairs.csv", rows)


@pytest.fixture(scope="module")
def start(pairs, tmp_path_factory):
    tree = tiny_tree(pairs, train={**TINY["train"], "steps": 1})
    out = tmp_path_factory.mktemp("weights") / "start"
    return quiet_train(Recipe.model_validate(tree), out).folder


@pytest.fixture(scope="module")
def model(start, tmp_path_factory):
    """A file of weights that is of no run."""
    path = tmp_path_factory.mktemp("model") / "model" / "declip.safetensors"
    path.parent.mkdir()
    write_declip_file(declip.load(start, device="cpu"), path)
    return path


def evaluated(model, pairs):
    return declip.evaluate(model, pairs, "retrieval", device="cpu", progress=False)


@pytest.mark.parametrize(
    "tree", [{"package": {"name": "x"}}, {"extends": "demo-clip"}], ids=["foreign", "own"]
)
def test_a_recipe_in_the_working_folder_is_not_that_of_the_model(
    tree, model, pairs, tmp_path, monkeypatch, caplog
):
    shutil.copytree(model.parent, tmp_path / "model")
    own = {"data": {"source": str(pairs)}} if "extends" in tree else {}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**tree, **own}))
    monkeypatch.chdir(tmp_path)
    evaluated("model/declip.safetensors", pairs)
    declip.finetune(pairs, "model/declip.safetensors", PLAIN, tmp_path / "tuned", progress=False)
    assert WARNING not in caplog.text
    assert "trained on these pairs" not in caplog.text
    assert "cannot be compared" not in caplog.text


@pytest.mark.exports
def test_a_tuned_run_warns_on_its_own_table_also_when_it_was_moved(pairs, start, tmp_path, caplog):
    run = declip.finetune(pairs, start, PLAIN, tmp_path / "run", progress=False)
    assert (run.folder / "train.pairs").is_file()
    moved = tmp_path / "moved"
    inner = [next((run.folder / name).iterdir()) for name in ("exported", "checkpoints")]
    for where in (run.folder, *inner, moved):
        if where == moved:
            run.folder.rename(moved)
        caplog.clear()
        evaluated(where, pairs)
        assert caplog.text.count(WARNING) == 1, where


def test_a_set_with_held_out_pairs_gives_no_warning(pairs, start, tmp_path, caplog):
    split = pairs.with_name("split.csv")
    run = declip.finetune(split, start, PLAIN, tmp_path / "run", progress=False)
    assert evaluated(run.folder, split).images == 10
    assert WARNING not in caplog.text


@pytest.fixture
def server():
    """An address that counts the requests to it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_the_addresses_of_another_run_are_not_opened(pairs, start, tmp_path, server):
    theirs = tmp_path / "theirs"
    shutil.copytree(start, theirs)
    tree = yaml.safe_load((theirs / "recipe.yaml").read_text())
    tree["data"]["source"] = f"http://127.0.0.1:{server.server_port}/leak.tar"
    (theirs / "recipe.yaml").write_text(yaml.safe_dump(tree))
    declip.finetune(pairs, theirs, PLAIN, tmp_path / "run", progress=False)
    assert server.requests == []
