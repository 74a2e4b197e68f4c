"""Nearest-neighbor supervision: the contrastive loss with similar captions of a queue."""

import math
from dataclasses import replace
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip.data.batch import Needs
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.supervision.contrastive import (
    ContrastiveTerm,
    Ids,
    cross_entropy_to_keys,
    text_views,
)
from declip.supervision.term import Encodings, Rows, Similarity

SIMILARITIES_AT_ONCE = 2**26  # that a lookup holds: 256 MiB in float32, whatever the batch


class Queue(nn.Module):
    """A first-in-first-out store of L2-normalized features, saved with the model.

    DeCLIP keeps 2¹⁶ text features (arXiv 2110.05208, nearest-neighbor supervision). A new feature takes the
    oldest one's slot. Empty slots are never returned. `written`, the number of full slots, and `pointer`, the next one
    to write to, are integers, so that nothing waits for the device.
    """

    features: Tensor  # (size, width) float32 buffer, rows of length 1

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("features", torch.zeros(size, width))
        self.written = 0
        self.pointer = 0

    def __len__(self) -> int:
        return self.written

    @torch.no_grad()
    def push(self, features: Tensor) -> None:
        """Write features (n, width), oldest first and of any length, over the oldest ones.

        Equals the plain loop
            for f in features: slot[pointer] = f / |f|; pointer = (pointer + 1) % size
        """
        # Of more rows than slots the last stay.
        skipped = max(len(features) - self.size, 0)
        start = (self.pointer + skipped) % self.size
        last = features[-self.size :].to(self.features)
        rows = F.normalize(last, dim=-1)
        before_end = self.size - start
        self.features[start : start + len(rows)] = rows[:before_end]
        rest = rows[before_end:]
        self.features[: len(rest)] = rest
        self.pointer = (start + len(rows)) % self.size
        self.written = min(self.written + len(rows), self.size)

    @torch.no_grad()
    def nearest(self, queries: Tensor) -> Tensor:
        """Find the row (n,) of `features` nearest to each query (n, width) by cosine; the queue must hold one.

        Equals the plain loop
            rows[i] = argmax over r < written of queries[i]·features[r]
        """
        rows = queries.to(self.features)
        keys = self.features[: self.written]
        blocks = max(1, math.ceil(len(rows) * len(keys) / SIMILARITIES_AT_ONCE))
        with torch.autocast(queries.device.type, enabled=False):
            cosines = (some @ keys.mT for some in rows.tensor_split(blocks))
            return torch.cat([some.argmax(dim=1) for some in cosines])

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.written, self.pointer], device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.written, self.pointer = state.tolist()


def neighbor_contrast(
    images: Tensor,
    neighbor_keys: Tensor,
    scale: Tensor | float,
    offset: int = 0,
    max_logit_bytes: float | None = None,
    smoothing: float = 0.0,
    ids: Ids | None = None,
) -> Tensor:
    """Contrastive loss between images and their captions' nearest neighbors (L_NNS of DeCLIP, arXiv 2110.05208).

    Equals the plain loop, F = images, N = neighbor_keys, y = offset + b
        mean over i, j, b of  logsumexpₙ(s·F[i, b]·N[j, n]) - s·F[i, b]·N[j, y]
    The official implementation's direction, from image to text; neighbors get no gradient.
    Image features are (V, B, d) of this rank, neighbors (T, N, d) of all ranks; others as `cross_entropy_to_keys`.
    """
    options = (scale, offset, max_logit_bytes, smoothing, ids)
    losses = []
    for view, keys in product(images, neighbor_keys.detach()):
        losses.append(cross_entropy_to_keys(view, keys, *options))
    return torch.stack(losses).mean()


class NearestNeighbor(ContrastiveTerm):
    """DeCLIP's loss between the augmented image views and the nearest neighbors of both text views in a queue."""

    needs = Needs(optional_views=frozenset({"second"}), texts=2)
    run_state = ("queue.",)
    title = "nearest-neighbor supervision"
    explanation = (
        "The contrastive loss with the most similar earlier captions in place of the caption."
    )

    def __init__(self, recipe: Recipe, model: DualEncoder) -> None:
        super().__init__(recipe, model)
        section = recipe.nearest_neighbor
        self.queue = Queue(section.queue_size, recipe.embed_dim)
        self.own_queue = section.queue_per_process
        if self.own_queue:
            self.process_state = ("queue.",)
        self._pending: Tensor | None = None  # (T, n, d), written after the step

    @classmethod
    def needs_in(cls, recipe: Recipe) -> Needs:
        return replace(cls.needs, texts=text_views(recipe.views.text))

    def features(self, encoded: Encodings) -> dict[str, Tensor]:
        texts = encoded.texts
        features = super().features(encoded)
        if len(self.queue) == 0:
            return features
        nearest = self.queue.nearest(texts.detach().flatten(0, 1))
        nearest = nearest.unflatten(0, texts.shape[:2]).mT  # (B, T)
        if self.own_queue:
            return features | {"neighbors": self.queue.features[nearest]}  # (B, T, d)
        return features | {"queue_indices": nearest}

    def loss(self, own: Rows, keys: Rows, similarity: Similarity, offset: int) -> Tensor:
        if self.training:
            pushed = own if self.own_queue else keys
            self._pending = pushed.texts.detach()
        if len(self.queue) == 0:
            return own.images.sum() * 0.0  # nothing to find yet
        if self.own_queue:
            neighbors = keys.extra["neighbors"].transpose(0, 1)  # (T, N, d)
        else:
            # Every rank looked up its own captions; all ranks' queues are equal, so the indices name the same features.
            neighbors = self.queue.features[keys.extra["queue_indices"].mT]
        options = self.options(own, keys, similarity, offset)
        return neighbor_contrast(own.augmented, neighbors, *options)

    @torch.no_grad()
    def after_step(self, model: DualEncoder) -> None:
        # The augmented caption first, then the caption, as the official implementation.
        if self._pending is not None:
            for view in reversed(self._pending):
                self.queue.push(view)
            self._pending = None
