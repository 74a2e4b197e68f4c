"""What several tests share: the command, a small table of real picture files, recipes small enough for seconds."""

import csv
import ctypes
import gc
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

# Threads that wait for each other make everything slow next to other tests; set before the libraries are loaded, and
# handed on to the processes that tests start.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

import numpy as np
import pytest
import typer.main
from filelock import FileLock
from markupsafe import Markup
from PIL import Image, ImageDraw

from declip.errors import UserError
from declip.io import plugins

COLORS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("circle", "square", "triangle", "bar")

TINY = {
    "image": {"model": "declip_vit_tiny", "size": 32, "model_kwargs": {"patch_size": 8, "embed_dim": 64, "depth": 1}},
    "text": {"width": 32, "layers": 1, "heads": 2, "context_length": 16, "bpe_merges": 300},
    "embed_dim": 16,
    "simsiam": {"widths": [16, 16, 8]},
    "simclr": {"widths": [16, 8]},
    "late_interaction": {"width": 8},
    "nearest_neighbor": {"queue_size": 32},
    "train": {
        "steps": 8, "batch_size": 8, "warmup_steps": 2, "log_every": 2, "checkpoint_every": 4, "report_to": [],
    },
}  # fmt: skip
"""A recipe's keys for towers of a few thousand parameters; TensorBoard would import pandas in every process."""

DECLIP = {
    "contrastive": 0.1,
    "multi_view": 0.3,
    "simsiam": 0.2,
    "masked_language": 0.2,
    "nearest_neighbor": 0.2,
}
WEIGHTS = {
    "clip": {"contrastive": 1.0},
    "slip": {"contrastive": 1.0, "simclr": 1.0},
    "filip": {"contrastive": 1.0, "late_interaction": 1.0},
    "declip": DECLIP,
    "defilip": {**DECLIP, "late_interaction": 0.2},
}


os.fsync = lambda _: None  # a twentieth of the time is spent on waiting for the disk

# Else each run of a command in one process builds the parser again, for 11 ms, and each name of a source
# looks through all installed packages, for 9 ms.
typer.main.get_command = cache(typer.main.get_command)
_installed = cache(lambda group, path: entry_points(group=group))
plugins.entry_points = lambda group: _installed(group, tuple(sys.path))

gc.disable()  # imports make millions of objects that stay; searching them for garbage takes a quarter of their time


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        # No test finds what an earlier run or the user computed; workers inherit the folder.
        cache = tempfile.mkdtemp(prefix="declip-cache-")
        os.environ["DECLIP_CACHE"] = cache
        config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
    # With workers this process only hands out tests.
    if not config.getoption("numprocesses", None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "wandb", None)  # else timm imports it, for half a second
            import timm  # noqa: F401


def pytest_collection_finish():
    gc.freeze()  # no collection looks again at what the imports made, here or in processes forked from here
    gc.set_threshold(20_000, 20, 20)  # by default it takes a twentieth of the time
    gc.enable()


def pytest_unconfigure():
    gc.collect()
    gc.freeze()  # pytest looks for garbage five times at the end


class Lazy:
    """A package that is imported at its first use: many take a second, and each process collects all tests."""

    def __init__(self, name):
        self.name = name

    def __getattr__(self, attribute):
        if attribute.startswith(("_", "pytest_")):  # pytest asks every object of a file for them
            raise AttributeError(attribute)
        return getattr(import_module(self.name), attribute)


def tiny_tree(source, losses="clip", **sections):
    """A recipe that trains towers of `TINY` on a source, without loader processes."""
    return {
        **TINY,
        "data": {"source": str(source), "workers": 0},
        "loss_weights": WEIGHTS[losses],
        **sections,
    }


def once(tmp_path_factory, name, make):
    """A folder that one of all test processes fills by a function; the others wait for it and read."""
    base = tmp_path_factory.getbasetemp()
    in_worker = "PYTEST_XDIST_WORKER" in os.environ
    folder = (base.parent if in_worker else base) / "shared" / name
    folder.parent.mkdir(exist_ok=True)
    done = folder.with_name(f"{name}.done")
    with FileLock(folder.with_name(f"{name}.lock")):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # what a maker left that failed
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_table(path):
    """The rows of a CSV file."""
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def write_table(path, rows):
    """Write a table of images and captions; each row is a line."""
    path.write_text("\n".join(["image,caption", *rows]) + "\n", encoding="utf-8")
    return path


def in_processes(function, world, folder, *arguments):
    """Run a function in gloo processes that know each other, and give what it returned in each; None where it ended."""
    import torch  # not above, where the process that only hands out tests to others would import it first
    import torch._dynamo  # as the first step of an optimizer does; else in each process, for 1.2 s

    folder.mkdir(parents=True, exist_ok=True)
    torch.multiprocessing.start_processes(
        _meet, (function, world, str(folder), arguments), nprocs=world, start_method="fork"
    )
    saved = [folder / f"{rank}.pt" for rank in range(world)]
    return [torch.load(path) if path.exists() else None for path in saved]


def _meet(rank, function, world, folder, arguments):
    import torch

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    torch.save(function(*arguments), f"{folder}/{rank}.pt")
    if torch.distributed.is_initialized():  # not after `declip.train`
        torch.distributed.destroy_process_group()


def draw(color, shape, size=40):
    image = Image.new("RGB", (size, size), "white")
    pen, box = ImageDraw.Draw(image), (8, 8, size - 8, size - 8)
    if shape == "circle":
        pen.ellipse(box, fill=color)
    elif shape == "square":
        pen.rectangle(box, fill=color)
    elif shape == "triangle":
        pen.polygon([(size // 2, 6), (6, size - 6), (size - 6, size - 6)], fill=color)
    else:
        pen.rectangle((6, size // 2 - 4, size - 6, size // 2 + 4), fill=color)
    return image


def texture(seed, side=48):
    """A smooth image of many colors, another for each seed."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def refuses(match, call, /, *given, **options):
    """A call that must end with a `UserError` of one line that matches, or has some parts; gives the line."""
    with pytest.raises(UserError, match=(isinstance(match, str) and match) or None) as caught:
        call(*given, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert isinstance(match, str) or [part for part in match if part not in message] == [], message
    return message


def read_only(folder, work):
    """Call a function in a process for which a folder is mounted read-only."""
    process = multiprocessing.get_context("fork").Process(target=_mounted, args=(str(folder), work))
    process.start()
    process.join()
    if process.exitcode == 77:
        pytest.skip("no mount namespaces here")
    assert process.exitcode == 0


def _mounted(folder, work):
    maps = {"setgroups": "deny", "uid_map": f"0 {os.getuid()} 1", "gid_map": f"0 {os.getgid()} 1"}
    if ctypes.CDLL(None).unshare(0x1002_0000):  # CLONE_NEWUSER | CLONE_NEWNS
        os._exit(77)
    for name, line in maps.items():
        Path(f"/proc/self/{name}").write_text(line)
    for options in (["--bind", folder, folder], ["-o", "remount,bind,ro", folder]):
        if subprocess.run(["mount", *options]).returncode:
            os._exit(77)
    work()


WITHOUT_WORKERS = {"app", "benchmarks", "docs", "evaluation", "inspection", "search"}
"""Folders of tests that read pairs in their own process unless they ask for workers, which take a tenth of a second."""


@pytest.fixture(autouse=True)
def cheap_defaults(request):
    """Draw charts in the tests of reports alone, which takes a tenth of a second; see `WITHOUT_WORKERS`."""
    with pytest.MonkeyPatch.context() as patch:
        if "reports" not in request.path.parts:
            patch.setattr("declip.reports.charts.Chart.svg", lambda *_: Markup("<svg></svg>"))
        if request.path.parent.name in WITHOUT_WORKERS:
            patch.setattr("declip.io.pool.MAX_WORKERS", 0)
        yield


@pytest.fixture
def command(monkeypatch, capfd):
    """Runs the command as a shell starts it; gives its exit status and what it printed."""
    from declip.cli import app as cli

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["declip", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return SimpleNamespace(status=caught.value.code or 0, **capfd.readouterr()._asdict())

    def refused(parts, *words):
        """A command that must end with status 2 and name some parts; gives its outcome."""
        outcome = run(*words)
        assert outcome.status == 2, outcome
        assert [part for part in parts if part not in outcome.err] == [], outcome.err
        return outcome

    run.refused = refused
    return run


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    """A JSONL table of 24 pictures with two captions each."""
    return once(tmp_path_factory, "shapes", draw_table) / "shapes.jsonl"


def draw_table(folder):
    rows = []
    for color in COLORS:
        for shape in SHAPES:
            draw(color, shape).save(folder / f"{color}-{shape}.png")
            captions = [f"a {color} {shape}", f"{shape} painted in {color} on white paper"]
            rows.append({"image": f"{color}-{shape}.png", "caption": captions})
    write_rows(folder / "shapes.jsonl", rows)


@pytest.fixture(scope="session")
def tiny_run(table, tmp_path_factory):
    """A run of `TINY` with all losses of DeCLIP over the table, for tests that only read a run."""
    from declip.api import train
    from declip.recipe.schema import Recipe

    def make(folder):
        recipe = Recipe.model_validate(tiny_tree(table, "declip", name="tiny"))
        train(recipe, out=folder / "tiny", progress=False, report=False)

    return once(tmp_path_factory, "run", make) / "tiny"


@pytest.fixture(scope="session")
def rows(table):
    """The rows of the table with absolute paths, for tables that lie elsewhere."""
    found = map(json.loads, table.read_text(encoding="utf-8").splitlines())
    return [{**row, "image": str(table.parent / row["image"])} for row in found]


@pytest.fixture
def generator():
    return np.random.default_rng(0)
