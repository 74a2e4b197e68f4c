"""Examples on the page of a run: retrieval, confused classes, neighbors in the queue, and the views of a batch.

`thumbnails` gives the image of a row of the features.
"""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
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
from declip.evaluation.encode import Encoder, SourceFeatures, text_features
from declip.evaluation.retrieval import carriers_of, ranks
from declip.reports.thumbnails import Thumbnail, Thumbnails, pixels, thumbnails_of
from declip.supervision.nearest_neighbor import Queue

SHOWN = 5  # candidates of a query, and neighbors of a caption


class Candidate(NamedTuple):
    """A retrieved candidate; `right` says that it belongs to the query, or has the same words."""

    words: str
    image: Thumbnail | None
    cosine: float
    right: bool


class Query(NamedTuple):
    """A caption, its image where that is not asked for, the nearest candidates, and the rank of the first right one."""

    words: str
    image: Thumbnail | None
    hits: list[Candidate]
    rank: int = 0


class Confusion(NamedTuple):
    """A class, and the class whose name `times` of its `size` images got, each with an image."""

    words: str
    image: Thumbnail | None
    other_words: str
    other_image: Thumbnail | None
    times: int
    size: int


class ShownPair(NamedTuple):
    """A pair as one batch showed it: its images, and its caption as the text tower reads it, by name."""

    original: Thumbnail | None
    views: list[Thumbnail]
    texts: dict[str, str]


def retrieval(
    features: SourceFeatures, thumbnails: Thumbnails, rng: np.random.Generator, each: int = 4
) -> tuple[list[Query], float]:
    """Random captions, `each` of those that rank their image first and of the others, with the nearest images.

    Returns:
        The captions, and the fraction that rank their image first.
    """
    assert features.texts is not None
    words, carriers = features.words, carriers_of(features)
    right = [carriers[word] for word in words]
    rank = ranks(features.texts, features.images, right)
    chosen: dict[int, int] = {}  # one caption of an image
    for group in (np.flatnonzero(rank == 1), np.flatnonzero(rank > 1)):
        by_owner = {int(features.owners[row]): row for row in rng.permutation(group).tolist()}
        chosen |= dict([(owner, row) for owner, row in by_owner.items() if owner not in chosen][:each])
    examples = []
    for row in chosen.values():
        cosines, places = (features.images @ features.texts[row]).topk(min(SHOWN, len(features)))
        hits = [
            Candidate(features.captions[place][0], thumbnails(place), cosine, place in right[row])
            for cosine, place in zip(cosines.tolist(), places.tolist(), strict=True)
        ]
        examples.append(Query(words[row], None, hits, int(rank[row])))
    return examples, float(np.mean(rank == 1))


def confusions(
    features: SourceFeatures,
    labels: np.ndarray,
    class_names: Sequence[str],
    classes: Tensor,
    thumbnails: Thumbnails,
    most: int = 12,
) -> tuple[list[Confusion], int]:
    """The pairs of classes confused most often, then most confidently, and the number of wrong answers.

    Args:
        classes: (C, d) text features of the classes.
    """
    nearest, taken_for = (part.numpy() for part in (features.images @ classes.T).max(1))
    margins = nearest - (features.images * classes[torch.from_numpy(labels)]).sum(1).numpy()
    rows_of: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row in np.flatnonzero(taken_for != labels).tolist():
        rows_of[int(labels[row]), int(taken_for[row])].append(row)
    order = sorted(rows_of, key=lambda pair: (-len(rows_of[pair]), -float(np.mean(margins[rows_of[pair]]))))
    example = {int(label): row for row, label in reversed(list(enumerate(labels)))}
    shown = []
    for true, other in order[:most]:
        rows, image = rows_of[true, other], thumbnails(example[other]) if other in example else None
        size = int(np.sum(labels == true))
        shown.append(Confusion(class_names[true], thumbnails(rows[0]), class_names[other], image, len(rows), size))
    return shown, int(np.sum(taken_for != labels))


def neighbors(
    model: Encoder, queue: Queue | None, source: PairSource, loader: PairLoader, rng: np.random.Generator, rows: int = 6
) -> list[Query]:
    """Random training captions, and the nearest entries of the queue that are of other pairs, each pair once.

    Args:
        queue: Its tags are 2 · tag + view, where tag = epoch · len(source) + index; an entry without one is left out.
        loader: Knows the text that a pair showed then.
    """
    known = torch.nonzero(queue.tags[: len(queue)] >= 0).flatten() if queue is not None else ()
    if queue is None or len(known) == 0:
        return []
    features, tags = queue.features[known].cpu(), queue.tags[known].tolist()
    thumbnails, looked = thumbnails_of(source), list[Query]()
    for index in rng.permutation(len(source)).tolist():
        with suppress(BrokenPair):
            words = source.captions(index)[0]
            cosines = features @ text_features(model, [words])[0]
            hits: dict[int, Candidate] = {}
            for slot in cosines.argsort(descending=True).tolist():
                tag, view = divmod(tags[slot], 2)
                other = tag % len(source)
                if other != index and other not in hits:
                    then = loader.words(tag, view)
                    hits[other] = Candidate(then, thumbnails(other), float(cosines[slot]), then == words)
                if len(hits) == SHOWN:
                    break
            looked.append(Query(words, thumbnails(index), list(hits.values())))
        if len(looked) == rows:
            break
    return looked


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
        decoded = (tokenizer.decode(text[row].tolist()) for text in batch.texts)
        texts = dict(zip(("caption", "augmented"), decoded, strict=False))
        if batch.masked is not None and batch.labels is not None:
            texts["masked"] = _masked(tokenizer, batch.masked[row], batch.labels[row])
        original = None if batch.sample_ids is None else thumbnails(int(batch.sample_ids[row]) % len(source))
        alt = f"View of: {texts['caption']}"
        pairs.append(ShownPair(original, [pixels(view[row].float().numpy(), alt) for view in images], texts))
    return pairs


def _masked(tokenizer: CaptionTokenizer, masked: Tensor, labels: Tensor) -> str:
    """The corrupted caption; a token to be predicted is in brackets, with what it was: "a [mask: cat] sat"."""
    words = []
    for token, label in zip(masked.tolist()[1:], labels.tolist()[1:], strict=True):
        if token == tokenizer.end:
            break
        word = "mask" if token == tokenizer.mask else tokenizer.decode([token])
        words.append(word if label == IGNORED else f"[{word}: {tokenizer.decode([label])}]")
    return " ".join(words)
