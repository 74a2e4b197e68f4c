"""Projections of frozen towers in closed form, chosen by cross-validation: no steps, no validation set needed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor
from torch.nn.functional import normalize

from declip.closed_form.folds import assign_folds
from declip.closed_form.solve import (
    DEFAULT_FORM,
    START,
    ClassPairs,
    Form,
    Heads,
    Pairs,
    Sides,
    centered,
    fit_heads,
    moments,
    raw_heads,
    regression_rows,
    solve,
    solve_one,
)
from declip.io.pool import torch_threads

# Candidates: with 5,811 emoji CCA finds 20 % and 44 % (R@1, R@10), ridge regression 11 % and 34 %, its best.
FORMS = (
    *(Form("ridge", ridge) for ridge in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)),
    *(Form("cca", ridge) for ridge in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)),
)
# Candidates where the features are embeddings of a model that has projections
START_FORMS = (
    *(Form("pulled", ridge) for ridge in (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)),
    *(Form("cca", ridge) for ridge in (0.3, 1.0, 3.0)),
)
CLASS_WEIGHTS = (1.0, 0.25, 0.0)  # of a class, where an own image has 1; the first where pairs are too few to choose
SCALES = (5.0, 10.0, 15.0, 20.0, 30.0, 50.0, 100.0)  # candidates for the logit scale
DEFAULT_SCALE = 20.0
TIE = 1e-9  # gains that differ by less are equal: the usual heads, or else the larger weight of the classes, are kept
# Standard errors that the gain of a candidate must exceed. A start that was trained on pairs is changed with more
# caution: with 1.0 it lost up to 11 points (31 to 124 pairs of builtin:clipart and stamps, from a model of icons).
CAUTION, START_CAUTION = 1.0, 2.0
FOLDS, FEWEST = 5, 20  # folds, and groups of pairs from which on they are measured
# Groups of equal size from which on there is a choice. With 20 pairs the usual heads are 1.2 points better than chosen
# ones (mean of R@1 and R@10), with 31 and 62 as good, with 124 0.3 worse (benchmarks/results/few/choice.jsonl).
FEW = 60
MOST = 5_000  # images that the choice is made on: the heads are of all, and so are their out-of-fold ranks
# Factor of an interval's width. Images of a fold compete with each other, and folds share pairs that are fitted, so
# their errors are not independent (arXiv 2104.00673). Chosen with 80 intervals on four built-in sets.
WIDER = 1.3
BLOCK = 1_000  # images that compete, so that the time grows with the number of images, not its square
FEW_FORMS = 3  # up to which each form has factors of its own; more share their axes
DIRECTIONS = 512  # largest directions of the image features that cross-validation keeps: a tenth of 1,280's time


Key = TypeVar("Key")
Given = TypeVar("Given")
Computed = TypeVar("Computed")


class Estimate(NamedTuple):
    """A mean over held-out pairs with its 95 % interval, by a jackknife over the groups."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class HeldOutRanks:
    """Out-of-fold ranks of n images and their m captions by one candidate, or those of a block alone."""

    owners: Tensor  # (m,) int64, the image of each caption
    to_text: Tensor  # (n,) int64, rank of an image's best caption in its block, from 0
    to_image: Tensor  # (m,) int64, rank of a caption's best image
    images: Tensor  # (n,) int64, number of images in the block
    fit: Tensor  # (m,) mean rank of caption and image for each other, see `rank`
    losses: Tensor  # (n, scales) float64, cross-entropy of an image with its captions

    @classmethod
    def join(cls, pairs: Pairs, parts: Sequence[tuple["HeldOutBlock", "HeldOutRanks"]]) -> "HeldOutRanks":
        """Concatenate the ranks of blocks that together have all pairs, in the order of the pairs."""
        images = torch.cat([block.images for block, _ in parts]).argsort()
        captions = torch.cat([block.captions for block, _ in parts]).argsort()
        ranks = [each for _, each in parts]
        return cls(
            pairs.owners,
            torch.cat([each.to_text for each in ranks])[images],
            torch.cat([each.to_image for each in ranks])[captions],
            torch.cat([each.images for each in ranks])[images],
            torch.cat([each.fit for each in ranks])[captions],
            torch.cat([each.losses for each in ranks])[images],
        )

    def scores(self) -> Tensor:
        """(n,) mean over both directions of the reciprocal rank and of a hit among the first ten, for each image.

        The reciprocal rank alone is smoother than R@1 where there are a dozen images, but blind to R@10.
        """
        to_text, to_image = ((1 / (1 + ranks.double()) + (ranks < 10)) / 2 for ranks in (self.to_text, self.to_image))
        return (to_text + self._by_image(to_image)) / 2

    def percentiles(self) -> Tensor:
        """(n,) fraction of the other pairs that an image and its captions beat; 0.5 by chance, for any number."""
        return 1 - self._by_image(self.fit.double())

    def best_scale(self) -> float:
        """The logit scale with the lowest cross-entropy."""
        return SCALES[int(self.losses.sum(dim=0).argmin())]

    def _by_image(self, values: Tensor) -> Tensor:
        """Mean of the captions' values (m,) float64 for each image, (n,)."""
        counts = torch.bincount(self.owners, minlength=len(self.to_text))
        return torch.zeros(len(counts)).double().index_add(0, self.owners, values) / counts

    def by_group(self, k: int, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(groups, 2) hits among the first k, and candidates for a hit, of images and of captions."""
        members = np.unique(groups, return_inverse=True)[1]
        sides = ((members, self.to_text), (members[self.owners.numpy()], self.to_image))
        hits = [np.bincount(of, (ranks < k).double().numpy()) for of, ranks in sides]
        return np.stack(hits, axis=1), np.stack([np.bincount(of) for of, _ in sides], axis=1)

    def percentile(self, groups: np.ndarray) -> Estimate:
        """Mean percentile of the images, with its interval."""
        value, low, high = group_mean(self.percentiles().numpy(), groups)
        return Estimate(value, max(0.0, low), min(1.0, high))

    def recall(self, k: int, groups: np.ndarray) -> Estimate:
        """Recall at k, mean of both directions, with its interval."""
        hits, counts = self.by_group(k, groups)
        value = float((hits.sum(axis=0) / counts.sum(axis=0)).mean())
        # Two groups of hits and two of misses, of mean size, as Agresti and Coull add to a proportion: if all groups
        # are hits, the interval would have no width otherwise.
        mean = counts.mean(axis=0)
        hits, counts = np.vstack([hits, 2 * [mean], 2 * [0 * mean]]), np.vstack([counts, 4 * [mean]])
        without = ((hits.sum(axis=0) - hits) / (counts.sum(axis=0) - counts)).mean(axis=1)
        center, half = float((hits.sum(axis=0) / counts.sum(axis=0)).mean()), jackknife(without, counts.sum(axis=1))
        return Estimate(value, max(0.0, min(center - half, value)), min(1.0, max(center + half, value)))


def group_mean(values: np.ndarray, groups: np.ndarray) -> Estimate:
    """Mean of the images' values (n,), with its interval."""
    sums, counts = group_sums(values, groups)
    value = float(values.mean())
    half = jackknife((sums.sum() - sums) / (counts.sum() - counts), counts)
    return Estimate(value, value - half, value + half)


def group_sums(values: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the images' values (n,) and number of images of each group, (g,) and (g,)."""
    members = np.unique(groups, return_inverse=True)[1]
    return np.bincount(members, values), np.bincount(members)


def jackknife(without: np.ndarray, sizes: np.ndarray) -> float:
    """Half the width of a 95 % interval, from the values (g,) without each group in turn, and the groups' sizes (g,).

    It is wide where a few groups hold most images, because Student's t has fewer degrees of freedom there.
    """
    variance = (len(without) - 1) * np.var(without)
    return float(WIDER * stdtrit(effective_groups(sizes) - 1, 0.975) * variance**0.5)


def effective_groups(sizes: np.ndarray) -> float:
    """The number of equal groups that would vary as much as those of these sizes (g,)."""
    return float(sizes.sum() ** 2 / (sizes**2).sum())


@dataclass(frozen=True)
class Choice:
    """Heads for all pairs, with what cross-validation says about them; None where there were too few groups."""

    heads: Heads
    form: Form
    class_weight: float
    logit_scale: float = DEFAULT_SCALE
    outcome: HeldOutRanks | None = None
    start: HeldOutRanks | None = None  # of the start without any fitting; None if it has no projections
    validation: "CrossValidation | None" = None  # with `MOST` of the pairs
    whole: "CrossValidation | None" = None  # with all pairs
    start_heads: Heads | None = None


def choose_heads(
    pairs: Pairs,
    groups: np.ndarray,
    classes: ClassPairs | None = None,
    seed: int = 0,
    embedded: bool = False,
    start: Heads | None = None,
) -> Choice:
    """Choose form and weight of the classes by cross-validation, and fit the heads again on all pairs.

    Images with equal `groups` (n,) stay in one fold: those with nearly the same image or the same caption. Features
    may be `embedded` in one space. Heads that do not rank the pairs of a left-out fold better than those of the start
    are not taken: the start's stay. These are computed from the classes, unless `start` is given.
    """
    forms = START_FORMS if embedded else FORMS
    weights = CLASS_WEIGHTS if classes is not None else (0.0,)
    start = start or start_heads(pairs, classes, embedded)
    usual = (START, 0.0) if embedded else (DEFAULT_FORM, weights[0])
    # --- too few to measure
    if len(np.unique(groups)) < FEWEST:
        heads = start if embedded and start is not None else fit_heads(pairs, classes, usual[1], usual[:1])[0]
        return Choice(heads, *usual, start_heads=start)
    folds = torch.from_numpy(assign_folds(groups, FOLDS, seed))
    some, chosen = subset(pairs, seed)
    own_groups, own_folds = groups[chosen.numpy()], folds[chosen]
    # --- all candidates, or of few pairs the usual one
    if not embedded and effective_groups(np.unique(groups, return_counts=True)[1]) < FEW:
        forms, weights = (DEFAULT_FORM,), weights[:1]
    build = partial(CrossValidation, some, own_groups, own_folds, classes, embedded)
    validations = dict(zip(weights, in_threads(build, weights), strict=True))
    tried = dict[tuple[Form, float], HeldOutRanks]()
    for weight, validation in validations.items():
        tried |= {(form, weight): ranks for form, ranks in zip(forms, validation.ranks(forms), strict=True)}
    if start is not None:
        tried[START, 0.0] = ranks_by(start, some, own_folds)
    form, weight = best_candidate(tried, usual, START_CAUTION if embedded else CAUTION)
    if start is not None and not beats(tried[form, weight], tried[START, 0.0], own_groups):
        form, weight = START, 0.0
    # --- the best, on all pairs
    of_start = None if start is None else ranks_by(start, pairs, folds)
    if form == START and start is not None and of_start is not None:
        return Choice(start, form, weight, of_start.best_scale(), of_start, of_start, start_heads=start)
    (heads,) = fit_heads(pairs, classes, weight, (form,))
    outcome, validation = tried[form, weight], validations[weight]
    whole = validation
    if some is not pairs:
        whole = CrossValidation(pairs, groups, folds, classes, embedded, weight)
        (outcome,) = whole.ranks((form,))
    return Choice(heads, form, weight, outcome.best_scale(), outcome, of_start, validation, whole, start)


def start_heads(pairs: Pairs, classes: ClassPairs | None, embedded: bool) -> Heads | None:
    """The heads without any pair: embeddings as they are, or those of the classes alone."""
    if embedded:
        return Heads(torch.eye(pairs.images.shape[1]), torch.eye(pairs.texts.shape[1]))
    if classes is None:
        return None
    nothing = Pairs(*(part[:0] for part in pairs))
    return fit_heads(nothing, classes, CLASS_WEIGHTS[0], (DEFAULT_FORM,))[0]


def ranks_by(heads: Heads | Mapping[int, Heads], pairs: Pairs, folds: Tensor) -> HeldOutRanks:
    """Ranks of all pairs by heads that were not fitted to them, or each fold's, among those of cross-validation."""
    parts, numbers, several = [], caption_numbers(pairs), heads
    for fold in folds.unique().tolist():
        heads = several if isinstance(several, Heads) else several[fold]
        for block in blocks((folds == fold).nonzero().flatten(), pairs.owners, numbers):
            sides = pairs.images[block.images], pairs.texts[block.texts]
            parts.append((block, score(heads.similarities(*(side.to(heads.image) for side in sides)), block)))
    return HeldOutRanks.join(pairs, parts)


def best_candidate(tried: Mapping[Key, HeldOutRanks], usual: Key, caution: float) -> Key:
    """The candidate whose gain in the mean score over the usual one, less `caution` standard errors, is largest.

    A dozen images cannot tell the candidates apart: the best of 39 would be one by chance. With 31 to 124 pairs this
    chose heads that were up to 7 points better on other pairs (builtin:stamps and stamps-photos, mean of R@1 and R@10).
    """
    best, largest = usual, 0.0
    compared = tried[usual].scores()
    for key, each in tried.items():
        gains = each.scores() - compared  # (n,)
        gain = float(gains.mean() - caution * gains.std() / len(gains) ** 0.5)
        if gain > largest + TIE:
            best, largest = key, gain
    return best


def beats(outcome: HeldOutRanks, start: HeldOutRanks, groups: np.ndarray) -> bool:
    """Whether heads rank left-out pairs better than those of the start, and better than chance.

    The gain alone would be above 0 by chance for half of all pairs whose captions mean nothing. An interval of the gain
    that excludes 0 would give up 2 to 3 points with 31 and 62 pairs (mean of R@1 and R@10, sets of `FEW`).
    """
    gain = float((outcome.percentiles() - start.percentiles()).mean())
    return gain > 0 and outcome.percentile(groups).low > 0.5


class CrossValidation:
    """Cross-validation of heads for one weight of the classes: fitted without each fold in turn, they rank its pairs.

    Features are centered once, with the mean of all folds, and only their `DIRECTIONS` largest directions are kept.
    """

    def __init__(
        self,
        pairs: Pairs,
        groups: np.ndarray,
        folds: Tensor,
        classes: ClassPairs | None,
        one_space: bool,
        weight: float,
    ) -> None:
        # The folds (n,) keep groups (n,) together; in one space the axes of images and texts must stay the same.
        self.pairs, self.groups, self.folds = pairs, groups, folds
        n, m = len(pairs.images), len(pairs.texts)
        rows = regression_rows(pairs, classes, weight, torch.float32)
        weights = rows.weights.float()
        x, y = rows.images, rows.texts.float()  # (i, v), the first n of own images, and (r, w)
        y, y_mean = centered(y, weights @ y)
        self._to_raw = partial(raw_heads, rows.direction.float(), y_mean, rows.classifier)
        self._widths = (x.shape[1] if one_space else min(x.shape[1], DIRECTIONS), y.shape[1])
        self._bases = torch.eye(x.shape[1]), torch.eye(y.shape[1])
        if not one_space:
            shares = torch.zeros(len(x)).index_add(0, rows.owners, weights)  # (i,)
            self._bases = (
                largest_directions(x, shares, self._widths[0]),
                largest_directions(y, weights, self._widths[1]),
            )
            x, y = x @ self._bases[0], y @ self._bases[1]
        self._weights = weights[:m]
        self._classes = moments(x[n:], y[m:], rows.owners[m:] - n, weights[m:])
        self._centered = Pairs(x[:n], y[:m], pairs.owners)
        self._numbers = caption_numbers(pairs)

    def ranks(self, forms: tuple[Form, ...], fitted: Tensor | None = None) -> list[HeldOutRanks]:
        """Ranks of all pairs by each form, whose heads are fitted to some images (n,) bool, or to all."""
        usable = torch.ones(len(self.folds), dtype=torch.bool) if fitted is None else fitted
        images, texts, owners = self._centered

        def rank_fold(fold: int) -> list[list[tuple[HeldOutBlock, HeldOutRanks]]]:
            """Ranks of a fold's blocks, of each by all forms."""
            (x_axes, y_axes), maps = self._solve((self.folds != fold) & usable, forms)
            ranked = []
            for block in blocks((self.folds == fold).nonzero().flatten(), owners, self._numbers):
                sides = images[block.images] @ x_axes, texts[block.texts] @ y_axes
                ranked.append([(block, score(Heads(*heads).similarities(*sides), block)) for heads in maps])
            return ranked

        ranked = chain.from_iterable(in_threads(rank_fold, self.folds.unique().tolist()))
        return [HeldOutRanks.join(self.pairs, of_form) for of_form in zip(*ranked, strict=True)]

    def heads_without(self, fold: int, form: Form) -> Heads:
        """The heads that rank the pairs of a fold, for features that are not centered."""
        (x_axes, y_axes), ((left, right),) = self._solve(self.folds != fold, (form,))
        return self._to_raw(left @ x_axes.mT @ self._bases[0].mT, right @ y_axes.mT @ self._bases[1].mT)

    def _solve(self, fitted: Tensor, forms: tuple[Form, ...]) -> tuple[Sides, list[Sides]]:
        """Axes, and projections in these, see `solve`, from some images (n,) bool and the classes."""
        images, texts, owners = self._centered
        kept = fitted[owners]  # (m,)
        own = moments(images, texts[kept], owners[kept], self._weights[kept])
        known = tuple(map(torch.add, own, self._classes))
        if len(forms) > FEW_FORMS:
            return solve(known, forms, self._widths)
        axes = [torch.eye(width) for width in known[2].shape]
        return (axes[0], axes[1]), [solve_one(known, form, self._widths) for form in forms]


def in_threads(compute: Callable[[Given], Computed], given: Sequence[Given]) -> list[Computed]:
    """Compute as many results at a time as torch has threads: small matrices gain nothing from several."""
    threads = torch.get_num_threads()
    at_once = min(threads, len(given))
    with ThreadPoolExecutor(at_once) as pool, torch_threads(threads // at_once):
        return [*pool.map(compute, given)]


def largest_directions(rows: Tensor, weights: Tensor, count: int) -> Tensor:
    """Axes (v, k) of the largest directions of rows (r, v), `count` or fewer."""
    if len(rows) < count:  # all of their directions
        return torch.linalg.qr(rows.mT).Q
    if rows.shape[1] <= count:
        return torch.eye(rows.shape[1])
    scaled = rows * weights.sqrt()[:, None]
    if len(rows) < rows.shape[1]:  # the same directions, from products of rows
        return normalize(scaled.mT @ torch.linalg.eigh(scaled @ scaled.mT).eigenvectors[:, -count:], dim=0)
    return torch.linalg.eigh(scaled.mT @ scaled).eigenvectors[:, -count:]


class HeldOutBlock(NamedTuple):
    """Images that compete with each other, and their captions; equal captions are one candidate."""

    images: Tensor  # (b,), rising
    captions: Tensor  # (c,)
    rows: Tensor  # (c,) row of the caption's image in the block
    columns: Tensor  # (c,) column of the caption among the distinct ones
    texts: Tensor  # (d,) a caption for each distinct one

    @classmethod
    def of(cls, images: Tensor, owners: Tensor, numbers: Tensor) -> "HeldOutBlock":
        """Images (b,), rising, with their captions; `owners` and `numbers` (see `caption_numbers`) (m,) are of all."""
        captions = torch.isin(owners, images).nonzero().flatten()
        distinct, columns = numbers[captions].unique(return_inverse=True)
        texts = torch.empty(len(distinct), dtype=torch.int64)
        texts[columns] = captions
        return cls(images, captions, torch.searchsorted(images, owners[captions]), columns, texts)


def blocks(images: Tensor, owners: Tensor, numbers: Tensor) -> Iterator[HeldOutBlock]:
    """Divide the images of a fold (n,), rising, into blocks of about `BLOCK`; other arguments as `HeldOutBlock.of`."""
    for part in images.tensor_split(max(1, round(len(images) / BLOCK))):
        yield HeldOutBlock.of(part, owners, numbers)


def score(similarities: Tensor, block: HeldOutBlock) -> HeldOutRanks:
    """Rank captions for each image of a block, and images for each caption, by similarities (b, d)."""
    rows, columns = block.rows, block.columns
    relevant = torch.zeros_like(similarities, dtype=torch.bool)
    relevant[rows, columns] = True
    # --- retrieval: the rank of the best match
    best = similarities.masked_fill(~relevant, -torch.inf)
    top = best.amax(dim=1)
    to_text = (similarities > top[:, None]).sum(dim=1)
    to_image = (similarities > best.amax(dim=0)).sum(dim=0)[columns]
    # --- the rank of each caption and its image for each other
    own = similarities[rows, columns]
    for_image = rank(similarities[rows], own, relevant[rows])
    for_caption = rank(similarities.mT[columns], own, relevant.mT[columns])
    # --- softmax over the captions, less that over the images' own ones
    largest, images = similarities.amax(dim=1), relevant.nonzero()[:, 0]
    all_below, own_below = similarities - largest[:, None], similarities[relevant] - top[images]
    losses = list[Tensor]()
    for scale in SCALES:
        # Smaller exponents than -80 add nothing: their exponentials are denormal, or 0 at ten times the cost.
        every, own = ((scale * below).clamp(min=-80.0).exp() for below in (all_below, own_below))
        own = torch.zeros_like(top).index_add(0, images, own)
        losses.append(scale * (largest - top) + every.sum(dim=1).log() - own.log())
    return HeldOutRanks(
        rows,
        to_text,
        to_image,
        torch.full_like(to_text, len(to_text)),
        (for_image + for_caption) / 2,
        torch.stack(losses, dim=1).double(),
    )


def rank(similarities: Tensor, own: Tensor, relevant: Tensor) -> Tensor:
    """Rank of each correct candidate among the wrong ones: 0 if it is first, 1 if it is last.

    The fraction of the wrong candidates whose similarity (c, k) is larger than `own` (c,); equal ones count half.
    Its expectation, 1/2 by chance, does not depend on their number. Without any it is 1/2.
    """
    wrong = ~relevant
    ahead = ((similarities > own[:, None]) & wrong).sum(dim=1) + ((similarities == own[:, None]) & wrong).sum(dim=1) / 2
    counts = wrong.sum(dim=1)
    return torch.where(counts > 0, ahead / counts.clamp(min=1), 0.5)


def caption_numbers(pairs: Pairs) -> Tensor:
    """(m,) int64, equal for equal captions."""
    return pairs.texts.unique(dim=0, return_inverse=True)[1]


def subset(pairs: Pairs, seed: int) -> tuple[Pairs, Tensor]:
    """`MOST` random images at most, with their captions; and their rows, rising."""
    if len(pairs.images) <= MOST:
        return pairs, torch.arange(len(pairs.images))
    chosen = torch.randperm(len(pairs.images), generator=torch.Generator().manual_seed(seed))[:MOST].sort().values
    captions = torch.isin(pairs.owners, chosen)
    owners = torch.searchsorted(chosen, pairs.owners[captions])
    return Pairs(pairs.images[chosen], pairs.texts[captions], owners), chosen
