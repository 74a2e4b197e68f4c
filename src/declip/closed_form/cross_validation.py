"""Cross-validation of heads: fitted without each fold in turn, they rank its pairs."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from declip.closed_form.axes import largest_directions
from declip.closed_form.ranks import (
    HeldOutBlock,
    HeldOutRanks,
    blocks,
    caption_numbers,
    score,
)
from declip.closed_form.solve import (
    ClassPairs,
    Form,
    Heads,
    Pairs,
    Sides,
    centered,
    moments,
    raw_heads,
    regression_rows,
    solve,
    solve_one,
)
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

    def __init__(
        self,
        pairs: Pairs,
        groups: np.ndarray,
        folds: Tensor,
        classes: ClassPairs | None,
        one_space: bool,
        weight: float,
    ) -> None:
        # The folds (n,) keep groups (n,) together; in one space the axes of images and texts must
        # stay the same.
        self.pairs, self.groups, self.folds = pairs, groups, folds
        n, m = len(pairs.images), len(pairs.texts)
        rows = regression_rows(pairs, classes, weight, torch.float32)
        weights = rows.weights.float()  # (r,)
        x = rows.images  # (i, v), the first n of own images
        y = rows.texts.float()  # (r, w)
        y, y_mean = centered(y, weights @ y)
        self._to_raw = partial(raw_heads, rows.direction.float(), y_mean, rows.classifier)
        # --- the largest directions of both sides
        x_width, y_width = x.shape[1], y.shape[1]
        if one_space:
            x_axes, y_axes = torch.eye(x_width), torch.eye(y_width)
        else:
            x_width = min(x_width, DIRECTIONS)
            shares = torch.zeros(len(x)).index_add(0, rows.owners, weights)  # (i,)
            x_axes = largest_directions(x, shares, x_width)
            y_axes = largest_directions(y, weights, y_width)
            x, y = x @ x_axes, y @ y_axes
        self._widths = x_width, y_width
        self._bases = x_axes, y_axes
        # --- own pairs, and the moments of the classes, which are part of every fit
        self._weights = weights[:m]
        self._classes = moments(x[n:], y[m:], rows.owners[m:] - n, weights[m:])
        self._centered = Pairs(x[:n], y[:m], pairs.owners)
        self._numbers = caption_numbers(pairs)

    def ranks(self, forms: tuple[Form, ...], fitted: Tensor | None = None) -> list[HeldOutRanks]:
        """Ranks of all pairs by each form, with heads fitted to some (n,) bool, or to all."""
        usable = torch.ones(len(self.folds), dtype=torch.bool) if fitted is None else fitted
        images, texts, owners = self._centered

        def rank_fold(fold: int) -> list[list[tuple[HeldOutBlock, HeldOutRanks]]]:
            """Ranks of a fold's blocks, of each by all forms."""
            held_out = self.folds == fold
            (x_axes, y_axes), maps = self._solve(~held_out & usable, forms)
            ranked = []
            for block in blocks(held_out.nonzero().flatten(), owners, self._numbers):
                x = images[block.images] @ x_axes
                y = texts[block.texts] @ y_axes
                of_forms = []
                for sides in maps:
                    similarities = Heads(*sides).similarities(x, y)
                    of_forms.append((block, score(similarities, block)))
                ranked.append(of_forms)
            return ranked

        of_folds = in_threads(rank_fold, self.folds.unique().tolist())
        of_blocks = chain.from_iterable(of_folds)
        return [HeldOutRanks.join(self.pairs, parts) for parts in zip(*of_blocks, strict=True)]

    def heads_without(self, fold: int, form: Form) -> Heads:
        """The heads that rank the pairs of a fold, for features that are not centered."""
        (x_axes, y_axes), ((left, right),) = self._solve(self.folds != fold, (form,))
        x_base, y_base = self._bases
        image = left @ x_axes.mT @ x_base.mT
        text = right @ y_axes.mT @ y_base.mT
        return self._to_raw(image, text)

    def _solve(self, fitted: Tensor, forms: tuple[Form, ...]) -> tuple[Sides, list[Sides]]:
        """Axes and projections in these, see `solve`: of some images (n,) bool and the classes."""
        images, texts, owners = self._centered
        kept = fitted[owners]  # (m,)
        own = moments(images, texts[kept], owners[kept], self._weights[kept])
        known = tuple(map(torch.add, own, self._classes))
        if len(forms) > FEW_FORMS:
            return solve(known, forms, self._widths)
        x_width, y_width = known[2].shape
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
