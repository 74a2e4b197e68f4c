"""WiSE-FT of projections: the mean of fitted heads and those of the start (arXiv 2109.01903)."""

from collections.abc import Sequence
from dataclasses import replace

from declip.closed_form.choice import Choice
from declip.closed_form.heads import mix
from declip.closed_form.ranks import ranks_by


def mixed_choices(choice: Choice, alphas: Sequence[float]) -> dict[float, Choice]:
    """A choice with heads of alpha · fitted + (1 - alpha) · start, and their out-of-fold ranks.

    Only the choice itself, as 1, if the start stays or there were too few pairs to measure.
    """
    mixed = {1.0: choice}
    start = choice.start_heads
    validation = choice.whole
    if start is None or validation is None:
        return mixed
    data = validation.data
    of_folds = validation.heads_of_folds(choice.form)
    for alpha in alphas:
        if alpha == 1:
            continue
        each = {fold: mix(start, fitted, alpha) for fold, fitted in of_folds.items()}
        ranks = ranks_by(each, data.pairs, data.folds)
        heads = mix(start, choice.heads, alpha)
        scale = ranks.best_scale()
        mixed[alpha] = replace(choice, heads=heads, logit_scale=scale, outcome=ranks)
    return mixed
