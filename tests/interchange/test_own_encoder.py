"""An encoder of one's own on the command line: FILE.py:function, alone and with the heads of a fit."""

import shutil
from pathlib import Path

import pytest
import torch

import declip
from conftest import refuses
from declip.interchange.read import loaded

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_encoder.py"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the example under a name that shells must quote."""
    monkeypatch.chdir(tmp_path)
    Path("größe eins").mkdir()
    shutil.copy(EXAMPLE, "größe eins/C encoder.py")
    return tmp_path


NAME = "größe eins/C encoder.py:make"
FITTED = f"{NAME}+runs/mine"


def test_the_commands_take_it_fit_it_and_search_with_it(folder, table, command, caplog):
    fit = command("finetune", table, "--from", NAME, "--out", "runs/mine", "--quiet")
    assert (fit.status, f"declip embed '{FITTED}'" in fit.out) == (0, True)
    assert "Exported" not in fit.out
    resumed = command("finetune", table, "--from", NAME, "--out", "runs/mine", "--resume")
    assert resumed.status == 0
    measured = command("evaluate", FITTED, "--dataset", table, "--task", "retrieval", "--quiet")
    assert (measured.status, "R@10" in measured.out) == (0, True)
    assert "runs/mine' was trained on pairs of" in caplog.text
    assert command("embed", FITTED, table, "--out", "index", "--quiet").status == 0
    query = ("search", "index", "a red circle", "-k", 2)
    stored = command(*query)
    assert (stored.status, f"--model '{FITTED}'" in stored.err) == (2, True)
    named = command(*query, "--model", f"~/{NAME}+~/runs/mine".replace("~", str(folder)))
    assert (named.status, "cosine" in named.out) == (0, True)
    assert command("choose", NAME, table, "--count", 2, "--out", "next.csv", "--quiet").status == 0
    sorted_ = command("classify", FITTED, table, "--classes", "red,green", "--quiet")
    assert len(sorted_.out.splitlines()) == 24


def test_a_reopened_fit_embeds_as_it_did(folder, table):
    encoder = loaded(NAME)
    fitted = declip.fit(table, encoder)
    run = declip.finetune(table, NAME, out="runs/mine", progress=False)
    assert run.cross_validation["better"] == fitted.measures()["better"]
    opened = loaded(FITTED)
    pixels, tokens = torch.rand(3, 3, 4, 4), opened.tokenize(["a red circle", "green"])
    for name, given in (("encode_image", pixels), ("encode_text", tokens)):
        own = torch.nn.functional.normalize(getattr(opened, name)(given), dim=-1)
        torch.testing.assert_close(own, getattr(fitted.model, name)(given), atol=1e-5, rtol=0)


def test_no_name_in_a_file_runs_code(folder, table):
    declip.finetune(table, NAME, out="runs/mine", progress=False)
    declip.embed(NAME, table, out="index")
    ran = Path("ran")
    code = Path(NAME.removesuffix(":make"))
    code.write_text(f"open({str(ran)!r}, 'w')\n" + code.read_text())
    refuses(["If you trust the file", FITTED], declip.load, "runs/mine")
    refuses(["If you trust the file", "--model"], declip.Index("index").search, "red")
    refuses(["If you trust the file"], declip.evaluate, "runs/mine", table, "retrieval")
    refuses("no weights", declip.train, "demo-clip", {"finetune.pretrained": NAME}, data=table)
    refuses("no weights", declip.load, NAME)
    refuses("no weights", declip.export, NAME, "safetensors", "out")
    assert not ran.exists()
    # --- the user names it: it runs, and is another encoder than it was
    index = declip.Index("index", model=NAME)
    refuses("made by another model", index.search, "red")
    refuses(["runs/mine", "of fingerprint", "from a seed"], loaded, FITTED)
    assert ran.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.py:make", ["'none.py' does not exist", "a function that returns"]),
        ("none.py:make+runs/mine", ["'none.py' does not exist"]),
        ("own.py", ["own.py:make"]),
        ("own.py:mak", ["function of 'own.py' 'mak'", "Did you mean 'make'"]),
        ("own.py:fails", ["fails() of 'own.py'", "RuntimeError: no weights here"]),
        ("own.py:needs", ["needs() of 'own.py'", "argument: 'path'"]),
        ("own.py:half", ["half() of 'own.py'", "Half has no `preprocess`"]),
        ("own.py:Mean", ["`encode_image` of Mean", "returned a tensor of float32 of shape ()"]),
        ("own.py:make+pictures", ["'pictures' is not the folder of a fit"]),
        ("broken.py:make", ["'broken.py' cannot be run", "nowhere_installed"]),
    ],
)
def test_a_name_that_opens_no_encoder_is_refused(name, message, folder, table, command):
    code = "class Half:\n    def encode_image(self, images): ...\n"
    code += "def half(): return Half()\ndef needs(path): ...\n"
    code += "def fails(): raise RuntimeError('no weights here')\n"
    code += "class Mean(Colors):\n    def encode_image(self, images): return images.mean()\n"
    Path("own.py").write_text(EXAMPLE.read_text() + code)
    Path("broken.py").write_text("import nowhere_installed")
    done = command("embed", name, table, "--out", "index", "--quiet")
    assert done.status == 2
    assert [part for part in message if part not in done.err] == [], done.err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--freeze", "none"), "no weights"),
        (("finetune.lora={rank: 2}",), "no weights"),
        (("finetune.class_pairs=true",), "no weights"),
        (("image.size=32",), "image.size has no effect"),
        (("train.precision=bf16",), "--precision"),
    ],
)
def test_what_a_fit_cannot_change_is_refused(given, message, folder, table, command):
    done = command("finetune", table, *given, "--from", NAME, "--out", "runs/mine", "--quiet")
    assert (done.status, message in done.err) == (2, True), done.err
    assert not Path("runs/mine").exists()


def test_a_fit_is_fitted_to_the_encoder_and_not_to_a_fit(folder, table):
    declip.finetune(table, NAME, out="runs/mine", progress=False)
    refuses(f"Fit to {NAME}", declip.finetune, table, FITTED, out="runs/other", progress=False)


def test_two_widths_cannot_be_compared(folder, table):
    index = declip.embed(NAME, table, out="index")
    for call in (
        lambda: index.search("red"),
        lambda: declip.classify(NAME, table, ["red", "green"]),
        lambda: declip.evaluate(NAME, table, "retrieval"),
    ):
        refuses("27 and 48|48 and 27", call)
