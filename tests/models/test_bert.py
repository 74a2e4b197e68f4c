"""BERT's encoder without transformers, compared with transformers'."""

import pytest
import torch

from declip.models.hf_encoder import Bert, is_plain

SIZES = {
    "model_type": "bert", "hidden_act": "gelu", "vocab_size": 60, "max_position_embeddings": 20, "type_vocab_size": 2,
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2, "layer_norm_eps": 1e-6, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
def test_states_and_gradients_are_those_of_transformers(training):
    transformers = pytest.importorskip("transformers")
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
