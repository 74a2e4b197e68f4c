import pytest

from conftest import refuses
from declip.data.text.tokenizer import HuggingfaceTokenizer
from declip.errors import UserError
from declip.models.hf_encoder import read_encoder
from text_encoders import CAPTIONS, bert, roberta

transformers = pytest.importorskip("transformers")

CONTEXT = 20


@pytest.fixture(scope="module", params=[bert, roberta])
def folder(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("encoder") / "folder")


@pytest.fixture(scope="module")
def tokenizer(folder):
    encoder = read_encoder(str(folder), pretrained=False)
    return HuggingfaceTokenizer(encoder.tokenizer, encoder.specials, CONTEXT)


def test_ids_and_padding_are_those_of_transformers(folder, tokenizer):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs(list(CAPTIONS), truncation=True, max_length=CONTEXT, padding=True, return_tensors="pt")
    assert tokenizer(CAPTIONS).tolist() == expected["input_ids"].tolist()
    assert tokenizer.encode("") == [theirs.cls_token_id, theirs.sep_token_id]
    assert tokenizer("a").shape == (1, 8)
    assert tokenizer.vocabulary == len(theirs)


def test_special_tokens_in_a_caption_are_spelled_out(tokenizer):
    specials = {tokenizer.start, tokenizer.end, tokenizer.mask, tokenizer.padding}
    special = {number for number, token in tokenizer.library.get_added_tokens_decoder().items() if token.special}
    assert specials <= special == {*range(tokenizer.vocabulary)} - {*tokenizer.words}, "words that may replace others"
    for token in ("[CLS]", "[SEP]", "[MASK]", "[PAD]", "<s>", "</s>", "<mask>", "<pad>"):
        ids = tokenizer.encode(f"red {token} square")
        assert not specials & set(ids[1:-1]), token
        assert len(ids) > 5


def test_it_decodes_what_the_report_shows(tokenizer):
    ids = tokenizer.encode("red circle in blue")
    assert tokenizer.decode([*ids, tokenizer.padding, tokenizer.padding]) == "red circle in blue"
    assert tokenizer.decode([tokenizer.mask]) in ("[MASK]", "<mask>")
    refuses(f"{tokenizer.vocabulary}", tokenizer.decode, [tokenizer.vocabulary])


def test_other_definitions_are_refused(tokenizer):
    definition = tokenizer.library.to_str()
    refuses("cannot be read", HuggingfaceTokenizer, "{}", {}, CONTEXT)
    with pytest.raises(UserError, match="special ids"):
        HuggingfaceTokenizer(definition, {"start": 0, "end": 2, "mask": 10**6, "padding": 1}, CONTEXT)
