"""torch.compile for the towers, with one graph for each length that captions are padded to."""

from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from declip.data.plan import Plan
from declip.errors import UserError
from declip.models.dual_encoder import DualEncoder
from declip.models.text_tower import TextFeatures
from declip.recipe.schema import Recipe
from declip.supervision.objective import Objective
from declip.training import distributed

STEP = 16  # captions are padded to a multiple of this, so that a context length of 77 needs five graphs at most
MOST_GRAPHS = 64  # of a tower: batch sizes × buckets × lengths, with and without gradient; torch allows 8


def compile_towers(recipe: Recipe, model: DualEncoder, objective: Objective, plan: Plan) -> None:
    """Let the objective run compiled forward passes of both towers.

    Only complete training batches run compiled; a batch that lacks a broken pair, and evaluation, run eagerly. The
    choice depends on the batch size alone, so that a resumed run computes the same as an uninterrupted one.
    """
    if recipe.train.grad_checkpointing and model.image_tower.has_batch_norm:
        raise UserError(
            f"train.compile with train.grad_checkpointing would update the statistics of '{recipe.image.model}' twice "
            "per batch. Set one of the two to false, or use a tower with layer norm."
        )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    pairs, ranks = recipe.train.batch_size, distributed.world_size()
    rows = pairs // ranks + (distributed.rank() < pairs % ranks)  # of this rank, without broken pairs
    chunk, buckets = recipe.train.grad_cache_chunk or rows, recipe.train.length_buckets
    parts = {min(chunk, rows), rows % chunk} - {0}
    alone = model.image_tower.has_batch_norm
    # A pass holds all views of one size, and these change.
    passes = {count for step in plan.changes for count in Counter(s.size for s in plan.at(step)).values()}
    images = {part * count for part in parts for count in ({1} if alone else passes)}
    captions = [part * (plan.texts.count + plan.texts.masked_copy) for part in parts]
    texts = {size for rows in captions for size in (-(-rows // buckets), rows // buckets)} - {0}
    objective.compiled = {
        "image_tower": _Compiled(model.image_tower, images),
        "text_tower": _CompiledText(model.text_tower, texts),
    }


class _Compiled:
    """A tower whose forward pass is compiled for training batches of some numbers of rows."""

    def __init__(self, tower: Any, rows: Collection[int]) -> None:
        self.tower, self.rows = tower, frozenset(rows)
        self.plain: Callable[[Tensor], Any] = tower.forward
        self.compiled = torch.compile(self.plain, dynamic=False)

    def __call__(self, batch: Tensor) -> Any:
        if self.tower.training and len(batch) in self.rows:
            return self.compiled(batch)
        return self.plain(batch)


class _CompiledText(_Compiled):
    """The text tower's forward pass, with captions padded to a multiple of `STEP`."""

    def __call__(self, batch: Tensor) -> TextFeatures:
        length, tower = batch.shape[1], self.tower
        longer = min(-(-length // STEP) * STEP, tower.context)
        features: TextFeatures = super().__call__(F.pad(batch, (0, longer - length), value=tower.padding))
        return TextFeatures(features.pooled, features.text_tokens[:, :length], features.lengths)
