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
    "no arguments": ("train", "Missing argument 'recipe'", "--help"),
    "unknown command": ("trian mine.yaml", "No such command 'trian'", "Did you mean 'train'?"),
    "unknown option": ("train mine.yaml --outt x", "No such option: --outt", "--out"),
    "unknown key": ("train mine.yaml train.stepps=3", "'train.stepps'", "Did you mean 'train.steps'?"),
    "unknown section": ("train mine.yaml trian.steps=3", "'trian'", "Did you mean 'train'?"),
    "override that is no YAML": ("train mine.yaml evaluation.retrieval=[a", "'evaluation.retrieval=[a'", "quotes"),
    "unknown recipe": ("train declop", "Unknown recipe 'declop'", "Did you mean 'declip'?"),
    "unknown model": ("train mine.yaml image.model=resnet50_klip", "'resnet50_klip'", "Did you mean 'resnet50_clip'?"),
    "unknown device": ("train mine.yaml train.device=gpu", "'gpu'", "auto or cpu"),
    "no steps": ("train mine.yaml train.steps=0", "train.steps=0", "greater than or equal to 1"),
    "batch too large": ("train mine.yaml train.batch_size=1000", "24 pairs", "batch of 1000", "Give a smaller batch"),
    "missing recipe file": ("train nowhere.yaml", "no recipe file 'nowhere.yaml'", "Shipped recipes: clip"),
    "folder as recipe": ("train nothing", "'nothing' is a folder, not a recipe", "one of clip"),
    "table as recipe": ("train text.jsonl", "'text.jsonl' is a file whose name does not end in .yaml", "one of clip"),
    "recipe that is no text": ("train latin.yaml", "'latin.yaml' is not UTF-8", "Save it as UTF-8"),
    "extends a number": ("train extends.yaml", "extends: 5", "give one recipe's name"),
    "recipe is a list": ("train list.yaml", "'list.yaml' must be a mapping of keys to values"),
    "recipe with tabs": ("train tabs.yaml", "'tabs.yaml' is not valid YAML", "'\\t'", "line 2, column 1"),
    "missing table": ("train mine.yaml data.source=no.jsonl", "no file or folder 'no.jsonl'", "Give a table (.jsonl"),
    "missing built-in": ("train mine.yaml data.source=builtin:emojy", "'emojy'", "Did you mean 'emoji'?"),
    "empty table": ("train mine.yaml data.source=empty.jsonl", "'empty.jsonl' is empty", "needs a row for each pair"),
    "blank lines": ("train mine.yaml data.source=blank.jsonl", "'blank.jsonl' has no rows", "one for each pair"),
    "empty CSV": ("train mine.yaml data.source=empty.csv", "'empty.csv' is empty", "names its columns"),
    "only a header": ("train mine.yaml data.source=header.csv", "'header.csv' has no rows", "one for each pair"),
    "missing column": ("train mine.yaml data.source=column.jsonl", "no column 'caption'", "Did you mean 'captoin'?",
                       "data.caption_column"),
    "missing column, CSV": ("train mine.yaml data.source=column.csv", "no column 'image'", "Did you mean 'imag'?",
                            "data.image_column"),
    "not Parquet": ("train mine.yaml data.source=text.parquet", "'text.parquet' is not a Parquet file"),
    "not JSONL": ("train mine.yaml data.source=text.jsonl", "'text.jsonl' is not JSONL", "a JSON object on each line"),
    "not a table": ("train mine.yaml data.source=text.txt", "'text.txt' is not a table", "Known: .jsonl"),
    "folder without images": ("train mine.yaml data.source=nothing", "'nothing' holds no image", ".jpg"),
    "folder without captions": ("train mine.yaml data.source=uncaptioned --quiet --out run",
                                "None of the 64 pairs seen of 'uncaptioned'", "missing caption: ", "data.source"),
    "missing image root": ("train mine.yaml data.image_root=nowhere", "no folder 'nowhere'"),
    "missing evaluation set": ("train mine.yaml evaluation.retrieval=[no.csv]", "no file or folder 'no.csv'"),
    "evaluation set without classes": ("train mine.yaml evaluation.final_zero_shot=[TABLE]", "has no classes",
                                       "protocol 'retrieval'"),
    "out is a file": ("train mine.yaml --out text.txt", "run folder 'text.txt'", "Choose another with --out"),
    "out below a file": ("train mine.yaml --out text.txt/run", "Not a directory", "Choose another with --out"),
    "out too long": ("train mine.yaml --out " + "x" * 300, "name too long", "Choose another with --out"),
    "prepares a table": ("data prepare empty.csv", "'empty.csv' is no built-in set", "--out DIR"),
    "prepares an empty table": ("data prepare empty.csv --out made", "'empty.csv' is empty", "names its columns"),
    "prepares into a file": ("data prepare TABLE --out text.txt", "'text.txt' cannot be written", "--out"),
    "prepares into another's folder": ("data prepare TABLE --out uncaptioned", "holds something else", "--out"),
    "prepares at no size": ("data prepare TABLE --out made --size 0", "size is 0", "16 or more"),
    "prepares twice": ("data prepare TABLE --out made --cache made", "give one of them"),
    "not prepared": ("train mine.yaml data.source=builtin:emoji", "declip data prepare builtin:emoji"),
    "no model": ("evaluate nowhere --dataset TABLE", "no model at 'nowhere'", "Give a run folder"),
    "model is no run": ("evaluate nothing --dataset TABLE", "'nothing' is not a run folder", "Give a run folder"),
    "model is text": ("evaluate text.txt --dataset TABLE", "'text.txt'", "no file of tensors", "Give a checkpoint"),
    "no set": ("evaluate RUN", "Missing option '--dataset'", "--help"),
    "missing set": ("evaluate RUN --dataset no.csv", "no file or folder 'no.csv'", "Give a table"),
    "unknown protocol": ("evaluate RUN --dataset TABLE --task zeroshot", "'zeroshot'", "Did you mean 'zero-shot'?"),
    "zero-shot on a table": ("evaluate RUN --dataset TABLE", "has no classes", "protocol 'retrieval'"),
    "no batch": ("evaluate RUN --dataset TABLE --batch-size 0", "'--batch-size'", "greater than or equal to 1"),
    "unknown device to evaluate": ("evaluate RUN --dataset TABLE --device gpu", "'gpu'", "--device"),
    "nothing to evaluate": ("evaluate RUN --dataset uncaptioned --task retrieval", "8 × missing caption"),
    "result below a file": ("evaluate RUN --dataset TABLE --task retrieval --json text.txt/x.json",
                            "Cannot write 'text.txt/x.json'", "Choose another place with --json"),
}  # fmt: skip
"""By name: the words, and what the message must say: what was given, and what to do about it."""


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_with_what_to_do(name: str, table: Path, trained: Path, here: Path, declip: Command) -> None:
    words, *said = MISTAKES[name]
    before = set(here.rglob("*"))
    status, printed = declip(*words.replace("TABLE", str(table)).replace("RUN", str(trained)).split(" "))
    assert status == 2, printed
    for words in said:
        assert words in printed
    assert set(here.rglob("*")) == before or "--out run" in MISTAKES[name][0], "a mistake leaves no run folder behind"


def png_of_one_color(path: Path, side: int) -> None:
    """A whole PNG, 1 bit a pixel, written without holding its picture."""

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
        assert f"x {reason}, such as" in printed
    assert "data.max_broken_fraction" in printed


def test_an_evaluation_tells_what_it_left_out(broken: Path, trained: Path, here: Path, declip: Command) -> None:
    status, printed = declip("evaluate", trained, "--dataset", broken, "--task", "retrieval", "--json", "result.json")
    assert status == 0, printed
    assert json.loads((here / "result.json").read_text())["skipped"] == REASONS
    assert "left out" in printed.lower()
    for reason in REASONS:
        assert reason.split()[0] in printed, "a narrow table breaks the others into lines"


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
    assert "'run' already holds a run. Go on with it by --resume" in printed
    write_recipe(here / "other.yaml", table, max_broken_fraction=0.5)
    status, printed = declip("train", "other.yaml", "train.lr=0.002", "--out", "run", "--resume")
    assert status == 2
    assert "holds the run of another recipe ('mine')" in printed
    assert "data.max_broken_fraction was 0.05, now 0.5; train.lr was 0.001, now 0.002" in printed
    assert "another folder with --out" in printed
    assert {path: path.read_bytes() for path in (here / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("content", ["flour: 200 g\n", "", "- a\n", "a: b: c\n"])
def test_a_strangers_recipe_is_no_run(content: str, here: Path, declip: Command) -> None:
    (here / "cookbook").mkdir()
    (here / "cookbook" / "recipe.yaml").write_text(content)
    status, printed = declip("train", "mine.yaml", "--out", "cookbook", "--resume")
    assert status == 2
    assert "'cookbook' holds" in printed
    assert "another folder with --out" in printed
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
    assert "Stopped after step 1 of 8" in printed
    assert "declip train mine.yaml data.max_pairs=16 'name=my run' --out 'my run' --resume" in printed
