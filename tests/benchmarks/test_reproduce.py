"""The reproduction of the papers' runs at toy sizes: layouts of data, cost, and accuracy beside the papers'."""

import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from conftest import TINY, write_rows
from data.fakes import write_shards
from declip.cli import app as cli
from declip.recipe.schema import Recipe
from evaluation import trees

ROOT = Path(__file__).parents[2]
SMALL = {
    f"{section}.{key}": value
    for section, keys in TINY.items() if isinstance(keys, dict) for key, value in keys.items()
} | {"embed_dim": 16, "image.freeze_patch_embed": False, "data.workers": 0, "train.precision": "fp32"}  # fmt: skip


@pytest.fixture
def module(scripts, monkeypatch):
    """The script, whose runs are trained in this process and write no report."""

    def call_here(command):
        monkeypatch.setattr(sys, "argv", command[2:])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    found = scripts("reproduce")
    monkeypatch.setattr(found, "call", call_here)
    monkeypatch.setattr("declip.api.write_report", lambda *_, **__: None)
    return found


@pytest.fixture
def without_cost(module, monkeypatch):
    """Leave out counting the operations of a step."""
    monkeypatch.setattr(
        module, "count_cost", lambda *_: SimpleNamespace(flops=1, activations=1, states=1)
    )


@pytest.mark.usefixtures("without_cost")
def test_reproduction(module, call, tmp_path, monkeypatch):
    known = module.EXPERIMENTS["synthetic"]
    train = {"steps": 8, "batch_size": 8, "warmup_steps": 0, "log_every": 1}
    small = known.keys | {f"train.{key}": value for key, value in train.items()}
    small |= {"image.size": 32, "text.layers": 1, "text.width": 64, "text.heads": 2}
    monkeypatch.setitem(module.EXPERIMENTS, "synthetic", replace(known, keys=small, pairs=40))
    shards, out = tmp_path / "shards", tmp_path / "out"
    words = ("synthetic", "--data", shards, "--out", out)
    status, printed = call("reproduce", *words, "--check-leakage", shards)
    assert status == 1  # the data are their own test set
    assert any("40 of 40 pairs look like" in line for line in printed)
    assert any(line.startswith("on each of 1: 8 steps of 8 pairs at most") for line in printed)
    assert not (out / "run").exists()
    learning = ("train.lr=0.002", "simsiam.widths=[256, 256, 128]")
    status, printed = call("reproduce", *words, *learning)
    assert status == 0, printed
    assert any("chance is ln(8) = 2.08" in line for line in printed)
    curve = json.loads((out / "run" / "curve.json").read_text())
    assert list(curve) == [str(step) for step in range(1, 9)]
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**curve, "2": 2 * curve["2"]}))
    monkeypatch.setattr(module, "call", lambda *_: 0)  # the run has ended
    status, printed = call("reproduce", *words, *learning, "--curve", other)
    assert status == 1
    assert "at step 2" in printed[-1]
    for text in ('{"9": 1.0}', '{"1": NaN}', "[1]"):  # wrong ones are found before a step is taken
        other.write_text(text)
        assert call("reproduce", *words, "--curve", other)[0] == 2
    assert call("reproduce", *words, "--gpus", 0)[0] == 2


def test_a_stopped_reproduction_lets_the_run_save_its_checkpoint(scripts):
    child = "import os, signal, sys, time; os.kill(os.getppid(), signal.{}); time.sleep({}); sys.exit(7)"
    call = scripts("reproduce").call
    assert call([sys.executable, "-c", child.format("SIGINT", 0.2)]) == 7
    assert call([sys.executable, "-c", child.format("SIGTERM", 60)]) == -signal.SIGTERM


def noise(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((48, 36)).save(path, "JPEG")
    return path


@pytest.fixture
def small(module, monkeypatch):
    """The papers' experiments with tiny towers and 40 pairs; no step is timed."""
    monkeypatch.setattr(module, "cost", lambda *_: "")
    for name in ("yfcc15m", "cc3m"):
        known = module.EXPERIMENTS[name]
        keys = known.keys | SMALL | {"train.epochs": None}
        monkeypatch.setitem(module.EXPERIMENTS, name, replace(known, keys=keys, pairs=40))
    return module


@pytest.fixture
def authors(tmp_path):
    """The authors' file: JSON lines, images in a folder of their own, one of 40 lost."""
    rows = [
        {"caption": f"a photo of thing {n}", "filename": f"{n:05d}.jpg", "url": f"http://x/{n}"}
        for n in range(40)
    ]
    for number, row in enumerate(rows[1:]):
        noise(tmp_path / "images" / row["filename"], number)
    return write_rows(tmp_path / "yfcc15m_clean_open_data.json", rows)


@pytest.fixture
def shards(tmp_path):
    """img2dataset's output: tar files with Parquet and statistics beside them."""
    folder = write_shards(tmp_path / "shards", [10] * 4)
    for shard in range(4):
        parquet.write_table(pyarrow.table({"key": ["0"]}), folder / f"{shard:05d}.parquet")
        (folder / f"{shard:05d}_stats.json").write_text("{}")
    return folder / "{00000..00003}.tar"


@pytest.mark.usefixtures("without_cost")
def test_the_authors_file_is_read_with_its_columns_and_a_root(small, call, authors, tmp_path):
    words = ("yfcc15m", "--data", authors, "--check", "--out", tmp_path / "out")
    status, printed = call("reproduce", *words, "--root", tmp_path / "images")
    assert (status, "40 pairs, the paper has 40; 2.50% of 40 broken" in printed) == (0, True), (
        printed
    )
    status, printed = call("reproduce", *words)
    assert status == 1
    assert "missing image" in printed[-1]
    assert "--root" in printed[-1]


def test_the_cost_is_estimated_without_a_gpu(small, call, shards, tmp_path):
    module = small
    words = f"yfcc15m --data {shards} --check --out {tmp_path}/out --gpus 2 --nodes 2"
    words += " train.steps=1000 data.workers=2"
    printed = "\n".join(call("reproduce", *words.split())[1])
    assert "40 pairs, the paper has 40; 0.00% of 40 broken" in printed
    (operations,) = re.findall(r"(\S+) GFLOP a pair", printed)
    seconds = float(operations) * 1e9 * 8 * 1000 / (4 * 0.1 * module.PEAKS["A100"])
    assert f"{seconds / 3600:,.1f}" in re.search("A100 +(.*)", printed)[1]
    # two batches of each of 2 × 2 workers, of 2 pairs with two views
    assert f"{2 * 4 * 2 * 2 * 3 * 32**2 / 1e9:.2g} GB of each machine for 2 workers" in printed


@pytest.mark.usefixtures("without_cost")
def test_a_run_ends_with_its_accuracy_beside_the_papers(small, call, authors, tmp_path):
    trees.pets(tmp_path / "sets" / "pets")
    words = f"yfcc15m --data {authors} --root {tmp_path}/images --out {tmp_path}/out --anyway"
    words += " train.steps=2 train.warmup_steps=0 train.log_every=1 train.report_to=[]"
    words = words.split()
    small.EXPERIMENTS["yfcc15m"] = replace(small.EXPERIMENTS["yfcc15m"], pairs=50)
    printed = call("reproduce", *words)[1]
    assert "IMAGENET=" in printed[0], "before training"
    problems = [line for line in printed if line.startswith("PROBLEM")]
    assert "ignored: 40 pairs instead of 50" in problems[0]
    assert "chance" in problems[1], "the problem of a loss after two steps stays"
    printed = call("reproduce", *words, "--test", f"paper11:{tmp_path / 'sets'}")[1]
    assert sum(line.startswith("Without ") for line in printed) == 10
    (line,) = (line for line in printed if line.startswith("zero-shot on pets:"))
    assert "mean_per_class, n = 6" in line
    assert "33.8 in table 3 of ALIP" in line


@pytest.mark.usefixtures("without_cost")
def test_several_machines_get_their_commands(small, call, shards, tmp_path):
    out = tmp_path / "out"
    words = ("yfcc15m", "--data", shards, "--out", out, "--gpus", 2, "--nodes", 2)
    status, printed = call("reproduce", *words)
    assert status == 0
    assert (out / "recipe.yaml").is_file()
    assert not (out / "run").exists()
    given = "\n".join(printed)
    assert "torchrun --nnodes 2 --nproc-per-node 2 " in given
    assert f"-m declip train {out}/recipe.yaml --out {out}/run --resume" in given
    assert (
        f"sbatch --nodes 2 --gpus-per-node 2 scripts/train.sbatch {out}/recipe.yaml --out {out}/run"
        in given
    )


def test_make_passes_what_is_given():
    command = "make -n --no-print-directory reproduce-yfcc15m DATA=x.json ROOT=images METHOD=clip"
    command += " BACKBONE=r50 IMAGENET=in SETS=sets GPUS=8"
    words = (
        subprocess.check_output(command.split(), cwd=ROOT, text=True).replace("\\\n", " ").split()
    )
    given = " ".join(word.strip("'") for word in words[words.index("yfcc15m") :])
    assert given == (
        "yfcc15m --data x.json --gpus 8 --nodes 1 --root images --method clip --backbone r50 "
        "--test imagenet:in --test paper11:sets"
    )


def test_the_published_numbers_of_the_page_are_those_of_the_script(scripts):
    page = (ROOT / "docs" / "reproduced.md").read_text(encoding="utf-8")
    expected = {}
    for (data, method, backbone), rows in scripts("reproduce").REPORTED.items():
        for number, source, _ in rows if data == "yfcc15m" else ():
            expected[method, backbone, "benchmark" in source] = number
    header, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines() if line.startswith(("| | source", "| ViT-B/32 |", "| ResNet-50 |"))
    )  # fmt: skip
    found = {}
    for tower, source, *numbers in rows:
        for method, number in zip(header[2:], numbers, strict=True):
            if number:
                found[
                    method.lower(), {"ViT-B/32": "vitb32"}.get(tower, "r50"), "benchmark" in source
                ] = number
    assert found == expected


def test_the_anchor_on_cc3m_has_open_clips_settings(scripts):
    module = scripts("reproduce")
    options = SimpleNamespace(
        method="clip", backbone="vitb32", keys=[], data="x", root=None, gpus=1, nodes=1
    )
    recipe = module.recipe_of(options, module.EXPERIMENTS["cc3m"])
    train, view = recipe.train, recipe.views.image
    assert (train.batch_size, train.lr, train.weight_decay, train.epochs) == (1024, 0.001, 0.1, 30)
    assert (view.scale, view.color_jitter_prob, view.hflip_prob) == ((0.9, 1.0), 0, 0)
    assert recipe.image.mean == Recipe().image.mean
    assert recipe.data.columns["image"] == "image"


def test_a_set_without_classes_is_refused_before_training(small, call, authors, tmp_path):
    words = f"yfcc15m --data {authors} --root {tmp_path}/images --out {tmp_path}/out --check"
    noise(tmp_path / "one.jpg", 1)
    table = tmp_path / "captions.csv"
    table.write_text("image,caption\none.jpg,a photo\n")
    status, printed = call("reproduce", *words.split(), "--test", table)
    assert status == 2
    assert "captions.csv" in printed[-1]


def test_the_cost_of_filip_counts_padding(small, call, shards, tmp_path):
    words = f"yfcc15m --method filip --data {shards} --check --out {tmp_path}/out"
    status, printed = call("reproduce", *words.split(), "text.context_length=32")
    assert status == 0
    assert "captions of 32 tokens" in "\n".join(printed)
