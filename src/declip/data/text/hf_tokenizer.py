"""The tokenizer of a Hugging Face text encoder, as `tokenizers` has it: transformers is not needed."""

import operator
from collections.abc import Iterable, Mapping
from functools import lru_cache

import tokenizers

from declip.data.text.caption_tokenizer import CaptionTokenizer
from declip.errors import UserError

SPECIALS = ("start", "end", "mask", "padding")
"""What an encoder's tokenizer must have; BERT calls them [CLS], [SEP], [MASK] and [PAD]."""


class HuggingfaceTokenizer(CaptionTokenizer):
    """Turns texts into the ids that an encoder was trained with; its own normalizer cleans them.

    Ids equal those of transformers for every text, but for one thing: "[SEP]" and the like in a text are spelled out,
    so that special ids stand only where this class or `mask_tokens` puts them.

    Args:
        definition: What tokenizer.json holds.
        specials: Ids of start, end, mask and padding.
        context: The most ids a text may have, start and end included.

    Raises:
        UserError: The context is under 3, `tokenizers` cannot read the definition, or an id is not in it.
    """

    def __init__(self, definition: str, specials: Mapping[str, int], context: int) -> None:
        if context < 3:
            raise UserError(f"The context is {context} tokens; start, end and a word need 3 at least.")
        self.context = context
        self._given = (definition, dict(specials))
        self._known = _known(definition)
        self.vocabulary = self._known.vocabulary
        if specials.keys() != set(SPECIALS) or not all(0 <= number < self.vocabulary for number in specials.values()):
            raise UserError(
                f"The tokenizer's special ids are {dict(specials)}; it needs one each for {', '.join(SPECIALS)}, under "
                f"{self.vocabulary:,}."
            )
        self.start, self.end, self.mask, self.padding = (specials[name] for name in SPECIALS)
        self.words = [number for number in self._known.words if number not in specials.values()]

    def __reduce__(self) -> tuple[type["HuggingfaceTokenizer"], tuple[str, dict[str, int], int]]:
        return type(self), (*self._given, self.context)

    @property
    def library(self) -> tokenizers.Tokenizer:
        """The `tokenizers` library's own object."""
        return self._known.library

    def encode(self, text: str) -> list[int]:
        """See `CaptionTokenizer.encode`."""
        if not isinstance(text, str):
            raise UserError(f"A text must be a string; {type(text).__name__} was given: {text!r:.60}.")
        found = self.library.encode(text, add_special_tokens=False).ids
        return [self.start, *found[: self.context - 2], self.end]

    def decode(self, ids: Iterable[int]) -> str:
        """See `CaptionTokenizer.decode`; the mask is shown as the encoder writes it."""
        found: list[int] = []
        for given in ids:
            token = operator.index(given)
            if token == self.end:
                break
            if not 0 <= token < self.vocabulary:
                raise UserError(f"Token id {token} was given; this vocabulary has 0 to {self.vocabulary - 1}.")
            if token != self.start:
                found.append(token)
        return self.library.decode(found, skip_special_tokens=False).strip()


class _Known:
    """A definition, read once however many instances there are.

    Args:
        definition: What tokenizer.json holds.
    """

    def __init__(self, definition: str) -> None:
        try:
            self.library = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # the library knows no other class
            said = " ".join(str(error).split())[:200]
            raise UserError(f"The text encoder's tokenizer cannot be read: {said}") from error
        self.library.no_truncation()
        self.library.no_padding()
        self.library.encode_special_tokens = True
        ids = set(self.library.get_vocab(with_added_tokens=True).values())
        added = self.library.get_added_tokens_decoder()
        self.vocabulary = max(ids, default=-1) + 1
        self.words = sorted(ids - {number for number, token in added.items() if token.special})


@lru_cache(maxsize=2)
def _known(definition: str) -> _Known:
    return _Known(definition)
