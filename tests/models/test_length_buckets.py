import pytest
import torch

from declip.models.text_tower import encode_by_length
from models.test_text_tower import captions, small_tower


@pytest.mark.parametrize("buckets", [2, 3, 5, 9])
def test_buckets_give_the_features_and_gradients_of_one_pass(buckets):
    lengths = [20, 3, 9, 3, 12, 8, 20]
    tower, tokens = small_tower().double(), captions(lengths, 20)
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
    [([20, 3, 9, 3, 12, 8, 20], 3, [(3, 8), (2, 16), (2, 20)]), ([5, 9], 1, [(2, 20)]), (None, 4, [(2, 20)])],
)
def test_each_bucket_is_truncated_to_its_own_longest(lengths, buckets, shapes):
    tower, tokens = small_tower(), captions(lengths or [5, 9], 20)
    seen: list[tuple[int, ...]] = []
    tower.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    encode_by_length(tower, tokens, None if lengths is None else torch.tensor(lengths), buckets)
    assert seen == shapes
