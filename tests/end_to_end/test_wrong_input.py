"""Wrong input and bad disks through the command: it ends with what to do, or counts; never with a traceback."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
import yaml
from safetensors.torch import save_file

from conftest import draw, encoded, once, tiny_tree, write_rows
from declip.cli import app as cli
from declip.data.images import decode
from declip.runs.folder import read_rows
from declip.search.embed import embed


@pytest.fixture
def declip(command):
    """The command: its exit status and all that it printed, on one line."""

    def run(*words):
        outcome = command(*words)
        assert "Traceback" not in outcome.err
        return outcome.status, " ".join((outcome.out + outcome.err).split())

    return run


@pytest.fixture
def here(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tiny_tree(table)))
    return tmp_path


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture(scope="module")
def trained(tiny_run):
    return tiny_run


@pytest.fixture(scope="module")
def index(table, trained, tmp_path_factory):
    make = lambda folder: embed(trained, table, out=folder / "index")  # noqa: E731
    return once(tmp_path_factory, "index", make) / "index"


NO_COLUMNS = ("no column 'image'", "no column 'caption'")
MISTAKES = {
    "unknown option": ("train mine.yaml --outt x", "--outt", "--out"),
    "override without a value": ("train mine.yaml steps", "'steps'", "train.steps=500"),
    "unknown device": ("train mine.yaml train.device=gpu", "'gpu'", "cpu"),
    "pairs as recipe": ("train TABLE", "shapes.jsonl' is not a recipe", "--data", "declip finetune"),
    "keys before the recipe": ("train train.steps=5 mine.yaml", "'mine.yaml'", "train.steps=500"),
    "another's files in out": ("train mine.yaml --out others", "'others'", "report.html", "--out"),
    "override that is not YAML": ("train mine.yaml evaluation.retrieval=[a", "'evaluation.retrieval=[a'", "quote the"),
    "extends a number": ("train extends.yaml", "'extends.yaml'", "extends"),
    "recipe with tabs": ("train tabs.yaml", "'tabs.yaml'", "line 2, column 1"),
    "no pairs named": ("train clip", "--data"),
    "missing built-in": ("train mine.yaml --data builtin:emojy", "'emojy'", "'emoji'"),
    "not a table": ("train mine.yaml --data text.txt", "'text.txt'", ".jsonl"),
    "folder without captions": ("train mine.yaml --data uncaptioned train.batch_size=2", "'uncaptioned'",
                                "missing caption", "text file", "declip choose", "declip app"),
    "out is a file": ("train mine.yaml --out text.txt", "'text.txt'", "--out"),
    "out too long": ("train mine.yaml --out " + "x" * 300, "name too long", "--out"),
    "downloads a table": ("data download empty.csv", "'empty.csv'", "without a download"),
    "copies without a test set": ("data inspect TABLE --without-copies rest.pairs", "--check-leakage"),
    "copies in another list": ("data inspect TABLE --check-leakage TABLE --without-copies x.txt", "x.txt", ".pairs"),
    "missing set": ("evaluate RUN --dataset no.csv", "'no.csv'", "--dataset"),
    "zero-shot on a table": ("evaluate RUN --dataset TABLE", "shapes.jsonl", "retrieval"),
    "result below a file": ("evaluate RUN --dataset TABLE --task retrieval --json text.txt/x.json", "'text.txt/x.json'",
                            "--json"),
    "validated on some of its pairs": ("finetune photos.csv --val copy.csv", "'copy.csv'", "--val"),
    "weights of something else": ("finetune photos.csv --from other.safetensors", "'other.safetensors'",
                                  "open_clip:MODEL/FILE"),
    "no network": ("finetune photos.csv --from hf-hub:owner/name", "'hf-hub:owner/name'", "builtin:lite2-minilm"),
    "key without its section": ("finetune photos.csv epochs=3", "'epochs'", "'train.epochs'"),
    "pairs given twice": ("finetune photos.csv data.source=other.csv", "data.source=other.csv", "PAIRS"),
    "validation as a key": ("finetune photos.csv evaluation.retrieval=[other.csv]", "evaluation.retrieval", "--val"),
    "fine-tunes into a file": ("finetune photos.csv --from start --out photos.csv", "'photos.csv'", "--out"),
    "no query": ("search INDEX", "--image"),
    "one weight of two": ("search INDEX red --weights 1", "--weights is '1'"),
    "a model as source": ("embed uncaptioned builtin:lite2-minilm --out x", "'builtin:lite2-minilm' is a model",
                          "SOURCE"),
    "a table as model": ("evaluate photos.csv --dataset uncaptioned", "'photos.csv' is a table"),
    "misspelled file": ("embed uncaption uncaptioned --out x", "'uncaption'", "Did you mean 'uncaptioned'"),
    "a name of the Hub": ("embed owner/name uncaptioned --out x", "Did you mean 'hf-hub:owner/name'"),
    "a key as option": ("train demo-clip --epochs 5", "--epochs", "train.epochs"),
    "another tool's key": ("compare demo-clip --lr=5 --pairs 8", "--lr", "train.lr"),
    "a folder as index": ("search uncaptioned red", "'uncaptioned'", "--out indices/NEW"),
    "no image": ("embed builtin:lite2-minilm nothing --out x", "nothing' has no image", "Give a folder"),
    "index and text swapped": ("search redapple INDEX", "swapped", "index redapple"),
    "no index": ("search gone red", "gone' does not exist", "--out gone"),
    "no usable pair": ("data inspect lost.csv --workers 0", "missing image", "images/gone.png"),
    "shots of no task": ("evaluate RUN --dataset TABLE --shots 2", "--task few-shot"),
    "shots compared": ("compare clip --pairs 8 --shots 2", "no option --shots"),
    "embeds in fp16": ("embed RUN uncaptioned --out x --device cpu --precision fp16", "does not compute in fp16"),
    "evaluates in fp16": ("evaluate RUN --dataset TABLE --task retrieval --device cpu --precision fp16", "fp16"),
    "classifies in fp16": ("classify RUN uncaptioned --classes a,b --device cpu --precision fp16", "fp16"),
    "captions nowhere": ("choose RUN uncaptioned --out x.csv --have gone.csv", "--have"),
    "a head and classes": ("classify RUN uncaptioned --head x --classes a,b", "--classes"),
    "no head to save": ("classify RUN uncaptioned --save x", "--save"),
    "groups without examples": ("classify RUN uncaptioned --classes a,b --group-column kind", "--examples"),
    "none of eleven sets": ("evaluate RUN --dataset paper11:nothing --task retrieval --json x.json", "paper11"),
    "unknown column": ("data inspect shop.csv --caption-column Titel,colour", "'colour'", "'Titel'", "column NAME"),
    "unknown column of a template": ("data inspect shop.csv --caption-column {colour}", "'colour'", "'Titel'"),
    "a list that is no table": ("choose RUN uncaptioned --out x.txt", ".csv file, not to 'x.txt'"),
    "no classes": ("classify RUN uncaptioned", "--classes"),
    "no such head": ("classify RUN uncaptioned --head no", "'no'"),
    "classes in no table": ("classify RUN uncaptioned --classes cat,dog --out x.txt", "'x.txt'"),
    "columns to train on": ("train clip --dry-run --data shop.csv", *NO_COLUMNS, "data.columns.caption=NAME"),
    "columns to tune on": ("finetune shop.csv --from start", *NO_COLUMNS, "data.columns.image=NAME"),
    "columns to evaluate": ("evaluate RUN --task retrieval --dataset shop.csv", *NO_COLUMNS, "--image-column NAME"),
    "columns to embed": ("embed RUN shop.csv --out x", *NO_COLUMNS, "--caption-column NAME"),
}  # fmt: skip
"""By name: the words, and what the message must have: the offending value, and the key or option of the remedy."""

WITHOUT_TORCH = {
    "train nosuch": "nosuch",
    "train clip --data no.csv": "no.csv",
    "train clip --val no.csv --data .": "no.csv",
    "train clip train.stepps=3": "train.steps",
    "train clip train.device=gpu": "cuda:1",
    "embed . . --out x --device gpu": "cuda:1",
    "train finetune --data . finetune.pretrained=nowhere": "nowhere",
    "finetune . train.lr=many": "train.lr",
    "finetune . --freeze bothh": "both",
    "compare clip --pairs many": "many",
    "finetune . --from builtin:lite1": "builtin:lite2-minilm",
    "finetune . --from openai/clip-vit-base-patch32": "hf-hub:openai/clip-vit-base-patch32",
    "evaluate foo:bar --dataset .": "foo:bar",
    "app nowhere .": "nowhere",
    "evaluate . --dataset no.csv": "no.csv",
    "classify . --model builtin:lite0-minilm": "classify MODEL",
    "train clip --epochs 3": "train.epochs",
    "train clip --data . --out others": "'others'",
    "finetune . --out others": "'others'",
    "finetune . --out fit": "already holds a fit",
    "evaluate . --dataset . --shots 2": "--task few-shot",
    "export . --format onnxx --out x": "--format': 'onnxx' is not one of 'open_clip'",
    "export . --format onnx --out others": "--overwrite",
    "compare clip --pairs 8 --out others": "'others'",
    "search nowhere a": "'nowhere'",
    "search others a --weights 1": "--weights",
    "search others a --out taken.csv": "--overwrite",
    "index show nowhere": "'nowhere'",
    "embed . . --out others": "--out",
    "choose . . --out taken.csv": "--overwrite",
    "choose . . --out x.csv --index others": "--index",
    "classify . . --classes a,b --out taken.csv": "--overwrite",
    "classify . . --head nowhere": "'nowhere'",
    "app . . --index others": "--index",
    "app . . --caption x.txt": "--caption",
    "embed . builtin:nonsense --out x": "'nonsense'. Known: clipart, emoji",
    "train clip --data . evaluation.zero_shot=[builtin:nonsense]": "'nonsense'",
    "data download builtin:nonsense": "'nonsense'",
    "data download nonsense:x": "'nonsense'",
    "finetune builtin:nonsense": "'nonsense'",
    "classify . . --classes a,b --templates nonsense": "template set 'nonsense'",
    "evaluate . --dataset . --templates nonsense": "template set 'nonsense'",
    "search others a --template nonsense": "template set 'nonsense'",
}
"""Command → what its error names. None needs torch, whose import takes seconds."""

ONE_BY_ONE = """
import sys, warnings
class Warn:
    def find_spec(self, name, *_):
        if name in ("typer", "yaml"):  # imported by all commands, and by some
            warnings.warn(f"{name} is old", FutureWarning)
sys.meta_path.insert(0, Warn())
import declip.__main__
for words in sys.argv[1:]:
    sys.argv[1:] = words.split()
    try:
        declip.__main__.main()
    except SystemExit as end:
        print(end.code, bool({"torch", "scipy"} & {*sys.modules}), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def wrong(table, trained, tmp_path_factory):
    """A folder with a good recipe, good pairs, good weights, and much that is wrong."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "mine.yaml").write_text(yaml.safe_dump(tiny_tree(table)))
    rows = [f"{path},{path.stem}" for path in sorted(table.parent.glob("*.png"))]
    tables = {"photos": rows, "other": rows[:4], "copy": rows[8:]}
    files = {f"{name}.csv": "\n".join(["image,caption", *part]) for name, part in tables.items()}
    files |= {
        "empty.csv": "",
        "lost.csv": "image,caption\nimages/gone.png,a cat\n",
        "shop.csv": "Bild,Titel\na.png,A\n",
        "text.txt": "I am text",
        "extends.yaml": "extends: 5\n",
        "tabs.yaml": "train:\n\tsteps: 5\n",
    }
    for name, content in files.items():
        (folder / name).write_text(content)
    for name in ("nothing", "uncaptioned", "others"):
        (folder / name).mkdir()
    (folder / "others" / "report.html").write_text("mine")
    draw("red", "circle").save(folder / "uncaptioned" / "0.png")
    draw("red", "circle").save(folder / "uncaptioned" / "1.png")
    save_file({"layer.weight": torch.zeros(64)}, folder / "other.safetensors")
    (folder / "start").symlink_to(trained)
    return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_with_what_to_do(name, table, trained, index, wrong, declip, monkeypatch):
    words, *parts = MISTAKES[name]
    monkeypatch.chdir(wrong)
    monkeypatch.setattr("huggingface_hub.snapshot_download", Mock(side_effect=OSError("no route")))
    before = set(wrong.rglob("*"))
    for mark, path in {"TABLE": table, "RUN": trained, "INDEX": index}.items():
        words = words.replace(mark, str(path))
    status, printed = declip(*words.split(" "))
    assert status == 2, printed
    assert printed.count("Error:") <= 1, printed
    assert [part for part in parts if part not in printed] == [], printed
    assert set(wrong.rglob("*")) == before, "a mistake leaves no folder behind"


def test_a_mistake_names_the_rank(declip, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "rank 1: Unknown recipe 'declipp'" in declip("train", "declipp")[1]


def test_wrong_arguments_are_answered_without_torch_and_libraries_stay_silent(tmp_path):
    for name in ("others/report.html", "fit/heads.safetensors", "taken.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    words = [sys.executable, "-c", ONE_BY_ONE, *WITHOUT_TORCH]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines()
    assert (done.returncode, lines[1::2]) == (0, ["2 False"] * len(WITHOUT_TORCH)), done.stderr
    for part, line in zip(WITHOUT_TORCH.values(), lines[::2], strict=True):
        assert part in line


REASONS = {"missing image": 3, "unreadable image": 2}
REASONS |= dict.fromkeys(("caption too long", "empty caption", "truncated image"), 1)


@pytest.fixture
def broken(table, rows, here):
    """A table of 24 good pairs and 8 broken ones, of every reason of `REASONS`."""
    (here / "text.png").write_text("I am text")
    (here / "folder").mkdir()
    (here / "cut.jpg").write_bytes(encoded(draw("red", "square", size=200), "JPEG")[:1500])
    good = f"{table.parent}/./red-bar.png"  # written otherwise than in the table, so that no rows are merged
    files = "gone.png", "lost.png", None, "text.png", "folder", "cut.jpg"
    faults = dict.fromkeys(files, "a caption")
    faults |= {good: "x" * 100_000, good.replace("./", "././"): " "}
    faulty = [{"image": image, "caption": caption} for image, caption in faults.items()]
    return write_rows(here / "broken.jsonl", [*rows, *faulty])


def test_broken_pairs_are_named_and_stop_a_run_where_they_are_too_many(
    broken, trained, here, declip
):
    words = ["train", "mine.yaml", "data.source=broken.jsonl", "--quiet"]
    more = ["data.max_broken_fraction=0.5", "train.steps=4", "--out", "run"]
    status, printed = declip(*words, *more)
    assert status == 0, printed
    skipped = json.loads((here / "run" / "skipped.json").read_text())
    assert {reason: row["count"] for reason, row in skipped["reasons"].items()} == REASONS
    assert skipped["seen"] == 32, "one epoch"
    assert {*skipped["reasons"]["unreadable image"]["examples"]} == {"text.png", "folder"}
    status, printed = declip(*words, "train.steps=20")
    named = (*REASONS.keys() - {"truncated image"}, "data.max_broken_fraction")
    assert (status, [part for part in named if part not in printed]) == (2, [])
    options = ["--task", "retrieval", "--json", "result.json"]
    status, printed = declip("evaluate", trained, "--dataset", broken, *options)
    assert status == 0, printed
    assert json.loads((here / "result.json").read_text())["skipped"] == REASONS
    assert [reason for reason in REASONS if reason not in printed] == []


@pytest.mark.parametrize(
    ("words", "status", "number"),
    [
        ("embed RUN phone --out i", 0, "4 × HEIC"),
        ("data inspect phone", 0, "80.0 %"),
        ("finetune phone --from RUN", 2, "4 × HEIC"),
        ("search INDEX --image phone/0.HEIC", 2, "phone/0.HEIC"),
    ],
)
def test_photographs_of_phones_without_their_reader(
    words, status, number, trained, index, here, declip, monkeypatch
):
    pytest.importorskip("pillow_heif")
    monkeypatch.setattr(decode, "FORMATS", tuple(name for name in decode.FORMATS if name != "HEIF"))
    (here / "phone").mkdir()
    for name in ("0.HEIC", "1.heic", "2.HEIC", "3.heif", "4.png"):
        draw("red", "circle").save(here / "phone" / name)
        (here / "phone" / name).with_suffix(".txt").write_text(f"a red circle {name}")
    named = words.replace("RUN", str(trained)).replace("INDEX", str(index))
    ended, printed = declip(*named.split())
    assert ended == status, printed
    assert "pip install 'declip[heif]'" in printed, printed
    assert number in printed, printed


USAGE = {
    "search": ("'INDEX'", "declip search --help"),
    "search INDEX red --contact x.png": ("--contact-sheet", "declip search --help"),
    "search INDEX red -k many": ("-k", "declip search --help"),
    "search INDEX red --over nothing": ("'nothing'", "'captions'", "declip search --help"),
    "serch INDEX red": ("'search'", "declip --help"),
    "recipes demo": ("'demo'", "declip recipes --help"),
}


@pytest.mark.parametrize(("words", "told"), USAGE.items())
def test_a_wrong_command_line_is_answered_by_one_line(command, index, words, told):
    ended = command(*words.replace("INDEX", str(index)).split())
    assert (ended.status, ended.out, ended.err.count("\n")) == (2, "", 1), ended.err
    assert [part for part in told if part not in ended.err] == []


def test_another_run_is_not_continued_by_mistake(here, declip, trained, table):
    status, printed = declip("train", "mine.yaml", "--out", trained)
    assert (status, f"on '{table}'" in printed, "another --out" in printed) == (2, True, True), (
        printed
    )


def test_a_strangers_recipe_is_no_run(here, declip):
    (here / "cookbook").mkdir()
    for content in ("flour: 200 g\n", "", "- a\n", "a: b: c\n"):
        (here / "cookbook" / "recipe.yaml").write_text(content)
        status, printed = declip("train", "mine.yaml", "--out", "cookbook", "--resume")
        assert (status, [part for part in ("'cookbook'", "--out") if part not in printed]) == (
            2,
            [],
        )
        assert (here / "cookbook" / "recipe.yaml").read_text() == content


def test_an_interrupted_run_prints_words_that_a_shell_reads(table, here, declip, monkeypatch):
    from declip.training import trainer

    step = trainer.training_step

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(trainer, "training_step", interrupted)
    status, printed = declip(
        "train", "mine.yaml", "data.max_pairs=16", "name=my run", "--out", "my run", "--quiet"
    )
    assert status == 130
    assert (
        "declip train mine.yaml data.max_pairs=16 'name=my run' --out 'my run' --quiet --resume"
        in printed
    )


# The largest size of a file, and what the message names
FULL = {
    500: ("'run/recipe.yaml'", "--out"),
    3_000: ("metrics.jsonl'", "--resume"),
    20_000: ("checkpoints/step-00000024",),
}


def test_a_full_disk_is_reported_and_the_run_continues_once_there_is_room(
    here, declip, table, trained
):
    """No file may grow beyond some size; the error differs from a full disk's only in its number."""
    words = [
        "train",
        "mine.yaml",
        "train.steps=24",
        "train.log_every=1",
        "train.checkpoint_every=100",
    ]
    # Without loader processes: their shared memory is files too.
    words += ["data.workers=0", "--out", "run", "--quiet", "--resume"]
    for largest, says in FULL.items():
        status, printed = on_a_full_disk(words, largest)
        assert (status, [part for part in ("File too large", *says) if part not in printed]) == (
            2,
            [],
        ), printed
        assert "Traceback" not in printed
    assert declip(*words)[0] == 0
    assert [row["step"] for row in read_rows(here / "run" / "metrics.jsonl")] == list(range(1, 25))
    words = [
        "evaluate",
        str(trained),
        "--dataset",
        str(table),
        "--task",
        "retrieval",
        "--json",
        "result.json",
    ]
    status, printed = on_a_full_disk(words, 10)
    assert (
        status,
        [part for part in ("R@1", "'result.json'", "--json") if part not in printed],
    ) == (2, [])


def on_a_full_disk(words, largest):
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


def _limited(words, largest, writer):
    # A write beyond the limit then raises, as on a full disk
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    sys.stdout = sys.stderr = os.fdopen(writer, "w", encoding="utf-8")
    sys.argv = ["declip", *words]
    cli.main()


def test_a_disk_that_refuses_is_no_traceback(declip, monkeypatch):
    """Raised by hand: to root, who may run the tests, nothing is forbidden."""
    for error, says in (
        (
            PermissionError(13, "Permission denied", "secret.yaml"),
            ("'secret.yaml'", "Permission denied"),
        ),
        (OSError(30, "Read-only file system", "run"), ("'run'", "Read-only", "another path")),
        (OSError(28, "No space left on device"), ("No space left", "--resume")),
    ):
        monkeypatch.setattr("declip.recipe.checks.load_recipe", Mock(side_effect=error))
        status, printed = declip("train", "clip")
        assert (status, [part for part in says if part not in printed]) == (2, []), printed
