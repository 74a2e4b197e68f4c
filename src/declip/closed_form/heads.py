"""Projections of frozen towers in closed form, chosen by cross-validation."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from declip.closed_form.candidates import (
    CAUTION,
    CLASS_WEIGHTS,
    FORMS,
    START_CAUTION,
    START_FORMS,
    beats,
    best_candidate,
)
from declip.closed_form.cross_validation import CrossValidation, in_threads
from declip.closed_form.estimates import effective_groups
from declip.closed_form.folds import assign_folds
from declip.closed_form.ranks import HeldOutRanks, ranks_by
from declip.closed_form.solve import (
    DEFAULT_FORM,
    START,
    ClassPairs,
    Form,
    Heads,
    Pairs,
    fit_heads,
)

DEFAULT_SCALE = 20.0  # logit scale of heads that could not be measured
FOLDS = 5
FEWEST = 20  # groups of pairs from which on they are measured
# Groups of equal size from which on there is a choice. With 20 pairs the usual heads are 1.2 points
# better than chosen ones (mean of R@1 and R@10), with 31 and 62 as good, with 124 0.3 worse
# (benchmarks/results/few/choice.jsonl).
FEW = 60
# Images that the choice is made on: the heads are of all, and so are their out-of-fold ranks
MOST = 5_000


@dataclass(frozen=True)
class Choice:
    """Heads for all pairs, with what cross-validation says; None of too few groups."""

    heads: Heads
    form: Form
    class_weight: float
    logit_scale: float = DEFAULT_SCALE
    outcome: HeldOutRanks | None = None
    # of the start without any fitting; None if it has no projections
    start: HeldOutRanks | None = None
    validation: CrossValidation | None = None  # with `MOST` of the pairs
    whole: CrossValidation | None = None  # with all pairs
    start_heads: Heads | None = None


def choose_heads(
    pairs: Pairs,
    groups: np.ndarray,
    classes: ClassPairs | None = None,
    seed: int = 0,
    embedded: bool = False,
    start: Heads | None = None,
    keep_start: bool = True,
) -> Choice:
    """Choose form and weight of the classes by cross-validation, and fit the heads to all pairs.

    Images with equal `groups` (n,) stay in one fold: those with nearly the same image or the same
    caption. Features may be `embedded` in one space. The heads of the start are computed from the
    classes, unless `start` is given. With `keep_start` they stay where no heads improve them.
    """
    forms = START_FORMS if embedded else FORMS
    weights = CLASS_WEIGHTS if classes is not None else (0.0,)
    start = start or start_heads(pairs, classes, embedded)
    usual = (START, 0.0) if embedded else (DEFAULT_FORM, weights[0])
    sizes = np.unique(groups, return_counts=True)[1]
    # --- too few to measure
    if len(sizes) < FEWEST:
        form, weight = usual
        if embedded and start is not None:
            heads = start
        else:
            (heads,) = fit_heads(pairs, classes, weight, (form,))
        return Choice(heads, form, weight, start_heads=start)
    folds = torch.from_numpy(assign_folds(groups, FOLDS, seed))
    some, chosen = subset(pairs, seed)
    own_groups = groups[chosen.numpy()]
    own_folds = folds[chosen]
    # --- all candidates, or of few pairs the usual one
    if not embedded and effective_groups(sizes) < FEW:
        forms, weights = (DEFAULT_FORM,), weights[:1]
    build = partial(CrossValidation, some, own_groups, own_folds, classes, embedded)
    validations = dict(zip(weights, in_threads(build, weights), strict=True))
    tried = dict[tuple[Form, float], HeldOutRanks]()
    for weight, validation in validations.items():
        for form, ranks in zip(forms, validation.ranks(forms), strict=True):
            tried[form, weight] = ranks
    of_start = None
    if start is not None:
        of_start = ranks_by(start, pairs, folds)
        if keep_start and some is pairs:
            tried[START, 0.0] = of_start
        elif keep_start:
            tried[START, 0.0] = ranks_by(start, some, own_folds)
    form, weight = best_candidate(tried, usual, START_CAUTION if embedded else CAUTION)
    if form == START:
        return unchanged(start, of_start)
    # --- the best, on all pairs
    (heads,) = fit_heads(pairs, classes, weight, (form,))
    outcome = tried[form, weight]
    validation = validations[weight]
    whole = validation
    if some is not pairs:
        whole = CrossValidation(pairs, groups, folds, classes, embedded, weight)
        (outcome,) = whole.ranks((form,))
    scale = outcome.best_scale()
    choice = Choice(heads, form, weight, scale, outcome, of_start, validation, whole, start)
    if keep_start and not improves(choice, groups):
        return unchanged(start, of_start)
    return choice


def improves(choice: Choice, groups: np.ndarray) -> bool:
    """Whether heads rank left-out pairs better than the start, see `beats`; so too if there is none."""
    if choice.outcome is None or choice.start is None:
        return True
    return beats(choice.outcome, choice.start, groups)


def unchanged(start: Heads | None, ranks: HeldOutRanks | None) -> Choice:
    """The choice of the start, with its ranks."""
    assert start is not None
    assert ranks is not None
    return Choice(start, START, 0.0, ranks.best_scale(), ranks, ranks, start_heads=start)


def start_heads(pairs: Pairs, classes: ClassPairs | None, embedded: bool) -> Heads | None:
    """The heads without any pair: embeddings as they are, or those of the classes alone."""
    if embedded:
        return Heads(torch.eye(pairs.images.shape[1]), torch.eye(pairs.texts.shape[1]))
    if classes is None:
        return None
    nothing = Pairs(pairs.images[:0], pairs.texts[:0], pairs.owners[:0])
    (heads,) = fit_heads(nothing, classes, CLASS_WEIGHTS[0], (DEFAULT_FORM,))
    return heads


def subset(pairs: Pairs, seed: int) -> tuple[Pairs, Tensor]:
    """`MOST` random images at most, with their captions; and their rows, rising."""
    count = len(pairs.images)
    if count <= MOST:
        return pairs, torch.arange(count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    chosen = order[:MOST].sort().values
    captions = torch.isin(pairs.owners, chosen)
    owners = torch.searchsorted(chosen, pairs.owners[captions])
    return Pairs(pairs.images[chosen], pairs.texts[captions], owners), chosen
