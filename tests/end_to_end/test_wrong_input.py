"""Wrong input and bad disks through the command: it ends with what to do, or counts; never with a traceback."""

import json
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import yaml

from conftest import draw
from declip.api import train
from declip.cli import app as cli
from declip.recipe.schema import Recipe
from declip.runs.folder import read_rows
from end_to_end.conftest import png, tree_of

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def declip(command: Callable[..., SimpleNamespace]) -> Command:
    """The command: its exit status and all that it printed, on one line."""

    def run(*words: object) -> tuple[int, str]:
        outcome = command(*words)
        assert "Traceback" not in outcome.err
        return outcome.status, " ".join((outcome.out + outcome.err).split())

    return run


@pytest.fixture
def here(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a good recipe, `mine.yaml`, and much that is wrong."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree_of(table)))
    files = {
        "empty.jsonl": "",
        "empty.csv": "",
        "header.csv": "image,caption\n",
        "column.jsonl": '{"image": "a.png", "captoin": "a picture"}\n',
        "text.parquet": "I am text",
        "text.jsonl": "I am text\n",
        "text.txt": "I am text",
        "extends.yaml": "extends: 5\n",
        "tabs.yaml": "train:\n\tsteps: 5\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "latin.yaml").write_bytes("name: café\n".encode("latin-1"))
    for name in ("nothing", "uncaptioned", "others"):
        (tmp_path / name).mkdir()
    (tmp_path / "others" / "report.html").write_text("mine")
    for number in range(8):
        draw("red", "circle").save(tmp_path / "uncaptioned" / f"{number}.png")
    return tmp_path


@pytest.fixture(scope="module")
def trained(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a tiny model."""
    recipe = Recipe.model_validate(tree_of(table))
    return train(recipe, out=tmp_path_factory.mktemp("trained"), quiet=True).folder


MISTAKES = {
    "no arguments": ("train", "'recipe'", "--help"),
    "unknown command": ("trian mine.yaml", "'trian'", "'train'"),
    "unknown option": ("train mine.yaml --outt x", "--outt", "--out"),
    "override without a value": ("train mine.yaml steps", "'steps'", "train.steps=500"),
    "override that is not YAML": ("train mine.yaml evaluation.retrieval=[a", "'evaluation.retrieval=[a'", "quote the"),
    "unknown model": ("train mine.yaml image.model=resnet50_klip", "'resnet50_klip'", "'resnet50_clip'"),
    "unknown device": ("train mine.yaml train.device=gpu", "'gpu'", "cpu"),
    "no steps": ("train mine.yaml train.steps=0", "train.steps=0", "1"),
    "batch too large": ("train mine.yaml train.batch_size=1000", "24 pairs", "1000"),
    "pairs as recipe": ("train TABLE", "shapes.jsonl' is not a recipe", "declip train clip --data", "declip finetune"),
    "keys before the recipe": ("train train.steps=5 mine.yaml", "'mine.yaml'", "behind the others"),
    "another's files in out": ("train mine.yaml --out others", "'others'", "report.html", "--out"),
    "missing recipe file": ("train nowhere.yaml", "'nowhere.yaml'", "clip"),
    "folder as recipe": ("train nothing", "'nothing'", "clip"),
    "recipe that is no text": ("train latin.yaml", "'latin.yaml'", "UTF-8"),
    "extends a number": ("train extends.yaml", "'extends.yaml'", "extends"),
    "recipe with tabs": ("train tabs.yaml", "'tabs.yaml'", "line 2, column 1"),
    "no pairs named": ("train clip", "--data"),
    "missing built-in": ("train mine.yaml --data builtin:emojy", "'emojy'", "'emoji'"),
    "empty table": ("train mine.yaml --data empty.jsonl", "'empty.jsonl'"),
    "only a header": ("train mine.yaml --data header.csv", "'header.csv'"),
    "missing column": ("train mine.yaml --data column.jsonl", "'caption'", "'captoin'", "data.columns.caption"),
    "not Parquet": ("train mine.yaml --data text.parquet", "'text.parquet'"),
    "not a table": ("train mine.yaml --data text.txt", "'text.txt'", ".jsonl"),
    "folder without images": ("train mine.yaml --data nothing", "'nothing'", ".jpg"),
    "folder without captions": ("train mine.yaml --data uncaptioned --quiet --out run", "'uncaptioned'",
                                "missing caption", "data.source"),
    "missing image root": ("train mine.yaml data.image_root=nowhere", "'nowhere'"),
    "missing evaluation set": ("train mine.yaml evaluation.retrieval=no.csv", "'no.csv'", "evaluation.retrieval"),
    "evaluation set without classes": ("train mine.yaml evaluation.final_zero_shot=TABLE", "shapes.jsonl", "retrieval"),
    "out is a file": ("train mine.yaml --out text.txt", "'text.txt'", "--out"),
    "out too long": ("train mine.yaml --out " + "x" * 300, "name too long", "--out"),
    "downloads a table": ("data download empty.csv", "'empty.csv'", "declip data shard"),
    "shards an empty table": ("data shard empty.csv --out made", "'empty.csv'"),
    "shards into a file": ("data shard TABLE --out text.txt", "'text.txt'", "--out"),
    "shards into another's folder": ("data shard TABLE --out uncaptioned", "'uncaptioned'", "--out"),
    "shards at no size": ("data shard TABLE --out made --size 0", "size", "16"),
    "not downloaded": ("train mine.yaml --data builtin:emoji", "declip data download builtin:emoji"),
    "excludes without a test set": ("data inspect TABLE --exclude drop.csv", "--check-leakage"),
    "unknown budget": ("compare mine.yaml --pairs 8 --budget time", "'time'", "both"),
    "no model": ("evaluate nowhere --dataset TABLE", "'nowhere'"),
    "model is no run": ("evaluate nothing --dataset TABLE", "'nothing'"),
    "missing set": ("evaluate RUN --dataset no.csv", "'no.csv'", "--dataset"),
    "unknown task": ("evaluate RUN --dataset TABLE --task zeroshot", "'zeroshot'", "'zero-shot'"),
    "templates of retrieval": ("evaluate RUN --dataset TABLE --task retrieval --templates emoji", "--templates"),
    "features of zero-shot": ("evaluate RUN --dataset TABLE --features embedding", "--features", "linear or knn"),
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


@pytest.fixture
def broken(table: Path, here: Path) -> Path:
    """A table of 24 good pairs and 8 broken ones; each reason once, "missing image" and "unreadable image" twice."""
    (here / "text.png").write_text("I am text")
    (here / "huge.png").write_bytes(png(30_000, 30_000, (b"IDAT", b"")))
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


REASONS = {"missing image": 2, "unreadable image": 2}
REASONS |= dict.fromkeys(("caption too long", "empty caption", "image too large", "truncated image"), 1)


def test_broken_pairs_are_named_and_stop_a_run_where_they_are_too_many(
    broken: Path, here: Path, declip: Command
) -> None:
    words = ["data.source=broken.jsonl", "data.max_broken_fraction=0.5", "train.steps=4", "--out", "run", "--quiet"]
    status, printed = declip("train", "mine.yaml", *words)
    assert status == 0, printed
    skipped = json.loads((here / "run" / "skipped.json").read_text())
    assert {reason: row["count"] for reason, row in skipped["reasons"].items()} == REASONS
    assert skipped["seen"] == 32, "one epoch"
    assert skipped["reasons"]["truncated image"]["examples"] == ["cut.jpg"]
    assert skipped["reasons"]["image too large"]["examples"] == ["huge.png"]
    assert set(skipped["reasons"]["unreadable image"]["examples"]) == {"text.png", "nothing"}
    status, printed = declip("train", "mine.yaml", "data.source=broken.jsonl", "train.steps=20", "--quiet")
    assert status == 2
    assert [
        part for part in (*REASONS.keys() - {"truncated image"}, "data.max_broken_fraction") if part not in printed
    ] == []


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
    words = ["data.source=most.jsonl", "data.max_broken_fraction=1", "train.batch_size=4", "train.steps=18"]
    status, printed = declip("train", "mine.yaml", *words, "train.log_every=1", "--out", "run", "--quiet")
    assert status == 0, printed
    assert json.loads((here / "run" / "skipped.json").read_text())["reasons"]["missing image"]["count"] == 48
    assert 0 < len(read_rows(here / "run" / "metrics.jsonl")) < 18, "some batches had fewer than two pairs"


def test_a_run_is_neither_overwritten_nor_resumed_with_another_recipe(table: Path, here: Path, declip: Command) -> None:
    assert declip("train", "mine.yaml", "--out", "run", "--quiet")[0] == 0
    before = {path: path.read_bytes() for path in (here / "run").rglob("*") if path.is_file()}
    assert "--resume" in declip("train", "mine.yaml", "--out", "run")[1]
    status, printed = declip("train", "mine.yaml", "train.lr=0.002", "--out", "run", "--resume")
    assert status == 2
    says = ("train.lr was 0.001, now 0.002", "--out")
    assert [part for part in says if part not in printed] == []
    assert {path: path.read_bytes() for path in (here / "run").rglob("*") if path.is_file()} == before


def test_a_strangers_recipe_is_no_run(here: Path, declip: Command) -> None:
    (here / "cookbook").mkdir()
    for content in ("flour: 200 g\n", "", "- a\n", "a: b: c\n"):
        (here / "cookbook" / "recipe.yaml").write_text(content)
        status, printed = declip("train", "mine.yaml", "--out", "cookbook", "--resume")
        assert status == 2
        assert [part for part in ("'cookbook'", "--out") if part not in printed] == []
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


FULL = [(500, ("'run/recipe.yaml'", "--out")), (4_000, ("examples.json",)), (20_000, ("checkpoints/step-00000030",))]


@pytest.mark.parametrize(("largest", "says"), FULL, ids=["recipe", "examples", "checkpoint"])
def test_a_full_disk_is_reported_and_the_run_continues_once_there_is_room(
    largest: int, says: tuple[str, ...], here: Path, declip: Command
) -> None:
    """No file may grow beyond `largest` bytes; the error differs from a full disk's only in its number."""
    words = ["train", "mine.yaml", "train.steps=30", "train.log_every=1", "train.checkpoint_every=100"]
    # Without loader processes: their shared memory is files too.
    words += ["data.workers=0", "--out", "run", "--quiet", "--resume"]
    status, printed = on_a_full_disk(words, largest)
    assert (status, [part for part in ("File too large", *says) if part not in printed]) == (2, []), printed
    assert "Traceback" not in printed
    assert declip(*words)[0] == 0
    assert [row["step"] for row in read_rows(here / "run" / "metrics.jsonl")] == list(range(1, 31))


def test_a_result_that_does_not_fit_on_the_disk(table: Path, trained: Path, here: Path) -> None:
    words = ["evaluate", str(trained), "--dataset", str(table), "--task", "retrieval", "--json", "result.json"]
    status, printed = on_a_full_disk(words, 10)
    assert (status, [part for part in ("R@1", "'result.json'", "--json") if part not in printed]) == (2, [])


def on_a_full_disk(words: list[str], largest: int) -> tuple[int | None, str]:
    """The command in a process of its own whose files are limited; its exit status and all that it printed."""
    fork = multiprocessing.get_context("fork")
    reader, writer = os.pipe()
    process = fork.Process(target=_limited, args=(words, largest, writer))
    process.start()
    os.close(writer)
    with open(reader, encoding="utf-8") as file:
        printed = " ".join(file.read().split())
    process.join()
    return process.exitcode, printed


def _limited(words: list[str], largest: int, writer: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit then raises, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    sys.stdout = sys.stderr = os.fdopen(writer, "w", encoding="utf-8")
    sys.argv = ["declip", *words]
    cli.main()


def test_a_disk_that_refuses_is_no_traceback(declip: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised by hand: to root, who may run the tests, nothing is forbidden."""
    for error, says in (
        (PermissionError(13, "Permission denied", "secret.yaml"), ("'secret.yaml'", "Permission denied")),
        (OSError(30, "Read-only file system", "run"), ("'run'", "Read-only", "another path")),
        (OSError(28, "No space left on device"), ("No space left", "--resume")),
    ):
        monkeypatch.setattr("declip.recipe.load.load_recipe", Mock(side_effect=error))
        status, printed = declip("train", "clip")
        assert (status, [part for part in says if part not in printed]) == (2, []), printed


def test_a_folder_that_cannot_be_read_is_not_called_empty(
    here: Path, declip: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    status, printed = declip("train", "mine.yaml", "data.source=uncaptioned")
    assert (status, "'uncaptioned' cannot be read or written: Permission denied" in printed) == (2, True)
