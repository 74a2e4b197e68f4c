"""Embedding of batches in other programs, and indices of the Parquet files that they write."""

import pickle
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import declip
from conftest import refuses
from data.fakes import write_tar
from declip.interchange.declip_file import write_declip_file
from declip.search.embedder import _load, _open
from docs.blocks import ROOT
from indices import tiny_model


def write_rows(path, rows):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({**rows, "vector": list(rows["vector"])}), path)
    return path


def embed_exactly(model, source, out):
    return declip.embed(model, source, out=out, dtype="float32", precision="fp32")


@pytest.fixture
def rows(folder):
    """The 24 images as bytes, a path, a PIL image or an array, and three broken rows."""
    paths = sorted(folder.iterdir())
    images = [path.read_bytes() for path in paths]
    images[:4] = [str(paths[0]), Image.open(paths[1]), np.asarray(Image.open(paths[2]).convert("RGB")),
                  {"bytes": None, "path": str(paths[3])}]  # fmt: skip
    ids = [path.name for path in paths] + ["x", "y", "z"]
    return {"id": ids, "image": [*images, b"no image", None, images[9][:70]]}


def test_an_embedder_returns_a_row_for_each_row(rows, weights_file, folder, tmp_path, monkeypatch):
    index = embed_exactly(weights_file, folder, tmp_path / "index")
    monkeypatch.chdir(weights_file.parent)
    embedder = declip.Embedder(weights_file.name, precision="fp32")
    monkeypatch.chdir(tmp_path)
    sent = pickle.dumps(embedder)
    assert len(sent) < 1000, "without weights"
    _load.cache_clear()
    first, second = (pickle.loads(sent)({name: cells[span] for name, cells in rows.items()})
                     for span in (slice(10), slice(10, None)))  # fmt: skip
    assert _load.cache_info().misses == 1, "a model once a process"
    assert first["id"] + second["id"] == rows["id"]
    assert first["error"] + second["error"][:14] == [""] * 24
    assert [error.partition(":")[0] for error in second["error"][14:]] == [
        "unreadable image", "missing image", "truncated image"]  # fmt: skip
    vectors = np.concatenate([first["vector"], second["vector"]])
    assert (vectors.dtype, vectors.shape) == (np.float32, (27, 16))
    assert np.abs(vectors[:24] - index.vectors(index.ids).numpy()).max() < 1e-6
    assert not vectors[24:].any()
    broken = embedder({"id": np.array([7]), "image": np.array([b"x"], object)})
    assert (broken["id"], broken["vector"].shape, bool(broken["error"][0])) == ([7], (1, 16), True)
    mixed = embedder({"id": [0, 1], "image": [b"x", rows["image"][5]]})["vector"]
    assert (mixed[0].any(), np.abs(mixed[1] - vectors[5]).max() < 1e-6) == (False, True)
    assert embedder({"id": [], "image": []})["vector"].shape == (0, 16)
    refuses(r"no column 'image' but id, photo.*image=", embedder, {"id": [1], "photo": [b""]})


def test_an_index_of_parquet_files(rows, weights_file, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    images = [*(path.read_bytes() for path in sorted(folder.iterdir())), *rows["image"][24:]]
    images = [{"bytes": image, "path": None} for image in images]
    given = datasets.Dataset.from_dict({"id": rows["id"], "image": images})
    made = given.map(
        declip.Embedder(weights_file, precision="fp32"),
        batched=True,
        batch_size=7,
        remove_columns=given.column_names,
    )
    # The first file has errors alone
    for name, span in {"-": range(24, 27), "0": range(5), "1": range(5, 24)}.items():
        made.select(span).to_parquet(str(tmp_path / f"{name}.parquet"))
    out = tmp_path / "index"
    from_parquet = partial(
        declip.Index.from_parquet, str(tmp_path / "*.parquet"), model=weights_file, out=out
    )
    index = from_parquet(dtype="float32")
    own = embed_exactly(weights_file, folder, tmp_path / "own")
    assert (index.keys(), index.info.precision) == (own.keys(), "fp32")
    assert torch.allclose(index.vectors(index.ids), own.vectors(own.ids), atol=1e-6)
    assert index.info.skipped["reasons"]["missing image"] == {"count": 1, "examples": ["y"]}
    hits = [[hit.key for hit in each.search("red", k=5)] for each in (index, own)]
    assert hits[0] == hits[1]
    refuses("--source", index.image, 3)
    assert declip.Index.open(out, source=folder).image(3).tobytes() == own.image(3).tobytes()
    assert len(from_parquet(dtype="float32")) == 24
    refuses("--overwrite", from_parquet)
    assert from_parquet(overwrite=True).info.dtype == "float16"


def test_parquet_files_that_are_refused(rows, weights_file, tmp_path, command):
    made = declip.Embedder(weights_file, precision="fp32")(
        {name: cells[:4] for name, cells in rows.items()}
    )
    write_declip_file(tiny_model(1), tmp_path / "other.safetensors")
    vectors = made["vector"]
    changed = {
        "repeated": ({"id": ["a", "b", "c", "b"]}, "1 ids are in several rows"),
        "model": ({"model": ["0" * 64 + " fp32"] * 4}, "another model, of fingerprint 00000000"),
        "none": ({"error": ["missing image"] * 4}, "no image that can be used"),
        "nan": ({"vector": [*vectors[:3], vectors[3] * np.nan]}, "not of length 1"),
        "length": ({"vector": [*vectors[:3], vectors[3] * 2]}, "not of length 1"),
        "width": ({"vector": [*vectors[:3], vectors[3][:8]]}, "8 or 16 numbers|16 or 8 numbers"),
        "text": ({"vector": ["a"] * 4}, "vectors in .*as `declip.Embedder`"),
    }
    from_parquet = declip.Index.from_parquet
    out = tmp_path / "index"
    for name, (columns, message) in changed.items():
        path = write_rows(tmp_path / f"{name}.parquet", {**made, **columns})
        refuses(message, from_parquet, path, model=weights_file, out=out)
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "less.parquet")
    good = write_rows(tmp_path / "good.parquet", made)
    (tmp_path / "cut.parquet").write_bytes(good.read_bytes()[:-20])
    words = ["index", "from-parquet", "--out", out, "--model"]
    for path, model, message in (
        ("less", weights_file, "no column 'vector'"),
        ("cut", weights_file, "not a Parquet"),
        ("good", tmp_path / "other.safetensors", "another model"),
    ):
        command.refused([message], *words, model, tmp_path / f"{path}.parquet")
    (tmp_path / "empty").mkdir()
    refuses("no .parquet", from_parquet, tmp_path / "empty", model=weights_file, out=out)
    assert not (out / "index.json").exists()
    assert "4 images" in command(*words, weights_file, good).out


@pytest.fixture
def shards(folder, tmp_path):
    """Two shards of twelve images."""
    members = []
    for number, path in enumerate(sorted(folder.iterdir())):
        members.append((f"{number:02d}.png", path.read_bytes()))
        members.append((f"{number:02d}.txt", path.stem.encode()))
    for number in range(2):
        write_tar(tmp_path / f"shards/{number}.tar", members[24 * number : 24 * number + 24])
    return tmp_path / "shards"


def test_numbers_of_a_source_are_embedded_in_any_order(weights_file, shards, tmp_path):
    embedder = declip.Embedder(weights_file, source=shards, precision="fp32")
    for start in (12, 0, 18, 6):  # as Ray Data calls workers
        ids = np.arange(start, start + 6)
        write_rows(tmp_path / f"rows/{start}.parquet", embedder({"id": ids}))
    index = declip.Index.from_parquet(
        tmp_path / "rows", model=weights_file, out=tmp_path / "made", dtype="float32"
    )
    whole = embed_exactly(weights_file, shards, tmp_path / "whole")
    order = np.argsort(index.keys())
    assert [index.keys()[at] for at in order] == whole.keys()
    assert (index.vectors(index.ids[order]) - whole.vectors(whole.ids)).abs().max() < 1e-6
    found = declip.Index.open(index.folder, source=shards)
    (hit,) = found.search(image=found.image(0), k=1)
    assert found.image(hit.id).tobytes() == found.image(0).tobytes()
    refuses("no image 24", embedder, {"id": [23, 24]})


def test_rows_of_two_states_of_a_folder_are_refused(weights_file, folder, tmp_path):
    embedder = declip.Embedder(weights_file, source=folder)
    write_rows(tmp_path / "rows/0.parquet", embedder({"id": range(12)}))
    (folder / "red-triangle.png").rename(folder / "a-new.png")
    _open.cache_clear()  # as in another process
    write_rows(tmp_path / "rows/12.parquet", embedder({"id": range(12, 24)}))
    from_parquet, rows = declip.Index.from_parquet, tmp_path / "rows"
    refuses("1 ids are in several rows", from_parquet, rows, model=weights_file, out="index")


def test_the_example_for_an_array_of_jobs(weights_file, folder, tmp_path, monkeypatch):
    script = (ROOT / "examples/engines/slurm_array.py").read_text()
    monkeypatch.chdir(tmp_path)
    names = [f"shapes/{path.name}\n" for path in sorted(folder.iterdir())]
    (tmp_path / "images.txt").write_text("".join(names))
    script = script.replace("runs/demo", str(weights_file)).replace("1024", "5")
    for task in (1, 0, 2, 1):  # one of them twice
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
        exec(compile(script, "slurm_array.py", "exec"), {})
    index = declip.Index.from_parquet("rows", model=weights_file, out="index")
    assert sorted(index.keys()) == [name.strip() for name in names]
    own = declip.embed(weights_file, folder, out="own")
    order = np.argsort(index.keys())
    torch.testing.assert_close(index.vectors(index.ids[order]), own.vectors(own.ids))
