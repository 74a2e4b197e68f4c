"""The objective: encode a batch once, gather once, and sum the weighted losses of a recipe."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip.data.batch import Needs, PairBatch
from declip.data.pair import PairSource
from declip.data.plan import length_step
from declip.errors import UserError, unknown
from declip.io.plugins import load_plugin, plugins
from declip.models.dual_encoder import DualEncoder
from declip.models.image_tower import ImageFeatures, ImageTower
from declip.models.tensor_names import all_but
from declip.models.text_tower import encode_by_length
from declip.recipe.schema import Recipe
from declip.supervision.contrastive import Contrastive, Sigmoid, to_float32
from declip.supervision.late_interaction import LateInteraction
from declip.supervision.masked_language import MaskedLanguage, chosen_rows
from declip.supervision.multi_view import MultiView
from declip.supervision.nearest_neighbor import NearestNeighbor
from declip.supervision.simclr import SimCLR
from declip.supervision.simsiam import SimSiam
from declip.supervision.term import Encodings, Rows, Similarity, Term, TowerOutputs

TERMS: dict[str, type[Term]] = {
    "contrastive": Contrastive,
    "sigmoid": Sigmoid,
    "multi_view": MultiView,
    "simsiam": SimSiam,
    "masked_language": MaskedLanguage,
    "nearest_neighbor": NearestNeighbor,
    "simclr": SimCLR,
    "late_interaction": LateInteraction,
}
"""Name in `loss_weights` → loss; see CONTRIBUTING.md."""

Gather = Callable[[Tensor], Tensor]
Terms = Mapping[str, type[Term]]
NO_TERMS: Terms = MappingProxyType({})


def active_terms(recipe: Recipe, terms: Terms) -> dict[str, type[Term]]:
    """The losses with a weight above 0: those of `TERMS` in its order, then plugins and the caller's `terms`."""
    others = [name for name in recipe.loss_weights if name not in {*TERMS, *terms}]
    installed = plugins("losses") if others else {}
    own = {name: load_plugin("losses", name) for name in others if name in installed}
    own |= terms
    for name, term in own.items():
        is_term = isinstance(term, type) and issubclass(term, Term)
        if name in TERMS or not name.isidentifier() or not is_term:
            raise UserError(
                f"terms has the name '{name}' for {term!r}; give identifiers other than {', '.join(TERMS)}, each for a "
                "subclass of declip.supervision.term.Term."
            )
    known = TERMS | own
    for name in recipe.loss_weights:
        if name not in known:
            allowed = [f"loss_weights.{other}" for other in known]
            raise unknown("loss", f"loss_weights.{name}", allowed)
    return {name: term for name, term in known.items() if name in recipe.active_losses}


def needs_of(recipe: Recipe, terms: Terms = NO_TERMS) -> list[Needs]:
    """List the needs of the active losses of a recipe."""
    return [term.needs_in(recipe) for term in active_terms(recipe, terms).values()]


def without_run_state(heads: Mapping[str, Any], terms: Terms) -> dict[str, Tensor]:
    """Leave out the tensors of an objective that another run cannot use; see `Term.run_state`."""
    left_out = _names(terms, "run_state")
    tensors = {name: value for name, value in heads.items() if isinstance(value, Tensor)}
    return all_but(left_out, tensors)


def _names(terms: Mapping[str, Any], attribute: str) -> tuple[str, ...]:
    """Beginnings of the names of tensors that losses list in an attribute, as an objective has them."""
    names = list[str]()
    for name, term in terms.items():
        names += [f"terms.{name}.{start}" for start in getattr(term, attribute)]
    return tuple(names)


class Objective(nn.Module):
    """The weighted sum of a recipe's active losses, with the heads and the queue that they own.

    Args:
        terms: Losses that are not of this package, by their name in `loss_weights`.
    """

    def __init__(self, recipe: Recipe, model: DualEncoder, terms: Terms = NO_TERMS) -> None:
        super().__init__()
        self.recipe = recipe
        active = active_terms(recipe, terms)
        self.classes = active
        self.weights = {name: recipe.loss_weights[name] for name in active}
        built = {name: term(recipe, model) for name, term in active.items()}
        self.terms = nn.ModuleDict(built)
        self.needs = needs_of(recipe, terms)
        self.reaches_all = any(term.reaches_all for term in active.values())
        self.reads_pixels = any(term.reads_pixels for _, term in self.named_terms())
        # The first loss that compares images with captions, and beginnings of names of layers whose outputs are words
        comparing = [name for name, term in active.items() if term.compares_pairs]
        self.watched = None
        if comparing:
            self.watched = comparing[0]
        layers = _names(active, "over_vocabulary")
        self.over_vocabulary = tuple(f"{layer}." for layer in layers)
        for name, tower in product(active, ("image_tower", "text_tower")):
            if active[name].needs.tokens and not getattr(model, tower).gives_tokens:
                raise UserError(
                    f"{name} needs token states, which this {tower} lacks. Set loss_weights.{name} to 0."
                )

    def attach(self, model: DualEncoder) -> None:
        """Change the model for training by these losses, before the optimizer is built."""
        uses_bias = any(term.uses_bias for _, term in self.named_terms())
        if model.logit_bias is not None and not uses_bias:
            model.logit_bias.requires_grad_(False)  # softmax does not see it
        for _, term in self.named_terms():
            term.attach(model)

    def prepare(self, source: PairSource, model: DualEncoder) -> None:
        """Prepare every loss, before the optimizer is built and a checkpoint is loaded."""
        for _, term in self.named_terms():
            term.prepare(source, model)
        self.to(model.device)

    def forward(
        self, model: DualEncoder, batch: PairBatch, gather: Gather | None = None, offset: int = 0
    ) -> dict[str, Tensor]:
        """Compute every active loss by its name, and "loss", the sum of weight · loss.

        Args:
            batch: Float views (B, 3, S, S) and texts (T, B, L); masked and labels when the recipe masks.
            gather: (B, k) → (N, k), rows of all ranks, in rank order, with gradient; None: there is one rank.
            offset: Row of this rank's first pair in that order.
        """
        outputs = self.run_towers(model, batch)
        return self.losses(outputs, model, batch, gather, offset)

    def losses(
        self,
        outputs: TowerOutputs,
        model: DualEncoder,
        batch: PairBatch,
        gather: Gather | None,
        offset: int,
    ) -> dict[str, Tensor]:
        """Compute the losses from the towers' outputs for the whole batch, as `forward`."""
        terms = self.named_terms()
        # (V, B, d) and (T, B, d)
        images = F.normalize(to_float32(outputs.images), dim=-1)
        texts = F.normalize(to_float32(outputs.texts), dim=-1)
        encoded = Encodings(images, texts, outputs, batch)
        # (B, …) each
        features = {name: _all_to_float32(term.features(encoded)) for name, term in terms}
        keys = {name: term.keys(features[name]) for name, term in terms}
        own = Rows(outputs.views, images, texts, {})
        gathered = own
        if gather is not None:
            keys = {name: term.pad_keys(keys[name]) for name, term in terms}
            # (V, N, d), (T, N, d) and (N, …), N pairs of all ranks
            gathered, keys = gather_rows(own, keys, gather)
        # Loss of this rank's rows against the keys of all ranks
        similarity = Similarity(model.logit_scale.exp(), model.logit_bias)
        losses = {}
        for name, term in terms:
            rows = replace(own, extra=features[name])
            key_rows = replace(gathered, extra=keys[name])
            with torch.autocast(texts.device.type, enabled=False):  # losses are float32
                losses[name] = term.loss(rows, key_rows, similarity, offset)
        weighted = [self.weights[name] * loss for name, loss in losses.items()]
        return losses | {"loss": torch.stack(weighted).sum()}

    def run_towers(self, model: DualEncoder, batch: PairBatch) -> TowerOutputs:
        """Run the towers; a part of a batch gives that part of the whole batch's outputs."""
        tokens = any(need.tokens for need in self.needs)
        pre_logits = any(need.pre_logits for need in self.needs)
        masked = any(need.masked for need in self.needs)
        # V · (B, 3, S, S) → (V, B, d)
        views = [view.pixels for view in batch.views.values()]
        images = encode_views(model, views)
        captions, masked_at, lengths = self._captions(batch, masked)  # (T or T + 1, B, L)
        train = self.recipe.train
        buckets = train.length_buckets
        step = length_step(train)
        # (T · B, d)
        texts = encode_by_length(model.text_tower, captions.flatten(0, 1), lengths, buckets, step)
        shape = captions.shape[:2]
        pooled = texts.pooled.unflatten(0, shape)  # (T, B, d)
        text_tokens = texts.text_tokens.unflatten(0, shape)  # (T, B, L, w)
        rows = None
        targets = None
        if masked and batch.labels is not None:
            # (M, w) and (M,), of the masked tokens
            rows, targets = chosen_rows(text_tokens[masked_at], batch.labels, batch.mask_positions)
        return TowerOutputs(
            views=tuple(batch.views),
            images=images.pooled,
            pre_logits=images.pre_logits if pre_logits else None,
            patches=images.tokens if tokens else None,
            texts=pooled[: len(batch.texts)],
            text_tokens=text_tokens[0] if tokens else None,
            masked_tokens=rows,
            targets=targets,
            lengths=texts.lengths[: len(batch)],
        )

    @torch.no_grad()
    def after_step(self, model: DualEncoder) -> None:
        """Keep the logit scale within its limits and update the losses' own state, after the optimizer's step."""
        limits = self.recipe.logit_scale
        model.logit_scale.clamp_(min=limits.min, max=limits.max)
        for _, term in self.named_terms():
            term.after_step(model)

    def process_state(self) -> dict[str, Tensor]:
        """The tensors that differ between processes, see `Term.process_state`, on the host."""
        starts = _names(dict(self.named_terms()), "process_state")
        state = self.state_dict()
        return {name: state[name].cpu() for name in state if name.startswith(starts)}

    def named_terms(self) -> list[tuple[str, Term]]:
        """The losses and their names."""
        return list(self.terms.items())  # type: ignore[arg-type]  # a ModuleDict does not know its values' class

    def _captions(self, batch: PairBatch, masked: bool) -> tuple[Tensor, int, Tensor | None]:
        """The sequences to encode (T or T + 1, B, L), which of them the language head reads, and their lengths."""
        lengths = None
        if batch.lengths is not None:
            lengths = batch.lengths.flatten()
        captions = batch.texts
        if batch.masked is not None and self.recipe.views.text.mask is not False:
            captions = torch.cat([batch.masked[None], captions[1:]])
        elif batch.masked is not None and masked:
            if lengths is not None:
                lengths = torch.cat([lengths, lengths[: len(batch)]])
            return torch.cat([captions, batch.masked[None]]), len(captions), lengths
        return captions, 0, lengths


def _all_to_float32(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the outputs of heads, which run in autocast, to float32; integers and booleans stay."""
    converted = dict(features)
    for name, feature in features.items():
        if feature.is_floating_point():
            converted[name] = to_float32(feature)
    return converted


def gather_rows(
    own: Rows, extra: dict[str, dict[str, Tensor]], gather: Gather
) -> tuple[Rows, dict[str, dict[str, Tensor]]]:
    """Gather the features of all ranks in one collective.

    Everything travels as one (B, k) float tensor: booleans as 0 and 1, and the bits of integers as floats that are only
    copied, never computed with. `extra` has, by loss and name, features (B, …), of one shape but for B.
    """
    tensors = [own.images.transpose(0, 1), own.texts.transpose(0, 1)]
    for features in extra.values():
        tensors += features.values()
    # (B, k), split after the collective by the same widths
    packed = [_as_floats(rows, own.texts.dtype) for rows in tensors]
    widths = [rows.shape[1] for rows in packed]
    of_all_ranks = gather(torch.cat(packed, dim=1))
    columns = of_all_ranks.split(widths, dim=1)
    # (N, …) as they were before
    unpacked = map(_unpack, columns, tensors)
    images = next(unpacked).transpose(0, 1)
    texts = next(unpacked).transpose(0, 1)
    gathered = {}
    for term, features in extra.items():
        gathered[term] = {name: next(unpacked) for name in features}
    return Rows(own.views, images, texts, {}), gathered


def _as_floats(rows: Tensor, dtype: torch.dtype) -> Tensor:
    rows = rows.unsqueeze(-1).flatten(1)
    if rows.dtype == torch.int64:
        return rows.contiguous().view(dtype)
    return rows.to(dtype)


def _unpack(packed: Tensor, like: Tensor) -> Tensor:
    if like.dtype == torch.int64:
        packed = packed.detach().contiguous().view(torch.int64)
    elif like.dtype == torch.bool:
        packed = packed.detach() > 0.5
    return packed.reshape(len(packed), *like.shape[1:])


def encode_views(model: DualEncoder, views: Sequence[Tensor]) -> ImageFeatures:
    """Encode (B, 3, S, S) views in one pass, or one by one where batch norm must see each view alone.

    `pooled` and `pre_logits` have a leading axis of views; `tokens` are the first view's.
    """
    tower: ImageTower = model.image_tower
    batches = views
    if not (model.training and tower.has_batch_norm):
        batches = [torch.cat([*views])]
    passes = [tower(pixels) for pixels in batches]
    # (V · B, k) → (V, B, k)
    shape = (len(views), -1)
    pooled = torch.cat([some.pooled for some in passes]).unflatten(0, shape)
    pre_logits = torch.cat([some.pre_logits for some in passes]).unflatten(0, shape)
    tokens = passes[0].tokens[: len(views[0])]
    return ImageFeatures(pooled, pre_logits, tokens)
