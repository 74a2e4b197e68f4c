"""The command `declip finetune`, and the same in Python."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import declip
from cli.test_cli import run
from conftest import TINY
from declip import api
from declip.interchange import starter
from declip.recipe.finetuning import settings
from declip.recipe.schema import Recipe
from declip.runs.folder import read_run
from declip.training.trainer import Trainer
from training.starts import same_end
from training.test_best import best_step


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    with (folder / "pairs.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        for number in range(48):
            values = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
            Image.fromarray(values).resize((40, 40), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
            table.writerow([f"{number}.png", f"texture number {number}"])
    (folder / "bare.csv").write_text("image,size\n0.png,3\n")
    rows = (folder / "pairs.csv").read_text().splitlines()
    lines = rows[:41]
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    (folder / "other.csv").write_text("\n".join([rows[0], *rows[41:]]))
    (folder / "few.csv").write_text("\n".join(lines[:4]))
    (folder / "copy.csv").write_text("\n".join(lines[:1] + lines[11:25]))
    (folder / "one.csv").write_text("\n".join([lines[0], *(line.split(",")[0] + ",a thing" for line in lines[1:])]))
    return folder / "pairs.csv"


@pytest.fixture(scope="module")
def weights(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("weights") / "start"
    image = {"model": "declip_conv_tiny", "size": 32}  # open_clip cannot hold it, which saves the time of its import
    tree = {**TINY, "image": image, "data": {"source": str(pairs)}, "train": {**TINY["train"], "steps": 2}}
    declip.train(Recipe.model_validate(tree), out=out, quiet=True, report=False)
    return out


def test_one_line_trains_validates_and_exports(
    pairs: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["finetune", str(pairs), "--from", str(weights), "--out", str(out), "--quiet", "train.epochs=3"]
    assert run([*words, "train.patience=9"], monkeypatch) == 0
    printed = capfd.readouterr().out
    assert "text → image R@1" in printed
    assert "validation loss" in printed
    assert str(out / "report.html") in printed
    done = read_run(out)
    assert done.recipe.train.steps == 12  # 3 epochs of 4 batches of 8 of the 36 pairs
    assert {row["step"] for row in done.evaluations} == {0, 4, 8, 12}
    assert (done.recipe.data.source, *done.recipe.evaluation.retrieval) == (
        str(out / "train.pairs"),
        str(out / "val.pairs"),
    )
    best = best_step(done.evaluations)
    assert done.best_step == best
    assert (out / "report.html").is_file()
    exported = declip.load(out / "exported/safetensors/declip.safetensors", device="cpu")
    tensors = declip.load(out / f"checkpoints/step-{best:08d}", device="cpu").state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(tensors[name], t) for name, t in exported.state_dict().items())  # type: ignore[attr-defined]
    assert run(words, monkeypatch) == 2
    assert "--resume" in capfd.readouterr().err


def test_python_uses_the_same_words_and_resumes(pairs: Path, weights: Path, tmp_path: Path) -> None:
    keys = {"train.steps": 6, "train.batch_size": 4, "train.evaluate_every": 2, "train.patience": 9}
    options = {"val": (), "freeze": "text", "quiet": True, **keys}
    whole = declip.finetune(pairs, weights, out=tmp_path / "whole", **options)
    assert whole.finished
    assert whole.recipe.finetune.freeze_text_blocks == "all"
    part = tmp_path / "part"
    recipe = api.finetune_recipe(pairs, part, weights, (), "text", keys, quiet=True)
    trainer = Trainer(recipe, part, quiet=True)
    trainer.stop.poll = lambda: trainer.step + 1 >= 3  # type: ignore[method-assign]
    assert not trainer.train().finished
    listed = (part / "val.pairs").read_bytes()
    assert declip.finetune(pairs, weights, out=part, resume=True, **options).finished
    assert (part / "val.pairs").read_bytes() == listed
    same_end(tmp_path / "whole", part)


MISTAKES = {
    "the training pairs again": ("pairs.csv --val pairs.csv", "100.0 %", "--val"),
    "a part of them": ("pairs.csv --val copy.csv", "'copy.csv'", "--val"),
    "too few": ("few.csv", "3 pairs"),
    "one caption": ("one.csv", "one caption"),
    "no captions": ("bare.csv", "'caption'", "caption_column"),
    "missing weights": ("pairs.csv --from nowhere", "'nowhere'", "open_clip:MODEL/TAG"),
    "unknown file": ("pairs.csv --from pairs.csv", "pairs.csv"),
    "unknown towers": ("pairs.csv --freeze all", "'all'", "both"),
    "nothing to train": ("pairs.csv --freeze both", "--freeze", "lora"),
    "both lengths": ("pairs.csv train.steps=3 train.epochs=3", "train.steps=3", "train.epochs=3"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_leaves_no_folder(
    name: str,
    pairs: Path,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words, *parts = MISTAKES[name]
    monkeypatch.chdir(pairs.parent)
    start = [] if "--from" in words else ["--from", str(weights)]
    assert run(["finetune", *words.split(), *start, "--out", str(tmp_path / "run"), "--quiet"], monkeypatch) == 2
    printed = capfd.readouterr().err
    assert all(part in printed for part in parts), printed
    assert not (tmp_path / "run").exists()


def test_without_weights_three_ways_are_named(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(starter, "installed", lambda: False)
    assert run(["finetune", str(pairs), "--out", str(tmp_path / "run")], monkeypatch) == 2
    printed = capfd.readouterr().err
    assert all(word in printed for word in ("builtin:lite0-minilm", "open_clip:", "a file"))


def test_dry_run_keeps_nothing(
    pairs: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words, other = (
        ["finetune", str(pairs), "--from", str(weights), "--dry-run", "--quiet"],
        pairs.with_name("other.csv"),
    )
    for val, source in (([], "runs/finetune/train.pairs"), (["--val", str(other)], str(pairs))):
        assert run([*words, *val], monkeypatch) == 0
        printed = capfd.readouterr().out
        assert f"source: {source}" in printed
        assert (str(other) in printed) == bool(val)
        assert "batch_size: 8" in printed
        assert "GiB" in printed
    assert not list(tmp_path.iterdir())


def test_the_table_of_settings() -> None:
    few, more = (settings(count, "heads", on_cpu=True) for count in (200, 5_000))
    assert (few["finetune.cached_views"] > 0, few["finetune.freeze_image_blocks"]) == (True, "all")
    assert few["train.batch_size"] < more["train.batch_size"]
    assert settings(1_000, "heads", on_cpu=True, freeze="none")["finetune.cached_views"] == 0
    given = settings(1_000, "whole", on_cpu=False, given={"train.steps": 40, "train.batch_size": 10, "train.lr": 1.0})
    assert "train.epochs" not in given
    assert (given["train.evaluate_every"], given["train.warmup_steps"], given["train.warmup_lr"]) == (40, 4, 0.01)
