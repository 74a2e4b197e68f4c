"""Indices of what several processes embedded."""

import os
import pickle
import shutil
import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import declip
from conftest import draw, refuses
from data.fakes import write_tar
from declip.interchange.declip_file import write_declip_file
from declip.io.parts import parse_part
from declip.search import embed as embedding
from declip.search.joined import _load
from indices import tiny_model
from search.test_embed import Interrupted


def write_rows(path, rows):
    pq.write_table(pa.table({**rows, "vector": list(rows["vector"])}), path)
    return path


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
    index = declip.embed(weights_file, folder, out=tmp_path / "index", dtype="float32", precision="fp32")
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
    assert embedder({"id": [], "image": []})["vector"].shape == (0, 16)
    refuses(r"no column 'image' but id, photo.*image=", embedder, {"id": [1], "photo": [b""]})


def test_an_index_of_parquet_files(rows, weights_file, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("declip.search.joined.PART_ROWS", 7)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    images = [*(path.read_bytes() for path in sorted(folder.iterdir())), *rows["image"][24:]]
    images = [{"bytes": image, "path": None} for image in images]
    given = datasets.Dataset.from_dict({"id": rows["id"], "image": images})
    made = given.map(
        declip.Embedder(weights_file, precision="fp32"), batched=True, batch_size=7, remove_columns=given.column_names
    )
    for number, span in enumerate((range(5), range(5, 27))):
        made.select(span).to_parquet(str(tmp_path / f"{number}.parquet"))
    files, out = str(tmp_path / "*.parquet"), tmp_path / "index"
    index = declip.Index.from_parquet(files, model=weights_file, out=out, dtype="float32")
    own = declip.embed(weights_file, folder, out=tmp_path / "own", dtype="float32", precision="fp32")
    assert (index.keys(), index.info.precision) == (own.keys(), "fp32")
    assert torch.allclose(index.vectors(index.ids), own.vectors(own.ids), atol=1e-6)
    assert index.info.skipped["reasons"]["missing image"] == {"count": 1, "examples": ["y"]}
    assert [hit.key for hit in index.search("red", k=5)] == [hit.key for hit in own.search("red", k=5)]
    refuses("--source", index.image, 3)
    assert declip.Index.open(out, source=folder).image(3).tobytes() == own.image(3).tobytes()
    again = declip.Index.from_parquet(files, model=weights_file, out=out, dtype="float32")
    assert (len(again), again.info.generation) == (24, 2)


def test_parquet_files_that_are_refused(rows, weights_file, tmp_path, command):
    made = declip.Embedder(weights_file, precision="fp32")({name: cells[:4] for name, cells in rows.items()})
    write_declip_file(tiny_model(1), tmp_path / "other.safetensors")
    vectors = made["vector"]
    changed = {
        "repeated": ({"id": ["a", "b", "c", "b"]}, "1 ids are in several rows"),
        "model": ({"model": ["0" * 64 + " fp32"] * 4}, "another model, of fingerprint 00000000"),
        "none": ({"error": ["missing image"] * 4}, "no image that can be used"),
        "nan": ({"vector": [*vectors[:3], vectors[3] * np.nan]}, "not of length 1"),
        "width": ({"vector": [*vectors[:3], vectors[3][:8]]}, "8 or 16 numbers|16 or 8 numbers"),
        "text": ({"vector": ["a"] * 4}, "vectors in .*as `declip.Embedder`"),
    }
    for name, (columns, message) in changed.items():
        path = write_rows(tmp_path / f"{name}.parquet", {**made, **columns})
        refuses(message, declip.Index.from_parquet, path, model=weights_file, out=tmp_path / "index")
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "less.parquet")
    good = write_rows(tmp_path / "good.parquet", made)
    (tmp_path / "cut.parquet").write_bytes(good.read_bytes()[:-20])
    for path, model, message in (("less", weights_file, "no column 'vector'"), ("cut", weights_file, "not a Parquet"),
                                 ("good", tmp_path / "other.safetensors", "another model")):  # fmt: skip
        files, out = tmp_path / f"{path}.parquet", tmp_path / "index"
        refused = command("index", "from-parquet", files, "--model", model, "--out", out)
        assert (refused.status, message in " ".join(refused.err.split())) == (2, True), refused.err
    assert not (out / "index.json").exists()
    assert "4 images" in command("index", "from-parquet", good, "--model", weights_file, "--out", out).out


def test_parts_are_one_index(weights_file, folder, tmp_path, command):
    (folder / "blue-bar.png").write_bytes(b"no image")
    out = tmp_path / "index"
    embed = ["embed", weights_file, folder, "--out", out, "--dtype", "float32", "--precision", "fp32", "--quiet"]
    for part in ("3/3", "1/3", "3/3"):
        assert command(*embed, "--part", part).status == 0
    refused = command("index", "join", out)
    assert (refused.status, "Part 2 of 3 is missing" in refused.err, "--part 2/3" in refused.err) == (2, True, True)
    assert command(*embed, "--part", "2/3").status == 0
    # --- joined, twice; equal to one call, and updated as one
    whole = declip.embed(weights_file, folder, out=tmp_path / "whole", dtype="float32", precision="fp32")
    for _ in range(2):
        assert "23 images" in command("index", "join", out).out
        index = declip.Index.open(out)
        assert (index.keys(), index.ids.tolist()) == (whole.keys(), whole.ids.tolist())
        assert torch.allclose(index.vectors(index.ids), whole.vectors(whole.ids), atol=1e-6)
        assert [index.row(id).place for id in (0, 9, 22)] == [whole.row(id).place for id in (0, 9, 22)]
        assert index.info.skipped == whole.info.skipped
    draw("pink", "bar").save(folder / "zz.png")
    updated = declip.embed(weights_file, folder, out=out, dtype="float32", precision="fp32")
    assert updated.ids.tolist() == [*range(23), 23], "only the new one is embedded"
    assert "without parts" in command("index", "join", out).err


def test_a_killed_part_continues(model, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "PART_ROWS", 4)
    for number in (1, 2):
        killed, repeated = Interrupted(folder, 6), Interrupted(folder)
        with pytest.raises(KeyboardInterrupt):
            declip.embed(model, killed, out=tmp_path / "index", part=(number, 2), batch_size=2)
        refuses(f"Part {number} of 2", declip.Index.join, tmp_path / "index")
        declip.embed(model, repeated, out=tmp_path / "index", part=(number, 2), batch_size=2)
        assert repeated.read[0] == 12 * number - 8, "after the first four images"
    index = declip.Index.join(tmp_path / "index")
    whole = declip.embed(model, Interrupted(folder), out=tmp_path / "whole", batch_size=2)
    assert torch.equal(index.vectors(index.ids), whole.vectors(whole.ids))


def test_parts_that_do_not_fit_are_refused(model, folder, tmp_path):
    out = tmp_path / "index"
    for given in ("0/3", "4/3", "3", "1/0"):
        refuses(f"--part is '{given}'", parse_part, given)
    refuses("only 24 images for 25 parts", declip.embed, model, folder, out=out, part=(1, 25))
    refuses("has no parts", declip.Index.join, out)
    declip.embed(model, folder, out=out, part=(1, 2))
    declip.embed(tiny_model(1), folder, out=out, part=(2, 2))
    refuses("another model", declip.Index.join, out)
    shutil.rmtree(f"{out}.part-2-of-2")
    (folder / "red-bar.png").unlink()
    declip.embed(model, folder, out=out, part=(2, 2))
    refuses("another number of images", declip.Index.join, out)
    declip.embed(model, folder, out=out, part=(1, 3))
    refuses("parts of 2 and 3", declip.Index.join, out)


@pytest.mark.slow
def test_ray_with_a_worker_that_is_killed(weights_file, folder, tmp_path, monkeypatch):
    for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}.items():
        monkeypatch.setenv(name, value)
    import ray
    import ray.data

    # --- shards, which each worker reads by declip's reader
    members = [(f"{n:02d}.{kind}", data) for n, path in enumerate(sorted(folder.iterdir()))
               for kind, data in (("png", path.read_bytes()), ("txt", path.stem.encode()))]  # fmt: skip
    write_tar(tmp_path / "shards/0.tar", members[:24])
    write_tar(tmp_path / "shards/1.tar", members[24:])
    shards, killed = tmp_path / "shards", tmp_path / "killed"
    sent = pickle.dumps(declip.Embedder(weights_file, source=shards, precision="fp32"))

    def work(batch):
        if 9 in batch["id"] and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return pickle.loads(sent)(batch)  # only now, because torch takes seconds to import

    # --- two workers
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        rows = ray.data.range(24, override_num_blocks=4).map_batches(work, batch_size=None)
        rows.write_parquet(str(tmp_path / "rows"))
    finally:
        ray.shutdown()
    # --- all rows are there, once, and equal those of one process
    assert killed.exists()
    index = declip.Index.from_parquet(tmp_path / "rows", model=weights_file, out=tmp_path / "made", dtype="float32")
    whole = declip.embed(weights_file, shards, out=tmp_path / "whole", precision="fp32", dtype="float32")
    order = np.argsort(index.keys())
    assert [index.keys()[at] for at in order] == whole.keys()
    assert (index.vectors(index.ids[order]) - whole.vectors(whole.ids)).abs().max() < 1e-6
    found = declip.Index.open(index.folder, source=shards)
    assert found.image(0).tobytes() == found.image(int(found.search(image=found.image(0), k=1)[0].id)).tobytes()
