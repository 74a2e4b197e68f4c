"""The files that the documentation's code takes for granted, small: built-in sets, runs, models, indices, data."""

import csv
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import uvicorn
from starlette.testclient import TestClient

import declip
import declip.api
import declip.finetuning.run
from conftest import COLORS, SHAPES, draw, once
from data.fakes import write_tar
from declip.comparison import runner
from declip.comparison.outcome import RESULT, folder_of
from declip.data.sources.open import open_source
from declip.evaluation import prompt_sets
from declip.evaluation.prompt_sets import read_prompts
from declip.recipe.load import load_recipe
from declip_sets.sets import DESIGNS, EMOJI
from evaluation import trees
from golden_cases import read_state
from text_encoders import roberta

FIRST = 0x1F34E
"""Code point of the first drawing: the red apple, which the pages name."""

STEPS, BATCH, PAIRS = 1, 8, 32
SMALL = 64
"""Largest image size that is kept; recipes for larger images get a small tower."""

SMALL_IMAGE = {"model": "declip_vit_tiny", "size": 32, "model_kwargs": {"depth": 2}}

MAKE_SMALL = ("declip.finetuning", "declip.comparison", "declip.recipe")
"""Modules that resolve the recipes of commands; those that read foreign weights keep the real sizes."""


def small(recipe):
    """Cut a recipe down to seconds: few steps of few pairs, small towers, no loader processes."""
    train, pairs = recipe.train, recipe.data.max_pairs
    keys = {
        "train": {
            "steps": min(train.steps, STEPS), "batch_size": min(train.batch_size, BATCH), "warmup_steps": 1,
            "log_every": 1, "checkpoint_every": STEPS, "evaluate_every": 0, "epochs": None, "patience": None,
            "precision": "fp32", "report_to": (),
        },
        "image": {} if recipe.image.size <= SMALL else SMALL_IMAGE,
        "text": {"bpe_merges": 300, "width": 32, "heads": 2, "layers": min(recipe.text.layers, 2)},
        "data": {"workers": 0, "max_pairs": pairs and min(pairs, PAIRS)},
        "nearest_neighbor": {"queue_size": 64},
    }  # fmt: skip
    sections = {
        name: getattr(recipe, name).model_copy(update=values) for name, values in keys.items()
    }
    return recipe.model_copy(update={**sections, "embed_dim": 32})


@pytest.fixture(scope="session")
def emoji_cache(tmp_path_factory):
    """A cache of 24 concepts by five designers, four of them held out, as `declip data download` writes it."""
    return once(tmp_path_factory, "emoji", write_emoji)


def write_emoji(cache):
    rows, pixels = [], []
    for design in (
        *DESIGNS[:6:2],
        *DESIGNS[6:],
    ):  # three of training, and those of validation and test
        for number, (color, shape) in enumerate((c, s) for c in COLORS for s in SHAPES):
            code, name = f"{FIRST + number:x}", f"{color} {shape}"
            row = {
                "key": f"{design.key}/{code}",
                "design": design.key,
                "code": code,
                "drawing": name,
                "name": name,
            }
            row |= {"category": shape, "group": shape, "held_out": color == COLORS[-1]}
            rows.append({**row, "captions": [name, f"{shape} in {color}"]})
            pixels.append(np.asarray(draw(color, shape, EMOJI.side)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(EMOJI), "credit", lambda self, row: "drawn for a test")
        EMOJI.write(EMOJI.folder(cache), zip(rows, pixels, strict=True), {})


def write_tables(folder, name, source):
    """Write a source as NAME.csv and NAME.jsonl, one row per caption, NAME-test.csv with classes, and pictures/."""
    pairs, rows, classes = open_source(source), [], []
    for number in range(len(pairs)):
        file = f"{pairs[number].key.replace('/', '-')}.png"
        pairs[number].open().decoded().save(folder / "pictures" / file)
        image, captions = f"pictures/{file}", pairs[number].captions()
        classes.append({"image": image, "class": captions[0]})
        rows += [
            {"image": image, "caption": caption, "file": file, "text": caption}
            for caption in captions
        ]
    (folder / f"{name}.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    for table, column, lines in (
        (f"{name}.csv", "caption", rows),
        (f"{name}-test.csv", "class", classes),
    ):
        with (folder / table).open("w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, ["image", column], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(lines)


def write_products(folder):
    """Write products.csv: two pictures of each product, in two colors."""
    lines = ["image,caption,product,color"]
    for number, file in enumerate(sorted((folder / "pictures").iterdir())[:8]):
        lines.append(f"pictures/{file.name},a shoe,{number // 2},{('red', 'blue')[number % 2]}")
    (folder / "products.csv").write_text("\n".join(lines), encoding="utf-8")


def write_data(folder, pictures):
    """Write what the pages have in /data: shards, images, pets with enough for a probe, some ImageNet classes."""
    folder.mkdir()
    (folder / "pictures").symlink_to(pictures)
    members = []
    for file in sorted(pictures.iterdir())[:BATCH]:
        members += [(file.name, file.read_bytes()), (f"{file.stem}.txt", file.stem.encode())]
    shard = write_tar(folder / "00000.tar", members)
    for number in range(1, 332):
        (folder / f"{number:05d}.tar").symlink_to(shard.name)
    trees.pets(folder / "pets")
    lists = folder / "pets" / "oxford-iiit-pet" / "annotations"
    breeds = ("Abyssinian", "american_bulldog", "great_pyrenees")
    lines = [
        f"{name}_{number} {label} 1 1\n"
        for label, name in enumerate(breeds, 1)
        for number in range(30, 40)
    ]
    (lists / "trainval.txt").write_text("".join(lines), encoding="utf-8")
    for line in lines:
        name, label, *_ = line.split()
        trees.paint(folder / "pets" / "oxford-iiit-pet" / "images" / f"{name}.jpg", int(label))
    for label, name in enumerate(read_prompts("imagenet").classes):
        (folder / "imagenet" / "val" / name).mkdir(parents=True)
        if label < 2:
            trees.paint(folder / "imagenet" / "val" / name / "0.JPEG", label)


@pytest.fixture(scope="session")
def world(emoji_cache, tmp_path_factory):
    return once(tmp_path_factory, "world", lambda folder: write_world(folder, emoji_cache))


def write_world(folder, emoji_cache):
    (folder / "pictures").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DECLIP_CACHE", str(emoji_cache))
        write_tables(folder, "pairs", "builtin:emoji")
        write_tables(folder, "heldout", "builtin:emoji-test")
        write_tables(folder, "validation", "builtin:emoji-validation")
        write_products(folder)
        write_data(folder / "data", folder / "pictures")
        draw(COLORS[0], SHAPES[0]).save(folder / "photo.jpg")
        runs = folder / "runs"
        vit = {f"image.{key}": value for key, value in SMALL_IMAGE.items()}
        for name, recipe in {
            "demo": declip.load_recipe("demo-few-declip"),
            "vit": declip.load_recipe("demo-few-clip", vit),
        }.items():
            declip.train(small(recipe), out=runs / name, progress=False, report=False)
        declip.embed(runs / "demo", folder / "pictures", out=folder / "indices" / "pictures")
        declip.export(runs / "vit", "huggingface", folder / "downloads" / "clip-vit-base-patch32")
    state = {f"module.{name}": value for name, value in read_state("defilip_vit_tiny").items()}
    torch.save({"last_iter": 1, "model": state, "optimizer": {}}, folder / "ckpt.pth.tar")
    roberta(folder / "encoders" / "clinical", context=128)


def visit(server, sockets):
    """Stand in for `uvicorn.Server.run`: open each view of the page once and search."""
    host, port = sockets[0].getsockname()[:2]
    with TestClient(server.config.app, base_url=f"http://{host}:{port}") as client:
        for view in ("search", "pairs"):
            assert client.get(f"/{view}").status_code == 200
        assert client.get("/api/search", params={"text": "a red circle"}).json()["hits"]


@pytest.fixture
def here(world, emoji_cache, tmp_path, monkeypatch):
    """Folder to follow a page in: links to the world; runs are short and write no report."""
    for given in world.iterdir():
        place = tmp_path / given.name
        if given.name in ("runs", "indices", "encoders", "downloads"):  # pages write into these
            place.mkdir()
            for inner in given.iterdir():
                (place / inner.name).symlink_to(inner)
        else:
            place.symlink_to(given)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DECLIP_CACHE", str(emoji_cache))
    monkeypatch.setenv("COLUMNS", "100")
    for name in MAKE_SMALL:
        for module in [
            m
            for n, m in sorted(sys.modules.items())
            if n.startswith(name) and hasattr(m, "load_recipe")
        ]:
            monkeypatch.setattr(module, "load_recipe", lambda *given: small(load_recipe(*given)))
    monkeypatch.setattr("declip.finetuning.outputs.write_finetuned", finish)
    monkeypatch.setattr(
        "declip.api.write_page", lambda outcome, out: Path(out, "report.html").touch()
    )
    whole, trained, first = runner.run, runner.run_trial, {}

    def once_a_recipe(study, trial, folder):
        """Train a recipe once in a comparison; its other settings have the same result."""
        recipe = study.variant(trial.variant).recipe
        known = first.setdefault((folder, recipe), trial)
        if known == trial:
            return trained(study, trial, folder)
        row = json.loads((folder_of(folder, known) / RESULT).read_text(encoding="utf-8"))
        place = folder_of(folder, trial)
        place.mkdir()
        (place / RESULT).write_text(json.dumps({**row, **asdict(trial)}), encoding="utf-8")
        return True

    def few(study, out, progress=True):
        """Compare the first and the last recipe at a small number of pairs with one seed, in this process."""
        ends = tuple({each.name: each for each in (study.variants[0], study.variants[-1])}.values())
        if str(out).endswith("-tuning"):
            ends = study.variants  # each value of each recipe is asked for
        return whole(replace(study, variants=ends, pairs=(16,), seeds=(0,)), out, progress)

    monkeypatch.setattr(runner, "run", few)
    monkeypatch.setattr(runner, "run_trial", once_a_recipe)
    monkeypatch.setattr(runner, "step_seconds", lambda parts, warm, count: [0.1] * count)
    monkeypatch.setattr(prompt_sets, "read_prompts", one_template)
    monkeypatch.setattr(uvicorn.Server, "run", visit)
    return tmp_path


def finish(folder, model, sources):
    (folder / "report.html").touch()
    declip.export(folder, "safetensors", folder / "exported" / "safetensors", overwrite=True)


def one_template(name):
    """Read a prompt set with one template: ImageNet's has 80,000 sentences."""
    prompts = read_prompts(name)
    return prompts._replace(templates=prompts.templates[:1])
