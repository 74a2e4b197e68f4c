import errno
import json
import os
import tarfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import declip
from conftest import draw
from declip.data.sources.origin import Origin
from declip.errors import UserError
from declip.models.dual_encoder import DualEncoder
from declip.search import embed as embedding
from declip.search.embed import Changes, find_changes
from declip.search.manifest import read_manifest
from declip.search.store import KnownImage
from indices import tiny_model


def contents(index: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in index.iterdir() if not path.name.startswith(".")}


def test_vectors_are_the_models_and_keys_the_sources(model: DualEncoder, folder: Path, tmp_path: Path) -> None:
    index = declip.embed(model, folder, out=tmp_path / "index", dtype="float32", batch_size=7)
    names = sorted(path.name for path in folder.iterdir())
    with torch.no_grad():
        expected = model.encode_image(model.preprocess([Image.open(folder / name).convert("RGB") for name in names]))
    assert index.keys() == names
    torch.testing.assert_close(index.vectors(index.ids), expected, rtol=0, atol=1e-5)
    row = index.row(3)
    assert row.origin.path == str(folder / names[3])
    assert row.origin.size == (folder / names[3]).stat().st_size
    assert index.manifest.update is not None
    assert index.manifest.update.uncaptioned["reasons"]["missing caption"]["count"] == 24


def test_float16_is_float32_rounded_and_bf16_near_it(model: DualEncoder, folder: Path, tmp_path: Path) -> None:
    half, full = (declip.embed(model, folder, out=tmp_path / kind, dtype=kind) for kind in ("float16", "float32"))
    exact = full.vectors(full.ids)
    assert torch.equal(half.vectors(half.ids), exact.half().float())
    autocast = declip.embed(model, folder, out=tmp_path / "bf16", precision="bf16", dtype="float32")
    cosines = (exact * autocast.vectors(autocast.ids)).sum(1)
    assert cosines.min() > 0.999
    assert not torch.equal(exact, autocast.vectors(autocast.ids))


def stop_at(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> list[int]:
    """Stop `embed` right after these parts are written, before the manifest names them; returns their rows."""
    write, rows = embedding.write_part, []

    def stopping(*arguments: Any) -> Any:
        rows.append(len(arguments[2]))
        made = write(*arguments)
        if len(rows) in numbers:
            raise KeyboardInterrupt
        return made

    monkeypatch.setattr(embedding, "write_part", stopping)
    return rows


def test_a_stopped_call_continues_bit_exact(
    model: DualEncoder, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "PART_ROWS", 7)
    options = {"captions": True, "batch_size": 3}
    declip.embed(model, table, out=tmp_path / "whole", **options)
    rows = stop_at(monkeypatch, 2, 3)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            declip.embed(model, table, out=tmp_path / "stopped", **options)
        update = read_manifest(tmp_path / "stopped").update
        assert update is not None
        assert (update.done, update.total, update.finished) == (7, 24, False)
    declip.embed(model, table, out=tmp_path / "stopped", **options)
    assert len(rows) == 6, "complete parts are not made again"
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_another_source_half_way_keeps_finished_parts(
    model: DualEncoder, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "PART_ROWS", 10)
    rows = stop_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        declip.embed(model, folder, out=tmp_path / "index")
    draw("pink", "bar").save(folder / "a-first.png")
    index = declip.embed(model, folder, out=tmp_path / "index")
    assert rows == [10, 10, 10, 5]
    assert sorted(index.keys()) == sorted(path.name for path in folder.iterdir())


def test_later_calls_add_what_is_new_and_hide_what_is_gone(model: DualEncoder, folder: Path, tmp_path: Path) -> None:
    out, exact = tmp_path / "index", {"dtype": "float32"}
    declip.embed(model, folder, out=out, **exact)
    before = contents(out)
    draw("pink", "bar").save(folder / "aa-new.png")
    draw("gold", "circle").save(folder / "red-bar.png")
    os.utime(folder / "red-bar.png", ns=(1, 1))
    aside = tmp_path / "aside.png"
    (folder / "blue-bar.png").rename(aside)
    index = declip.embed(model, folder, out=out, **exact)
    assert contents(out)["part-000000.arrow"] == before["part-000000.arrow"]
    assert [part.rows for part in index.manifest.parts] == [24, 2]
    assert sorted(index.keys()) == sorted(path.name for path in folder.iterdir())
    assert index.search(image=draw("gold", "circle"), k=1)[0].key == "red-bar.png"

    aside.rename(folder / "blue-bar.png")
    back = declip.embed(model, folder, out=out, **exact)
    assert [part.rows for part in back.manifest.parts] == [24, 2], "it was there already"
    assert len(back) == len(index) + 1
    assert back.search(image=folder / "blue-bar.png", k=1)[0].key == "blue-bar.png"


def test_broken_images_are_counted_and_tried_again(model: DualEncoder, folder: Path, tmp_path: Path) -> None:
    whole = (folder / "red-bar.png").read_bytes()
    (folder / "red-bar.png").write_bytes(whole[:60])
    (folder / "blue-bar.png").write_bytes(b"")
    (folder / "green-bar.png").write_bytes(b"no image")
    index = declip.embed(model, folder, out=tmp_path / "index")
    assert len(index) == 21
    assert sum(index.manifest.skipped.counts.values()) == 3
    assert index.manifest.skipped.examples["unreadable image"] == ["green-bar.png"]
    assert "Left out: 1 × unreadable image, such as green-bar.png" in index.summary()
    (folder / "red-bar.png").write_bytes(whole)
    index = declip.embed(model, folder, out=tmp_path / "index")
    assert len(index) == 22
    assert sum(index.manifest.skipped.counts.values()) == 2
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"None of the 1 images of 'broken'.* unreadable image"):
        declip.embed(model, tmp_path / "broken", out=tmp_path / "none")


def test_another_option_model_source_or_folder_is_refused(
    model: DualEncoder, folder: Path, table: Path, tmp_path: Path
) -> None:
    same: dict[str, Any] = {"model": model, "source": folder, "out": tmp_path / "index"}
    declip.embed(**same)
    before = contents(tmp_path / "index")
    changed: tuple[tuple[dict[str, Any], str], ...] = (
        ({"dtype": "float32"}, "dtype was 'float16'"),
        ({"captions": True}, "captions was False"),
        ({"precision": "bf16"}, "precision was 'fp32'"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"precision": "fp16"}, "precision 'fp16'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"model": tiny_model(1)}, "another model"),
        ({"source": table}, "source was"),
        ({"out": folder}, "'black-bar.png'"),
    )
    for options, message in changed:
        with pytest.raises(UserError, match=message):
            declip.embed(**{**same, **options})
    assert contents(tmp_path / "index") == before


def test_captions_get_the_mean_of_their_vectors(model: DualEncoder, table: Path, tmp_path: Path) -> None:
    index = declip.embed(model, table, out=tmp_path / "index", captions=True, dtype="float32")
    with torch.no_grad():
        texts = model.encode_text(model.tokenize(list(index.row(5).captions)))
    mean = torch.nn.functional.normalize(texts.mean(0), dim=-1)
    found = index.nearest(mean[None], 1, over="captions")
    assert found[0].item() == 5
    assert found[1].item() == pytest.approx(1, abs=1e-5)


def test_a_model_that_gives_no_numbers_is_refused(folder: Path, tmp_path: Path) -> None:
    broken = tiny_model()
    with torch.no_grad():
        next(broken.image_tower.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match=r"no number for 'black-bar.png' and 23 more"):
        declip.embed(broken, folder, out=tmp_path / "index")


def test_a_full_disk_is_said_and_can_be_fixed(
    model: DualEncoder, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "PART_ROWS", 10)
    sync, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No room left on the disk"):
        declip.embed(model, folder, out=tmp_path / "index")
    monkeypatch.setattr(os, "fsync", sync)
    assert read_manifest(tmp_path / "index").rows == 10
    assert len(declip.embed(model, folder, out=tmp_path / "index")) == 24


def test_tables_without_captions_and_with_bytes(model: DualEncoder, folder: Path, tmp_path: Path) -> None:
    paths = [path for path in sorted(folder.iterdir()) if "red" in path.name]
    listed = tmp_path / "list.jsonl"
    listed.write_text("".join(json.dumps({"image": f"shapes/{path.name}"}) + "\n" for path in paths))
    index = declip.embed(model, listed, out=tmp_path / "paths", caption_column="")
    assert [index.row(id_).captions for id_ in index.ids] == [()] * 4
    assert index.row(0).key == "shapes/red-bar.png"

    cells = {"image": [path.read_bytes() for path in paths], "caption": ["a bar", None, "a square", "a triangle"]}
    pq.write_table(pa.table(cells), tmp_path / "bytes.parquet")
    held = declip.embed(model, tmp_path / "bytes.parquet", out=tmp_path / "bytes")
    assert len(held) == 4, "a caption that is missing breaks no image"
    assert held.row(1).captions == ()
    torch.testing.assert_close(held.vectors(held.ids), index.vectors(index.ids))
    # A row is put before all others: they are recognized by their content, not by their numbers.
    cells = {name: [column[3], *column[:3]] for name, column in cells.items()}
    pq.write_table(pa.table(cells), tmp_path / "bytes.parquet")
    held = declip.embed(model, tmp_path / "bytes.parquet", out=tmp_path / "bytes")
    assert [held.row(id_).captions for id_ in held.ids] == [("a triangle",), ("a bar",), (), ("a square",)]


def test_shards_say_where_each_image_lies(
    model: DualEncoder, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path / "cache"))
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for path in sorted(folder.iterdir())[:5]:
            tar.add(path, path.name)
    index = declip.embed(model, tmp_path / "0.tar", out=tmp_path / "index")
    row = index.row(2)
    assert (row.key, row.captions) == ("0.tar/black-square", ())
    with open(row.origin.path, "rb") as file:
        file.seek(row.origin.offset)
        found = Image.open(BytesIO(file.read(row.origin.size)))
    assert np.array_equal(found.convert("RGB"), index.image(2))


def test_worker_processes_change_nothing(model: DualEncoder, folder: Path, tmp_path: Path) -> None:
    for workers in (0, 2):
        declip.embed(model, folder, out=tmp_path / str(workers), batch_size=5, workers=workers)
    assert contents(tmp_path / "0") == contents(tmp_path / "2")


@dataclass
class Listed:
    """Keys and stamps of a source."""

    images: list[tuple[str, str]]

    def key(self, index: int) -> str:
        return self.images[index][0]

    def origin(self, index: int) -> Origin:
        return Origin(stamp=self.images[index][1])


ROWS = [KnownImage(0, "a", "1"), KnownImage(1, "b", "1"), KnownImage(2, "c", "1")]


def changes(images: list[tuple[str, str]], rows: list[KnownImage], **hidden: object) -> Changes:
    return find_changes(Listed(images), range(len(images)), rows, **hidden)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("images", "hidden", "places", "gone", "back"),
    [
        ([("a", "1"), ("b", "1"), ("c", "1")], {}, [], set(), set()),
        ([("a", "1"), ("new", "1"), ("b", "1"), ("c", "1")], {}, [1], set(), set()),
        ([("a", "1"), ("b", "2"), ("c", "1")], {}, [1], {1}, set()),
        ([("a", "1"), ("c", "1")], {}, [], {1}, set()),
        ([("a", "1"), ("c", "1")], {"gone": {1}}, [], set(), set()),
        ([("a", "1"), ("b", "1"), ("c", "1")], {"gone": {1}}, [], set(), {1}),
        ([("a", "1"), ("b", "2"), ("c", "1")], {"removed": {1}}, [], set(), set()),
        ([("a", "1"), ("b", "2"), ("c", "1"), ("out", "1")], {"excluded": {"out"}}, [1], {1}, set()),
        ([("a", "1"), ("a", "1"), ("b", "1"), ("c", "1")], {}, [1], set(), set()),
    ],
)
def test_what_is_new_changed_gone_and_back(
    images: list[tuple[str, str]], hidden: dict[str, set[int]], places: list[int], gone: set[int], back: set[int]
) -> None:
    found = changes(images, ROWS, **hidden)
    assert (found.places.tolist(), found.gone, found.back) == (places, gone, back)


def test_a_live_row_goes_before_a_hidden_one_and_the_digest_depends_on_the_work() -> None:
    found = changes([("a", "1")], [KnownImage(0, "a", "1"), KnownImage(1, "a", "1")], gone={0})
    assert (found.back, found.gone) == (set(), set())
    one = changes([("a", "1"), ("x", "1"), ("y", "1")], ROWS)
    assert one.digest == changes([("x", "9"), ("y", "9")], ROWS).digest
    assert one.digest != changes([("y", "1"), ("x", "1")], ROWS).digest
