"""Projections of frozen towers in closed form, chosen by cross-validation."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

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
from declip.closed_form.heads import Heads, fit_heads
from declip.closed_form.pairs import FitData
from declip.closed_form.ranks import HeldOutRanks, ranks_by
from declip.closed_form.solve import DEFAULT_FORM, START, Form

DEFAULT_SCALE = 20.0  # logit scale of heads that could not be measured
FEWEST = 20  # groups of pairs from which on they are measured
# Groups of equal size from which on there is a choice. With 20 pairs the usual heads are 1.2 points
# better than chosen ones (mean of R@1 and R@10), with 31 and 62 as good, with 124 0.3 worse
# (benchmarks/results/few/choice.jsonl).
FEW = 60


@dataclass(frozen=True)
class Choice:
    """Heads for all pairs, with their cross-validation, which is None for too few groups."""

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


def choose_heads(data: FitData, start: Heads | None = None, keep_start: bool = True) -> Choice:
    """Choose form and weight of the classes by cross-validation, and fit the heads to all pairs.

    Args:
        start: The heads without any pair; by default they are computed, see `start_heads`.
        keep_start: Whether these stay where no heads improve them.
    """
    start = start or start_heads(data)
    weights = CLASS_WEIGHTS if data.classes is not None else (0.0,)
    usual = (START, 0.0) if data.one_space else (DEFAULT_FORM, weights[0])
    sizes = np.unique(data.groups, return_counts=True)[1]
    # --- too few to measure
    if len(sizes) < FEWEST:
        form, weight = usual
        heads = start
        if heads is None or not data.one_space:
            heads = fit_heads(data.pairs, data.classes, weight, form)
        return Choice(heads, form, weight, start_heads=start)
    # --- all candidates, or of few pairs the usual one
    forms = FORMS
    caution = CAUTION
    if data.one_space:
        forms = START_FORMS
        caution = START_CAUTION
    elif effective_groups(sizes) < FEW:
        forms = (DEFAULT_FORM,)
        weights = weights[:1]
    sample = data.sample()
    computed = in_threads(partial(CrossValidation, sample), weights)
    validations = dict(zip(weights, computed, strict=True))
    tried = dict[tuple[Form, float], HeldOutRanks]()
    for weight, validation in validations.items():
        for form, ranks in zip(forms, validation.ranks(forms), strict=True):
            tried[form, weight] = ranks
    of_start = None
    if start is not None:
        of_start = ranks_by(start, data.pairs, data.folds)
        if keep_start and sample is data:
            tried[START, 0.0] = of_start
        elif keep_start:
            tried[START, 0.0] = ranks_by(start, sample.pairs, sample.folds)
    form, weight = best_candidate(tried, usual, caution)
    if form == START:
        return unchanged(start, of_start)
    # --- the best, on all pairs
    heads = fit_heads(data.pairs, data.classes, weight, form)
    outcome = tried[form, weight]
    validation = validations[weight]
    whole = validation
    if sample is not data:
        whole = CrossValidation(data, weight)
        (outcome,) = whole.ranks((form,))
    scale = outcome.best_scale()
    choice = Choice(heads, form, weight, scale, outcome, of_start, validation, whole, start)
    if keep_start and not improves(choice, data.groups):
        return unchanged(start, of_start)
    return choice


def improves(choice: Choice, groups: np.ndarray) -> bool:
    """Whether heads rank left-out pairs better than the start, see `beats`; True without a start."""
    if choice.outcome is None or choice.start is None:
        return True
    return beats(choice.outcome, choice.start, groups)


def unchanged(start: Heads | None, ranks: HeldOutRanks | None) -> Choice:
    """The choice of the start, with its ranks."""
    assert start is not None
    assert ranks is not None
    return Choice(start, START, 0.0, ranks.best_scale(), ranks, ranks, start_heads=start)


def start_heads(data: FitData) -> Heads | None:
    """The heads without any pair: embeddings as they are, or those of the classes alone."""
    pairs = data.pairs
    classes = data.classes
    if data.one_space:
        image = torch.eye(pairs.images.shape[1])
        text = torch.eye(pairs.texts.shape[1])
        return Heads(image, text)
    if classes is None:
        return None
    nothing = pairs.of_images(torch.arange(0))
    return fit_heads(nothing, classes, CLASS_WEIGHTS[0], DEFAULT_FORM)
