"""Caption tokenizers: CLIP's byte pairs, those of Hugging Face encoders, and those of other libraries."""

import bz2
import html
import operator
import string
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain, islice, takewhile
from typing import Any

import ftfy
import regex
import tokenizers
import torch
from tokenizers import models, pre_tokenizers

from declip.data.asset_files import asset
from declip.errors import UserError

_MERGES = 48_894
# CLIP's pattern without its special tokens; ignoring case also makes U+0345 a letter.
_PIECE = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
_LONGEST_CACHED = 64  # characters of a word whose ids are kept
# Required special ids; BERT calls them [CLS], [SEP], [MASK] and [PAD].
SPECIALS = ("start", "end", "mask", "padding")
PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))


class CaptionTokenizer(ABC):
    """Encodes texts as ids, enclosed by start and end; can be used by threads, forked and pickled."""

    vocabulary: int  # number of ids
    start: int
    end: int
    mask: int
    padding: int  # with CLIP's tokenizer also a word's
    words: Sequence[int]  # the ids of words
    library: tokenizers.Tokenizer
    _arguments: tuple[Any, ...]  # of the constructor

    def __init__(self, context: int) -> None:
        if context < 3:
            raise UserError(
                f"The context is {context} tokens; start, end and a word need 3 at least."
            )
        self.context = context  # largest number of ids of a text, start and end included

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), self._arguments

    @abstractmethod
    def word_ids(self, text: str) -> Iterable[int]:
        """The ids of all words of a text, one by one."""

    @abstractmethod
    def spell(self, ids: list[int]) -> str:
        """The text of ids of words and masks."""

    def ids(self, text: str) -> list[int]:
        """The ids of one text: start, its words' and end; the words are truncated to `context` ids in total."""
        words = islice(self.word_ids(text), self.context - 2)
        return [self.start, *words, self.end]

    def encode(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise UserError(
                f"A text must be a string; {type(text).__name__} was given: {text!r:.60}."
            )
        return self.ids(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids, with or without start and end; ids after the first end (padding) are ignored."""
        kept = [*takewhile(lambda token: token != self.end, map(operator.index, ids))]
        wrong = [token for token in kept if not 0 <= token < self.vocabulary]
        if wrong:
            raise UserError(
                f"Token id {wrong[0]} was given; this vocabulary has 0 to {self.vocabulary - 1}."
            )
        return self.spell([token for token in kept if token != self.start])

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        """Encode one text or several as (n, L) int64, L the longest, rounded up to 8 and at most `context`."""
        several: Any = texts
        if isinstance(texts, str) or not isinstance(texts, Iterable):
            several = [texts]
        rows = [self.encode(text) for text in several]
        if not rows:
            raise UserError("The tokenizer got no text; pass a string or a list of at least one.")
        # (n, L); few different L, so that kernels and memory are reused.
        width = padded_length(max(map(len, rows)), self.context)
        padded = [row + [self.padding] * (width - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64)


def padded_length(longest: int, context: int, step: int = 8) -> int:
    """The length of a batch of texts: their longest, rounded up to `step`, so that few different shapes occur."""
    return min(-(-longest // step) * step, context)


def read_definition(definition: str) -> tokenizers.Tokenizer:
    """The library's tokenizer of a tokenizer.json, which neither truncates nor pads."""
    try:
        library = tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # the library knows no other class
        raise UserError(
            f"The tokenizer cannot be read: {' '.join(str(error).split())[:200]}"
        ) from error
    library.no_truncation()
    library.no_padding()
    return library


class Tokenizer(CaptionTokenizer):
    """Encodes texts as CLIP's token ids and decodes them.

    Ids equal those of OpenAI's and open_clip's `SimpleTokenizer` with one exception: nothing in a text is read as a
    special token, so that pooling at the first end token is safe. Few `merges` make a small vocabulary.
    """

    def __init__(self, context: int = 77, merges: int | None = None) -> None:
        super().__init__(context)
        if merges is None:
            merges = _MERGES
        self._arguments = (context, merges)
        if not 0 <= merges <= _MERGES:
            raise UserError(
                f"{merges:,} merges were given; CLIP's vocabulary has 0 to {_MERGES:,}."
            )
        self.words = range(512 + merges)
        self.merges = merges
        self.vocabulary = len(self.words) + 3
        self.padding = 0
        self.start, self.end, self.mask = range(len(self.words), self.vocabulary)
        self._bpe = _bpe(merges)
        self.library = self._bpe.library

    def word_ids(self, text: str) -> Iterable[int]:
        return chain.from_iterable(map(self._bpe.encode, clean(text).split(" ")))

    def spell(self, ids: list[int]) -> str:
        pieces = (b" <|mask|> " if token == self.mask else self._bpe.pieces[token] for token in ids)
        return " ".join(b"".join(pieces).decode("utf-8", errors="replace").split())


def clean(text: str) -> str:
    """Clean a text as CLIP does: as `fix`, in lower case."""
    return fix(text).lower()


def fix(text: str) -> str:
    """Fix encodings, resolve HTML entities twice, make spaces single."""
    # ftfy and unescape leave printable ASCII without an ampersand unchanged: 15 microseconds saved.
    if not text.isascii() or not text.isprintable() or "&" in text:
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


class _BytePairs:
    """Byte-pair encoding of each word by itself: the library's thread pool, which must not be forked, never starts."""

    def __init__(self, merges: int) -> None:
        # Letters of CLIP's merges by byte, in the order of CLIP's ids: printable bytes of Latin-1 first.
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        letters = {byte: chr(byte) for byte in plain}
        for byte in range(256):
            if byte not in plain:
                letters[byte] = chr(256 + len(letters) - len(plain))
        packed = asset("clip_merges.txt.bz2").read_bytes()
        lines = bz2.decompress(packed).decode().splitlines()
        pairs = [(left, right) for left, right in map(str.split, lines[1 : merges + 1])]
        ended = [letter + "</w>" for letter in letters.values()]
        vocabulary = [*letters.values(), *ended, *map("".join, pairs)]
        numbers = {piece: number for number, piece in enumerate(vocabulary)}
        self.library = tokenizers.Tokenizer(
            models.BPE(vocab=numbers, merges=pairs, end_of_word_suffix="</w>")
        )
        self.library.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=False
        )
        self._cached = lru_cache(maxsize=2**16)(self._encode)
        bytes_of = {ord(letter): byte for byte, letter in letters.items()}
        self.pieces = []
        for piece in vocabulary:
            spelled = piece.replace("</w>", " ").translate(bytes_of)
            self.pieces.append(spelled.encode("latin-1"))

    def encode(self, word: str) -> tuple[int, ...]:
        if len(word) <= _LONGEST_CACHED:
            return self._cached(word)
        return self._encode(word)

    def _encode(self, word: str) -> tuple[int, ...]:
        pieces = _PIECE.findall(word)
        encoding = self.library.encode(pieces, is_pretokenized=True)
        return tuple(encoding.ids)


_bpe = lru_cache(maxsize=4)(_BytePairs)


class HuggingfaceTokenizer(CaptionTokenizer):
    """Encodes texts, cleaned by `fix` as in open_clip, by the content of tokenizer.json; "[SEP]" is spelled out."""

    def __init__(self, definition: str, specials: Mapping[str, int], context: int) -> None:
        super().__init__(context)
        self._arguments = (definition, dict(specials), context)
        self.library = read_definition(definition)
        self.library.encode_special_tokens = True
        ids = set(self.library.get_vocab(with_added_tokens=True).values())
        self.vocabulary = max(ids, default=-1) + 1
        if specials.keys() != set(SPECIALS) or not all(
            0 <= number < self.vocabulary for number in specials.values()
        ):
            wanted = f"one each for {', '.join(SPECIALS)}, under {self.vocabulary:,}"
            raise UserError(f"The tokenizer's special ids are {dict(specials)}; it needs {wanted}.")
        self.start, self.end, self.mask, self.padding = (specials[name] for name in SPECIALS)
        added = self.library.get_added_tokens_decoder().items()
        special = {number for number, token in added if token.special}
        self.words = sorted(ids - special - {*specials.values()})
        if not self.words:
            raise UserError(
                "The tokenizer has special tokens only, no words. Give the tokenizer that the encoder had."
            )

    def word_ids(self, text: str) -> Iterable[int]:
        return self.library.encode(fix(text), add_special_tokens=False).ids

    def spell(self, ids: list[int]) -> str:
        return self.library.decode(ids, skip_special_tokens=False).strip()


# Cleaning before the tokenizer, by open_clip's names; "" is none.
CLEAN: Mapping[str, Callable[[str], str]] = {
    "": str,
    "whitespace": fix,
    "lower": clean,
    "canonicalize": lambda text: " ".join(clean(text).translate(PUNCTUATION).split()),
}


class WrappedTokenizer(CaptionTokenizer):
    """Encodes texts as another library does, by tokenizer.json or CLIP's, padded to the context; `zeroed` becomes 0."""

    mask = -1  # none of these models was trained with masks

    def __init__(
        self,
        definition: str | None,
        context: int,
        clean: str,
        padding: int = 0,
        zeroed: int | None = None,
    ) -> None:
        super().__init__(context)
        self.stored: dict[str, Any] = {
            "definition": definition,
            "context": context,
            "clean": clean,
            "padding": padding,
            "zeroed": zeroed,
        }
        self._arguments = tuple(self.stored.values())
        self.padding = padding
        self._clean = CLEAN[clean]
        self._zeroed = zeroed
        self.clip: Tokenizer | None = None
        if definition is None:
            self.clip = Tokenizer(context)
            self.library = self.clip.library
            self.vocabulary = self.clip.mask
        else:
            self.library = read_definition(definition)
            self.library.enable_truncation(context)
            self.vocabulary = self.library.get_vocab_size()
        self.words = range(self.vocabulary)
        *start, self.end = self.encode("") or [padding]
        self.start = start[0] if start else -1

    def ids(self, text: str) -> list[int]:
        text = self._clean(text)
        ids = self.clip.ids(text) if self.clip else self.library.encode(text).ids
        return [0 if number == self._zeroed else number for number in ids]

    def word_ids(self, text: str) -> Iterable[int]:
        text = self._clean(text)
        if self.clip:
            return self.clip.word_ids(text)
        return self.library.encode(text, add_special_tokens=False).ids

    def spell(self, ids: list[int]) -> str:
        if self.clip:
            return self.clip.spell(ids)
        return self.library.decode(ids).strip()

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        tokens = super().__call__(texts)
        missing = self.context - tokens.shape[1]
        return torch.nn.functional.pad(tokens, (0, missing), value=self.padding)
