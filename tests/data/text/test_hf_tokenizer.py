from pathlib import Path

import numpy as np
import pytest

from declip.data.batch import IGNORED
from declip.data.text.augment import mask_tokens
from declip.data.text.hf_tokenizer import HuggingfaceTokenizer
from declip.errors import UserError
from declip.models.hf_encoder import read_encoder
from text_encoders import CAPTIONS, bert, roberta

transformers = pytest.importorskip("transformers")

CONTEXT = 20


@pytest.fixture(scope="module", params=[bert, roberta])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return request.param(tmp_path_factory.mktemp("encoder") / "folder")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> HuggingfaceTokenizer:
    encoder = read_encoder(str(folder), pretrained=False)
    return HuggingfaceTokenizer(encoder.tokenizer, encoder.specials, CONTEXT)


def test_ids_and_padding_are_those_of_transformers(folder: Path, tokenizer: HuggingfaceTokenizer) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs(list(CAPTIONS), truncation=True, max_length=CONTEXT, padding=True, return_tensors="pt")
    assert tokenizer(CAPTIONS).tolist() == expected["input_ids"].tolist()
    assert tokenizer.encode("") == [theirs.cls_token_id, theirs.sep_token_id]
    assert tokenizer("a").shape == (1, 8)
    assert tokenizer.vocabulary == len(theirs)


def test_special_tokens_in_a_caption_are_spelled_out(tokenizer: HuggingfaceTokenizer) -> None:
    specials = {tokenizer.start, tokenizer.end, tokenizer.mask, tokenizer.padding}
    for token in ("[CLS]", "[SEP]", "[MASK]", "[PAD]", "<s>", "</s>", "<mask>", "<pad>"):
        ids = tokenizer.encode(f"red {token} square")
        assert not specials & set(ids[1:-1]), token
        assert len(ids) > 5


def test_it_decodes_what_the_report_shows(tokenizer: HuggingfaceTokenizer) -> None:
    ids = tokenizer.encode("red circle in blue")
    assert tokenizer.decode([*ids, tokenizer.padding, tokenizer.padding]) == "red circle in blue"
    assert tokenizer.decode([tokenizer.mask]) in ("[MASK]", "<mask>")
    with pytest.raises(UserError, match=f"{tokenizer.vocabulary}"):
        tokenizer.decode([tokenizer.vocabulary])


def test_masking_uses_the_encoders_own_mask_and_words(
    tokenizer: HuggingfaceTokenizer, generator: np.random.Generator
) -> None:
    inner = list(tokenizer.words[:18])
    ids = [tokenizer.start, *inner, tokenizer.end, *[tokenizer.padding] * 4]
    put_in = set()
    for _ in range(1500):
        masked, labels = mask_tokens(ids, generator, tokenizer, 1.0)
        assert (masked[0], masked[19:]) == (tokenizer.start, ids[19:])
        assert labels == [IGNORED, *inner, *[IGNORED] * 5]
        put_in |= {*masked[1:19]}
    specials = {number for number, token in tokenizer.library.get_added_tokens_decoder().items() if token.special}
    assert put_in & specials == {tokenizer.mask}
    assert len(put_in) > 0.9 * len(tokenizer.words)
    assert max(put_in) > 0.9 * tokenizer.vocabulary


def test_other_definitions_are_refused(tokenizer: HuggingfaceTokenizer) -> None:
    definition = tokenizer.library.to_str()
    with pytest.raises(UserError, match="cannot be read"):
        HuggingfaceTokenizer("{}", {}, CONTEXT)
    with pytest.raises(UserError, match="special ids"):
        HuggingfaceTokenizer(definition, {"start": 0, "end": 2, "mask": 10**6, "padding": 1}, CONTEXT)
