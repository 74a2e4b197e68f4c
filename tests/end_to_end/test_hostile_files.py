"""Files that came from elsewhere: nothing in them runs, memory stays bounded, nothing hangs, and all is said."""

import io
import json
import multiprocessing
import os
import pickle
import resource
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

import declip
from conftest import TINY
from declip.config import Recipe
from declip.data.decode import decode
from declip.data.pairs import BrokenPair
from declip.data.sources import open_source
from declip.errors import UserError
from declip.evaluation.datasets import open_dataset
from declip.interchange import read_declip_authors
from declip.models.dual_encoder import DualEncoder
from declip.recipe_file import load_recipe
from declip.training.checkpoint import STATE, WEIGHTS, Checkpoint, save_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"
ROOM = 48
"""MB that reading may take beyond what the process had; the bombs here would take 64 and more, or everything."""

quickly = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Trap:
    """Makes a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own; a program that is started fails the test."""
    inside = tmp_path / "here"
    inside.mkdir()
    monkeypatch.chdir(inside)
    for name in ("Popen", "run", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("a program was started"))
    return inside


def said(work: Callable[[], object]) -> str:
    """What a file got: the error's message, the broken pair's reason, or "read". Anything else is raised."""
    try:
        work()
    except UserError as error:
        return str(error)
    except BrokenPair as broken:
        return broken.reason
    return "read"


def apart(work: Callable[[], object], seconds: float = 10) -> tuple[str, float]:
    """The same in a process of its own: what the file got, and the MB that reading it took at most."""
    fork = multiprocessing.get_context("fork")
    reader, writer = fork.Pipe(duplex=False)

    def child() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30),) * 2)  # should it fail, the machine survives
        found = said(work)
        writer.send((found, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))

    process = fork.Process(target=child)
    process.start()
    writer.close()
    try:
        assert reader.poll(seconds), "it hangs"
        return reader.recv()
    except EOFError:
        pytest.fail("it ended the process, or raised what no one catches")
    finally:
        process.kill()
        process.join()


# Weights


def legacy_tar(path: Path, trap: Trap) -> None:
    """torch's form before 0.1.10, which is unpacked to the disk where it is read."""
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle", "../outside"):
            content = pickle.dumps(trap)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


TRAPS: dict[str, Callable[[Path, Trap], object]] = {
    "pickle.pth": lambda path, trap: path.write_bytes(pickle.dumps({"model": trap})),
    "pickle.pth.tar": lambda path, trap: path.write_bytes(pickle.dumps({"model": trap}, protocol=2)),
    "zip.pt": lambda path, trap: torch.save({"state_dict": trap}, path),
    "legacy.pth": lambda path, trap: torch.save({"model": trap}, path, _use_new_zipfile_serialization=False),
    "tar.pth": legacy_tar,
    "pickle.safetensors": lambda path, trap: path.write_bytes(pickle.dumps(trap)),
    "array.npy": lambda path, trap: np.save(path, np.array([trap], dtype=object), allow_pickle=True),
}


@pytest.mark.parametrize("name", TRAPS)
def test_weights_that_would_run_code(name: str, here: Path) -> None:
    marker, path = here / "harm", here / name
    TRAPS[name](path, Trap(marker))
    before = set(here.parent.rglob("*"))
    assert "Cannot read weights" in said(lambda: read_declip_authors(path))
    assert "Cannot read weights" in said(lambda: declip.load(path, device="cpu"))
    assert "Cannot load" in said(lambda: declip.load(f"open_clip:RN50/{path}", device="cpu"))
    assert set(here.parent.rglob("*")) == before


def zip_bomb(path: Path) -> None:
    torch.save({"logit_scale": torch.ones(1)}, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr(f"{path.stem}/data/1", bytes(64 << 20))


def overlapping_zip(path: Path) -> None:
    """Five hundred entries that are all the same megabyte."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data/0", bytes(1 << 20))
        archive.filelist.extend(archive.filelist * 500)


class Endless:
    """What `weights_only` allows to be made of nothing."""

    def __init__(self, make: Any, *given: Any) -> None:
        self.make, self.given = make, given

    def __reduce__(self) -> tuple[Any, ...]:
        return self.make, self.given


def holding(value: Any) -> Callable[[Path], None]:
    names = ("logit_scale", "visual.conv1.weight", "encode_text.token_embedding.weight")
    return lambda path: torch.save({"model": dict.fromkeys(names, value)}, path)


def holding_itself(path: Path) -> None:
    inner: list[Any] = []
    inner.append(inner)
    torch.save({"model": {"logit_scale": inner}}, path)


BOMBS: dict[str, Callable[[Path], object]] = {
    "inflates.pth": zip_bomb,
    "overlaps.pth": overlapping_zip,
    "repeats.pth": holding(torch.zeros(1).expand(1 << 20, 1 << 20)),
    "bytes.pth": holding(Endless(bytearray, 1 << 40)),
    "nowhere.pth": holding(
        Endless(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (1 << 30, 1 << 20), (1 << 20, 1), False)
    ),
    "itself.pth": holding_itself,
    "header.safetensors": lambda path: path.write_bytes((1 << 40).to_bytes(8, "little") + b"{" * 100),
    "sizes.safetensors": lambda path: path.write_bytes(
        struct.pack("<Q", 64) + b'{"a":{"dtype":"F32","shape":[99999999],"data_offsets":[0,9]}}   '
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_weights_that_are_larger_than_their_file(name: str, here: Path) -> None:
    BOMBS[name](here / name)
    for where in (str(here / name), f"open_clip:RN50/{here / name}"):
        got, megabytes = apart(lambda where=where: declip.load(where, device="cpu"))
        assert got != "read"
        assert megabytes < ROOM + 512 * where.startswith("open_clip"), "of which RN50 itself may take 408"


@pytest.mark.parametrize(
    "change",
    [
        {"encode_text.text_projection.weight": torch.zeros(1 << 40, 0)},
        {"encode_text.text_projection.weight": torch.zeros(1 << 22, 1, dtype=torch.uint8)},
        {"encode_text.positional_embedding": torch.zeros(1 << 40, 0)},
        {"encode_text.token_embedding.weight": torch.zeros(0, 0)},
        {"encode_text.token_embedding.weight": torch.zeros(1 << 40, 0)},
        {"visual.conv1.weight": torch.zeros(1 << 22, 1, 1, 1, dtype=torch.uint8)},
        {"visual.conv1.weight": torch.zeros(4)},
        {"visual.conv1.weight": torch.zeros(64, 3, 0, 0)},
        {"visual.positional_embedding": torch.tensor(1.0)},
        {"visual.positional_embedding": torch.zeros(0, 64)},
        {"logit_scale": torch.zeros(5)},
    ],
)
def test_weights_of_sizes_that_no_one_meant(change: dict[str, torch.Tensor], here: Path) -> None:
    save_file(load_file(GOLDEN / "declip_vit_tiny.safetensors") | change, here / "odd.safetensors")
    got, megabytes = apart(lambda: declip.load(here / "odd.safetensors", device="cpu"))
    assert got != "read"
    assert megabytes < 2 * ROOM


@pytest.fixture
def checkpoint(here: Path) -> Path:
    """A checkpoint of a tiny model, of the first version: its state has no digest to be found out by."""
    recipe = Recipe.model_validate({key: TINY[key] for key in ("image", "text", "embed_dim")})
    weights = {f"model.{name}": tensor for name, tensor in DualEncoder.from_recipe(recipe).state_dict().items()}
    folder = save_checkpoint(here / "run", Checkpoint(1, weights, {}, recipe.to_yaml()), keep=1)
    edit(folder, recipe.to_yaml())
    return folder


def edit(folder: Path, recipe: str) -> None:
    state = json.loads((folder / STATE).read_text())
    state.pop("digest", None)
    (folder / STATE).write_text(json.dumps({**state, "recipe": recipe}))


def laughs(levels: int = 30) -> str:
    """Ten aliases of ten aliases of ten …: 10^30 entries of 30 lines."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join([*lines, f"name: *a{levels - 1}", ""])


RECIPES = {
    "code": "name: !!python/object/apply:os.system ['touch harm']\n",
    "module": "!!python/module:os\n",
    "laughs": laughs(),
    "deep": "[" * 5000,
    "date": "name: 2001-99-99\n",
    "binary": "name: !!binary é\n",
    "null": "name: \0\n",
    "list": "- a\n",
    "empty": "",
    "unknown key": "harm: 1\n",
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_checkpoint_with_anothers_recipe(name: str, checkpoint: Path) -> None:
    edit(checkpoint, RECIPES[name])
    got, megabytes = apart(lambda: declip.load(checkpoint, device="cpu"))
    assert "run" in got or name == "empty"
    assert got != "read"
    assert megabytes < 2 * ROOM
    assert not Path("harm").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"text.width": 1 << 20, "text.heads": 1},
        {"text.context": 1 << 40},
        {"embed_dim": 1 << 50},
        {"image.options": {"patch_size": 8, "embed_dim": 1 << 20, "depth": 1}},
        {"image.options": {"patch_size": 8, "embed_dim": "x"}},
        {"image.size": 1 << 20},
        {"image.name": "hf-hub:someone/model"},
    ],
)
def test_a_checkpoint_whose_recipe_asks_for_another_model(change: dict[str, Any], checkpoint: Path) -> None:
    tree = yaml.safe_load(json.loads((checkpoint / STATE).read_text())["recipe"])
    for key, value in change.items():
        *inner, last = key.split(".")
        (tree[inner[0]] if inner else tree)[last] = value
    edit(checkpoint, yaml.safe_dump(tree))
    got, megabytes = apart(lambda: declip.load(checkpoint, device="cpu"))
    assert got != "read"
    assert megabytes < 2 * ROOM


def test_a_checkpoint_whose_weights_would_run_code(checkpoint: Path) -> None:
    assert said(lambda: declip.load(checkpoint, device="cpu")) == "read"
    (checkpoint / WEIGHTS).write_bytes(pickle.dumps(Trap(Path("harm"))))
    assert "damaged" in said(lambda: declip.load(checkpoint, device="cpu"))
    assert not Path("harm").exists()


@quickly
@given(st.binary(max_size=300), st.sampled_from([".pth", ".pt", ".safetensors", ".pth.tar"]), st.booleans())
def test_any_bytes_as_weights(content: bytes, suffix: str, in_header: bool) -> None:
    path = Path(f"any{suffix}")
    path.write_bytes(struct.pack("<Q", len(content)) + content if in_header else content)
    assert "any" in said(lambda: declip.load(path, device="cpu"))


# Recipes


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"empty"}))
def test_a_recipe_that_would_run_code_or_is_none(name: str) -> None:
    Path("mine.yaml").write_text(RECIPES[name])
    got, megabytes = apart(lambda: load_recipe("mine.yaml"))
    assert "mine" in got
    assert megabytes < ROOM
    assert not Path("harm").exists()


# Images


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IEND", b"")]
    framed = (struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def written(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, kind, **options)
    return buffer.getvalue()


def patched(kind: str, find: bytes, skip: int, form: str, *sizes: int, **options: Any) -> bytes:
    """A small picture that says that it is a large one."""
    content = written(kind, **options)
    place = (content.index(find) if find else 0) + skip
    new = struct.pack(form, *sizes)
    return content[:place] + new + content[place + len(new) :]


def tiff(side: int) -> bytes:
    tags = [(256, side), (257, side), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, side), (279, 100)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


def with_comment() -> bytes:
    about = PngImagePlugin.PngInfo()
    about.add(b"zTXt", b"x\0\0" + zlib.compress(bytes(64 << 20), 1))
    return written("PNG", pnginfo=about)


IMAGES: dict[str, tuple[bytes, str]] = {
    "50 gigapixels, PNG": (png(223_607, 223_607, (b"IDAT", zlib.compress(bytes(99)))), "image too large"),
    "4 gigapixels, JPEG": (patched("JPEG", b"\xff\xc0", 5, ">HH", 65_500, 65_500), "image too large"),
    "4 gigapixels, GIF": (patched("GIF", b"", 6, "<HH", 65_535, 65_535), "image too large"),
    "WebP that grew": (
        patched("WEBP", b"VP8X", 12, "<HBHB", 0x3FFF, 0, 0x3FFF, 0, icc_profile=b"x" * 99),
        "image too large",
    ),
    "1,000 gigapixels, BMP": (patched("BMP", b"", 18, "<ii", 1_000_000, 1_000_000), "image too large"),
    "1,000 gigapixels, TIFF": (tiff(1_000_000), "image too large"),
    "negative, BMP": (patched("BMP", b"", 18, "<ii", -5, -5), "image too large"),
    "comment that inflates, PNG": (with_comment(), "unreadable image"),
    "pixels that inflate, PNG": (png(2, 2, (b"IDAT", zlib.compress(bytes(64 << 20), 1))), "read"),
    "profile that inflates, PNG": (
        png(2, 2, (b"iCCP", b"x\0\0" + zlib.compress(bytes(64 << 20), 1)), (b"IDAT", zlib.compress(bytes(14)))),
        "unreadable image",
    ),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" onload="x()"/>', "unreadable image"),
    "SVG with an entity": (b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><svg>&e;</svg>', "unreadable image"),
    "PDF": (b"%PDF-1.7\n1 0 obj<</OpenAction<</S/Launch>>>>endobj\n", "unreadable image"),
    "HTML": (b"<!doctype html><script>x()</script>", "unreadable image"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(harm) (w) file\n%%EOF\n", "unreadable image"),
    "EPS, binary head": (b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, 99) + bytes(200), "unreadable image"),
    "WMF": (b"\xd7\xcd\xc6\x9a" + bytes(100), "unreadable image"),
    "Python": (b"#!/usr/bin/python3\nopen('harm', 'w')\n", "unreadable image"),
    "pickle": (pickle.dumps(Trap(Path("harm"))), "unreadable image"),
    "numpy": (b"\x93NUMPY" + bytes(100), "unreadable image"),
    "nothing": (b"", "truncated image"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_that_are_bombs_or_none(name: str) -> None:
    content, expected = IMAGES[name]
    Path("a.jpg").write_bytes(content)
    for source in (Path("a.jpg"), content):
        got, megabytes = apart(lambda source=source: decode(source, "a.jpg"))
        assert got == expected
        assert megabytes < ROOM
    assert not Path("harm").exists()


def sparse(path: Path, head: bytes, size: int) -> None:
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)


def test_a_file_of_20_gigabytes_is_not_read() -> None:
    sparse(Path("a.webp"), b"RIFF\xff\xff\xff\xffWEBPVP8X", 20 << 30)

    def work() -> None:
        with pytest.raises(BrokenPair, match=r"image too large.*a file of 21,474,836,480 bytes"):
            decode(Path("a.webp"), "a.webp")

    assert apart(work)[1] < ROOM


OTHER_THINGS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "link to itself": lambda path: path.symlink_to(path),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
}
IMAGE_REASONS = dict.fromkeys(OTHER_THINGS, "unreadable image") | dict.fromkeys(
    ("link to itself", "link to nothing"), "missing image"
)


@pytest.mark.parametrize("name", OTHER_THINGS)
def test_what_is_no_file_does_not_hang(name: str, here: Path) -> None:
    Path("set").mkdir()
    for place in ("a.jpg", "set/b.txt", "t.csv", "w.pth", "r.yaml"):
        OTHER_THINGS[name](here / place)
    Image.new("RGB", (4, 4)).save("set/b.png")
    assert apart(lambda: decode(Path("a.jpg"), "a.jpg"))[0] == IMAGE_REASONS[name]
    assert apart(lambda: open_source("set")[0])[0] == "missing caption"
    for work in (lambda: open_source("t.csv"), lambda: declip.load("w.pth"), lambda: load_recipe("r.yaml")):
        assert apart(work)[0] not in {"read", ""}


@quickly
@given(st.binary(max_size=200), st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]), st.integers(0, 80))
@pytest.mark.filterwarnings("ignore")
def test_any_bytes_as_an_image(content: bytes, kind: str, kept: int) -> None:
    said(lambda: decode(written(kind)[:kept] + content, "k"))


# Pairs


def table(kind: str, rows: list[dict[str, Any]]) -> Path:
    path = Path(f"t.{kind}")
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        mark = "," if kind == "csv" else "\t"
        lines = [mark.join(f'"{cell}"' for cell in row.values()) for row in rows]
        path.write_text("\n".join([mark.join(rows[0]), *lines, ""]))
    return path


KINDS = ("jsonl", "csv", "tsv", "parquet")


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_root_cannot_be_left(kind: str, here: Path) -> None:
    root = here / "images"
    (root / "inner").mkdir(parents=True)
    for place in (root / "in.png", here / "out.png", here.parent / "up.png"):
        Image.new("RGB", (2, 2)).save(place)
    (root / "good").symlink_to(root / "in.png")
    (root / "file.png").symlink_to(here / "out.png")
    (root / "folder").symlink_to(here.parent)
    (root / "chain.png").symlink_to(root / "file.png")
    expected = {
        "in.png": "read",
        "good": "read",
        "inner/../in.png": "read",
        "../out.png": "path outside image root",
        "inner/../../out.png": "path outside image root",
        str(here / "out.png"): "path outside image root",
        "/etc/passwd": "path outside image root",
        "file.png": "path outside image root",
        "chain.png": "path outside image root",
        "folder/up.png": "path outside image root",
        "~/in.png": "missing image",
        "file:///etc/passwd": "missing image",
        "https://example.org/a.png": "missing image",
    }
    path = table(kind, [{"image": name, "caption": "x"} for name in expected])
    source = open_source(path, image_root=root)
    assert {name: said(lambda i=i: source[i]) for i, name in enumerate(expected)} == expected


def test_the_root_may_be_a_link_itself(here: Path) -> None:
    (here / "real").mkdir()
    Image.new("RGB", (2, 2)).save("real/in.png")
    (here / "images").symlink_to(here / "real")
    source = open_source(table("jsonl", [{"image": "in.png", "caption": "x"}]), image_root="images")
    assert said(lambda: source[0]) == "read"


NESTED: Any = "x"
for _ in range(60):
    NESTED = [NESTED]

CELLS: list[tuple[str, str, str]] = [
    ("NaN", '"x"', "missing image"),
    ("null", '"x"', "missing image"),
    ("5", '"x"', "missing image"),
    ("true", '"x"', "missing image"),
    ("1e999", '"x"', "missing image"),
    ("1" * 5000, '"x"', "unreadable row"),
    ('["a.png"]', '"x"', "missing image"),
    ('{"path": "a.png"}', '"x"', "missing image"),
    ('""', '"x"', "missing image"),
    ('"\\u0000.png"', '"x"', "missing image"),
    ('"\\ud800.png"', '"x"', "missing image"),
    (json.dumps("a" * 5000), '"x"', "missing image"),
    ('"a.png"', "NaN", "unreadable row"),
    ('"a.png"', "null", "empty caption"),
    ('"a.png"', "7", "unreadable row"),
    ('"a.png"', json.dumps(NESTED), "unreadable row"),
    ('"a.png"', '{"en": "x"}', "unreadable row"),
    ('"a.png"', "[" * 100_000, "unreadable row"),
    ('"a.png"', "[]", "empty caption"),
    ('"a.png"', '"\\u0000\\u0000"', "empty caption"),
    ('"a.png"', '"\\u001b[2J\\u0007\\u009b"', "read"),
    ('"a.png"', '"\\u0001\\u0002\\u007f\\u0085"', "empty caption"),
    ('"a.png"', '"\\ud83d"', "invalid text"),
    ('"a.png"', json.dumps("x" * 10_000_000), "caption too long"),
    ('"a.png"', json.dumps(["x"] * 1_000_000), "too many captions"),
    ('"a.png"', json.dumps("x" * 20_000_000), "unreadable row"),
]


def test_cells_that_hold_anything() -> None:
    Image.new("RGB", (2, 2)).save("a.png")
    rows = [f'{{"image": {image}, "caption": {caption}}}' for image, caption, _ in CELLS]
    Path("t.jsonl").write_text("\n".join(rows))
    source = open_source("t.jsonl")
    got, megabytes = apart(lambda: [said(lambda i=i: source[i]) for i in range(len(CELLS))])
    assert got == "read"
    assert megabytes < 4 * ROOM
    assert [said(lambda i=i: source[i]) for i in range(len(CELLS))] == [expected for *_, expected in CELLS]
    control = [caption for _, caption, _ in CELLS].index('"\\u001b[2J\\u0007\\u009b"')
    assert source.captions(control) == ("[2J",), "nothing that a terminal obeys is left"


def test_a_key_that_a_terminal_would_obey() -> None:
    Path("t.jsonl").write_text(json.dumps({"image": "\x1b[2J\u202egnp.\ud800\n" + "a" * 10_000, "caption": "x"}))
    with pytest.raises(BrokenPair) as caught:
        open_source("t.jsonl")[0]
    assert caught.value.key.startswith("\ufffd[2J\ufffdgnp.\ufffd\ufffdaaa")
    assert len(caught.value.key) == 300
    assert str(caught.value).isprintable()


def test_bytes_that_are_no_text() -> None:
    Image.new("RGB", (2, 2)).save("a.png")
    Path("t.csv").write_bytes(b"image,caption\na.png,\xff\xfe\nb\xff.png,x\n")
    source = open_source("t.csv")
    assert [said(lambda i=i: source[i]) for i in range(2)] == ["invalid text", "invalid text"]
    Path("t.jsonl").write_bytes(b'{"image": "a.png", "caption": "x"}\n{"image": "a.png", "caption": "\xc0\xaf"}\n')
    assert said(lambda: open_source("t.jsonl")[1]) == "invalid text"
    Path("u.csv").write_bytes("image,caption\na.png,x\n".encode("utf-16"))
    assert "UTF-16" in said(lambda: open_source("u.csv"))


def test_a_row_that_does_not_end_takes_no_memory() -> None:
    Image.new("RGB", (2, 2)).save("a.png")
    with open("t.jsonl", "wb") as file:
        file.write(b'{"image": "a.png", "caption": "x"}\n{"image": "a.png", "caption": "')
        file.write(b"y" * (50 << 20))
    # The mapped file counts as memory, which the system takes back at will.
    got, megabytes = apart(lambda: open_source("t.jsonl")[1])
    assert got == "unreadable row"
    assert megabytes < 2 * 50 + ROOM
    for kind, mark in (("csv", b","), ("tsv", b"\t")):
        Path(f"t.{kind}").write_bytes(b"image" + mark + b'caption\na.png\t"' + b"y" * (50 << 20))
        got, megabytes = apart(lambda kind=kind: open_source(f"t.{kind}"))
        assert "cannot be read as a table" in got
        assert megabytes < 3 * 50 + ROOM
    Path("h.csv").write_bytes(b"x" * (10 << 20))
    assert "does not name columns" in said(lambda: open_source("h.csv"))


def test_a_million_columns() -> None:
    Path("t.jsonl").write_text(json.dumps({f"column{n}\x1b": 0 for n in range(100_000)}))
    got = apart(lambda: open_source("t.jsonl"))[0]
    assert "no column 'image'" in got
    assert got.isprintable()
    assert len(got) < 3000


def test_a_million_captions_in_a_folder() -> None:
    Path("set").mkdir()
    Image.new("RGB", (2, 2)).save("set/a.png")
    Image.new("RGB", (2, 2)).save("set/b.png")
    Path("set/a.txt").write_text("x\n" * 600_000)
    sparse(Path("set/b.txt"), b"x", 20 << 30)
    source = open_source("set")
    assert [apart(lambda i=i: source[i])[0] for i in range(2)] == ["too many captions", "caption too long"]


def test_names_that_are_no_text(here: Path) -> None:
    for name in (b"set/one/\xff\x1b.png", b"set/two/b.png"):
        os.makedirs(os.path.dirname(name), exist_ok=True)
        with open(name, "wb") as file:
            file.write(written("PNG"))
    with open(b"set/one/\xff\x1b.txt", "w") as file:
        file.write("a red square")
    for source in (open_source("set"), open_dataset("folder:set").split("test")):
        pair = source[0]
        assert pair.image.size == (16, 16)
        assert pair.key.endswith("\ufffd\x1b.png")
    os.rename("set/two", b"set/\xff")
    assert "name is not UTF-8" in said(lambda: open_dataset("folder:set"))


def test_parquet_that_would_run_code(here: Path) -> None:
    """Arrow before 14.0.1 unpickled a type that a file names (CVE-2023-47248)."""
    about = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Trap(here / "harm")),
    }
    kind = pa.schema([pa.field("image", pa.binary(), metadata=about), pa.field("caption", pa.string())])
    cells = [pickle.dumps(Trap(here / "harm")), b"\x93NUMPY\1\0", b"", None]
    pq.write_table(pa.table([cells, ["x"] * 4], schema=kind), "t.parquet")
    source = open_source("t.parquet")
    got = [said(lambda i=i: source[i]) for i in range(4)]
    assert got == ["unreadable image", "unreadable image", "missing image", "missing image"]
    assert not Path("harm").exists()


def test_parquet_that_repeats_one_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few kilobytes that stand for half a gigabyte, and could stand for a thousand."""
    monkeypatch.setattr("declip.data.table_rows.HELD_IN_MEMORY", 64 << 20)
    caption = pa.DictionaryArray.from_arrays(pa.array([0] * 8000, pa.int32()), ["x" * (1 << 16)])
    pq.write_table(pa.table({"image": ["a"] * 8000, "caption": caption}), "t.parquet", store_schema=False)
    assert Path("t.parquet").stat().st_size < 4000
    got, megabytes = apart(lambda: open_source("t.parquet"))
    assert "take more than 67,108,864 bytes" in got
    assert megabytes < 4 * ROOM


def test_every_flipped_bit_in_parquet() -> None:
    path = table("parquet", [{"image": "a.png", "caption": "x"}] * 2)
    content = path.read_bytes()

    def read(source: Any, index: int) -> str:
        return said(lambda: source[index])

    for place in range(0, len(content), 2):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place // 2 % 8]) + content[place + 1 :])
        said(lambda: [read(source, index) for source in [open_source("t.parquet")] for index in range(len(source))])


PIECES = [
    *(b"image", b"caption", b"label", b"{", b"}", b"[", b"]", b":", b"1e999", b"NaN", b"null", b"../x", b"/dev/zero"),
    *(b",", b"\t", b"\n", b"\r", b'"', b"\0", b"\xff", b"\\ud800", b"\xef\xbb\xbf", b'"image"', b'"caption": '),
    *(b"image,caption\n", b"image\tcaption\tlabel\n", b'{"image": "a.png", "caption": "x"}\n'),
]


@quickly
@given(
    st.lists(st.sampled_from(PIECES)).map(b"".join),
    st.sampled_from(["jsonl", "csv", "tsv"]),
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_any_bytes_as_a_table(content: bytes, kind: str) -> None:
    path = Path(f"any.{kind}")
    path.write_bytes(content)

    def work() -> None:
        for source in (open_source(path), open_dataset(str(path)).split("test")):
            for index in range(min(len(source), 10)):
                said(lambda source=source, index=index: source[index])

    said(work)


# Named sets


COCO: list[Any] = [
    [],
    {"images": 5},
    {"images": [{"id": [], "file_name": "a"}], "annotations": []},
    {"images": [{"id": 1, "file_name": 5}], "annotations": []},
    {"images": [{"id": 1, "file_name": "\ud800"}], "annotations": []},
    {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": 5}]},
    {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 2, "caption": "x"}]},
    {"images": ["text"], "annotations": [None]},
]


@pytest.mark.parametrize("tree", COCO)
def test_a_list_of_captions_of_another_make(tree: Any, here: Path) -> None:
    (here / "val2017").mkdir()
    (here / "captions_val2017.json").write_text(json.dumps(tree))
    assert "not what was published" in said(lambda: open_dataset(f"coco:{here}"))
    (here / "captions_val2017.json").write_text("[" * 100_000)
    assert "not what was published" in said(lambda: open_dataset(f"coco:{here}"))


def test_a_list_that_names_images_elsewhere(here: Path) -> None:
    (here / "coco" / "val2017").mkdir(parents=True)
    Image.new("RGB", (2, 2)).save("out.png")
    names = ["../../out.png", str(here / "out.png"), "/dev/zero"]
    tree = {
        "images": [{"id": n, "file_name": name} for n, name in enumerate(names)],
        "annotations": [{"image_id": n, "caption": "x"} for n in range(len(names))],
    }
    (here / "coco" / "captions_val2017.json").write_text(json.dumps(tree))
    source = open_dataset(f"coco:{here / 'coco'}").split("test")
    assert [said(lambda i=i: source[i]) for i in range(3)] == ["path outside image root"] * 3


@pytest.mark.parametrize("content", [b"\xff\xfe#0\tx\n", b"a.jpg#0", b'image|n|comment\n"' + b"x" * 200_000])
def test_lines_of_captions_that_are_none(content: bytes, here: Path) -> None:
    (here / "images").mkdir()
    (here / ("results.csv" if b"|" in content else "results_20130124.token")).write_bytes(content)
    got = said(lambda: open_dataset(f"flickr30k:{here}"))
    assert "results" in got or "not what was published" in got


def test_folders_that_link_to_each_other_end(here: Path) -> None:
    for name in ("set/cat/deep", "set/dog"):
        (here / name).mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(here / name / "a.png")
    for place in ("set/cat/deep/x", "set/cat/deep/y", "set/cat/z"):
        (here / place).symlink_to(here / "set/cat")
    got, _ = apart(lambda: open_dataset("folder:set").split("test"), seconds=5)
    assert got == "read"
    assert len(open_dataset("folder:set").split("test")) == 2


def test_labels_of_any_kind() -> None:
    Image.new("RGB", (2, 2)).save("a.png")
    labels = ["cat", "dog", "1" * 5000, "x" * 2000, "\ud800", None, 1.5, [["cat"]], {}, "\0", True, " "]
    rows = [{"image": "a.png", "caption": "x", "label": label} for label in labels]
    source = open_dataset(str(table("jsonl", rows))).split("test")
    got = [said(lambda i=i: source[i]) for i in range(len(labels))]
    long, none = "label too long", "missing label"
    assert got == ["read", "read", long, long, "invalid text", none, none, none, none, "read", "read", none]
