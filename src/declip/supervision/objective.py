"""The objective: which terms teach, with which weights.

A new kind of supervision is one function in a file of its own, one line in `Objective.terms`, one recipe.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip.data.batch import IGNORED, PairBatch
from declip.errors import UserError
from declip.models.dual_encoder import AnyTextTower, DualEncoder
from declip.models.heads import Predictor, Projector, SimCLRHead, TokenProjection
from declip.models.image_tower import ImageFeatures, ImageTower
from declip.models.length_buckets import encode_by_length
from declip.recipe.schema import Recipe
from declip.supervision import contrastive, late_interaction, masked_language, simclr, simsiam
from declip.supervision import nearest_neighbor as nearest_neighbor
from declip.supervision.contrastive import to_float32
from declip.supervision.tower_outputs import TowerOutputs

T = TypeVar("T")
Gather = Callable[[Tensor], Tensor]


def alone(rows: Tensor) -> Tensor:
    """The gather of a single process: its own rows are all rows."""
    return rows


@dataclass(frozen=True)
class Features:
    """What the towers and heads made of this rank's pairs.

    Attributes:
        images: (V, B, d) F of each view, L2-normalized float32; `image_pairs` are the last two.
        texts: (T, B, d) G of the caption, then of its EDA augmentation.
        simsiam: p1, p2, z1, z2, each (B, k), or None. Not gathered.
        language: (M, vocabulary) logits and (M,) targets at the masked words, or None. Not gathered.
        masked: (B,) number of masked words of each caption, or None.
        simclr: (2, B, k) outputs of SimCLR's head, or None.
        patches, words: (B, P, w), (B, L, w) token features in the late-interaction space, or None.
        word_mask: (B, L) True at real tokens, or None.
        tags: (B,) int64, which pair was seen when.
        slots: (B, T) int64, where in the queue each text's nearest neighbor is, or None.
    """

    images: Tensor
    texts: Tensor
    simsiam: tuple[Tensor, Tensor, Tensor, Tensor] | None
    language: tuple[Tensor, Tensor] | None
    masked: Tensor | None
    simclr: Tensor | None
    patches: Tensor | None
    words: Tensor | None
    word_mask: Tensor | None
    tags: Tensor
    slots: Tensor | None


class Objective(nn.Module):
    """The weighted sum of a recipe's terms, with the heads and the queue that they need.

    Args:
        recipe: Its weights, the terms' sections and `embed_dim` are read.
        image_tower: Its widths are read: of the feature before the projection, which SimCLR's head takes, as in SLIP,
            and of the patch features.
        text_tower: Its width is read, and it gives the head that predicts masked words.

    Attributes:
        weights: Term name → weight, active terms only.
        queue: The nearest-neighbor queue, or None when that term has no weight.
    """

    def __init__(self, recipe: Recipe, image_tower: ImageTower, text_tower: AnyTextTower) -> None:
        super().__init__()
        self.recipe = recipe
        self.weights = {name: getattr(recipe.loss_weights, name) for name in recipe.loss_weights.active()}
        self.queue: nearest_neighbor.Queue | None = None
        if "simsiam" in self.weights:
            sizes = recipe.simsiam
            self.projector = Projector(recipe.embed_dim, sizes.hidden, sizes.out)
            self.predictor = Predictor(sizes.out, sizes.predictor_hidden, sizes.out)
        if "simclr" in self.weights:
            self.simclr_head = SimCLRHead(image_tower.hidden_width, recipe.simclr.hidden, recipe.simclr.out)
        if "masked_language" in self.weights:
            self.language_head = text_tower.language_head()
        if "nearest_neighbor" in self.weights:
            self.queue = nearest_neighbor.Queue(recipe.nearest_neighbor.queue_size, recipe.embed_dim)
        if "late_interaction" in self.weights:
            self.patch_projection = TokenProjection(image_tower.token_width, recipe.late_interaction.width)
            self.word_projection = TokenProjection(text_tower.width, recipe.late_interaction.width)
            self.late_scale = nn.Parameter(torch.tensor(recipe.logit_scale.init))

    @classmethod
    def for_model(cls, recipe: Recipe, model: DualEncoder) -> "Objective":
        """Build the objective whose heads fit a model."""
        return cls(recipe, model.image_tower, model.text_tower)

    def forward(
        self, model: DualEncoder, batch: PairBatch, gather: Gather = alone, offset: int = 0
    ) -> dict[str, Tensor]:
        """Compute every active term and the total.

        Args:
            model: The two towers.
            batch: Images (V, B, 3, H, W) float and texts (T, B, L); masked and labels when the recipe masks.
            gather: Rows of all ranks, in rank order, with gradient; the identity on one process.
            offset: Row of this rank's first pair in that order.

        Returns:
            Scalars by term name, and "total": the sum of weight · term. In training mode the queue is then written.

        Raises:
            UserError: the batch lacks a view or the masked captions that a term needs.
        """
        return self.losses(self.run_towers(model, batch), model, batch, gather, offset)

    def losses(
        self, outputs: TowerOutputs, model: DualEncoder, batch: PairBatch, gather: Gather = alone, offset: int = 0
    ) -> dict[str, Tensor]:
        """The terms and the total from what the towers made of the batch; arguments and result as `forward`."""
        features = self.read(outputs, batch)
        longest = self.recipe.late_interaction.top_k or model.text_tower.context
        keys = gather_features(self._key_tokens(features), gather, longest)
        terms = self.terms(features, keys, model.logit_scale.exp(), offset)
        if self.queue is not None and self.training:
            self.queue.push(keys.texts[1], tags=2 * keys.tags + 1)
            self.queue.push(keys.texts[0], tags=2 * keys.tags)
        return self.total(terms)

    def encode(self, model: DualEncoder, batch: PairBatch) -> Features:
        """Run the towers and the heads on this rank's pairs."""
        return self.read(self.run_towers(model, batch), batch)

    def run_towers(self, model: DualEncoder, batch: PairBatch) -> TowerOutputs:
        """Run the towers; on a part of a batch it gives that part of the whole batch's outputs."""
        self._check(batch)
        views = len(batch.images)
        images = _encode_views(model, batch.images, self.recipe.image.shared_bn_views)
        captions, masked_at, lengths = self._captions(batch)
        groups = self.recipe.train.length_buckets
        texts = encode_by_length(model.text_tower, captions.flatten(0, 1), lengths, groups)
        count, size = captions.shape[:2]
        late = "late_interaction" in self.weights
        words = texts.words.unflatten(0, (count, size))
        rows, targets = None, None
        if "masked_language" in self.weights and batch.labels is not None:
            rows, targets = masked_language.chosen_rows(words[masked_at], batch.labels, batch.places)
        return TowerOutputs(
            images=images.pooled,
            texts=texts.pooled.unflatten(0, (count, size))[: len(batch.texts)],
            hidden=images.hidden[views - 2 :] if "simclr" in self.weights else None,
            patches=images.tokens[0] if late else None,
            words=words[0] if late else None,
            masked_words=rows,
            targets=targets,
            lengths=texts.lengths[:size],
        )

    def read(self, outputs: TowerOutputs, batch: PairBatch) -> Features:
        """Run the heads on the towers' outputs for a whole batch."""
        late = "late_interaction" in self.weights
        texts = _normalize(outputs.texts)
        positions = torch.arange(batch.texts.shape[-1], device=texts.device)
        size = len(batch)
        return Features(
            images=_normalize(outputs.images),
            texts=texts,
            simsiam=self._simsiam(outputs.images[-2:]) if "simsiam" in self.weights else None,
            language=self._language(outputs.masked_words, outputs.targets),
            masked=(batch.labels != IGNORED).sum(dim=1) if batch.labels is not None else None,
            simclr=self._simclr(_given(outputs.hidden)) if "simclr" in self.weights else None,
            patches=_normalize(self.patch_projection(_given(outputs.patches))) if late else None,
            words=_normalize(self.word_projection(_given(outputs.words))) if late else None,
            word_mask=positions < outputs.lengths[:, None] if late else None,
            tags=batch.tags if batch.tags is not None else torch.full((size,), -1, device=texts.device),
            slots=self._neighbors(texts),
        )

    def terms(self, own: Features, keys: Features, scale: Tensor, offset: int) -> dict[str, Tensor]:
        """The terms that contrast this rank's rows with all ranks' (formulas: docs/method.md)."""
        largest = self._largest
        functions: dict[str, Callable[[], Tensor]] = {
            "contrastive": lambda: contrastive.info_nce(
                own.images[0], own.texts[0], keys.images[0], keys.texts[0], scale, offset, largest
            ),
            "multi_view": lambda: contrastive.multi_view(
                own.images[-2:], own.texts, keys.images[-2:], keys.texts, scale, offset, largest
            ),
            "simsiam": lambda: simsiam.negative_cosine(*_given(own.simsiam)),
            "masked_language": lambda: self._masked_language(own, keys),
            "nearest_neighbor": lambda: self._nearest_neighbor(own, keys, scale, offset),
            "simclr": lambda: self._nt_xent(own.simclr, keys.simclr, offset),
            "late_interaction": lambda: self._late_interaction(own, keys, offset),
        }
        return {name: functions[name]() for name in self.weights}

    def total(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add the weighted sum under "total"."""
        weighted = [weight * terms[name] for name, weight in self.weights.items()]
        return {**terms, "total": torch.stack(weighted).sum()}

    @torch.no_grad()
    def limit_scales(self, model: DualEncoder) -> None:
        """Bring the logit scales back into the recipe's limits; called after the optimizer's step."""
        limits = self.recipe.logit_scale
        model.logit_scale.clamp_(min=limits.min, max=limits.max)
        if "late_interaction" in self.weights and limits.min is not None:
            self.late_scale.clamp_(min=limits.min)

    def _captions(self, batch: PairBatch) -> tuple[Tensor, int, Tensor | None]:
        """The sequences to encode (T or T + 1, B, L), which of them the language head reads, and their lengths."""
        lengths = None if batch.lengths is None else batch.lengths.flatten()
        if batch.masked is None:
            return batch.texts, 0, lengths
        if self.recipe.masked_language.mask_contrastive_text:
            return torch.cat([batch.masked[None], batch.texts[1:]]), 0, lengths
        if "masked_language" not in self.weights:
            return batch.texts, 0, lengths
        if batch.lengths is not None:
            lengths = torch.cat([batch.lengths.flatten(), batch.lengths[0]])
        return torch.cat([batch.texts, batch.masked[None]]), len(batch.texts), lengths

    def _neighbors(self, texts: Tensor) -> Tensor | None:
        """Places of the nearest neighbors of (T, B, d) in the queue, (B, T); None while it is empty."""
        if self.queue is None or len(self.queue) == 0:
            return None
        dtype = torch.bfloat16 if self.recipe.nearest_neighbor.lookup == "bf16" else None
        _, slots = self.queue.nearest(texts.detach().flatten(0, 1), dtype)
        return slots.unflatten(0, texts.shape[:2]).mT

    @property
    def _largest(self) -> float:
        """Bytes of a loss matrix that may be kept for the backward pass."""
        return 1e6 * self.recipe.train.max_logits_mb

    def _simsiam(self, pooled: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z1, z2 = (self.projector(view) for view in pooled)
        return self.predictor(z1), self.predictor(z2), z1, z2

    def _simclr(self, hidden: Tensor) -> Tensor:
        return torch.stack([self.simclr_head(view) for view in hidden])

    def _nt_xent(self, own: Tensor | None, keys: Tensor | None, offset: int) -> Tensor:
        (z1, z2), (keys1, keys2) = _given(own), _given(keys)
        return simclr.nt_xent(z1, z2, keys1, keys2, self.recipe.simclr.temperature, offset, self._largest)

    def _language(self, rows: Tensor | None, targets: Tensor | None) -> tuple[Tensor, Tensor] | None:
        return None if rows is None or targets is None else (self.language_head(rows), targets)

    def _masked_language(self, own: Features, keys: Features) -> Tensor:
        """Divide by all ranks' words over the ranks, so that the mean over ranks is the mean over words."""
        ranks = len(keys.tags) / len(own.tags)
        count = (_given(keys.masked).sum() / ranks).clamp(min=1 / ranks)
        return masked_language.cross_entropy(*_given(own.language), count=count)

    def _nearest_neighbor(self, own: Features, keys: Features, scale: Tensor, offset: int) -> Tensor:
        """Every rank looked up its own captions; all ranks' queues are equal, so the places say which features."""
        assert self.queue is not None
        if keys.slots is None:
            return own.images.sum() * 0.0
        neighbor_keys = self.queue.features[keys.slots.mT]
        size = own.images.shape[1]
        return nearest_neighbor.neighbor_contrast(
            own.images[-2:],
            neighbor_keys[:, offset : offset + size],
            neighbor_keys,
            scale,
            offset=offset,
            symmetric=self.recipe.nearest_neighbor.symmetric,
            image_keys=keys.images[-2:],
            largest=self._largest,
        )

    def _late_interaction(self, own: Features, keys: Features, offset: int) -> Tensor:
        return late_interaction.late_interaction(
            _given(own.patches),
            _given(own.words),
            _given(own.word_mask),
            _given(keys.patches),
            _given(keys.words),
            _given(keys.word_mask),
            scale=self.late_scale.exp(),
            offset=offset,
            include_padding=self.recipe.late_interaction.include_padding,
            largest=self._largest,
        )

    def _key_tokens(self, own: Features) -> Features:
        """Keep the tokens of the keys' side that the recipe selects; the own side keeps all."""
        k = self.recipe.late_interaction.top_k
        if own.patches is None or own.words is None or k is None:
            return own
        counted = None if self.recipe.late_interaction.include_padding else own.word_mask
        patches, _ = late_interaction.select_tokens(own.patches, own.words, k, paired_mask=counted)
        words, mask = late_interaction.select_tokens(own.words, own.patches, k, mask=counted)
        return replace(own, patches=patches, words=words, word_mask=mask)

    def _check(self, batch: PairBatch) -> None:
        views = {"images": (len(batch.images), self.recipe.image_view_count)}
        views["texts"] = (len(batch.texts), self.recipe.text_view_count)
        for name, (given, needed) in views.items():
            if given < needed:
                raise UserError(
                    f"The batch has {given} view of its {name}; {', '.join(self.weights)} need {needed}. "
                    f"Give {name} with {needed} views, or set the weights of the terms that need them to 0."
                )
        if "masked_language" in self.weights and (batch.masked is None or batch.labels is None):
            raise UserError(
                "masked_language needs `masked` and `labels` in the batch; none were given. "
                "Give both, or set loss_weights.masked_language to 0."
            )


def gather_features(own: Features, gather: Gather, words: int) -> Features:
    """Bring the features of all ranks together in one collective.

    Everything travels as one (B, k) float tensor: views and tokens side by side, and the bits of tags and slots as
    floats that are only copied, never computed with.

    Args:
        own: This rank's features.
        gather: (B, k) → (N, k), rows in rank order, with gradient.
        words: Number of words that every rank's captions are padded to, masked, before they travel.

    Returns:
        The same fields with N rows.
    """
    if gather is alone:
        return own
    if own.words is not None and own.word_mask is not None:
        missing = words - own.words.shape[1]
        own = replace(own, words=F.pad(own.words, (0, 0, 0, missing)), word_mask=F.pad(own.word_mask, (0, missing)))
    tensors = {"images": own.images, "texts": own.texts, "simclr": own.simclr}
    by_row = {name: tensor.transpose(0, 1) for name, tensor in tensors.items() if tensor is not None}
    by_row |= {n: t for n, t in (("patches", own.patches), ("words", own.words)) if t is not None}
    whole = {"tags": own.tags.unsqueeze(1)} | ({} if own.slots is None else {"slots": own.slots.contiguous()})
    by_row |= {name: numbers.view(own.images.dtype) for name, numbers in whole.items()}
    if own.word_mask is not None:
        by_row["word_mask"] = own.word_mask.float()
    if own.masked is not None:
        by_row["masked"] = own.masked.float().unsqueeze(1)
    rows = gather(torch.cat([tensor.flatten(1) for tensor in by_row.values()], dim=1))
    parts = rows.split([tensor[0].numel() for tensor in by_row.values()], dim=1)
    found: dict[str, Tensor] = {
        name: part.reshape(len(part), *tensor.shape[1:])
        for (name, tensor), part in zip(by_row.items(), parts, strict=True)
    }
    found |= {name: found[name].transpose(0, 1) for name in tensors if name in found}
    found |= {name: found[name].detach().contiguous().view(torch.int64) for name in whole}
    found["tags"] = found["tags"].flatten()
    if "word_mask" in found:
        found["word_mask"] = found["word_mask"].detach() > 0.5
    return replace(own, **found)  # type: ignore[arg-type]  # tensors by the names of tensor fields


def _given(value: T | None) -> T:
    assert value is not None, "the term is active, so its features were made"
    return value


def _normalize(features: Tensor) -> Tensor:
    return F.normalize(to_float32(features), dim=-1)


def _encode_views(model: DualEncoder, images: Tensor, joint: bool) -> ImageFeatures:
    """Encode (V, B, 3, H, W): all views in one pass, or one by one where batch norm must see each view alone."""
    views, size = images.shape[:2]
    if model.training and model.image_tower.has_batch_norm and not joint:
        each = [model.image_tower(view) for view in images]
        return ImageFeatures(*(torch.stack([getattr(view, name) for view in each]) for name in _IMAGE_FIELDS))
    together = model.image_tower(images.flatten(0, 1))
    return ImageFeatures(*(getattr(together, name).unflatten(0, (views, size)) for name in _IMAGE_FIELDS))


_IMAGE_FIELDS = ("pooled", "hidden", "tokens")
