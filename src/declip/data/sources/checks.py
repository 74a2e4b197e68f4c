"""Checks of a source before it is used: broken pairs, and captions that a text tower cannot read."""

from contextlib import suppress

import numpy as np

from declip.data.pair import BrokenPair, PairSource, SkipCounter
from declip.data.text.tokenizer import CaptionTokenizer
from declip.io.text import percent, plural

FEW = 1_000  # pairs up to which all are opened, in about a second: one broken pair in a few matters
SAMPLE = 64  # pairs, evenly spaced, that stand for all where reading all would take too long
ASKED = 512  # pairs whose captions are looked at
UNKNOWN = 0.1  # fraction of unknown tokens above which a warning is due
CUT = 0.05  # fraction of captions that are cut above which a warning is due


def describe_source(source: PairSource) -> str:
    """Format the number of pairs, their source and its columns of captions.

    For example "24 pairs of a.csv (captions: title)".
    """
    text = f"{plural(len(source), 'pair')} of {source.name}"
    if source.captions_from:
        text += f" (captions: {source.captions_from})"
    return text


def refuse_broken(source: PairSource, allowed: float) -> None:
    """Raise an error if more than a fraction of a few pairs cannot be used.

    Images are opened, not decoded: one that is damaged behind its header is found when it is read.
    """
    if source.remote or len(source) > FEW:
        return
    broken = SkipCounter()
    for index in range(len(source)):
        try:
            pair = source[index]
            pair.captions()
            pair.open()
        except BrokenPair as error:
            broken.add(error)
    broken.refuse(len(source), allowed, source.name)


def evenly_spaced(source: PairSource, size: int = SAMPLE) -> list[int]:
    """Indices of evenly spaced pairs; none of a remote source."""
    count = 0 if source.remote else min(size, len(source))
    spaced = np.linspace(0, len(source) - 1, count)
    return [int(index) for index in spaced]


def caption_warnings(source: PairSource, tokenizer: CaptionTokenizer) -> list[str]:
    """Look at the tokens of some captions, evenly spaced in the source; remote sources are not read."""
    texts = list[list[int]]()
    for index in evenly_spaced(source, ASKED):
        with suppress(BrokenPair):
            for caption in source[index].captions():
                texts.append([*tokenizer.word_ids(caption)])
    unknown_id = _unknown_id(tokenizer)
    found = sum(ids.count(unknown_id) for ids in texts)
    unknown = found / max(1, sum(map(len, texts)))
    longer = sum(len(ids) + 2 > tokenizer.context for ids in texts)  # with start and end
    cut = longer / max(1, len(texts))
    warnings = []
    if unknown > UNKNOWN:
        warnings.append(
            f"{percent(unknown)} of the captions' tokens are unknown to the text tower, which "
            "cannot tell them apart. Write captions in its language, or give weights of a "
            "multilingual text tower with --from."
        )
    if cut > CUT:
        warnings.append(
            f"{percent(cut)} of the captions are longer than {tokenizer.context} tokens "
            "(text.context_length); what follows is not read. Write what matters first."
        )
    return warnings


def _unknown_id(tokenizer: CaptionTokenizer) -> int:
    """The id of words that the vocabulary lacks; -1 for tokenizers that spell them in bytes."""
    named = getattr(tokenizer.library.model, "unk_token", None)
    for name in (named, "<unk>", "[UNK]"):
        if name is None:
            continue
        number = tokenizer.library.token_to_id(name)
        if number is not None:
            return number
    return -1
