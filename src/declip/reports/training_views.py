"""Examples from training: the views of a batch, and the neighbors of captions in the queue."""

from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from declip.data.batch import IGNORED, PairBatch
from declip.data.images.crops import apply_photometric
from declip.data.pair import BrokenPair, PairSource
from declip.data.plan import Plan
from declip.data.text.caption_tokenizer import CaptionTokenizer
from declip.evaluation.encode import Encoder, text_features
from declip.reports.thumbnails import Thumbnail, ThumbnailCache, pixels
from declip.supervision.nearest_neighbor import Queue

SAMPLE = 512
"""Captions looked up for the fractions."""


class TextLookup(Protocol):
    """A `PairLoader`, as far as a report needs one: the text that a pair showed when."""

    def words(self, tag: int, view: int) -> str:
        """The text that the pair `tag` (epoch * len(source) + index) showed as text view 0 or 1."""
        ...


@dataclass(frozen=True)
class Neighbor:
    """An entry of the queue near a caption: `same` says that its words are the query's."""

    words: str
    image: Thumbnail | None
    cosine: float
    same: bool


@dataclass(frozen=True)
class LookedUp:
    """A caption that was looked up in the queue, with its image and its neighbors."""

    words: str
    image: Thumbnail | None
    found: list[Neighbor]


@dataclass(frozen=True)
class Neighbors:
    """A few random captions and their neighbors in the queue, which holds `held` of at most `size` entries.

    Attributes:
        rows: Neighbors of the same pair are left out.
        sampled: Number of captions that the fractions are of.
        same_pair: Fraction whose nearest entry is the same pair, seen earlier.
        same_words: Fraction whose nearest entry is another pair with the same words.
    """

    rows: list[LookedUp]
    held: int
    size: int
    sampled: int
    same_pair: float
    same_words: float

    @property
    def other(self) -> float:
        """Fraction whose nearest entry has other words: what the loss adds."""
        return 1 - self.same_pair - self.same_words


@dataclass(frozen=True)
class Word:
    """A piece of text; `mark` is "", "changed", "masked", "swapped" or "kept", `was` the word under a mask."""

    text: str
    mark: str = ""
    was: str = ""


@dataclass(frozen=True)
class ShownPair:
    """A pair as one batch showed it."""

    original: Thumbnail | None
    views: list[Thumbnail]
    caption: list[Word]
    augmented: list[Word] | None
    masked: list[Word] | None


def neighbors(
    model: Encoder,
    queue: Queue,
    source: PairSource,
    loader: TextLookup,
    rng: np.random.Generator,
    rows: int = 6,
    shown: int = 4,
) -> Neighbors | None:
    """Look up random training captions in the queue, as the nearest-neighbor loss does.

    Args:
        queue: Its tags are 2 · tag + view, where tag = epoch · len(source) + index.

    Returns:
        None when the queue holds no entry that can be named.
    """
    device = queue.tags.device
    known = torch.nonzero(queue.tags[: len(queue)] >= 0).flatten()
    if len(known) == 0:
        return None
    features, tags = queue.features[known.to(device)].cpu(), queue.tags[known.to(device)].cpu().numpy()
    indices = tags // 2 % len(source)
    asked = _readable(source, rng.permutation(len(source))[:SAMPLE])
    texts = text_features(model, [words for _, words in asked])
    first = torch.cat([(part @ features.T).argmax(1) for part in texts.split(64)]).numpy()
    own = indices[first] == [index for index, _ in asked]
    same = np.array([_words(loader, tags[slot]) == words for slot, (_, words) in zip(first, asked, strict=True)])
    thumbnails = ThumbnailCache(source)
    looked = [
        LookedUp(words, thumbnails.at(index), _found(loader, thumbnails, features @ text, tags, (index, words), shown))
        for (index, words), text in zip(asked[:rows], texts, strict=False)
    ]
    return Neighbors(looked, len(queue), queue.size, len(asked), float(own.mean()), float((same & ~own).mean()))


def shown_pairs(
    batch: PairBatch,
    source: PairSource,
    plan: Plan,
    tokenizer: CaptionTokenizer,
    rng: np.random.Generator,
    count: int = 4,
) -> list[ShownPair]:
    """Random pairs of a batch as the towers get them: pixels un-normalized, token ids decoded.

    Pairs whose words were changed or masked come first, so that there is something to see.
    """
    mean, std = torch.tensor(plan.mean), torch.tensor(plan.std)
    finished = apply_photometric(batch.views, mean, std)
    images = [view.pixels * std.view(3, 1, 1) + mean.view(3, 1, 1) for view in finished.values()]
    hidden = torch.zeros(len(batch)) if batch.labels is None else (batch.labels != IGNORED).sum(1).float()
    changed = torch.zeros(len(batch)) if len(batch.texts) < 2 else (batch.texts[0] != batch.texts[1]).any(1).float()
    order = rng.permutation(len(batch))
    interest = ((hidden > 0).float() + changed)[torch.from_numpy(order)].numpy()
    chosen = order[np.argsort(-interest, kind="stable")][:count]
    thumbnails = ThumbnailCache(source)
    seen = []
    for row in chosen.tolist():
        caption = _caption(tokenizer, batch.texts[0, row])
        seen.append(
            ShownPair(
                original=None if batch.sample_ids is None else thumbnails.at(int(batch.sample_ids[row]) % len(source)),
                views=[
                    pixels(view[row].float().numpy(), f"View {number} of: {caption}")
                    for number, view in enumerate(images, 1)
                ],
                caption=[Word(caption)],
                augmented=_changes(caption, _caption(tokenizer, batch.texts[1, row])) if len(batch.texts) > 1 else None,
                masked=None
                if batch.masked is None or batch.labels is None
                else _masked(tokenizer, batch.masked[row], batch.labels[row]),
            )
        )
    return seen


def _found(
    loader: TextLookup,
    thumbnails: ThumbnailCache,
    cosines: Tensor,
    tags: np.ndarray,
    asked: tuple[int, str],
    shown: int,
) -> list[Neighbor]:
    """The nearest entries of other pairs than the one that asks, each pair once."""
    own, words = asked
    found: list[Neighbor] = []
    met = {own}
    for slot in cosines.argsort(descending=True).tolist():
        index = int(tags[slot]) // 2 % len(thumbnails.source)
        if index not in met:
            met.add(index)
            entry = _words(loader, tags[slot])
            found.append(Neighbor(entry, thumbnails.at(index), float(cosines[slot]), entry == words))
        if len(found) == shown:
            break
    return found


def _words(loader: TextLookup, queue_tag: int) -> str:
    return loader.words(int(queue_tag) // 2, int(queue_tag) % 2)


def _readable(source: PairSource, indices: np.ndarray) -> list[tuple[int, str]]:
    """Indices with their first captions, without broken pairs."""
    found = []
    for index in indices.tolist():
        try:
            found.append((index, source.captions(index)[0]))
        except BrokenPair:
            continue
    return found


def _ids(tokenizer: CaptionTokenizer, row: Tensor) -> list[int]:
    """The ids between start and end."""
    ids = row.tolist()
    return ids[1 : ids.index(tokenizer.end)] if tokenizer.end in ids else ids[1:]


def _caption(tokenizer: CaptionTokenizer, row: Tensor) -> str:
    return tokenizer.decode(row.tolist())


def _changes(caption: str, augmented: str) -> list[Word]:
    """The augmented caption, with the words marked that were replaced, moved in or are new."""
    before, after = caption.split(), augmented.split()
    words = []
    for kind, _, _, start, end in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        words += [Word(word, "" if kind == "equal" else "changed") for word in after[start:end]]
    return words


def _masked(tokenizer: CaptionTokenizer, masked: Tensor, labels: Tensor) -> list[Word]:
    """The corrupted caption token by token; under each token that is to be predicted, what it was."""
    words = []
    for token, label in zip(_ids(tokenizer, masked), labels.tolist()[1:], strict=False):
        text = tokenizer.decode([token])
        was = "" if label == IGNORED else tokenizer.decode([label])
        mark = "" if label == IGNORED else "kept" if label == token else "swapped"
        words.append(Word("mask", "masked", was) if token == tokenizer.mask else Word(text, mark, was))
    return words
