"""Hugging Face text encoders: transformers' features, and one sentence for each that cannot be used."""

import json
import sys
from functools import partial

import pytest
import torch

from conftest import refuses
from declip.models.dual_encoder import DualEncoder
from declip.models.hf_encoder import ENTRY, Bert, TextEncoder, read_encoder
from declip.models.layers import blocks_of
from declip.models.stored import encoder_kept_in
from declip.models.text_tower import encode_by_length
from declip.supervision.objective import Objective
from declip.training.optimizer import decays
from text_encoders import CAPTIONS, bert, distilbert, model_of, roberta, transformers

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
    padding = model.tokenizer.padding
    found, lengths = tower(tokens), (tokens != padding).sum(dim=1).tolist()
    assert found.lengths.tolist() == lengths
    states_of = zip(states(folders[kind], tokens, padding), lengths, strict=True)
    words = [row[:length] for row, length in states_of]
    pool = {
        "cls": lambda row: row[0],
        "auto": lambda row: row[0],
        "mean": lambda row: row.mean(dim=0),
        "eos": lambda row: row[-1],
    }[pooling]
    expected = torch.stack([pool(row) for row in words])
    expected = expected @ tower.text_projection.weight.T + tower.text_projection.bias
    torch.testing.assert_close(found.pooled, expected, rtol=0, atol=1e-6)
    for own, row in zip(found.text_tokens, words, strict=True):
        torch.testing.assert_close(own[: len(row)], row, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True, "include_prompt": True}, "mean"),
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
    kept = encoder_kept_in(model.state_dict(), folder)
    assert DualEncoder(model.recipe, kept).text_tower.pooling == expected


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


def test_states_and_gradients_are_those_of_transformers():
    config = transformers.BertConfig(**SIZES)
    theirs = transformers.BertModel(config, add_pooling_layer=False).train()
    ours = Bert(SIZES).train()
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


@pytest.mark.parametrize("change", [{}, {"model_type": "roberta"}, {"hidden_act": "relu"}])
def test_other_encoders_are_left_to_transformers(change):
    built = TextEncoder(SIZES | change, "", {}, filled_later=True).build()
    assert isinstance(built, Bert) == (change == {})


def changed(folder, **config):
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**found, **config}))
    return folder


def test_a_folder_that_is_none_and_a_missing_library(tmp_path, monkeypatch):
    refuses(r"not a folder with config\.json", model_of, tmp_path)
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("[]")
    refuses("not the configuration", model_of, tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    refuses(r"pip install 'declip\[hf\]'", model_of, tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "gpt2"}, "'gpt2'.*encoders bert, roberta.*leave text.hf_model out"),
        ({"is_decoder": True}, "'decoder'"),
        ({"position_embedding_type": "relative_key"}, "'relative_key'"),
        ({"vocab_size": "many"}, r"config\.json' is not the configuration.*vocab_size"),
        ({"vocab_size": 20}, "69 ids.*vocab_size 20"),
        ({"pad_token_id": 3}, "pads with id 0.*pad_token_id 3"),
        ({"max_position_embeddings": 16}, "16 ids.*text.context_length to 16 or less"),
        ({"num_hidden_layers": 3}, r"lack 'encoder\.layer\.2\.[^']*' and 15 more.*text.pretrained"),
        ({"num_hidden_layers": 1}, r"fewer layers than the weights.*'[^']*layer\.1\."),
        ({"hidden_act": "sinister"}, "cannot be built"),
    ],
)
def test_a_configuration_that_cannot_be_used(tmp_path, config, said):
    refuses(said, model_of, changed(bert(tmp_path / "bert"), **config))


def test_weights_that_could_run_code_are_not_opened(tmp_path):
    folder = bert(tmp_path / "bert")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuses(r"model\.safetensors.*save_pretrained", model_of, folder)
    assert model_of(folder, pretrained=False).text_tower.width == 32
    (folder / "model.safetensors").write_bytes((folder / "pytorch_model.bin").read_bytes()[:1000])
    refuses("cannot be built", model_of, folder)


def test_a_tokenizer_without_words(tmp_path):
    folder = bert(tmp_path / "bert")
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]")
    refuses(["special tokens only"], model_of, folder)


def test_tokenizers_that_are_missing_damaged_or_lack_a_token(tmp_path):
    folder = roberta(tmp_path / "roberta")
    whole = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**whole, "mask_token": None}))
    refuses("no mask_token", model_of, folder)
    (folder / "tokenizer.json").write_text("{")
    refuses("cannot be read", model_of, folder)
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
    refuses(r"a tokenizer \(tokenizer\.json", model_of, folder)


def test_of_the_hub_no_file_is_fetched_that_could_run_code_and_no_network_is_one_line(
    tmp_path, monkeypatch
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    for offline in (True, False):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        name = "huggingface:nobody/nothing"
        refuses(rf"fetch '{name}': no connection.*builtin:", model_of, name)

    folder, asked = bert(tmp_path / "bert"), []

    def fetch(name, allow_patterns, local_files_only):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert model_of("huggingface:owner/name").text_tower.width == 32
    model_of("huggingface:owner/name", pretrained=False)
    (first, patterns), (second, others) = asked
    assert first == second == "owner/name"
    assert any("safetensors" in pattern for pattern in patterns)
    assert not any("safetensors" in pattern for pattern in others)
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in (*patterns, *others))


def test_what_is_kept_names_no_folder_and_no_code_and_fits_no_other_tokenizer(tmp_path):
    config = {"auto_map": {"AutoModel": "evil.Model"}, "attn_implementation": "owner/kernel"}
    folder = changed(bert(tmp_path / "bert"), **config)
    kept = read_encoder(str(folder), pretrained=True).to_tensor()
    text = kept.numpy().tobytes().decode()
    strange = "evil", "kernel", "auto_map", "_name_or_path", str(tmp_path)
    assert not any(word in text for word in strange)
    assert TextEncoder.from_tensor(kept).to_tensor().equal(kept)
    first, words = model_of(folder).state_dict(), folder / "vocab.txt"
    model_of(folder).load_state_dict(first)
    words.write_text(words.read_text().replace("\nred\n", "\ndim\n"))
    refuses("another configuration or tokenizer", model_of(folder).load_state_dict, first)


def test_an_encoder_that_did_not_come_with_the_weights_is_not_looked_for(tmp_path):
    refuses("missing or damaged", encoder_kept_in, {}, tmp_path)
    for text in ("", "{", "[]", "{}", '{"config": {}, "tokenizer": 3}'):
        damaged = torch.tensor(list(text.encode()), dtype=torch.uint8)
        refuses("damaged", encoder_kept_in, {ENTRY: damaged}, tmp_path)
