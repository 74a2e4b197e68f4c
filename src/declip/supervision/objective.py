"""The objective: encode a batch once, gather once, and sum the weighted losses of a recipe."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip.data.batch import PairBatch
from declip.data.plan import Needs
from declip.errors import UserError, unknown
from declip.models.dual_encoder import DualEncoder
from declip.models.image_tower import ImageFeatures, ImageTower
from declip.models.length_buckets import encode_by_length
from declip.recipe.schema import Recipe
from declip.supervision.contrastive import Contrastive, to_float32
from declip.supervision.late_interaction import LateInteraction
from declip.supervision.masked_language import MaskedLanguage, chosen_rows
from declip.supervision.multi_view import MultiView
from declip.supervision.nearest_neighbor import NearestNeighbor, Queue
from declip.supervision.simclr import SimCLR
from declip.supervision.simsiam import SimSiam
from declip.supervision.term import Encodings, Rows, Similarity, Term, augmented_views
from declip.supervision.tower_outputs import TowerOutputs

TERMS: Mapping[str, type[Term]] = {
    "contrastive": Contrastive,
    "multi_view": MultiView,
    "simsiam": SimSiam,
    "masked_language": MaskedLanguage,
    "nearest_neighbor": NearestNeighbor,
    "simclr": SimCLR,
    "late_interaction": LateInteraction,
}
"""Name in `loss_weights` → loss. A new loss is a file, a line here and a recipe."""

Gather = Callable[[Tensor], Tensor]
FIELDS = ("pooled", "pre_logits", "tokens")
"""Fields of `ImageFeatures`."""


def identity_gather(rows: Tensor) -> Tensor:
    """The gather of a single process: its own rows are all rows."""
    return rows


def active_terms(recipe: Recipe) -> dict[str, type[Term]]:
    """The losses with a weight above 0, in the order of `TERMS`.

    Raises:
        UserError: `loss_weights` names a loss that does not exist.
    """
    for name in recipe.loss_weights:
        if name not in TERMS:
            raise unknown("loss", f"loss_weights.{name}", [f"loss_weights.{known}" for known in TERMS])
    return {name: term for name, term in TERMS.items() if name in recipe.active_losses}


def needs_of(recipe: Recipe) -> list[Needs]:
    """List the needs of the active losses of a recipe."""
    return [term.needs for term in active_terms(recipe).values()]


class Objective(nn.Module):
    """The weighted sum of a recipe's losses, with the heads and the queue that they own.

    Args:
        recipe: Its weights and the sections of the losses are read.
        model: The heads fit its towers.

    Attributes:
        weights: Name → weight, active losses only.
        terms: Name → loss.
    """

    def __init__(self, recipe: Recipe, model: DualEncoder) -> None:
        super().__init__()
        self.recipe = recipe
        active = active_terms(recipe)
        self.weights = {name: recipe.loss_weights[name] for name in active}
        self.terms = nn.ModuleDict({name: term(recipe, model) for name, term in active.items()})
        self.needs = [term.needs for term in active.values()]

    @property
    def queue(self) -> Queue | None:
        """The nearest-neighbor queue; None when that loss has no weight."""
        term = dict(self.terms.items()).get("nearest_neighbor")
        return term.queue if isinstance(term, NearestNeighbor) else None

    def forward(
        self, model: DualEncoder, batch: PairBatch, gather: Gather = identity_gather, offset: int = 0
    ) -> dict[str, Tensor]:
        """Compute every active loss and the total.

        Args:
            model: The two towers.
            batch: Float views (B, 3, S, S) and texts (T, B, L); masked and labels when the recipe masks.
            gather: Rows of all ranks, in rank order, with gradient; the identity on one process.
            offset: Row of this rank's first pair in that order.

        Returns:
            Scalars by name, and "loss": the sum of weight · loss.

        Raises:
            UserError: the batch lacks a view or the masked captions that a loss needs.
        """
        return self.losses(self.run_towers(model, batch), model, batch, gather, offset)

    def losses(
        self,
        outputs: TowerOutputs,
        model: DualEncoder,
        batch: PairBatch,
        gather: Gather = identity_gather,
        offset: int = 0,
    ) -> dict[str, Tensor]:
        """Compute the losses from the towers' outputs for the whole batch; arguments and result as `forward`."""
        encoded = Encodings(_normalize(outputs.images), _normalize(outputs.texts), outputs, batch)
        features = {name: term.features(encoded) for name, term in self._terms()}
        keys = {name: term.keys(features[name]) for name, term in self._terms()}
        ids = batch.sample_ids
        own = Rows(
            outputs.views,
            encoded.images,
            encoded.texts,
            ids if ids is not None else torch.full((len(batch),), -1, device=encoded.texts.device),
            {},
        )
        gathered = own
        if gather is not identity_gather:
            keys = {name: term.pad_keys(keys[name]) for name, term in self._terms()}
            gathered, keys = gather_rows(own, keys, gather)
        similarity = Similarity(model.logit_scale.exp())
        losses = {}
        for name, term in self._terms():
            rows, key_rows = replace(own, extra=features[name]), replace(gathered, extra=keys[name])
            losses[name] = term.loss(rows, key_rows, similarity, offset)
        weighted = [weight * losses[name] for name, weight in self.weights.items()]
        return {**losses, "loss": torch.stack(weighted).sum()}

    def run_towers(self, model: DualEncoder, batch: PairBatch) -> TowerOutputs:
        """Run the towers; a part of a batch gives that part of the whole batch's outputs."""
        self._check(batch)
        views = tuple(batch.views)
        pixels = [view.pixels for view in batch.views.values()]
        images = encode_views(model, pixels, self.recipe.image.shared_bn_views)
        captions, masked_at, lengths = self._captions(batch)
        texts = encode_by_length(model.text_tower, captions.flatten(0, 1), lengths, self.recipe.train.length_buckets)
        count, size = captions.shape[:2]
        tokens = any(need.tokens for need in self.needs)
        pre_logits = any(need.pre_logits for need in self.needs)
        text_tokens = texts.text_tokens.unflatten(0, (count, size))
        rows, targets = None, None
        if any(need.masked for need in self.needs) and batch.labels is not None:
            rows, targets = chosen_rows(text_tokens[masked_at], batch.labels, batch.mask_positions)
        return TowerOutputs(
            views=views,
            images=images.pooled,
            pre_logits=images.pre_logits[augmented_views(views)] if pre_logits else None,
            patches=images.tokens[0] if tokens else None,
            texts=texts.pooled.unflatten(0, (count, size))[: len(batch.texts)],
            text_tokens=text_tokens[0] if tokens else None,
            masked_tokens=rows,
            targets=targets,
            lengths=texts.lengths[:size],
        )

    @torch.no_grad()
    def after_step(self, model: DualEncoder) -> None:
        """Keep the logit scale within its limits and update the losses' own state, after the optimizer's step."""
        limits = self.recipe.logit_scale
        model.logit_scale.clamp_(min=limits.min, max=limits.max)
        for _, term in self._terms():
            term.after_step(model)

    def discard_step(self) -> None:
        """Forget a step that was skipped."""
        for _, term in self._terms():
            term.discard_step()

    def _terms(self) -> list[tuple[str, Term]]:
        return list(self.terms.items())  # type: ignore[arg-type]  # a ModuleDict does not know its values' class

    def _captions(self, batch: PairBatch) -> tuple[Tensor, int, Tensor | None]:
        """The sequences to encode (T or T + 1, B, L), which of them the language head reads, and their lengths."""
        lengths = None if batch.lengths is None else batch.lengths.flatten()
        if batch.masked is None:
            return batch.texts, 0, lengths
        if self.recipe.masked_language.mask_contrastive_text:
            return torch.cat([batch.masked[None], batch.texts[1:]]), 0, lengths
        if not any(need.masked for need in self.needs):
            return batch.texts, 0, lengths
        if batch.lengths is not None:
            lengths = torch.cat([batch.lengths.flatten(), batch.lengths[0]])
        return torch.cat([batch.texts, batch.masked[None]]), len(batch.texts), lengths

    def _check(self, batch: PairBatch) -> None:
        for name, need in zip(self.terms, self.needs, strict=True):
            missing = sorted(need.views - {"first"} - set(batch.views))
            if missing:
                raise UserError(
                    f"The batch has the image views {', '.join(batch.views)}; {name} needs '{missing[0]}' too. "
                    f"Give that view, or set loss_weights.{name} to 0."
                )
            if len(batch.texts) < need.texts:
                raise UserError(
                    f"The batch has {len(batch.texts)} text view; {name} needs {need.texts}. Give `texts` with "
                    f"{need.texts} views, or set loss_weights.{name} to 0."
                )
            if need.masked and (batch.masked is None or batch.labels is None):
                raise UserError(
                    f"{name} needs `masked` and `labels` in the batch; none were given. Give both, or set "
                    f"loss_weights.{name} to 0."
                )


def gather_rows(
    own: Rows, extra: dict[str, dict[str, Tensor]], gather: Gather
) -> tuple[Rows, dict[str, dict[str, Tensor]]]:
    """Bring the features of all ranks together in one collective.

    Everything travels as one (B, k) float tensor: features next to each other, booleans as 0 and 1, and the bits of
    integers as floats that are only copied, never computed with.

    Args:
        own: This rank's image and text features and sample ids.
        extra: Loss name → feature name → (B, …), of the same shape on all ranks but for B.
        gather: (B, k) → (N, k), rows in rank order, with gradient.

    Returns:
        The same with N rows.
    """
    tensors = {
        ("images", ""): own.images.transpose(0, 1),
        ("texts", ""): own.texts.transpose(0, 1),
        ("ids", ""): own.sample_ids,
    }
    tensors |= {(term, name): rows for term, features in extra.items() for name, rows in features.items()}
    packed = [_as_floats(rows, own.texts.dtype) for rows in tensors.values()]
    columns = gather(torch.cat(packed, dim=1)).split([rows.shape[1] for rows in packed], dim=1)
    found = {key: _unpacked(part, rows) for (key, rows), part in zip(tensors.items(), columns, strict=True)}
    images, texts = (found[name, ""].transpose(0, 1) for name in ("images", "texts"))
    everyone = Rows(own.views, images, texts, found["ids", ""], {})
    return everyone, {term: {name: found[term, name] for name in features} for term, features in extra.items()}


def _as_floats(rows: Tensor, dtype: torch.dtype) -> Tensor:
    rows = rows.flatten(1) if rows.ndim > 1 else rows.unsqueeze(1)
    if rows.dtype == torch.int64:
        return rows.contiguous().view(dtype)
    return rows.to(dtype)


def _unpacked(part: Tensor, like: Tensor) -> Tensor:
    if like.dtype == torch.int64:
        part = part.detach().contiguous().view(torch.int64)
    elif like.dtype == torch.bool:
        part = part.detach() > 0.5
    return part.reshape(len(part), *like.shape[1:])


def _normalize(features: Tensor) -> Tensor:
    return F.normalize(to_float32(features), dim=-1)


def encode_views(model: DualEncoder, views: Sequence[Tensor], shared: bool = False) -> ImageFeatures:
    """Encode views of equal size in one pass, or one by one where batch norm must see each view alone.

    Args:
        model: The two towers.
        views: (B, 3, S, S) float each.
        shared: Whether batch-norm statistics are computed over all views together.

    Returns:
        Features with a leading axis of views.
    """
    tower: ImageTower = model.image_tower
    alone = model.training and tower.has_batch_norm and not shared
    groups = [[n] for n in range(len(views))] if alone else []
    for size in [] if alone else dict.fromkeys(view.shape for view in views):
        groups.append([n for n, view in enumerate(views) if view.shape == size])
    passes = [tower(torch.cat([views[n] for n in group])) for group in groups]
    if len(groups) == 1:
        return ImageFeatures(*(getattr(passes[0], f).unflatten(0, (len(views), -1)) for f in FIELDS))
    by_view: dict[int, ImageFeatures] = {}
    for group, features in zip(groups, passes, strict=True):
        parts = [getattr(features, f).chunk(len(group)) for f in FIELDS]
        for place, n in enumerate(group):
            by_view[n] = ImageFeatures(parts[0][place], parts[1][place], parts[2][place])
    ordered = [by_view[n] for n in range(len(views))]
    tokens = ordered[0].tokens[None]  # of views of other sizes there would be another number
    pooled, pre_logits = (torch.stack([getattr(view, f) for view in ordered]) for f in FIELDS[:2])
    return ImageFeatures(pooled, pre_logits, tokens)
