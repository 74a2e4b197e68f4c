"""The tokenizer of a Hugging Face text encoder, by `tokenizers` alone: transformers is not needed."""

import operator
from collections.abc import Iterable, Mapping
from functools import lru_cache

import tokenizers

from declip.data.text.caption_tokenizer import CaptionTokenizer
from declip.errors import UserError

SPECIALS = ("start", "end", "mask", "padding")
"""Required special ids; BERT calls them [CLS], [SEP], [MASK] and [PAD]."""


class HuggingfaceTokenizer(CaptionTokenizer):
    """Turns texts into the ids that an encoder was trained with; its own normalizer cleans them.

    Ids equal those of transformers for every text with one exception: "[SEP]" and the like in a text are spelled out,
    so that special ids stand only where this class or `mask_tokens` puts them.

    Args:
        definition: The content of tokenizer.json.
        specials: Ids of start, end, mask and padding.
        context: Largest number of ids of a text, start and end included.

    Raises:
        UserError: The context is below 3, `tokenizers` cannot read the definition, or an id is not in it.
    """

    def __init__(self, definition: str, specials: Mapping[str, int], context: int) -> None:
        if context < 3:
            raise UserError(f"The context is {context} tokens; start, end and a word need 3 at least.")
        self.context = context
        self._arguments = (definition, dict(specials))
        self._definition = _parsed(definition)
        self.vocabulary = self._definition.vocabulary
        if specials.keys() != set(SPECIALS) or not all(0 <= number < self.vocabulary for number in specials.values()):
            raise UserError(
                f"The tokenizer's special ids are {dict(specials)}; it needs one each for {', '.join(SPECIALS)}, under "
                f"{self.vocabulary:,}."
            )
        self.start, self.end, self.mask, self.padding = (specials[name] for name in SPECIALS)
        self.words = [number for number in self._definition.words if number not in specials.values()]

    def __reduce__(self) -> tuple[type["HuggingfaceTokenizer"], tuple[str, dict[str, int], int]]:
        return type(self), (*self._arguments, self.context)

    @property
    def library(self) -> tokenizers.Tokenizer:
        """The `tokenizers` library's own object."""
        return self._definition.library

    def encode(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise UserError(f"A text must be a string; {type(text).__name__} was given: {text!r:.60}.")
        ids = self.library.encode(text, add_special_tokens=False).ids
        return [self.start, *ids[: self.context - 2], self.end]

    def decode(self, ids: Iterable[int]) -> str:
        """See `CaptionTokenizer.decode`; the mask is shown as the encoder writes it."""
        kept: list[int] = []
        for number in ids:
            token = operator.index(number)
            if token == self.end:
                break
            if not 0 <= token < self.vocabulary:
                raise UserError(f"Token id {token} was given; this vocabulary has 0 to {self.vocabulary - 1}.")
            if token != self.start:
                kept.append(token)
        return self.library.decode(kept, skip_special_tokens=False).strip()


class _Definition:
    """A definition, parsed once however many instances there are."""

    def __init__(self, definition: str) -> None:
        try:
            self.library = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # the library knows no other class
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"The text encoder's tokenizer cannot be read: {reason}") from error
        self.library.no_truncation()
        self.library.no_padding()
        self.library.encode_special_tokens = True
        ids = set(self.library.get_vocab(with_added_tokens=True).values())
        added = self.library.get_added_tokens_decoder()
        self.vocabulary = max(ids, default=-1) + 1
        self.words = sorted(ids - {number for number, token in added.items() if token.special})


@lru_cache(maxsize=2)
def _parsed(definition: str) -> _Definition:
    return _Definition(definition)
