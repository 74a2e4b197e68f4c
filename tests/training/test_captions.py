"""Warnings about captions that the text tower does not know, or that are cut."""

import pytest

from declip.data.sources.open import open_source
from declip.data.text.tokenizer import HuggingfaceTokenizer, Tokenizer
from declip.models.hf_encoder import read_encoder
from declip.training.pairs import caption_warnings
from text_encoders import bert


@pytest.mark.parametrize(
    ("caption", "parts"),
    [("a red circle", ()), ("赤い丸", ("unknown", "--from")), ("a red circle " * 9, ("cut", "text.context_length"))],
)
def test_captions_that_cannot_be_read_are_named(caption, parts, tmp_path):
    encoder = read_encoder(str(bert(tmp_path / "bert")), pretrained=False)
    tokenizer = HuggingfaceTokenizer(encoder.tokenizer, encoder.specials, context=16)
    source = open_source([("image.png", caption)] * 3)
    warnings = caption_warnings(source, tokenizer)
    assert len(warnings) == bool(parts)
    assert all(part in warnings[0] for part in parts if part != "cut")
    if parts:
        assert "100.0 %" in warnings[0]


def test_a_tokenizer_of_bytes_knows_every_script():
    assert not caption_warnings(open_source([("image.png", "赤い丸")]), Tokenizer(context=77))
