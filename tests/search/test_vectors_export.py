"""Vectors of an index in Parquet and NumPy files."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from declip.errors import UserError
from declip.search.index import Index
from indices import write_index, write_pairs


def test_both_files_hold_the_vectors_in_their_order(tmp_path: Path, command: Any) -> None:
    vectors = torch.nn.functional.normalize(torch.randn(1200, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    folder = write_index(tmp_path / "index", vectors)
    assert command("index", "export", folder, tmp_path / "x.npy").status == 0
    assert command("index", "export", folder, tmp_path / "x.parquet").status == 0
    index = Index.open(folder)
    loaded, table = np.load(tmp_path / "x.npy"), pq.read_table(tmp_path / "x.parquet")
    assert (loaded.dtype, loaded.shape) == (np.float32, (1200, 8))
    assert np.array_equal(loaded, vectors.numpy())
    assert np.array_equal(np.array(table["vector"].to_pylist(), np.float32), vectors.numpy())
    assert table["key"].to_pylist() == index.keys()
    rows = list(csv.DictReader((tmp_path / "x.csv").open()))
    assert [(int(row["id"]), row["key"]) for row in rows] == list(zip(index.ids.tolist(), index.keys(), strict=True))
    wrong = command("index", "export", folder, tmp_path / "x.txt")
    assert (wrong.status, ".parquet" in wrong.err) == (2, True)


def test_vectors_of_captions_and_of_16_bits(tmp_path: Path, model: Any, folder: Path) -> None:
    import declip

    images, texts = torch.eye(3), torch.eye(3).flip(0)
    index = write_pairs(tmp_path / "index", images, texts, ["a", "", "c"])
    assert np.array_equal(np.load(index.export(tmp_path / "x.npy", over="captions")), texts.numpy())
    with pytest.raises(UserError, match="--captions"):
        Index.open(write_index(tmp_path / "plain", images)).export(tmp_path / "y.npy", over="captions")
    half = declip.embed(model, folder, out=tmp_path / "half")
    loaded = np.load(half.export(tmp_path / "half.npy"))
    assert loaded.dtype == np.float16
    assert np.array_equal(loaded.astype(np.float32), half.vectors(half.ids).numpy())
    assert pq.read_table(half.export(tmp_path / "half.parquet"))["vector"].type.value_type == "float"
