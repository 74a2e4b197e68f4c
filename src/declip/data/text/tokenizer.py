"""CLIP's byte-pair encoding, with `<|mask|>` appended. The merges are OpenAI's, MIT license (assets/LICENSE.clip.txt).

Ids: 256 bytes inside a word, 256 bytes at a word's end, one per merge, then start, end, mask.
"""

import gzip
import html
from collections.abc import Iterable
from functools import lru_cache
from importlib.resources import files
from itertools import chain

import ftfy
import regex
import tokenizers
from tokenizers import models, pre_tokenizers

from declip.data.text.caption_tokenizer import CaptionTokenizer
from declip.errors import UserError

_MERGES = 48_894
# CLIP's pattern without its special tokens; ignoring case also makes U+0345 a letter.
_PIECE = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
_LONGEST_CACHED = 64


class Tokenizer(CaptionTokenizer):
    """Encodes texts as CLIP's token ids and decodes them.

    Ids equal those of OpenAI's and open_clip's `SimpleTokenizer` with one exception: nothing in a text is read as a
    special token, so that pooling at the first end token is safe. Few `merges` make a small vocabulary.
    """

    def __init__(self, context: int = 77, merges: int | None = None) -> None:
        super().__init__(context)
        self.merges = _MERGES if merges is None else merges
        if not 0 <= self.merges <= _MERGES:
            raise UserError(f"{self.merges:,} merges were given; CLIP's vocabulary has 0 to {_MERGES:,}.")
        self.words = range(512 + self.merges)
        self.start, self.end, self.mask = (len(self.words) + number for number in range(3))
        self.vocabulary = self.mask + 1
        self.padding = 0
        self._bpe = _bpe(self.merges)
        self.library = self._bpe.library

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[int, int]]:
        return type(self), (self.context, self.merges)

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
    """Byte-pair encoding of strings between two spaces, with the first `merges` of CLIP's merges.

    Each string is looked up in a bounded cache or encoded by itself, so that the library's thread pool never starts.
    """

    def __init__(self, merges: int) -> None:
        letters = _byte_letters()
        packed = files("declip.data").joinpath("assets", "clip_merges.txt.gz").read_bytes()
        lines = gzip.decompress(packed).decode("utf-8").splitlines()
        pairs = [(left, right) for left, right in map(str.split, lines[1 : merges + 1])]
        ended = [letter + "</w>" for letter in letters.values()]
        vocabulary = [*letters.values(), *ended, *(left + right for left, right in pairs)]
        numbers = {piece: number for number, piece in enumerate(vocabulary)}
        self.library = tokenizers.Tokenizer(models.BPE(vocab=numbers, merges=pairs, end_of_word_suffix="</w>"))
        self.library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._cached = lru_cache(maxsize=2**16)(self._encode)
        bytes_of = {ord(letter): byte for byte, letter in letters.items()}
        self.pieces = [piece.replace("</w>", " ").translate(bytes_of).encode("latin-1") for piece in vocabulary]

    def encode(self, word: str) -> tuple[int, ...]:
        return self._cached(word) if len(word) <= _LONGEST_CACHED else self._encode(word)

    def _encode(self, word: str) -> tuple[int, ...]:
        return tuple(self.library.encode(_PIECE.findall(word), is_pretokenized=True).ids)


_bpe = lru_cache(maxsize=4)(_BytePairs)


def _byte_letters() -> dict[int, str]:
    """Map bytes to the letters of CLIP's merges, in the order of CLIP's ids: printable bytes of Latin-1 first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
