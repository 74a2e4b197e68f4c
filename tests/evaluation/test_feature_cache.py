"""Features on the disk: what is a hit, what is a miss, and what is made anew."""

import io
import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from declip.evaluation.datasets import open_dataset
from declip.evaluation.feature_cache import SPOT_CHECKS, FeatureCache

NAMES = ("red", "green", "blue")
COLOURS = ["red", "green", "blue", "red", "blue", "green", "green", "red"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path))
    return tmp_path / "features"


@pytest.fixture
def source(painted):
    return painted(COLOURS, classes=NAMES, broken=[2])


def _seen(model) -> int:
    """Images encoded so far."""
    return sum(size for kind, size, *_ in model.passes if kind == "image")


def test_a_second_look_reads_the_file_and_encodes_a_few(model, source, folder, caplog) -> None:
    with caplog.at_level(logging.INFO, "declip"):
        first = FeatureCache(model, "embedding").images(source, "train")
    assert str(folder) in caplog.text
    assert _seen(model) == 7
    assert len(list(folder.iterdir())) == 1
    second = FeatureCache(model, "embedding").images(source, "train")
    assert _seen(model) == 7 + SPOT_CHECKS
    assert torch.equal(first.images, second.images)
    assert second.indices.tolist() == first.indices.tolist() == [0, 1, 3, 4, 5, 6, 7]
    assert second.skipped.counts == {"truncated image": 1}


def _change(what: str, model, source) -> None:
    if what == "weights":
        model.gain.data += 1e-3
    elif what == "buffer":
        model.frozen.running_mean += 1
    elif what == "preprocessing":
        before = model.preprocess
        model.preprocess = lambda images: before(images) * 0.999
    elif what == "name":
        source.name = "repainted"
    elif what == "labels":
        source.labels = source.labels[::-1].copy()
    else:
        source.class_names = ("red", "green", "azure")


@pytest.mark.parametrize("change", ["weights", "buffer", "preprocessing", "name", "labels", "classes"])
def test_a_change_is_a_miss(model, source, folder, change) -> None:
    FeatureCache(model, "embedding").images(source, "train")
    _change(change, model, source)
    seen = _seen(model)
    FeatureCache(model, "embedding").images(source, "train")
    assert _seen(model) - seen == len(source) - 1
    assert len(list(folder.iterdir())) == 2


def test_another_split_or_kind_is_a_miss(model, source, folder) -> None:
    model.encode_backbone = lambda pixels: 3 * pixels.mean((2, 3))
    for kind, split in (("embedding", "train"), ("embedding", "test"), ("backbone", "train")):
        found = FeatureCache(model, kind).images(source, split)
    assert len(list(folder.iterdir())) == 3
    np.testing.assert_allclose(found.images[:2], [[3, 0, 0], [0, 3, 0]])  # as the model gives them


def _flipped(place: int):
    return lambda content: content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :]


def _cut(length: int):
    return lambda content: content[:length]


def _foreign(content: bytes) -> bytes:
    np.savez(other := io.BytesIO(), something=np.ones(1))
    return other.getvalue()


DAMAGES = [_flipped(0), _flipped(100), _flipped(210), _flipped(230), _cut(0), _cut(4), _cut(300), _foreign]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_anew(model, source, caplog, damage) -> None:
    cache = FeatureCache(model, "embedding")
    good, path = cache.images(source, "train"), cache.path(source, "train")
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    with caplog.at_level(logging.WARNING, "declip"):
        assert torch.equal(cache.images(source, "train").images, good.images)
    assert "damaged" in caplog.text
    assert path.read_bytes() != damaged
    seen = _seen(model)
    cache.images(source, "train")
    assert _seen(model) - seen == SPOT_CHECKS


def test_other_images_behind_the_same_names_and_changed_code_are_noticed(model, source) -> None:
    cache = FeatureCache(model, "embedding")
    cache.images(source, "train")
    source.colors = ["blue", *COLOURS[1:]]
    assert cache.images(source, "train").images[0].tolist() == [0, 0, 1]
    model.encode_image = lambda pixels: pixels.amax((2, 3)) + 0.1
    again = FeatureCache(model, "embedding").images(source, "train")
    np.testing.assert_allclose(again.images[0], [0.1, 0.1, 1.1], rtol=1e-6)


@pytest.mark.parametrize("kind", ["folder", "jsonl", "parquet"])
def test_one_image_replaced_under_its_name_is_a_miss(model, tmp_path, kind) -> None:
    root = tmp_path / "set"
    paths = [root / COLOURS[0 if row % 2 else 1] / f"{row}.png" for row in range(8)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), path.parent.name).save(path)
    table = tmp_path / f"set.{kind}"

    def features() -> list[list[float]]:
        if kind == "jsonl":
            lines = [json.dumps({"image": str(path), "label": path.parent.name}) for path in paths]
            table.write_text("\n".join(lines) + "\n", encoding="utf-8")
        elif kind == "parquet":
            cells = {"image": [path.read_bytes() for path in paths], "label": [path.parent.name for path in paths]}
            pq.write_table(pa.table(cells), table)
        source = open_dataset(f"folder:{root}" if kind == "folder" else str(table)).split("test")
        return FeatureCache(model, "embedding").images(source, "test").images.tolist()

    before = features()
    assert features() == before
    # The second of eight is none of those that are encoded again on a hit.
    second = sorted(paths)[1] if kind == "folder" else paths[1]
    Image.new("RGB", (8, 8), "blue").save(second)
    after = features()
    assert after[1] == [0, 0, 1]
    assert [row for place, row in enumerate(after) if place != 1] == [r for p, r in enumerate(before) if p != 1]


def test_a_folder_that_cannot_be_written_is_only_logged(model, source, folder, caplog) -> None:
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, "declip"):
        found = FeatureCache(model, "embedding").images(source, "train")
    assert len(found.images) == 7
    assert "not stored" in caplog.text
