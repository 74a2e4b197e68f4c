import json
from functools import partial

import pytest
import torch

from conftest import refuses
from declip.models.dual_encoder import DualEncoder
from declip.models.hf_encoder import Bert, is_plain
from declip.models.layers import blocks_of
from declip.models.text_tower import encode_by_length
from declip.models.wrapped import encoder_kept_in
from declip.supervision.objective import Objective
from declip.training.optimizer import decays
from text_encoders import CAPTIONS, bert, distilbert, model_of, roberta

transformers = pytest.importorskip("transformers")

KINDS = {
    "bert": bert,
    "roberta": roberta,
    "xlm-roberta": partial(roberta, kind="XLMRoberta"),
    "camembert": partial(roberta, kind="Camembert"),
    "distilbert": distilbert,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    return {kind: make(root / kind) for kind, make in KINDS.items()}


def states(folder, tokens, padding):
    """transformers' own token states, of the public class and from the public mask."""
    theirs = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False).double().eval()
    return theirs(input_ids=tokens, attention_mask=(tokens != padding).long()).last_hidden_state


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("pooling", ["auto", "cls", "mean", "eos"])
def test_features_are_transformers_own_pooled_and_projected(folders, kind, pooling):
    model = model_of(folders[kind], pooling=pooling, projection_bias=True).double()
    tower, tokens = model.text_tower, model.tokenize(CAPTIONS)
    words, found = states(folders[kind], tokens, model.tokenizer.padding), tower(tokens)
    rows = [[int(token) for token in row if token != model.tokenizer.padding] for row in tokens]
    pool = {
        "cls": lambda row, length: row[0],
        "auto": lambda row, length: row[0],
        "mean": lambda row, length: row[:length].mean(dim=0),
        "eos": lambda row, length: row[length - 1],
    }[pooling]
    expected = torch.stack([pool(row, len(ids)) for row, ids in zip(words, rows, strict=True)])
    expected = expected @ tower.text_projection.weight.T + tower.text_projection.bias
    assert found.lengths.tolist() == [len(ids) for ids in rows]
    torch.testing.assert_close(found.pooled, expected, rtol=0, atol=1e-6)
    for row, length in enumerate(found.lengths):
        torch.testing.assert_close(found.text_tokens[row, :length], words[row, :length], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "include_prompt": True}, "cls"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}, "mean"),
        ({"pooling_mode_lasttoken": True}, "eos"),
        ({"word_embedding_dimension": 32}, "mean"),
        ({"pooling_mode": "lasttoken"}, "eos"),
        ({"pooling_mode": ["cls"]}, "cls"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, None),
        ({"pooling_mode": "weightedmean"}, None),
    ],
)
def test_auto_pools_as_a_sentence_encoder_says(tmp_path, config, expected):
    folder = bert(tmp_path / "bert")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps(config))
    assert model_of(folder, pooling="mean").text_tower.pooling == "mean"
    if expected is None:
        refuses("1_Pooling", model_of, folder)
        return
    model = model_of(folder)
    assert model.text_tower.pooling == expected
    kept = encoder_kept_in(model.state_dict(), model.recipe, folder)
    assert DualEncoder.from_recipe(model.recipe, kept).text_tower.pooling == expected


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_matter_every_parameter_learns_and_blocks_are_found(folders, kind):
    model = model_of(folders[kind]).double()
    tokens = model.tokenize(CAPTIONS)
    lengths = torch.tensor([len(model.tokenizer.encode(text)) for text in CAPTIONS])
    for model.text_tower.pooling in ("cls", "mean", "eos"):
        whole = model.text_tower(tokens)
        found = encode_by_length(model.text_tower, tokens, lengths, 3)
        assert found.lengths.tolist() == whole.lengths.tolist() == lengths.tolist()
        torch.testing.assert_close(found.pooled, whole.pooled, rtol=0, atol=1e-12)
    tower = model.text_tower.train()
    assert len(blocks_of(tower)) == 2
    tower(torch.tensor([[5, 6, 7, 8]])).pooled.square().sum().backward()
    assert [name for name, parameter in tower.named_parameters() if parameter.grad is None] == []
    undecayed = [n for n, p in tower.named_parameters() if p.ndim > 1 and not decays(n, p)]
    assert undecayed == ["encoder.embeddings.position_embeddings.weight"]


def test_the_language_head_starts_as_the_word_embeddings(folders):
    model = model_of(folders["bert"], "declip")
    head = Objective(model.recipe, model).terms["masked_language"].head
    words = model.text_tower.encoder.embeddings.word_embeddings.weight
    assert torch.equal(head.weight, words)
    assert head.weight.data_ptr() != words.data_ptr()


def test_random_weights_come_from_the_seed(folders):
    first, second = (model_of(folders["bert"], pretrained=False).state_dict() for _ in range(2))
    pretrained = model_of(folders["bert"]).state_dict()
    name = "text_tower.encoder.embeddings.word_embeddings.weight"
    assert torch.equal(first[name], second[name])
    assert not torch.allclose(first[name], pretrained[name], atol=0.01)


SIZES = {
    "model_type": "bert", "hidden_act": "gelu", "vocab_size": 60, "max_position_embeddings": 20, "type_vocab_size": 2,
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2, "layer_norm_eps": 1e-6, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
def test_states_and_gradients_are_those_of_transformers(training):
    theirs = transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=False).train(training)
    ours = Bert(SIZES).train(training)
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randint(1, 60, (5, 9), generator=torch.Generator().manual_seed(0))
    tokens[1:3, 4:] = 0
    mask = (tokens != 0)[:, None, None, :]
    results = []
    for model in (ours, theirs):
        torch.manual_seed(1)  # of dropout
        states = model(input_ids=tokens, attention_mask=mask).last_hidden_state
        states.square().sum().backward()
        results.append((states, model.embeddings.word_embeddings.weight.grad))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", [{"model_type": "roberta"}, {"hidden_act": "relu"}])
def test_other_encoders_are_left_to_transformers(change):
    assert is_plain(SIZES)
    assert not is_plain(SIZES | change)
