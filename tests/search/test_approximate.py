from pathlib import Path

import pytest
import torch

from declip.errors import UserError
from declip.search.approximate import import_faiss
from declip.search.index import Index
from declip.search.manifest import read_manifest
from indices import append_vectors, approximate, clustered, write_index


@pytest.fixture(scope="module")
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def recall(index: Index, queries: torch.Tensor) -> float:
    found, exact = (index.nearest(queries, 10, exact=kind)[0].tolist() for kind in (None, True))
    return sum(len(set(a) & set(b)) for a, b in zip(found, exact, strict=True)) / (10 * len(queries))


def test_few_vectors_or_no_faiss_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_index(tmp_path / "index", torch.eye(8))
    with pytest.raises(UserError, match=r"has 8 images. An approximate index needs 1,000"):
        approximate(folder)
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(UserError, match=r"pip install 'declip\[search\]'"):
        import_faiss()


def test_recall_is_measured_and_reached(tmp_path: Path, generator: torch.Generator) -> None:
    pytest.importorskip("faiss")
    vectors = clustered(4_000, 64, generator)
    folder = write_index(tmp_path / "index", vectors)
    made = approximate(folder)
    assert made.images.recall >= 0.99
    assert (made.images.k, made.images.queries, made.texts) == (10, 200, None)
    assert 1 <= made.probed < made.lists == 4_000 // 39
    index = Index.open(folder)
    queries = clustered(50, 64, generator)
    assert recall(index, queries) > 0.9, "of queries that were not tuned on"
    found, scores = index.nearest(vectors[:20], 1)
    assert found[:, 0].tolist() == list(range(20))
    torch.testing.assert_close(scores[:, 0], torch.ones(20)), "scores are exact, not those of 8 bits"
    assert "recall@10 of exact: 100.0 % (images as queries, n = 200)" in index.summary()


def test_texts_that_lie_elsewhere_are_measured_too(tmp_path: Path, generator: torch.Generator) -> None:
    """Vectors of texts lie apart from those of images, so lists that serve images can fail them."""
    pytest.importorskip("faiss")
    folder = write_index(tmp_path / "index", clustered(4_000, 64, generator))
    texts = clustered(300, 64, generator, seed=1)
    approximate(folder)
    assert recall(Index.open(folder), texts[200:]) < 0.8
    asked: list[list[str]] = []

    def encode(words: list[str]) -> torch.Tensor:
        asked.append(words)
        return texts[:200]

    made = approximate(folder, encode)
    assert asked[0][:2] == ["caption 0", "caption 20"]
    assert made.texts is not None
    assert made.texts.recall >= 0.99
    assert recall(Index.open(folder), texts[200:]) > 0.9


def test_changes_need_no_new_index(tmp_path: Path, generator: torch.Generator) -> None:
    pytest.importorskip("faiss")
    vectors = clustered(2_000, 64, generator)
    folder = write_index(tmp_path / "index", vectors)
    first = approximate(folder)
    index = Index.open(folder)
    index.remove([f"key {number}" for number in range(100)])
    found, _ = index.nearest(vectors[:100], 10)
    assert found.min() >= 100, "hidden at once"
    assert found.shape == (100, 10)

    later = clustered(30, 64, generator)
    append_vectors(folder, index.manifest, later)
    index = Index.open(folder)
    assert index.nearest(later, 1)[0][:, 0].tolist() == list(range(2_000, 2_030)), "searched exactly"
    second = approximate(folder)
    assert (second.lists, second.covered) == (first.lists, 2_030), "added to the same lists"
    assert [path.name for path in folder.glob("*.faiss")] == [second.file]

    index = Index.open(folder)
    index.compact()
    assert index.nearest(later, 1)[0][:, 0].tolist() == list(range(2_000, 2_030))
    assert index.nearest(vectors[:100], 10)[0].min() >= 100
    assert recall(index, clustered(50, 64, generator)) > 0.9


def test_a_damaged_or_missing_file_is_said(
    tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    vectors = clustered(1_000, 16, generator)
    folder = write_index(tmp_path / "index", vectors)
    path = folder / approximate(folder).file
    with monkeypatch.context() as patched:
        patched.setitem(__import__("sys").modules, "faiss", None)
        assert Index.open(folder).nearest(vectors[:1], 1)[0].item() == 0, "exact where faiss is missing"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"approximate index '.*' is damaged"):
        Index.open(folder).nearest(vectors[:1], 1)
    assert Index.open(folder).nearest(vectors[:1], 1, exact=True)[0].item() == 0
    assert read_manifest(folder).approximate is not None
