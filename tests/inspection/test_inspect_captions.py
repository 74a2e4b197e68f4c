import pytest

from declip.data.text.tokenizer import Tokenizer
from declip.inspection.captions import CaptionCounts, kind_of, script_of, token_count


@pytest.mark.parametrize(
    ("caption", "kind"),
    [
        ("IMG_1234.jpg", "file name"),
        ("DSC 0042", "file name"),
        ("https://example.org/a?b=c", "web address"),
        ("2021-03-04", "date"),
        ("4.3.2021 12:30", "date"),
        ("12 March 2021", "date"),
        ("12345", "number"),
        ("3.5 %", "number"),
        ("...", "no letter"),
        ("❤", "no letter"),
        ("cat", "one word"),
        ("кошка", "one word"),
        ("a cat", None),
        ("a picture, see https://example.org", None),
        ("photo of 3 cats", None),
        ("image editor", None),
        ("may 5 cats sit here", None),
    ],
)
def test_kinds_of_captions(caption: str, kind: str | None) -> None:
    assert kind_of(caption) == kind


@pytest.mark.parametrize(
    ("caption", "script"),
    [
        ("a cat", "Latin"),
        ("un café", "Latin"),
        ("кошка the cat сидит", "Cyrillic"),
        ("猫の写真", "Han"),
        ("ねこ", "Hiragana"),
        ("한국어", "Hangul"),
        ("صورة", "Arabic"),
        ("ᚠᚢᚦ", "Runic"),
        ("123 ...", None),
        ("❤", None),
    ],
)
def test_script_of_most_letters(caption: str, script: str | None) -> None:
    assert script_of(caption) == script


def test_counts_of_parts_add_up_and_tokens_are_counted_beyond_the_context() -> None:
    assert token_count("a cat") == len(Tokenizer().encode("a cat")) == 4
    assert token_count("cat " * 300) == 302
    whole, parts = CaptionCounts(), [CaptionCounts(), CaptionCounts()]
    captions = ["red cat", "cat", "12", "кот", "IMG_1.jpg", "red hat"]
    for number, caption in enumerate(captions):
        whole.add(caption)
        parts[number % 2].add(caption)
    parts[0].merge(parts[1])
    assert parts[0].kinds == whole.kinds == {"one word": 2, "number": 1, "file name": 1}
    assert parts[0].scripts == whole.scripts == {"Latin": 4, "Cyrillic": 1}
