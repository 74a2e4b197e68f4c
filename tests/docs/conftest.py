"""A small world for the documentation's code: the built-in emoji as drawn shapes, short runs, a model, an index."""

import csv
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import declip
from conftest import COLOURS, SHAPES, draw
from declip import recipe_file
from declip.config import Recipe
from declip.data.emoji import DESIGNS, EMOJI, IMAGES
from declip.data.emoji_build import SCHEMA
from declip.data.picture_build import write_record
from declip.data.picture_cache import TABLE
from declip.data.sources import open_source
from declip.training import trainer

SIDE = 40
STEPS, BATCH = 4, 8


def small(recipe: Recipe) -> Recipe:
    """The recipe for seconds: few steps of few pairs, a short vocabulary, no loading processes."""
    train = {
        "steps": min(recipe.train.steps, STEPS),
        "batch": min(recipe.train.batch, BATCH),
        "warmup_steps": 1,
        "log_every": 2,
        "checkpoint_every": STEPS,
        "evaluate_every": 0,
        "threads": 1,
        "precision": "fp32",
        "keep_memory": False,
        "freeze_garbage": False,
    }
    text = {"merges": 300, "width": 32, "heads": 2}
    return recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update=train),
            "text": recipe.text.model_copy(update=text),
            "data": recipe.data.model_copy(update={"workers": 0}),
        }
    )


def write_emoji(cache: Path) -> None:
    """A cache of 24 concepts by all designers, four of them held out, laid as `declip data prepare` does."""
    folder = EMOJI.folder(cache)
    folder.mkdir(parents=True)
    rows, pixels = [], []
    for design in DESIGNS:
        for number, (colour, shape) in enumerate((c, s) for c in COLOURS for s in SHAPES):
            code, name = f"{number:x}", f"{colour} {shape}"
            rows.append(
                {
                    "key": f"{design.key}/{code}", "image": len(pixels), "design": design.key, "drawing": name,
                    "code": code, "name": name, "category": shape, "group": shape, "held_out": colour == COLOURS[-1],
                    "captions": [name, f"{shape} in {colour}"], "keywords": [colour, shape],
                }
            )  # fmt: skip
            pixels.append(np.asarray(draw(colour, shape, SIDE)))
    np.save(folder / IMAGES, np.stack(pixels))
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / TABLE)
    write_record(folder, {"layout": EMOJI.layout, "side": SIDE, "pairs": len(rows)}, "drawn for a test")


@pytest.fixture(scope="session")
def emoji_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder."""
    cache = tmp_path_factory.mktemp("emoji")
    write_emoji(cache)
    return cache


@pytest.fixture(scope="session")
def world(emoji_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a page may take for granted: pairs.csv, heldout.csv, pictures, runs/demo and indices/pictures."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "pictures").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DECLIP_CACHE", str(emoji_cache))
        for table, source in (("pairs.csv", "builtin:emoji"), ("heldout.csv", "builtin:emoji-test")):
            pairs = open_source(source)
            with (folder / table).open("w", newline="", encoding="utf-8") as file:
                rows = csv.writer(file)
                rows.writerow(["image", "caption"])
                for number in range(len(pairs)):
                    name = f"pictures/{pairs.key(number).replace('/', '-')}.png"  # type: ignore[attr-defined]
                    pairs[number].image.save(folder / name)
                    rows.writerows([name, caption] for caption in pairs.captions(number))
        trainer.train(small(declip.load_recipe("declip-demo")), out=folder / "runs" / "demo", quiet=True, report=False)
        declip.embed(folder / "runs" / "demo", folder / "pictures", out=folder / "indices" / "pictures")
    return folder


@pytest.fixture
def here(world: Path, emoji_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to follow a page in: the world in it, all runs short, reports only where a page is about them."""
    for each in ("pairs.csv", "heldout.csv", "pictures"):
        (tmp_path / each).symlink_to(world / each)
    for place in ("runs/demo", "indices/pictures"):
        (tmp_path / place).parent.mkdir()
        (tmp_path / place).symlink_to(world / place)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DECLIP_CACHE", str(emoji_cache))
    monkeypatch.setenv("COLUMNS", "100")
    load = recipe_file.load_recipe
    for module in (recipe_file, trainer):
        monkeypatch.setattr(module, "load_recipe", lambda *given: small(load(*given)))
    monkeypatch.setattr(trainer, "write_report", lambda run: Path(run.folder, "report.html").touch())
    assert os.environ["DECLIP_CACHE"] == str(emoji_cache)
    return tmp_path
