"""What every tokenizer of captions has: ids for start, end, mask and padding, and batches of them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch

from declip.errors import UserError

_LENGTH_STEP = 8


class CaptionTokenizer(ABC):
    """Turns texts into ids and back; start and end stand around every text, and nowhere else.

    An instance can be used by threads, forked and pickled.

    Attributes:
        context: The most ids a text may have, start and end included.
        vocabulary: Number of ids.
        start: Id before the first word.
        end: Id after the last word.
        mask: Id that takes a word's place.
        padding: Id after the end.
        words: The ids that a text's words can have: none of the above, but for padding, where that is a word's too.
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
        """Encode one text.

        Args:
            text: Any text; an empty one gives start and end alone.

        Returns:
            start, the words' ids, end: at most `context` ids. What does not fit is cut off before the end.

        Raises:
            UserError: `text` is not a string.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Show what ids say.

        Args:
            ids: Ids with or without start and end; what follows the first end (padding) is left out.

        Raises:
            UserError: An id is not in the vocabulary.
        """

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        """Encode texts into one padded batch.

        Args:
            texts: One text or several.

        Returns:
            Ids (n, L) int64, L the longest rounded up to a multiple of 8, at most `context`; padding after the end.

        Raises:
            UserError: No text was given, or something that is not a string.
        """
        rows = [self.encode(text) for text in ([texts] if isinstance(texts, str) else texts)]
        if not rows:
            raise UserError("No text was given to the tokenizer; give a string or a list of at least one.")
        longest = max(map(len, rows))
        width = min(-(-longest // _LENGTH_STEP) * _LENGTH_STEP, self.context)
        return torch.tensor([row + [self.padding] * (width - len(row)) for row in rows], dtype=torch.int64)
