import pytest

from declip.data.text.tokenizer import Tokenizer
from declip.inspection.reading import kind_of, token_count


@pytest.mark.parametrize(
    ("caption", "kind"),
    [
        ("IMG_1234.jpg", "file name"),
        ("DSC 0042", "file name"),
        ("https://example.org/a?b=c", "web address"),
        ("2021-03-04", "number or date"),
        ("4.3.2021 12:30", "number or date"),
        ("12 March 2021", "number or date"),
        ("12345", "number or date"),
        ("3.5 %", "number or date"),
        ("...", "number or date"),
        ("❤", "number or date"),
        ("cat", "one word"),
        ("кошка", "not in Latin script"),
        ("белая кошка, 3", "not in Latin script"),
        ("猫の写真", "not in Latin script"),
        ("un café", None),
        ("кошка the cat", None),
        ("a cat", None),
        ("a picture, see https://example.org", None),
        ("photo of 3 cats", None),
        ("image editor", None),
        ("may 5 cats sit here", None),
    ],
)
def test_kinds_of_captions(caption, kind):
    assert kind_of(caption) == kind


def test_tokens_are_counted_beyond_the_context():
    assert token_count("a cat") == len(Tokenizer().encode("a cat")) == 4
    assert token_count("cat " * 300) == 302
