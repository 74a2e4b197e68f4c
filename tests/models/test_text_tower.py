import pytest
import torch

from conftest import Lazy
from declip.models.text_tower import TextTower, encode_by_length
from declip.recipe.schema import TextTowerConfig

transformer = Lazy("open_clip.transformer")
VOCABULARY, END = 50, 48


def small_tower(**options):
    torch.manual_seed(0)
    text = TextTowerConfig(width=32, layers=2, heads=4, context_length=20, **options)
    return TextTower(VOCABULARY, END, text, embed_dim=12)


def captions(lengths, context):
    tokens = torch.randint(1, 47, (len(lengths), context))
    for row, length in zip(tokens, lengths, strict=True):
        row[length - 1], row[length:] = END, 0
    return tokens


def test_a_batch_cut_to_its_longest_caption_equals_the_padded_one():
    tower, tokens = small_tower().double(), captions([5, 8, 3], 20)
    tokens[0, 2] = VOCABULARY - 1  # an id above the end's does not move the pooling
    padded, cut = tower(tokens), tower(tokens[:, :8])
    assert torch.equal(padded.lengths, torch.tensor([5, 8, 3]))
    torch.testing.assert_close(cut.pooled, padded.pooled, rtol=0, atol=1e-12)
    torch.testing.assert_close(cut.text_tokens, padded.text_tokens[:, :8], rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_equals_open_clip_on_the_same_weights(activation):
    tower = small_tower(activation=activation).double()
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs = transformer.TextTransformer(
        context_length=20, vocab_size=VOCABULARY, width=32, heads=4, layers=2, output_dim=12,
        act_layer=transformer.QuickGELU if activation == "quick_gelu" else torch.nn.GELU, pool_type="eos", eos_id=END,
    ).double()  # fmt: skip
    state = dict(tower.state_dict())
    state["text_projection"] = state.pop("text_projection.weight").T
    theirs.load_state_dict(state, strict=True)
    tokens = captions([20, 7, 2], 20)
    torch.testing.assert_close(tower(tokens).pooled, theirs(tokens), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("buckets", [2, 3, 5, 9])
def test_buckets_give_the_features_and_gradients_of_one_pass(buckets):
    lengths = [20, 3, 9, 3, 12, 8, 20]
    tower, tokens = small_tower().double(), captions(lengths, 20)
    whole = tower(tokens)
    found = encode_by_length(tower, tokens, torch.tensor(lengths), buckets)
    torch.testing.assert_close(found.pooled, whole.pooled, rtol=0, atol=1e-12)
    assert found.lengths.tolist() == lengths
    for row, length in enumerate(lengths):
        torch.testing.assert_close(
            found.text_tokens[row, :length], whole.text_tokens[row, :length], rtol=0, atol=1e-12
        )
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
        ([20, 3, 9, 3, 12, 8, 20], 3, [(3, 8), (2, 16), (2, 20)]),
        ([5, 9], 1, [(2, 20)]),
        (None, 4, [(2, 20)]),
    ],
)
def test_each_bucket_is_truncated_to_its_own_longest(lengths, buckets, shapes):
    tower, tokens = small_tower(), captions(lengths or [5, 9], 20)
    seen = []
    tower.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    encode_by_length(tower, tokens, None if lengths is None else torch.tensor(lengths), buckets)
    assert seen == shapes
