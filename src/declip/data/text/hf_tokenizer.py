"""The tokenizer of a Hugging Face text encoder, by `tokenizers` alone: transformers is not needed."""

from collections.abc import Iterable, Mapping

from declip.data.text.caption_tokenizer import CaptionTokenizer, read_definition
from declip.errors import UserError

# Required special ids; BERT calls them [CLS], [SEP], [MASK] and [PAD].
SPECIALS = ("start", "end", "mask", "padding")


class HuggingfaceTokenizer(CaptionTokenizer):
    """Encodes texts as the ids that an encoder was trained with, equal to those of transformers.

    "[SEP]" and the like in a text are spelled out, so that special ids occur only where this class inserts them.

    Args:
        definition: The content of tokenizer.json.
        specials: Ids of start, end, mask and padding.
    """

    def __init__(self, definition: str, specials: Mapping[str, int], context: int) -> None:
        super().__init__(context)
        self._arguments = (definition, dict(specials), context)
        self.library = read_definition(definition)
        self.library.encode_special_tokens = True
        ids = set(self.library.get_vocab(with_added_tokens=True).values())
        self.vocabulary = max(ids, default=-1) + 1
        if specials.keys() != set(SPECIALS) or not all(0 <= number < self.vocabulary for number in specials.values()):
            raise UserError(
                f"The tokenizer's special ids are {dict(specials)}; it needs one each for {', '.join(SPECIALS)}, under "
                f"{self.vocabulary:,}."
            )
        self.start, self.end, self.mask, self.padding = (specials[name] for name in SPECIALS)
        added = self.library.get_added_tokens_decoder().items()
        self.words = sorted(ids - {number for number, token in added if token.special} - {*specials.values()})

    def __reduce__(self) -> tuple[type["HuggingfaceTokenizer"], tuple[str, dict[str, int], int]]:
        return type(self), self._arguments

    def word_ids(self, text: str) -> Iterable[int]:
        return self.library.encode(text, add_special_tokens=False).ids

    def spell(self, ids: list[int]) -> str:
        return self.library.decode(ids, skip_special_tokens=False).strip()
