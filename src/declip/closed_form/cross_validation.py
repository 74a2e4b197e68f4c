"""Cross-validation of heads: fitted without each fold in turn, they rank its pairs."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor

from declip.closed_form.axes import largest_directions
from declip.closed_form.heads import Heads, raw_heads
from declip.closed_form.pairs import FitData, Pairs
from declip.closed_form.ranks import (
    HeldOutBlock,
    HeldOutRanks,
    blocks,
    caption_numbers,
    score,
)
from declip.closed_form.regression import centered, moments, regression_rows
from declip.closed_form.solve import Form, Sides, solve, solve_one
from declip.io.pool import torch_threads

FEW_FORMS = 3  # up to which each form has factors of its own; more share their axes
# Largest directions of the image features that are kept: a tenth of the time of 1,280
DIRECTIONS = 512

Given = TypeVar("Given")
Computed = TypeVar("Computed")


class CrossValidation:
    """Cross-validation of heads for one weight of the classes.

    Features are centered once, with the mean of all folds, and only their `DIRECTIONS` largest
    directions are kept.
    """

    def __init__(self, data: FitData, weight: float) -> None:
        self.data = data
        pairs = data.pairs
        n = len(pairs.images)
        m = len(pairs.texts)
        rows = regression_rows(pairs, data.classes, weight, torch.float32)
        weights = rows.weights.float()  # (r,)
        x = rows.images  # (i, v), the first n of own images
        y = rows.texts.float()  # (r, w)
        y, y_mean = centered(y, weights @ y)
        self._to_raw = partial(raw_heads, rows.direction.float(), y_mean, rows.classifier)
        # --- the largest directions of both sides; in one space their axes must stay the same
        x_width = x.shape[1]
        y_width = y.shape[1]
        if data.one_space:
            x_axes = torch.eye(x_width)
            y_axes = torch.eye(y_width)
        else:
            x_width = min(x_width, DIRECTIONS)
            shares = torch.zeros(len(x)).index_add(0, rows.owners, weights)  # (i,)
            x_axes = largest_directions(x, shares, x_width)
            y_axes = largest_directions(y, weights, y_width)
            x = x @ x_axes
            y = y @ y_axes
        self._widths = x_width, y_width
        self._bases = x_axes, y_axes
        # --- own pairs, and the moments of the classes, which are part of every fit
        self._weights = weights[:m]
        owners = rows.owners[m:] - n
        self._classes = moments(x[n:], y[m:], owners, weights[m:])
        self._centered = Pairs(x[:n], y[:m], pairs.owners)
        self._numbers = caption_numbers(pairs)

    def ranks(self, forms: tuple[Form, ...], fitted: Tensor | None = None) -> list[HeldOutRanks]:
        """Ranks of all pairs by each form, with heads fitted to some (n,) bool, or to all."""
        folds = self.data.folds
        images, texts, owners = self._centered

        def rank_fold(fold: int) -> list[list[tuple[HeldOutBlock, HeldOutRanks]]]:
            """Ranks of a fold's blocks, of each by all forms."""
            held_out = folds == fold
            used = ~held_out
            if fitted is not None:
                used &= fitted
            (x_axes, y_axes), maps = self._solve(used, forms)
            ranked = []
            for block in blocks(held_out, owners, self._numbers):
                x = images[block.images] @ x_axes
                y = texts[block.texts] @ y_axes
                of_forms = []
                for sides in maps:
                    similarities = Heads(*sides).similarities(x, y)
                    of_forms.append((block, score(similarities, block)))
                ranked.append(of_forms)
            return ranked

        of_folds = in_threads(rank_fold, folds.unique().tolist())
        of_blocks = chain.from_iterable(of_folds)
        of_forms = zip(*of_blocks, strict=True)
        return [HeldOutRanks.join(self.data.pairs, parts) for parts in of_forms]

    def heads_of_folds(self, form: Form) -> dict[int, Heads]:
        """The heads that rank the pairs of each fold, for features that are not centered."""
        folds = self.data.folds
        heads = {}
        for fold in folds.unique().tolist():
            heads[fold] = self._heads_of(folds != fold, form)
        return heads

    def _heads_of(self, fitted: Tensor, form: Form) -> Heads:
        (x_axes, y_axes), maps = self._solve(fitted, (form,))
        left, right = maps[0]
        x_base, y_base = self._bases
        image = left @ x_axes.mT @ x_base.mT
        text = right @ y_axes.mT @ y_base.mT
        return self._to_raw(image, text)

    def _solve(self, fitted: Tensor, forms: tuple[Form, ...]) -> tuple[Sides, list[Sides]]:
        """Axes and projections in these, see `solve`: of some images (n,) bool and the classes."""
        images, texts, owners = self._centered
        kept = fitted[owners]  # (m,)
        own = moments(images, texts[kept], owners[kept], self._weights[kept])
        known = own.plus(self._classes)
        if len(forms) > FEW_FORMS:
            return solve(known, forms, self._widths)
        x_width, y_width = known.crossed.shape
        maps = [solve_one(known, form, self._widths) for form in forms]
        return (torch.eye(x_width), torch.eye(y_width)), maps


def in_threads(compute: Callable[[Given], Computed], given: Sequence[Given]) -> list[Computed]:
    """Compute as many results at a time as torch has threads.

    Small matrices gain nothing from several threads each.
    """
    threads = torch.get_num_threads()
    at_once = min(threads, len(given))
    with ThreadPoolExecutor(at_once) as pool, torch_threads(threads // at_once):
        return [*pool.map(compute, given)]
