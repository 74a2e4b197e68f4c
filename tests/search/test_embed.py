import logging
import multiprocessing
import os
import resource
import shutil
from contextlib import suppress
from functools import partial
from itertools import count

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import declip
from conftest import draw, encoded, refuses, tiny_tree
from data.fakes import write_tar
from declip.data.columns import Columns
from declip.data.sources.folder import FolderSource
from declip.models import device, inference
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.search import embed as embedding
from declip.search.store import open_index
from indices import tiny_model


def contents(index):
    files = [path for path in index.rglob("*") if path.is_file() and ".lock" not in path.name]
    return {str(path.relative_to(index)): path.read_bytes() for path in files}


class Interrupted(FolderSource):
    """A folder of images that presses Ctrl-C when a given number of them have been read."""

    def __init__(self, folder, stop=1000):
        super().__init__(folder)
        self.stop, self.read = stop, []

    def opened(self, key, entry):
        if len(self.read) == self.stop:
            raise KeyboardInterrupt
        self.read.append(key)
        return super().opened(key, entry)


def test_vectors_are_the_models_and_keys_the_sources(embed, model, folder):
    index = embed(folder, dtype="float32", batch_size=7)
    names = sorted(path.name for path in folder.iterdir())
    images = [Image.open(folder / name).convert("RGB") for name in names]
    with torch.no_grad():
        expected = model.encode_image(model.preprocess(images))
    assert index.keys() == names
    torch.testing.assert_close(index.vectors(index.ids), expected, rtol=0, atol=1e-5)
    half = embed(folder, "half", batch_size=7)
    assert torch.equal(half.vectors(half.ids), index.vectors(index.ids).half().float())
    origin, file = index.row(3).origin, folder / names[3]
    assert (origin.path, origin.size) == (str(file), file.stat().st_size)
    assert "Without caption: 24" in index.summary()


def test_an_index_in_another_precision_is_searched_and_updated(
    weights_file, folder, tmp_path, monkeypatch
):
    # Emulated where it is false
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    embed = partial(declip.embed, weights_file, folder, out=tmp_path / "index", device="cpu")
    assert embed().info.precision == "bf16"
    index = declip.Index.open(tmp_path / "index", device="cpu")
    found = index.search(image=folder / "red-bar.png", k=24, copies=True)
    (own,) = (hit.score for hit in found if hit.key == "red-bar.png")
    assert own == pytest.approx(1.0, abs=1e-3)
    draw("red", "bar").resize((60, 60)).save(folder / "zoomed.png")
    index = embed(precision="fp32")
    assert (len(index), index.info.precision) == (25, "fp32")
    assert "computed in fp32" in index.summary()


def test_a_stopped_call_continues(embed, model, folder, tmp_path, caplog):
    for name in ("black-bar.png", "blue-bar.png"):  # tried again
        (folder / name).write_bytes(b"no image")
    read = []
    for stop in (12, 10):
        source = Interrupted(folder, stop)
        with pytest.raises(KeyboardInterrupt), caplog.at_level(logging.WARNING, "declip"):
            embed(source, "stopped", batch_size=3)
        assert "the same command continues" in caplog.text
        refuses("does not exist", declip.Index.open, tmp_path / "stopped", model=model)
        read.append(source.read)
    names = sorted(path.name for path in folder.iterdir())
    rest = [names[index] for index in (0, 4, *range(12, 20))]
    assert read == [names[:12], rest], "the rest, and the broken ones"
    embed(Interrupted(folder), "stopped", batch_size=3, workers=2)
    embed(Interrupted(folder), "whole", batch_size=3)
    stopped, whole = contents(tmp_path / "stopped"), contents(tmp_path / "whole")
    assert stopped.pop("index.json") != whole.pop("index.json"), "the time of creation differs"
    assert stopped == whole, "with worker processes or without"


def test_two_processes_share_the_cache(embed, folder):
    source = Interrupted(folder)
    for out in ("one", "two"):
        embed(source, out)
    assert len(source.read) == 24, "read once"


def test_blocks_do_not_stay_open(embed, folder, monkeypatch):
    monkeypatch.setattr(embedding, "GROUP_ROWS", 1)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 12, limits[1]))
    try:
        assert len(embed(folder)) == 24
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_later_calls_embed_what_is_new_or_changed_and_drop_what_is_gone(embed, folder):
    first = embed(folder, dtype="float32")
    ids, vectors = dict(zip(first.keys(), first.ids, strict=True)), first.vectors(first.ids)
    draw("pink", "bar").save(folder / "aa-new.png")
    draw("gold", "circle").save(folder / "red-bar.png")
    (folder / "red-square.png").unlink()
    index = embed(folder, dtype="float32")
    assert sorted(index.keys()) == sorted(path.name for path in folder.iterdir())
    assert index.search(image=draw("gold", "circle"), k=1)[0].key == "red-bar.png"
    kept = sorted(ids.keys() - {"red-bar.png", "red-square.png"})
    now = {key: row for row, key in enumerate(index.keys())}
    same = index.vectors([now[key] for key in kept])
    assert torch.equal(same, vectors[[int(ids[key]) for key in kept]])
    assert torch.equal(first.vectors(first.ids), vectors), "an index that is open keeps its rows"
    assert "24 images" in first.summary()
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no image")
    refuses("None of the 1 images", embed, folder, dtype="float32")
    assert len(declip.Index.open(index.folder)) == 24


def opened_until(index, done, count):
    """Open an index again and again, and send how often it was complete."""
    number = 0
    while not done.exists():
        info, store = open_index(index)
        assert store.matrix().shape == (len(store), info.dimension)
        assert store.rows(np.array([len(store) - 1]))
        number += 1
    count.put(number)


def test_an_index_opens_while_it_is_updated(embed, folder, tmp_path):
    done = tmp_path / "done"
    index = embed(folder).folder
    fork = multiprocessing.get_context("fork")
    count = fork.SimpleQueue()
    reader = fork.Process(target=opened_until, args=(index, done, count))
    reader.start()
    for number in range(6):
        draw("red", "bar", 40 + number).save(folder / "red-bar.png")
        embed(folder)
    done.touch()
    reader.join()
    assert reader.exitcode == 0
    assert count.get() > 6


def test_broken_images_are_counted_and_tried_again(embed, folder, tmp_path):
    whole = (folder / "red-bar.png").read_bytes()
    (folder / "red-bar.png").write_bytes(whole[:60])
    (folder / "blue-bar.png").write_bytes(b"")
    (folder / "green-bar.png").write_bytes(b"no image")
    index = embed(folder)
    assert (len(index), index.summary().count("Left out")) == (21, 2)
    assert "Left out: 1 × unreadable image, such as green-bar.png" in index.summary()
    (folder / "red-bar.png").write_bytes(whole)
    index = embed(folder)
    assert (len(index), "red-bar.png" in index.summary()) == (22, False)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"x")
    refuses("None of the 1 .* 'broken'.* unreadable image", embed, tmp_path / "broken", "none")


def test_another_option_model_source_or_folder_is_refused(model, folder, table, tmp_path):
    broken = tiny_model()
    torch.nn.init.constant_(next(broken.image_tower.parameters()), torch.nan)
    same = {"model": model, "source": folder, "out": tmp_path / "index"}
    declip.embed(**same)
    before = contents(tmp_path / "index")
    changed = (
        ({"dtype": "float32"}, "dtype was 'float16'"),
        ({"captions": True}, "captions was False"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"model": tiny_model(1)}, "another model"),
        ({"model": broken, "out": tmp_path / "none"}, "not finite"),
        ({"source": table}, "the source was '.*shapes'"),
        ({"out": folder}, "'black-bar.png'"),
    )
    for options, message in changed:
        refuses(message, declip.embed, **{**same, **options})
    assert contents(tmp_path / "index") == before


def test_repaired_captions_and_other_objects_are_embedded_again(embed, tmp_path):
    table = tmp_path / "pairs.csv"
    for number, color in enumerate(("red", "blue")):
        draw(color, "bar", 40).save(tmp_path / f"{number}.png")
    for word in ("wrong", "right"):
        table.write_text(f"image,caption\n0.png,{word}\n1.png,blue bar\n")
        index = embed(table, captions=True)
        assert [index.row(id).caption for id in index.ids.tolist()] == [word, "blue bar"]
    objects = [[(draw(color, "bar", 40), "a bar")] for color in ("red", "green")]
    one, other = (embed(each, "objects") for each in objects)
    assert not torch.equal(one.vectors(one.ids), other.vectors(other.ids))
    index = embed([("1.png", "a bar")], "named", columns=Columns(root=tmp_path))
    assert (index.keys(), index.row(0).origin.path) == (["1.png"], str(tmp_path / "1.png"))


class Changing(FolderSource):
    """A folder whose first image is replaced while it is read."""

    def opened(self, key, entry):
        if key == self[0].key:
            draw("gold", "circle", 50).save(self.root / key)
        return super().opened(key, entry)


def test_an_image_that_changes_while_it_is_read_is_embedded_again(embed, model, folder):
    embed(Changing(folder))
    source = Interrupted(folder)
    index = embed(source)
    assert source.read == [source[0].key], "the first one only"
    expected = model.encode_image(model.preprocess([draw("gold", "circle", 50)]))
    assert float(index.vectors([0]) @ expected[0]) == pytest.approx(1, abs=1e-3)


XMP = (
    '<x xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    "<rdf:Description><dc:description>a red bar</dc:description></rdf:Description></x>"
)


def test_an_update_decodes_no_file_whose_size_and_time_are_as_before(embed, tmp_path, monkeypatch):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a", "b"):
        draw("red", "bar").save(folder / f"{name}.webp", xmp=XMP.encode())
    (folder / "b.txt").write_text("one")
    index = embed(folder)
    assert [row.caption for row in index.rows([0, 1])] == ["a red bar", "one"]
    (folder / "b.txt").write_text("other")
    batches, encode = [], embedding.encode_batches
    monkeypatch.setattr(
        embedding, "encode_batches", lambda *given: batches.extend(given[3]) or encode(*given)
    )
    index = embed(folder)
    assert not batches
    assert [row.caption for row in index.rows([0, 1])] == ["a red bar", "other"]
    (folder / "b.txt").unlink()
    assert embed(folder).rows([1])[0].caption == "a red bar"


def test_captions_get_the_mean_of_their_vectors(embed, model, table):
    index = embed(table, captions=True, dtype="float32")
    with torch.no_grad():
        texts = model.encode_text(model.tokenize(list(index.row(5).captions)))
    mean = torch.nn.functional.normalize(texts.mean(0), dim=-1)
    found = index.nearest(mean[None], 1, over="captions")
    assert (found[0].item(), found[1].item()) == (5, pytest.approx(1, abs=1e-5))


def test_shards_that_come_later_and_share_names(embed, tmp_path):
    def shard(folder, *colors):
        members = []
        for number, color in enumerate(colors):
            members.append((f"{number}.png", encoded(draw(color, "bar"))))
            members.append((f"{number}.txt", color.encode()))
        write_tar(tmp_path / folder / "0.tar", members)

    pattern = str(tmp_path / "*" / "*.tar")
    shard("b", "red", "green")
    embed(pattern, captions=True)
    shard("a", "blue", "black")  # moves the others
    index = embed(pattern, captions=True)
    assert sorted(index.row(id).caption for id in index.ids) == ["black", "blue", "green", "red"]
    for id in index.ids:
        assert index.image(id).tobytes() == draw(index.row(id).caption, "bar").tobytes()
    shutil.copy(tmp_path / "b" / "0.tar", tmp_path / "a" / "1.tar")
    embed(tmp_path / "b", "one")
    shutil.copy(tmp_path / "a" / "0.tar", tmp_path / "b" / "1.tar")
    assert embed(tmp_path / "b", "one").ids.tolist() == [0, 1, 2, 3]


def test_cells_of_a_table_that_have_moved_are_embedded_again(embed, folder, tmp_path):
    paths = [path for path in sorted(folder.iterdir()) if "red" in path.name]
    table = tmp_path / "bytes.parquet"
    cells = {
        "image": [path.read_bytes() for path in paths],
        "caption": ["a bar", None, "a square", "a triangle"],
    }
    pq.write_table(pa.table(cells), table)
    assert embed(table).row(1).captions == (), "a caption that is missing breaks no image"
    moved = {name: [column[3], *column[:3]] for name, column in cells.items()}
    pq.write_table(pa.table(moved), table)
    moved = embed(table)
    captions = [moved.row(id).captions for id in moved.ids]
    assert captions == [("a triangle",), ("a bar",), (), ("a square",)]
    plain = embed(table, "plain", columns=Columns(caption=None))
    assert [plain.row(id).captions for id in plain.ids] == [()] * 4


def test_an_index_keeps_its_columns_of_captions(embed, folder, tmp_path):
    (tmp_path / "t.csv").write_text(f"image,title,kind\n{next(folder.glob('*.png'))},a bar,red")
    given = Columns(caption=["title", "a {kind} bar"])
    for _ in range(2):
        index = embed(tmp_path / "t.csv", captions=True, columns=given)
    assert index.row(0).captions == ("a bar", "a red bar")


class Killed(BaseException):
    """Not caught by anything."""


def die_at(number, call, monkeypatch):
    """Call a function until its nth change of a folder, after which nothing is changed either; whether it got there."""
    changes, changed = count(), {name: getattr(os, name) for name in ("rename", "replace", "rmdir")}

    def change(name, *given, **options):
        if next(changes) >= number:
            raise Killed
        return changed[name](*given, **options)

    with monkeypatch.context() as patched, suppress(Killed):
        for name in changed:
            patched.setattr(os, name, partial(change, name))
        call()
        return False
    return True


@pytest.mark.parametrize("update", [False, True])
def test_a_call_that_is_killed_at_any_moment_leaves_an_index_or_continues(
    update, model, tmp_path, monkeypatch
):
    photos, results = tmp_path / "photos", []
    embed = partial(declip.embed, model, photos)
    photos.mkdir()
    for name in "abc":
        draw("red", "bar", 30 + ord(name)).save(photos / f"{name}.png")
    if update:
        embed(out=tmp_path / "before")
    draw("blue", "bar", 50).save(photos / "b.png")
    (photos / "a.png").rename(photos / "d.png")
    for number in count():
        out = tmp_path / f"{number}"
        monkeypatch.setenv("DECLIP_CACHE", str(tmp_path / f"cache-{number}"))
        if update:
            shutil.copytree(tmp_path / "before", out)
        killed = die_at(number, partial(embed, out=out), monkeypatch)
        for aside in tmp_path.glob(f".{number}.*.old"):  # the process that made it is gone
            aside.rename(tmp_path / f".{number}.4194305.old")
        if update:
            keys = sorted(declip.Index.open(out).keys())
            assert keys in (["a.png", "b.png", "c.png"], ["b.png", "c.png", "d.png"])
        embed(out=out)
        results.append(contents(out))
        results[-1].pop("index.json")
        if not killed:
            break
    assert number > 0
    assert all(result == results[0] for result in results)


def test_many_images_are_embedded_by_a_compiled_tower(folder, tmp_path, monkeypatch):
    tree = tiny_tree("unused", image={"model": "declip_conv_tiny", "size": 32})
    conv = DualEncoder(Recipe.model_validate(tree))  # in training mode
    statistics = {name: value.clone() for name, value in conv.named_buffers()}
    compiled = []

    def compile_it(function, **_):
        return lambda pixels: compiled.append(len(pixels)) or function(pixels)

    monkeypatch.setattr(torch, "compile", compile_it)
    monkeypatch.setattr(device, "COMPILED_ON", ("cpu",))
    count = len(FolderSource(folder))
    indices = []
    for least in (count + 1, count):
        assert compiled == []
        monkeypatch.setattr(inference, "COMPILE_FROM", least)
        monkeypatch.setenv("DECLIP_CACHE", str(tmp_path / f"cache-{least}"))
        out = tmp_path / f"index-{least}"
        indices.append(declip.embed(conv, folder, out=out, batch_size=5, workers=0))
    assert compiled == [5] * (1 + -(-count // 5)), "black pixels, then the images"
    plain, fast = (index.vectors(range(count)) for index in indices)
    torch.testing.assert_close(fast, plain, rtol=0, atol=2e-3)
    assert all(torch.equal(statistics[name], value) for name, value in conv.named_buffers())
