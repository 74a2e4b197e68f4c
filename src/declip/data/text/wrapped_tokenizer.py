"""Tokenizers of other libraries' models, such as SigLIP's and XLM-R's, by `tokenizers` alone."""

import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from declip.data.text.caption_tokenizer import CaptionTokenizer, read_definition
from declip.data.text.tokenizer import Tokenizer, clean, fix

PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))

# Cleaning before the tokenizer, by open_clip's names.
CLEAN: Mapping[str, Callable[[str], str]] = {
    "whitespace": fix,
    "lower": clean,
    "canonicalize": lambda text: " ".join(fix(text).translate(PUNCTUATION).lower().split()),
}


class WrappedTokenizer(CaptionTokenizer):
    """Encodes texts as the ids of another library's tokenizer; batches are padded to the full context, as there.

    Args:
        definition: Content of tokenizer.json; None for CLIP's own vocabulary.
        zeroed: Id that becomes 0 (CLIPA's separator).
    """

    mask = -1  # none of these models was trained with masks

    def __init__(
        self, definition: str | None, context: int, clean: str, padding: int = 0, zeroed: int | None = None
    ) -> None:
        super().__init__(context)
        self.stored: dict[str, Any] = {
            "definition": definition, "context": context, "clean": clean, "padding": padding, "zeroed": zeroed,
        }  # fmt: skip
        self.padding, self._clean, self._zeroed = padding, CLEAN[clean], zeroed
        self.clip = Tokenizer(context) if definition is None else None
        self.library = self.clip.library if self.clip else read_definition(str(definition))
        if not self.clip:
            self.library.enable_truncation(context)
        self.vocabulary = self.clip.mask if self.clip else self.library.get_vocab_size()
        self.words = range(self.vocabulary)
        empty = self.encode("") or [padding]
        self.start, self.end = empty[0] if len(empty) > 1 else -1, empty[-1]

    def __reduce__(self) -> tuple[type["WrappedTokenizer"], tuple[Any, ...]]:
        return type(self), tuple(self.stored.values())

    def ids(self, text: str) -> list[int]:
        text = self._clean(text)
        ids = self.clip.ids(text) if self.clip else self.library.encode(text).ids
        return [0 if number == self._zeroed else number for number in ids]

    def word_ids(self, text: str) -> Iterable[int]:
        text = self._clean(text)
        return self.clip.word_ids(text) if self.clip else self.library.encode(text, add_special_tokens=False).ids

    def spell(self, ids: list[int]) -> str:
        return self.clip.spell(ids) if self.clip else self.library.decode(ids).strip()

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        tokens = super().__call__(texts)
        return torch.nn.functional.pad(tokens, (0, self.context - tokens.shape[1]), value=self.padding)
