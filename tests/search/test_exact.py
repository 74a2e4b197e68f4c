import numpy as np
import pytest
import torch

from declip.search import exact
from declip.search.exact import nearest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nearest_equals_a_loop_in_float64(dtype, monkeypatch):
    monkeypatch.setattr(exact, "ROWS", 30)
    monkeypatch.setattr(exact, "BLOCK_BYTES", 4 * 24 * 7)  # 7 rows: blocks do not divide the parts
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(100, 24, generator=generator).to(dtype)
    queries = torch.randn(5, 24, generator=generator)
    ids = torch.arange(100) * 3 + 1
    dead = torch.rand(100, generator=generator) < 0.3
    dead[60:90] = True  # a block of which nothing is alive
    vectors[dead] = 0
    found, scores = nearest(queries, ids, vectors, 10, skip_zeros=True)

    products = queries.numpy().astype(np.float64) @ vectors.numpy().astype(np.float64).T
    for row, own in enumerate(products):
        best = sorted((-score, int(ids[at])) for at, score in enumerate(own) if not dead[at])[:10]
        assert found[row].tolist() == [id_ for _, id_ in best]
        np.testing.assert_allclose(scores[row], [-score for score, _ in best], rtol=1e-5)


@pytest.mark.parametrize("k", [1, 5, 20, 60])
def test_of_equal_scores_the_first_ids_are_taken(k, monkeypatch):
    monkeypatch.setattr(exact, "ROWS", 150)
    vectors = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    copies = [7, *range(100, 200), *range(250, 300)]
    vectors[copies] = 2 * vectors.norm(dim=1).max() * torch.nn.functional.normalize(torch.ones(8), dim=0)
    assert nearest(torch.ones(1, 8), torch.arange(300), vectors, k)[0].tolist() == [copies[:k]]


def test_few_vectors_give_few_results():
    vectors = torch.tensor([1.0, 0, 1, 1])[:, None].expand(4, 8)
    assert (
        nearest(torch.ones(2, 8), torch.tensor([2, 5, 7, 9]), vectors, 10, skip_zeros=True)[0].tolist()
        == [[2, 7, 9]] * 2
    )
    assert nearest(torch.ones(1, 8), torch.arange(0), torch.ones(0, 8), 3)[0].shape == (1, 0)
