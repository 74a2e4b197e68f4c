"""The base class of caption tokenizers: special ids, encoding, decoding, and padded batches."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch

from declip.errors import UserError

_LENGTH_STEP = 8


class CaptionTokenizer(ABC):
    """Turns texts into ids and back; start and end stand around every text, and nowhere else.

    An instance can be used by threads, forked and pickled.

    Attributes:
        context: Largest number of ids of a text, start and end included.
        vocabulary: Number of ids.
        start, end, mask, padding: Special ids; with CLIP's tokenizer padding is also a word's.
        words: The ids of words.
    """

    context: int
    vocabulary: int
    start: int
    end: int
    mask: int
    padding: int
    words: Sequence[int]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Encode one text as start, its words' ids and end; the words are truncated to `context` ids in total."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids, with or without start and end; ids after the first end (padding) are ignored."""

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        """Encode one text or several as (n, L) int64, L the longest, rounded up to 8 and at most `context`."""
        rows = [self.encode(text) for text in ([texts] if isinstance(texts, str) else texts)]
        if not rows:
            raise UserError("No text was given to the tokenizer; give a string or a list of at least one.")
        longest = max(map(len, rows))
        width = min(-(-longest // _LENGTH_STEP) * _LENGTH_STEP, self.context)
        return torch.tensor([row + [self.padding] * (width - len(row)) for row in rows], dtype=torch.int64)
