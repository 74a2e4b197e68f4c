"""Captions that a text tower cannot read: in a script that its tokenizer does not know, or too long."""

from contextlib import suppress

import numpy as np

from declip.data.pair import BrokenPair, PairSource
from declip.data.text.caption_tokenizer import CaptionTokenizer
from declip.io.text import percent

UNKNOWN, CUT = 0.1, 0.05
"""Shares of unknown tokens, and of captions that are cut, above which a warning is due."""


def caption_warnings(source: PairSource, tokenizer: CaptionTokenizer, sample: int = 512) -> list[str]:
    """Look at the tokens of some captions, evenly spaced in the source; remote sources are not read."""
    if source.remote:
        return []
    unknown, tokens, cut, captions = 0, 0, 0, 0
    unknown_id = _unknown_id(tokenizer)
    for index in np.linspace(0, len(source) - 1, min(sample, len(source))).astype(int).tolist():
        with suppress(BrokenPair):
            for caption in source.captions(index):
                ids = [*tokenizer.word_ids(caption)]
                unknown += ids.count(unknown_id)
                tokens += len(ids)
                cut += len(ids) + 2 > tokenizer.context  # start and end
                captions += 1
    warnings = []
    if tokens and unknown / tokens > UNKNOWN:
        warnings.append(
            f"{percent(unknown / tokens)} of the captions' tokens are unknown to the text tower: it cannot tell these "
            "words apart. Write captions in its language, or give weights of a multilingual text tower with --from."
        )
    if captions and cut / captions > CUT:
        warnings.append(
            f"{percent(cut / captions)} of the captions are longer than {tokenizer.context} tokens "
            "(text.context_length); what follows is not read. Write what matters first."
        )
    return warnings


def _unknown_id(tokenizer: CaptionTokenizer) -> int:
    """The id of words that the vocabulary lacks; -1 for tokenizers that spell them in bytes."""
    named = getattr(tokenizer.library.model, "unk_token", None)
    found = (tokenizer.library.token_to_id(name) for name in (named, "<unk>", "[UNK]") if name is not None)
    return next((number for number in found if number is not None), -1)
