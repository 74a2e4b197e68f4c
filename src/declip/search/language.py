"""Queries in a language that the built-in sentence encoder does not read: it knows English."""

from functools import cache
from typing import Any

from declip.data.asset_files import read_lines
from declip.data.text.tokenizer import CaptionTokenizer, fix
from declip.recipe.starts import STARTS

# Frequent short words of other languages that are no English words
FUNCTION_WORDS = (
    " der das ein eine einer einem einen und mit auf im vom zum le les une du et avec dans el los "
    "las del unas una con y na z w lo gli uno e di della os um uma com het een van met och ett "
    "un de des sur qui que por para al "
)
CONTINUED = "##"  # begins a piece that continues a word
MOST_PIECES = 4  # of a word that is unknown: rare English words have fewer
MULTILINGUAL = "open_clip:ViT-B-16-SigLIP2/webli"
NOTE = (
    "This query may not be English, the only language that the built-in text encoder reads. For other "
    f"languages embed with a multilingual model: declip embed {MULTILINGUAL} SOURCE --out DIR"
)


def language_note(text: str, model: Any) -> str:
    """What to do if a text seems to be in a language that a model that began as a built-in start does not read.

    Empty for English, and for other models.
    """
    recipe = model.recipe
    if recipe is None or recipe.text.hf_model not in STARTS:
        return ""
    if seems_english(text, model.tokenizer):
        return ""
    return NOTE


def seems_english(text: str, tokenizer: CaptionTokenizer) -> bool:
    """Whether the words of a text, with their pieces in the vocabulary of an English encoder, look English."""
    words = split_words(text, tokenizer)
    unknown = [pieces for pieces in words if _is_unknown(pieces)]
    if any(ord(letter) > 127 and letter.isalpha() for letter in text):
        return False
    if not unknown:
        return True
    longest = max(map(len, unknown))
    foreign = any(f" {''.join(pieces)} " in FUNCTION_WORDS for pieces in words)
    mostly_unknown = len(unknown) > 1 and 2 * len(unknown) >= len(words)
    return not (foreign or mostly_unknown or longest >= MOST_PIECES)


def split_words(text: str, tokenizer: CaptionTokenizer) -> list[list[str]]:
    """The words of a text, each as its pieces in a vocabulary of word pieces; without punctuation."""
    words: list[list[str]] = []
    for piece in tokenizer.library.encode(fix(text), add_special_tokens=False).tokens:
        if piece.startswith(CONTINUED) and words:
            words[-1].append(piece.removeprefix(CONTINUED))
        else:
            words.append([piece])
    return [pieces for pieces in words if pieces[0].isalpha()]


def _is_unknown(pieces: list[str]) -> bool:
    return len(pieces) > 1 and "".join(pieces) not in _english()


@cache
def _english() -> frozenset[str]:
    """English words with synonyms, from the shipped table: read once per process, for a rare word."""
    lines = read_lines("synonyms.txt")
    return frozenset(lines[: len(lines) // 2])
