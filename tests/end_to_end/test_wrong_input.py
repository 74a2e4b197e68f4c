"""Wrong input through the command: it ends with a message that says what to do, or is counted; never a traceback."""

import json
import os
import signal
import struct
import zlib
from pathlib import Path

import pytest

from conftest import draw
from declip.runs.folder import read_rows
from end_to_end.command import Command, write_recipe


@pytest.fixture
def here(wrong_inputs: Path) -> Path:
    return wrong_inputs


MISTAKES = {
    "no arguments": ("train", "'recipe'", "--help"),
    "unknown command": ("trian mine.yaml", "'trian'", "'train'"),
    "unknown option": ("train mine.yaml --outt x", "--outt", "--out"),
    "unknown key": ("train mine.yaml train.stepps=3", "'train.stepps'", "'train.steps'"),
    "unknown section": ("train mine.yaml trian.steps=3", "'trian'", "'train'"),
    "override that is no YAML": ("train mine.yaml evaluation.retrieval=[a", "'evaluation.retrieval=[a'", "quotes"),
    "unknown recipe": ("train declop", "'declop'", "'declip'"),
    "unknown model": ("train mine.yaml image.model=resnet50_klip", "'resnet50_klip'", "'resnet50_clip'"),
    "unknown device": ("train mine.yaml train.device=gpu", "'gpu'", "cpu"),
    "no steps": ("train mine.yaml train.steps=0", "train.steps=0", "1"),
    "batch too large": ("train mine.yaml train.batch_size=1000", "24 pairs", "1000"),
    "missing recipe file": ("train nowhere.yaml", "'nowhere.yaml'", "clip"),
    "folder as recipe": ("train nothing", "'nothing'", "clip"),
    "table as recipe": ("train text.jsonl", "'text.jsonl'", "clip"),
    "recipe that is no text": ("train latin.yaml", "'latin.yaml'", "UTF-8"),
    "extends a number": ("train extends.yaml", "'extends.yaml'", "extends"),
    "recipe with tabs": ("train tabs.yaml", "'tabs.yaml'", "line 2, column 1"),
    "missing table": ("train mine.yaml --data no.jsonl", "'no.jsonl'", "--data"),
    "missing built-in": ("train mine.yaml --data builtin:emojy", "'emojy'", "'emoji'"),
    "empty table": ("train mine.yaml --data empty.jsonl", "'empty.jsonl'"),
    "only a header": ("train mine.yaml --data header.csv", "'header.csv'"),
    "missing column": ("train mine.yaml --data column.jsonl", "'caption'", "'captoin'", "data.caption_column"),
    "not Parquet": ("train mine.yaml --data text.parquet", "'text.parquet'"),
    "not a table": ("train mine.yaml --data text.txt", "'text.txt'", ".jsonl"),
    "folder without images": ("train mine.yaml --data nothing", "'nothing'", ".jpg"),
    "folder without captions": ("train mine.yaml --data uncaptioned --quiet --out run", "'uncaptioned'",
                                "missing caption", "data.source"),
    "missing image root": ("train mine.yaml data.image_root=nowhere", "'nowhere'"),
    "missing evaluation set": ("train mine.yaml evaluation.retrieval=no.csv", "'no.csv'", "evaluation.retrieval"),
    "missing held-out set": ("train mine.yaml --val no.csv", "'no.csv'", "--val"),
    "evaluation set without classes": ("train mine.yaml evaluation.final_zero_shot=TABLE", "shapes.jsonl", "retrieval"),
    "out is a file": ("train mine.yaml --out text.txt", "'text.txt'", "--out"),
    "out too long": ("train mine.yaml --out " + "x" * 300, "name too long", "--out"),
    "downloads a table": ("data download empty.csv", "'empty.csv'", "declip data shard"),
    "shards an empty table": ("data shard empty.csv --out made", "'empty.csv'"),
    "shards into a file": ("data shard TABLE --out text.txt", "'text.txt'", "--out"),
    "shards into another's folder": ("data shard TABLE --out uncaptioned", "'uncaptioned'", "--out"),
    "shards at no size": ("data shard TABLE --out made --size 0", "size", "16"),
    "not downloaded": ("train mine.yaml --data builtin:emoji", "declip data download builtin:emoji"),
    "no model": ("evaluate nowhere --dataset TABLE", "'nowhere'"),
    "model is no run": ("evaluate nothing --dataset TABLE", "'nothing'"),
    "missing set": ("evaluate RUN --dataset no.csv", "'no.csv'", "--dataset"),
    "unknown task": ("evaluate RUN --dataset TABLE --task zeroshot", "'zeroshot'", "'zero-shot'"),
    "zero-shot on a table": ("evaluate RUN --dataset TABLE", "shapes.jsonl", "retrieval"),
    "no batch": ("evaluate RUN --dataset TABLE --batch-size 0", "'--batch-size'"),
    "unknown device to evaluate": ("evaluate RUN --dataset TABLE --device gpu", "'gpu'", "--device"),
    "nothing to evaluate": ("evaluate RUN --dataset uncaptioned --task retrieval", "missing caption"),
    "result below a file": ("evaluate RUN --dataset TABLE --task retrieval --json text.txt/x.json", "'text.txt/x.json'",
                            "--json"),
}  # fmt: skip
"""By name: the words, and what the message must have: the offending value, and the key or option of the remedy."""


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_with_what_to_do(name: str, table: Path, trained: Path, here: Path, declip: Command) -> None:
    words, *parts = MISTAKES[name]
    before = set(here.rglob("*"))
    status, printed = declip(*words.replace("TABLE", str(table)).replace("RUN", str(trained)).split(" "))
    assert status == 2, printed
    assert [part for part in parts if part not in printed] == [], printed
    assert set(here.rglob("*")) == before or "--out run" in MISTAKES[name][0], "a mistake leaves no run folder behind"


def png_of_one_color(path: Path, side: int) -> None:
    """Write a PNG of 1 bit per pixel without holding the image."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    deflate, row = zlib.compressobj(1), bytes(1 + -(-side // 8))
    pixels = b"".join(deflate.compress(row * 100) for _ in range(side // 100)) + deflate.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


@pytest.fixture
def broken(table: Path, here: Path) -> Path:
    """A table of 24 good pairs and 8 broken ones; each reason once, "missing image" and "unreadable image" twice."""
    (here / "text.png").write_text("I am text")
    png_of_one_color(here / "huge.png", 30_000)
    draw("red", "square", size=200).save(here / "whole.jpg")
    (here / "cut.jpg").write_bytes((here / "whole.jpg").read_bytes()[:1500])
    good = f"{table.parent}/./red-bar.png"  # written otherwise than in the table, so that no rows are merged
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    rows = [{**row, "image": str(table.parent / row["image"])} for row in rows]
    rows += [
        {"image": "gone.png", "caption": "no such file"},
        {"image": None, "caption": "no image named"},
        {"image": "text.png", "caption": "text"},
        {"image": "nothing", "caption": "a folder"},
        {"image": "cut.jpg", "caption": "cut off"},
        {"image": "huge.png", "caption": "30,000 pixels wide and high"},
        {"image": good, "caption": "x" * 100_000},
        {"image": good.replace("./", "././"), "caption": " "},
    ]
    path = here / "broken.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


REASONS = {
    "caption too long": 1,
    "empty caption": 1,
    "image too large": 1,
    "missing image": 2,
    "truncated image": 1,
    "unreadable image": 2,
}


def test_broken_pairs_are_named_and_the_run_goes_through(broken: Path, here: Path, declip: Command) -> None:
    words = ["data.source=broken.jsonl", "data.max_broken_fraction=0.5", "train.steps=4", "--out", "run", "--quiet"]
    status, printed = declip("train", "mine.yaml", *words)
    assert status == 0, printed
    skipped = json.loads((here / "run" / "skipped.json").read_text())
    assert {reason: row["count"] for reason, row in skipped["reasons"].items()} == REASONS
    assert skipped["seen"] == 32, "one epoch"
    assert skipped["reasons"]["truncated image"]["examples"] == ["cut.jpg"]
    assert skipped["reasons"]["image too large"]["examples"] == ["huge.png"]
    assert set(skipped["reasons"]["unreadable image"]["examples"]) == {"text.png", "nothing"}


def test_too_many_broken_pairs_stop_the_run_with_their_reasons(broken: Path, declip: Command) -> None:
    status, printed = declip("train", "mine.yaml", "data.source=broken.jsonl", "train.steps=20", "--quiet")
    assert status == 2
    for reason in REASONS:
        assert f"× {reason}" in printed
    assert "data.max_broken_fraction" in printed


def test_an_evaluation_names_what_it_left_out(broken: Path, trained: Path, here: Path, declip: Command) -> None:
    status, printed = declip("evaluate", trained, "--dataset", broken, "--task", "retrieval", "--json", "result.json")
    assert status == 0, printed
    assert json.loads((here / "result.json").read_text())["skipped"] == REASONS
    assert [reason for reason in REASONS if reason not in printed] == []


def test_batches_of_broken_pairs_alone_are_passed_over(table: Path, here: Path, declip: Command) -> None:
    rows = [json.dumps({"image": f"gone-{number}.png", "caption": "gone"}) for number in range(48)]
    good = [json.loads(line) for line in table.read_text().splitlines()]
    rows += [json.dumps({**row, "image": str(table.parent / row["image"])}) for row in good]
    (here / "most.jsonl").write_text("\n".join(rows))
    words = [
        "data.source=most.jsonl",
        "data.max_broken_fraction=1",
        "train.batch_size=4",
        "train.steps=18",
        "train.log_every=1",
    ]
    status, printed = declip("train", "mine.yaml", *words, "--out", "run", "--quiet")
    assert status == 0, printed
    assert json.loads((here / "run" / "skipped.json").read_text())["reasons"]["missing image"]["count"] == 48
    assert 0 < len(read_rows(here / "run" / "metrics.jsonl")) < 18, "some batches had fewer than two pairs"


def test_a_run_is_neither_overwritten_nor_resumed_with_another_recipe(table: Path, here: Path, declip: Command) -> None:
    assert declip("train", "mine.yaml", "--out", "run", "--quiet")[0] == 0
    before = {path: path.read_bytes() for path in (here / "run").rglob("*") if path.is_file()}
    status, printed = declip("train", "mine.yaml", "--out", "run")
    assert status == 2
    assert "--resume" in printed
    write_recipe(here / "other.yaml", table, max_broken_fraction=0.5)
    status, printed = declip("train", "other.yaml", "train.lr=0.002", "--out", "run", "--resume")
    assert status == 2
    assert "data.max_broken_fraction was 0.05, now 0.5" in printed
    assert "train.lr was 0.001, now 0.002" in printed
    assert "--out" in printed
    assert {path: path.read_bytes() for path in (here / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("content", ["flour: 200 g\n", "", "- a\n", "a: b: c\n"])
def test_a_strangers_recipe_is_no_run(content: str, here: Path, declip: Command) -> None:
    (here / "cookbook").mkdir()
    (here / "cookbook" / "recipe.yaml").write_text(content)
    status, printed = declip("train", "mine.yaml", "--out", "cookbook", "--resume")
    assert status == 2
    assert "'cookbook'" in printed
    assert "--out" in printed
    assert "pydantic" not in printed
    assert (here / "cookbook" / "recipe.yaml").read_text() == content


def test_an_interrupted_run_prints_words_that_a_shell_reads(
    table: Path, here: Path, declip: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from declip.training import trainer

    step = trainer.training_step

    def interrupted(*arguments: object) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer, "training_step", interrupted)
    status, printed = declip("train", "mine.yaml", "data.max_pairs=16", "name=my run", "--out", "my run", "--quiet")
    assert status == 130
    assert "declip train mine.yaml data.max_pairs=16 'name=my run' --out 'my run' --quiet --resume" in printed
