"""Token ids against open_clip's, the authors' and transformers', and what a caption may not do."""

import html.entities
import multiprocessing
import pickle
import random
import re
from multiprocessing.pool import ThreadPool

import pytest
import torch

from conftest import refuses
from declip.data.text.tokenizer import HuggingfaceTokenizer, Tokenizer, fix
from declip.models.hf_encoder import read_encoder
from golden_cases import read_json
from text_encoders import CAPTIONS, bert, roberta

OFFICIAL = read_json("token_cases.json")
CASES = [
    case
    for case in OFFICIAL.get("cases", [])
    if not re.search(r"<\|(start|end)oftext\|>", case["caption"])
]
"""Without captions in which the authors read special tokens, which differ on purpose."""


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer()


@pytest.fixture(scope="module")
def small():
    return Tokenizer(merges=600)


def ours(ids, special, tokenizer):
    """The authors' ids, who put the mask before start and end, as ours."""
    names = {
        "<|mask|>": tokenizer.mask,
        "<|startoftext|>": tokenizer.start,
        "<|endoftext|>": tokenizer.end,
    }
    numbers = {number: names[name] for name, number in special.items()}
    return [numbers.get(token, token) for token in ids]


def random_text(source):
    """Words and scraps of all that a caption from the web may hold."""
    scraps = (
        lambda: chr(source.randrange(source.choice([0x250, 0x3000, 0xD800]))),
        lambda: chr(source.randrange(1 << 16, 17 << 16)),
        lambda: chr(source.randrange(0x1F300, 0x1FAFF)),
        lambda: "&" + source.choice(list(html.entities.html5)),
        lambda: source.choice(["'s", "'T", "'re", "'VE", "'m", "'ll", "'d", "'ſ", "’s", "‘", "`"]),
        lambda: str(source.randrange(10 ** source.randrange(1, 8))),
        lambda: source.choice(" \t\n\r\x0b\x0c\x1c\x85\xa0\u2028\u200b\u3000\ufeff"),
        lambda: source.choice("!\"#$%&'()*+,-./:;<=>?@[]^_{|}~") * source.randrange(1, 4),
        lambda: source.choice(["Ã©", "â€œ", "&amp;amp;", "&#x1F600;", "&#0;", "&#xD800;", "\x1b[31m", "ﬁ", "ＡＢＣ"]),
        lambda: source.choice(["<br>", "\ud800", "\u0345", "ΑΣ", "ß", "İ", "\x7f"]),
        lambda: source.choice(["日本語", "Привет", "مرحبا", "한국어"]),
        lambda: "".join(chr(source.randrange(32, 127)) for _ in range(source.randrange(1, 12))),
        lambda: " " + source.choice(["a", "photo", "Dogs", "supercalifragilistic", "xxxxxxx", "don't"]),
    )  # fmt: skip
    return "".join(source.choice(scraps)() for _ in range(source.randrange(1, 25)))


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["caption"][:20])
def test_ids_and_decoded_text_equal_the_authors(case, tokenizer, small):
    ids = tokenizer.encode(case["caption"])
    assert ids == ours(case["ids"], OFFICIAL["special"], tokenizer)
    expected = ours(case["ids_small_vocab"], OFFICIAL["small_vocab"]["special"], small)
    assert small.encode(case["caption"]) == expected
    if case["n_body_tokens"] <= 75:
        assert tokenizer.decode(ids) == case["decoded"].strip()


def test_ids_equal_open_clip_on_random_text(tokenizer):
    from open_clip.tokenizer import SimpleTokenizer

    source, reference = random.Random(0), SimpleTokenizer()
    for _ in range(400):
        text = random_text(source)
        expected = [tokenizer.start, *reference.encode(text)[:75], tokenizer.end]
        assert tokenizer.encode(text) == expected, repr(text)


def test_small_vocabulary_is_the_start_of_the_whole(tokenizer, small):
    assert (tokenizer.vocabulary, tokenizer.start, tokenizer.end, tokenizer.mask) == (
        49_409,
        49_406,
        49_407,
        49_408,
    )
    assert (small.vocabulary, small.start, small.end, small.mask) == (1_115, 1_112, 1_113, 1_114)
    assert [small.decode([token]) for token in range(1_112)] == [
        tokenizer.decode([token]) for token in range(1_112)
    ]
    letters = Tokenizer(merges=0)
    assert letters.encode("cat") == [512, 66, 64, 339, 513]


@pytest.mark.parametrize(
    "name", ["<|mask|>", "<|startoftext|>", "<|endoftext|>", "<start_of_text>", "<end_of_text>"]
)
def test_a_caption_cannot_hold_special_tokens(name, tokenizer, small):
    """The authors and open_clip read some of these as tokens, which moves the place where features are pooled."""
    for one in (tokenizer, small):
        start, *ids, end = one.encode(f"the {name} of {name.upper()}")
        assert (start, end, max(ids) < one.start) == (one.start, one.end, True)
    assert tokenizer.encode("<|endoftext|>") == [
        49406,
        27,
        347,
        *tokenizer.encode("endoftext")[1:-1],
        91,
        285,
        49407,
    ]


def test_long_texts_keep_their_end():
    tokenizer = Tokenizer(context=5, merges=600)
    whole = Tokenizer(merges=600).encode("one two three four")
    assert tokenizer.encode("one two three four") == [*whole[:4], tokenizer.end]
    assert tokenizer("one two three four").tolist() == [tokenizer.encode("one two three four")]
    assert len(Tokenizer().encode("x" * 100_000)) == 77


def test_batches_are_as_long_as_they_must_be(tokenizer):
    short = tokenizer(["cat", "a photo of a cat"])
    assert (short.dtype, short.shape) == (torch.int64, (2, 8))
    assert short[0].tolist() == [*tokenizer.encode("cat"), 0, 0, 0, 0, 0]
    for words, length in ((0, 8), (6, 8), (7, 16), (72, 77), (500, 77)):
        assert tokenizer("word " * words).shape == (1, length)


def test_decode_shows_masks_and_leaves_padding_out(tokenizer):
    ids = tokenizer("A photo of a cat")[0]
    ids[2] = tokenizer.mask
    assert tokenizer.decode(ids) == tokenizer.decode(ids.numpy()) == "a <|mask|> of a cat"
    assert (tokenizer.decode([2368]), tokenizer.decode([])) == ("cat", "")


def test_wrong_use_says_what_is_wrong(tokenizer):
    refuses(r"NoneType.*None", tokenizer.encode, None)
    refuses("int", tokenizer, ["a cat", 7])
    refuses("no text", tokenizer, [])
    refuses(r"99999.*0 to 49408", tokenizer.decode, [99_999])
    refuses("-1", tokenizer.decode, [-1])
    refuses("context is 2", Tokenizer, context=2)
    for merges in (-1, 48_895):
        refuses("0 to 48,894", Tokenizer, merges=merges)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_copies_forked_workers_and_threads_agree():
    tokenizer = Tokenizer(context=16, merges=300)
    texts = [f"caption nr {number} öl" for number in range(200)]
    packed = pickle.dumps(tokenizer)
    assert len(packed) < 200
    expected = list(map(tokenizer.encode, texts))
    assert list(map(pickle.loads(packed).encode, texts)) == expected
    with multiprocessing.get_context("fork").Pool(2) as processes, ThreadPool(4) as threads:
        assert (
            threads.map(tokenizer.encode, texts)
            == processes.map(tokenizer.encode, texts)
            == expected
        )


CONTEXT = 20


@pytest.fixture(scope="module", params=[bert, roberta])
def encoder(request, tmp_path_factory):
    """The folder of a text encoder, and its tokenizer."""
    pytest.importorskip("transformers")
    folder = request.param(tmp_path_factory.mktemp("encoder") / "folder")
    read = read_encoder(str(folder), pretrained=False)
    return folder, HuggingfaceTokenizer(read.tokenizer, read.specials, CONTEXT)


def test_ids_and_padding_of_cleaned_captions_are_those_of_transformers(encoder):
    from transformers import AutoTokenizer

    folder, tokenizer = encoder
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs(
        list(map(fix, CAPTIONS)),
        truncation=True,
        max_length=CONTEXT,
        padding=True,
        return_tensors="pt",
    )
    assert tokenizer(CAPTIONS).tolist() == expected["input_ids"].tolist()
    assert tokenizer.encode("") == [theirs.cls_token_id, theirs.sep_token_id]
    assert tokenizer("a").shape == (1, 8)
    assert tokenizer.vocabulary == len(theirs)


def test_special_tokens_in_a_caption_are_spelled_out(encoder):
    _, tokenizer = encoder
    specials = {tokenizer.start, tokenizer.end, tokenizer.mask, tokenizer.padding}
    special = {
        number
        for number, token in tokenizer.library.get_added_tokens_decoder().items()
        if token.special
    }
    assert specials <= special == {*range(tokenizer.vocabulary)} - {*tokenizer.words}, (
        "words that may replace others"
    )
    for token in ("[CLS]", "[SEP]", "[MASK]", "[PAD]", "<s>", "</s>", "<mask>", "<pad>"):
        ids = tokenizer.encode(f"red {token} square")
        assert not specials & set(ids[1:-1]), token
        assert len(ids) > 5


def test_it_decodes_what_the_report_shows_and_other_definitions_are_refused(encoder):
    _, tokenizer = encoder
    ids = tokenizer.encode("red circle in blue")
    assert tokenizer.decode([*ids, tokenizer.padding, tokenizer.padding]) == "red circle in blue"
    assert tokenizer.decode([tokenizer.mask]) in ("[MASK]", "<mask>")
    refuses(f"{tokenizer.vocabulary}", tokenizer.decode, [tokenizer.vocabulary])
    refuses("cannot be read", HuggingfaceTokenizer, "{}", {}, CONTEXT)
    specials = {"start": 0, "end": 2, "mask": 10**6, "padding": 1}
    refuses("special ids", HuggingfaceTokenizer, tokenizer.library.to_str(), specials, CONTEXT)
