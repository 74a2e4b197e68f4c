"""The base class of caption tokenizers: special ids, encoding, decoding, and padded batches."""

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import islice, takewhile

import tokenizers
import torch

from declip.errors import UserError


class CaptionTokenizer(ABC):
    """Encodes texts as ids and decodes them; start and end ids enclose every text and occur nowhere else.

    An instance can be used by threads, forked and pickled.

    Attributes:
        context: Largest number of ids of a text, start and end included.
        vocabulary: Number of ids.
        start, end, mask, padding: Special ids; with CLIP's tokenizer padding is also a word's.
        words: The ids of words.
        library: The `tokenizers` library's own object.
    """

    vocabulary: int
    start: int
    end: int
    mask: int
    padding: int
    words: Sequence[int]
    library: tokenizers.Tokenizer

    def __init__(self, context: int) -> None:
        if context < 3:
            raise UserError(f"The context is {context} tokens; start, end and a word need 3 at least.")
        self.context = context

    @abstractmethod
    def word_ids(self, text: str) -> Iterable[int]:
        """The ids of all words of a text, one by one."""

    @abstractmethod
    def spell(self, ids: list[int]) -> str:
        """The text of ids of words and masks."""

    def ids(self, text: str) -> list[int]:
        """The ids of one text: start, its words' and end; the words are truncated to `context` ids in total."""
        return [self.start, *islice(self.word_ids(text), self.context - 2), self.end]

    def encode(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise UserError(f"A text must be a string; {type(text).__name__} was given: {text!r:.60}.")
        return self.ids(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids, with or without start and end; ids after the first end (padding) are ignored."""
        kept = [*takewhile(lambda token: token != self.end, map(operator.index, ids))]
        if wrong := [token for token in kept if not 0 <= token < self.vocabulary]:
            raise UserError(f"Token id {wrong[0]} was given; this vocabulary has 0 to {self.vocabulary - 1}.")
        return self.spell([token for token in kept if token != self.start])

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        """Encode one text or several as (n, L) int64, L the longest, rounded up to 8 and at most `context`."""
        rows = [self.encode(text) for text in ([texts] if isinstance(texts, str) else texts)]
        if not rows:
            raise UserError("The tokenizer got no text; pass a string or a list of at least one.")
        # (n, L); few different L, so that kernels and memory are reused.
        width = padded_length(max(map(len, rows)), self.context)
        return torch.tensor([row + [self.padding] * (width - len(row)) for row in rows], dtype=torch.int64)


def padded_length(longest: int, context: int) -> int:
    """The length of a batch of texts: their longest, rounded up to 8, so that few different shapes occur."""
    return min(-(-longest // 8) * 8, context)


def read_definition(definition: str) -> tokenizers.Tokenizer:
    """The library's tokenizer of a tokenizer.json, which neither truncates nor pads."""
    try:
        library = tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # the library knows no other class
        raise UserError(f"The tokenizer cannot be read: {' '.join(str(error).split())[:200]}") from error
    library.no_truncation()
    library.no_padding()
    return library
