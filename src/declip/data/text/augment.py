"""Text views of a caption: EDA (Wei and Zou, EMNLP 2019) without insertion, and BERT's masking (NAACL 2019)."""

from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
import regex

from declip.data.asset_files import read_lines
from declip.data.batch import IGNORED
from declip.data.text.tokenizer import CaptionTokenizer

# Shares of the chosen tokens that become the mask, or another word, as in BERT
_MASKED = 0.8
_RANDOM = 0.1

POSSESSIVES = ("'s", "’s", "'S", "’S")
LATIN = regex.compile(r"\p{Latin}", regex.V1)
OTHER = regex.compile(r"[\p{L}--\p{Latin}]", regex.V1)


def augment(caption: str, generator: np.random.Generator, alpha: float = 0.1) -> str:
    """Change a caption a little: one of synonym replacement, random swap and random deletion, a third each.

    n = max(1, int(alpha * words)) words are replaced by synonyms, or two words are swapped n times, or each word is
    deleted with probability alpha. A caption of one word, or none, or in another script is unchanged.
    """
    words = caption.split()
    if len(words) < 2 or in_other_script(caption):
        return caption
    operation = _below(3, generator)
    count = max(1, int(alpha * len(words)))
    if operation == 0:
        changed = replace_words(words, count, generator)
    elif operation == 1:
        changed = swap_words(words, count, generator)
    else:
        changed = delete_words(words, alpha, generator)
    return " ".join(changed)


def in_other_script(caption: str) -> bool:
    """Whether most letters of a caption are not Latin: the augmentation is made for English."""
    return len(OTHER.findall(caption)) > len(LATIN.findall(caption))


def replace_words(words: Sequence[str], count: int, generator: np.random.Generator) -> list[str]:
    """Replace up to `count` different words by synonyms, which may be phrases, each wherever it stands."""
    parsed = [_parse(word) for word in words]
    cores = dict.fromkeys(core.lower() for _, core, _ in parsed)
    candidates = [core for core in cores if synonyms(core)]
    replacements: dict[str, str] = {}
    while candidates and len(replacements) < count:
        core = candidates.pop(_below(len(candidates), generator))
        others = synonyms(core)
        replacements[core] = others[_below(len(others), generator)]
    changed = []
    for before, core, after in parsed:
        if core.lower() in replacements:
            core = _like(core, replacements[core.lower()])
        changed.append(before + core + after)
    return changed


def swap_words(words: Sequence[str], count: int, generator: np.random.Generator) -> list[str]:
    """Swap two of the words, at least two, at different positions, `count` times."""
    swapped = list(words)
    for _ in range(count):
        first = _below(len(swapped), generator)
        second = _below(len(swapped) - 1, generator)
        second += second >= first
        swapped[first], swapped[second] = swapped[second], swapped[first]
    return swapped


def delete_words(
    words: Sequence[str], probability: float, generator: np.random.Generator
) -> list[str]:
    """Delete each word with a probability; one of them, chosen evenly, stays if all would be deleted."""
    draws = generator.random(len(words)).tolist()
    kept = [word for word, draw in zip(words, draws, strict=True) if draw >= probability]
    return kept or [words[_below(len(words), generator)]]


def mask_tokens(
    ids: Sequence[int],
    generator: np.random.Generator,
    tokenizer: CaptionTokenizer,
    probability: float = 0.15,
) -> tuple[list[int], list[int]]:
    """Corrupt token ids for masked-language modeling.

    Each token between start and end is chosen with `probability`. Of the chosen, 80 % become the mask, 10 % a random
    word's id, 10 % stay. Padding, if any, is known by its position: with CLIP's tokenizer its id is also a word's.
    The labels are the original ids where a token was chosen, -100 elsewhere.
    """
    masked = list(ids)
    labels = [IGNORED] * len(masked)
    draws = generator.random(masked.index(tokenizer.end) - 1)
    for position in np.flatnonzero(draws < probability).tolist():
        labels[position + 1] = masked[position + 1]
        # Evenly in [0, 1), since the draw is below the probability
        kind = draws[position] / probability
        if kind < _MASKED:
            masked[position + 1] = tokenizer.mask
        elif kind < _MASKED + _RANDOM:
            masked[position + 1] = tokenizer.words[_below(len(tokenizer.words), generator)]
    return masked, labels


@cache
def table() -> dict[str, str]:
    """The shipped table, read once per process: synonyms joined by "|" by word; empty for a word without any."""
    lines = read_lines("synonyms.txt")
    half = len(lines) // 2  # an empty line stands between the words and their lists
    return dict(zip(lines[:half], lines[half + 1 :], strict=True))


@lru_cache(maxsize=2**16)
def synonyms(word: str) -> tuple[str, ...]:
    """Other words or phrases for a lower-case word in its form: plurals for "sofas", "-ing" for "jumping"."""
    joined = table().get(word)
    if not joined:
        return ()
    return tuple(joined.split("|"))


def _below(limit: int, generator: np.random.Generator) -> int:
    """Sample an integer in [0, limit) evenly; an eighth of the time of `generator.integers` for one number."""
    return int(generator.random() * limit)


def _parse(word: str) -> tuple[str, str, str]:
    """Split a written word into punctuation before it, the word, and a possessive and punctuation after it."""
    positions = [position for position, letter in enumerate(word) if letter.isalnum()]
    if not positions:
        return word, "", ""
    first = positions[0]
    end = positions[-1] + 1
    if end - first > 2 and word[:end].endswith(POSSESSIVES):
        end -= 2
    return word[:first], word[first:end], word[end:]


def _like(core: str, replacement: str) -> str:
    if core.isupper() and len(core) > 1:
        return replacement.upper()
    if core[0].isupper():
        return replacement[0].upper() + replacement[1:]
    return replacement
