import pytest
import torch

from declip.models.length_buckets import encode_by_length
from declip.models.text_tower import TextTower

END, CONTEXT = 40, 24


@pytest.fixture
def tower() -> TextTower:
    torch.manual_seed(0)
    return TextTower(vocabulary=42, end=END, embed_dim=8, width=16, layers=2, heads=2, context=CONTEXT).double()


def captions(lengths: list[int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, END, (len(lengths), CONTEXT), generator=generator)
    for row, length in enumerate(lengths):
        tokens[row, length - 1] = END
        tokens[row, length:] = 0
    return tokens


@pytest.mark.parametrize("buckets", [2, 3, 5, 9])
def test_buckets_give_the_features_and_gradients_of_one_pass(tower: TextTower, buckets: int) -> None:
    lengths = [24, 3, 9, 3, 17, 8, 24]
    tokens = captions(lengths)
    whole = tower(tokens)
    found = encode_by_length(tower, tokens, torch.tensor(lengths), buckets)
    torch.testing.assert_close(found.pooled, whole.pooled, rtol=0, atol=1e-12)
    assert found.lengths.tolist() == lengths
    for row, length in enumerate(lengths):
        torch.testing.assert_close(found.text_tokens[row, :length], whole.text_tokens[row, :length], rtol=0, atol=1e-12)
    weights = list(tower.parameters())
    for given, expected in zip(
        torch.autograd.grad(found.pooled.square().sum(), weights),
        torch.autograd.grad(whole.pooled.square().sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("lengths", "buckets", "shapes"),
    [
        ([24, 3, 9, 3, 17, 8, 24], 3, [(3, 8), (2, 24), (2, 24)]),
        ([5, 9], 1, [(2, CONTEXT)]),
        (None, 4, [(2, CONTEXT)]),
    ],
)
def test_each_bucket_is_truncated_to_its_own_longest(
    tower: TextTower, lengths: list[int] | None, buckets: int, shapes: list[tuple[int, int]]
) -> None:
    tokens = captions(lengths or [5, 9])
    seen: list[tuple[int, ...]] = []
    tower.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    encode_by_length(tower, tokens, None if lengths is None else torch.tensor(lengths), buckets)
    assert seen == shapes
