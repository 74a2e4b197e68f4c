"""Wrong text encoders: one sentence that says what is wrong, and no file that could run code is opened."""

import json
import sys

import pytest
import torch

from conftest import TINY, WEIGHTS, refuses
from declip.errors import UserError
from declip.models.hf_encoder import ENTRY, TextEncoder, read_encoder
from declip.models.wrapped import encoder_kept_in
from declip.recipe.schema import Recipe
from text_encoders import bert, model_of, roberta

pytest.importorskip("transformers")


def changed(folder, **config):
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**found, **config}))
    return folder


def test_a_folder_that_is_none_and_a_missing_library(tmp_path, monkeypatch):
    for folder in (tmp_path / "missing", tmp_path):
        refuses(r"not a folder with config\.json", model_of, folder)
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
        ({"max_position_embeddings": 16}, "positions for 16 ids.*text.context_length to 16 or less"),
        ({"num_hidden_layers": 3}, r"lack 'encoder\.layer\.2\.[^']*' and 15 more.*text.pretrained=false"),
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


def test_of_the_hub_no_file_is_fetched_that_could_run_code_and_no_network_is_one_line(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    for offline in (True, False):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        with pytest.raises(UserError, match=r"fetch 'huggingface:nobody/nothing': no connection.*builtin:") as error:
            model_of("huggingface:nobody/nothing")
        assert "\n" not in str(error.value)

    folder, asked = bert(tmp_path / "bert"), []

    def fetch(name, allow_patterns, local_files_only):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert model_of("huggingface:owner/name").text_tower.width == 32
    model_of("huggingface:owner/name", pretrained=False)
    assert [name for name, _ in asked] == ["owner/name"] * 2
    assert [any("safetensors" in pattern for pattern in patterns) for _, patterns in asked] == [True, False]
    assert not any(pattern.endswith((".py", ".bin", "*")) for _, patterns in asked for pattern in patterns)


def test_what_is_kept_names_no_folder_and_no_code_and_fits_no_other_tokenizer(tmp_path):
    folder = changed(bert(tmp_path / "bert"), auto_map={"AutoModel": "evil.Model"}, attn_implementation="owner/kernel")
    kept = read_encoder(str(folder), pretrained=True).to_tensor()
    text = kept.numpy().tobytes().decode()
    assert not any(word in text for word in ("evil", "kernel", "auto_map", "_name_or_path", str(tmp_path)))
    assert TextEncoder.from_tensor(kept).to_tensor().equal(kept)
    first = model_of(folder)
    model_of(folder).load_state_dict(first.state_dict())
    (folder / "vocab.txt").write_text((folder / "vocab.txt").read_text().replace("\nred\n", "\ndim\n"))
    refuses("another configuration or tokenizer", model_of(folder).load_state_dict, first.state_dict())


def test_an_encoder_that_did_not_come_with_the_weights_is_not_looked_for(tmp_path):
    folder = bert(tmp_path / "bert")
    recipe = Recipe.model_validate({**TINY, "text": {"hf_model": str(folder)}, "loss_weights": WEIGHTS["clip"]})
    refuses("missing or damaged", encoder_kept_in, {}, recipe, tmp_path)
    for text in ("", "{", "[]", "{}", '{"config": {}, "tokenizer": 3}'):
        damaged = torch.tensor(list(text.encode()), dtype=torch.uint8)
        refuses("damaged", encoder_kept_in, {ENTRY: damaged}, recipe, tmp_path)
