import sys
from pathlib import Path

import pytest
import torch

from declip.errors import UserError
from declip.search.approximate import FILE
from declip.search.index import Index
from indices import append_vectors, approximate, clustered, write_index

pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def recall(index: Index, queries: torch.Tensor) -> float:
    found, exact = (index.nearest(queries, 10, exact=kind)[0].tolist() for kind in (None, True))
    return sum(len(set(a) & set(b)) for a, b in zip(found, exact, strict=True)) / (10 * len(queries))


def test_recall_is_reached_and_measured_for_images_and_for_texts(tmp_path: Path, generator: torch.Generator) -> None:
    """Vectors of texts lie apart from those of images, so lists that serve images can fail them."""
    vectors, texts = clustered(4_000, 64, generator), clustered(300, 64, generator, seed=1)
    folder = write_index(tmp_path / "index", vectors)
    made = approximate(folder)
    assert made.image_recall >= 0.99
    assert made.text_recall is None
    assert 1 <= made.probed < made.lists == 4_000 // 39
    index = Index.open(folder)
    assert "recall@10 of exact: 100.0 % (images as queries)" in index.summary()
    assert recall(index, clustered(50, 64, generator)) > 0.9, "of queries that were not tuned on"
    assert recall(index, texts[200:]) < 0.8
    found, scores = index.nearest(vectors[:20], 1)
    assert found[:, 0].tolist() == list(range(20))
    torch.testing.assert_close(scores[:, 0], torch.ones(20)), "scores are exact, not those of 8 bits"

    asked: list[list[str]] = []
    made = approximate(folder, lambda words: asked.append(words) or texts[:200])  # type: ignore[func-returns-value]
    assert asked[0][:2] == ["caption 0", "caption 20"]
    assert made.text_recall is not None
    assert made.text_recall >= 0.99
    assert recall(Index.open(folder), texts[200:]) > 0.9


def test_changes_need_no_new_index(tmp_path: Path, generator: torch.Generator) -> None:
    vectors, later = clustered(2_000, 64, generator), clustered(30, 64, generator)
    folder = write_index(tmp_path / "index", vectors)
    approximate(folder)
    index = Index.open(folder)
    index.remove([f"key {number}" for number in range(100)])
    found, _ = index.nearest(vectors[:100], 10)
    assert found.min() >= 100, "removed at once"
    assert found.shape == (100, 10)
    append_vectors(folder, index.manifest, later)
    assert Index.open(folder).nearest(later, 1)[0][:, 0].tolist() == list(range(2_000, 2_030)), "searched exactly"
    assert approximate(folder).covered == 2_030
    assert Index.open(folder).nearest(later, 1)[0][:, 0].tolist() == list(range(2_000, 2_030))


def test_faiss_or_a_file_that_is_missing_and_damage_are_said(
    tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="needs 39 or more"):
        approximate(write_index(tmp_path / "few", torch.eye(8)))
    vectors = clustered(1_000, 16, generator)
    folder = write_index(tmp_path / "index", vectors)
    approximate(folder)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "faiss", None)
        assert Index.open(folder).nearest(vectors[:1], 1)[0].item() == 0, "exact where faiss is missing"
        with pytest.raises(UserError, match=r"pip install 'declip\[search\]'"):
            approximate(folder)
    path = folder / FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"approximate index '.*' is damaged"):
        Index.open(folder).nearest(vectors[:1], 1)
    assert Index.open(folder).nearest(vectors[:1], 1, exact=True)[0].item() == 0
