"""WiSE-FT of projections: the mean of fitted heads and those of the start (arXiv 2109.01903), ranked out of fold."""

from collections.abc import Sequence
from dataclasses import replace

from declip.closed_form.heads import Choice
from declip.closed_form.ranks import ranks_by
from declip.closed_form.solve import mix


def mixed_choices(choice: Choice, alphas: Sequence[float]) -> dict[float, Choice]:
    """A choice with heads of alpha · fitted + (1 - alpha) · start, and with their out-of-fold ranks, for each alpha.

    Only the choice itself, as 1, if the start stays or there were too few pairs to measure.
    """
    start, validation, mixed = choice.start_heads, choice.whole, {1.0: choice}
    if start is None or validation is None:
        return mixed
    folds = validation.folds
    without = {
        fold: validation.heads_without(fold, choice.form) for fold in folds.unique().tolist()
    }
    for alpha in alphas:
        if alpha < 1:
            of_folds = {fold: mix(start, fitted, alpha) for fold, fitted in without.items()}
            ranks = ranks_by(of_folds, validation.pairs, folds)
            heads = mix(start, choice.heads, alpha)
            mixed[alpha] = replace(
                choice, heads=heads, logit_scale=ranks.best_scale(), outcome=ranks
            )
    return mixed
