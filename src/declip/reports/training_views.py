"""Examples from training: the views of a batch, and the neighbors of captions in the queue."""

from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from declip.data.batch import IGNORED, PairBatch
from declip.data.images.crops import apply_photometric
from declip.data.loader import PairLoader
from declip.data.pair import BrokenPair, PairSource
from declip.data.plan import Plan
from declip.data.text.caption_tokenizer import CaptionTokenizer
from declip.evaluation.encode import Encoder, text_features
from declip.reports.thumbnails import Thumbnail, pixels, thumbnails_of
from declip.supervision.nearest_neighbor import Queue

SAMPLE = 512
"""Captions looked up for the fractions."""


class Neighbor(NamedTuple):
    """An entry of the queue near a caption: `same` says that its words are the query's."""

    words: str
    image: Thumbnail | None
    cosine: float
    same: bool


class LookedUp(NamedTuple):
    """A caption that was looked up in the queue, with its image and its neighbors, other pairs."""

    words: str
    image: Thumbnail | None
    found: list[Neighbor]


@dataclass(frozen=True)
class Neighbors:
    """A few random captions and their neighbors in the queue.

    Attributes:
        sampled: Number of captions that the fractions are of.
        same_pair: Fraction whose nearest entry is the same pair, seen earlier.
        same_words: Fraction whose nearest entry is another pair with the same words.
    """

    rows: list[LookedUp]
    sampled: int
    same_pair: float
    same_words: float


class Word(NamedTuple):
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
    loader: PairLoader,
    rng: np.random.Generator,
    rows: int = 6,
    shown: int = 4,
) -> Neighbors | None:
    """Look up random training captions in the queue, as the nearest-neighbor loss does.

    Args:
        queue: Its tags are 2 · tag + view, where tag = epoch · len(source) + index.
        loader: Knows the text that a pair showed then.

    Returns:
        None when the queue holds no entry that can be named.
    """
    known = torch.nonzero(queue.tags[: len(queue)] >= 0).flatten()
    if len(known) == 0:
        return None
    features, tags = queue.features[known].cpu(), queue.tags[known].tolist()
    asked = _readable(source, rng.permutation(len(source))[:SAMPLE])
    texts = text_features(model, [words for _, words in asked])
    thumbnails = thumbnails_of(source)

    def entry(slot: int) -> tuple[int, str]:
        """Index of the pair, and its words then."""
        tag, view = divmod(tags[slot], 2)
        return tag % len(source), loader.words(tag, view)

    looked: list[LookedUp] = []
    same_pair = same_words = 0
    for (index, words), text in zip(asked, texts, strict=True):
        cosines = features @ text
        nearest = entry(int(cosines.argmax()))
        same_pair += nearest[0] == index
        same_words += nearest[0] != index and nearest[1] == words
        if len(looked) < rows:
            found: dict[int, Neighbor] = {}
            for slot in cosines.argsort(descending=True).tolist():
                if len(found) == shown:
                    break
                if (other := tags[slot] // 2 % len(source)) != index and other not in found:
                    then = entry(slot)[1]
                    found[other] = Neighbor(then, thumbnails(other), float(cosines[slot]), then == words)
            looked.append(LookedUp(words, thumbnails(index), list(found.values())))
    return Neighbors(looked, len(asked), same_pair / len(asked), same_words / len(asked))


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
    interest = (batch.texts[0] != batch.texts[-1]).any(1).float()
    if batch.labels is not None:
        interest += (batch.labels != IGNORED).any(1)
    order = rng.permutation(len(batch))
    chosen = order[np.argsort(-interest.numpy()[order], kind="stable")][:count]
    thumbnails = thumbnails_of(source)
    pairs = []
    for row in chosen.tolist():
        caption, *others = (tokenizer.decode(text[row].tolist()) for text in batch.texts)
        masked = None
        if batch.masked is not None and batch.labels is not None:
            masked = _masked(tokenizer, batch.masked[row], batch.labels[row])
        pairs.append(
            ShownPair(
                original=None if batch.sample_ids is None else thumbnails(int(batch.sample_ids[row]) % len(source)),
                views=[
                    pixels(view[row].float().numpy(), f"View {number} of: {caption}")
                    for number, view in enumerate(images, 1)
                ],
                caption=[Word(caption)],
                augmented=_changes(caption, others[0]) if others else None,
                masked=masked,
            )
        )
    return pairs


def _readable(source: PairSource, indices: np.ndarray) -> list[tuple[int, str]]:
    """Indices with their first captions, without broken pairs."""
    found = []
    for index in indices.tolist():
        try:
            found.append((index, source.captions(index)[0]))
        except BrokenPair:
            continue
    return found


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
    for token, label in zip(masked.tolist()[1:], labels.tolist()[1:], strict=True):
        if token == tokenizer.end:
            break
        text = "mask" if token == tokenizer.mask else tokenizer.decode([token])
        mark = "masked" if token == tokenizer.mask else "kept" if label == token else "swapped"
        words.append(Word(text) if label == IGNORED else Word(text, mark, tokenizer.decode([label])))
    return words
