"""Distillation from a teacher that is an exponential moving average of the learner."""

from copy import deepcopy
from itertools import chain
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from declip.data.pair import PairSource
from declip.errors import UserError
from declip.models.dual_encoder import AnyTextTower, DualEncoder
from declip.models.image_tower import ImageTower
from declip.recipe.schema import Recipe
from declip.supervision.contrastive import to_float32
from declip.supervision.term import Encodings, Rows, Similarity, Term


def feature_distillation(images: Tensor, texts: Tensor, teacher_image: Tensor, teacher_text: Tensor) -> Tensor:
    """Squared distance to the teacher's features: CLIP-KD's feature distillation (arXiv 2307.12732).

    Equals the plain loop
        mean over v, b of |images[v, b] - teacher_image[b]|² + mean over t, b of |texts[t, b] - teacher_text[b]|²

    Args:
        images: (V, B, d) image features, L2-normalized.
        texts: (T, B, d) text features, L2-normalized.
        teacher_image: (B, d), L2-normalized; gets no gradient.
        teacher_text: (B, d), the same.
    """
    of_images = (to_float32(images) - to_float32(teacher_image.detach())).square().sum(dim=-1).mean()
    of_texts = (to_float32(texts) - to_float32(teacher_text.detach())).square().sum(dim=-1).mean()
    return of_images + of_texts


class EmaDistillation(Term):
    """Both towers follow the averaged towers, which see the contrastive or else the first view, and the clean caption.

    After each step the average moves by 1 - decay towards the learner. The teacher is always in evaluation mode: batch
    norm uses averaged statistics, and there is no dropout.
    """

    title = "distillation from averaged weights"
    explanation = "Squared distance to the features of an average of the model's earlier weights."
    image_tower: ImageTower
    text_tower: AnyTextTower

    def __init__(self, recipe: Recipe, model: DualEncoder) -> None:
        super().__init__(recipe, model)
        self.decay = recipe.ema_distillation.decay

    def prepare(self, source: PairSource, model: DualEncoder, shown: bool = False) -> None:
        self.image_tower = deepcopy(model.image_tower).eval().requires_grad_(False)
        self.text_tower = deepcopy(model.text_tower).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    @torch.no_grad()
    def features(self, encoded: Encodings) -> dict[str, Tensor]:
        if "image_tower" not in self._modules:
            raise UserError(
                "ema_distillation copies the model before it trains: call objective.prepare(source, model)."
            )
        view = next(iter(encoded.batch.views.values()))  # the contrastive one comes first
        image, text = self.image_tower(view.pixels).pooled, self.text_tower(encoded.batch.texts[0]).pooled
        return {"image": F.normalize(to_float32(image), dim=-1), "text": F.normalize(to_float32(text), dim=-1)}

    def keys(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {}  # each pair is compared with itself alone

    def loss(self, own: Rows, keys: Rows, similarity: Similarity, offset: int) -> Tensor:
        return feature_distillation(own.images, own.texts, own.extra["image"], own.extra["text"])

    @torch.no_grad()
    def after_step(self, model: DualEncoder) -> None:
        for teacher, learner in ((self.image_tower, model.image_tower), (self.text_tower, model.text_tower)):
            averages, values = (chain(tower.parameters(), tower.buffers()) for tower in (teacher, learner))
            for average, value in zip(averages, values, strict=True):
                average.lerp_(value, 1 - self.decay) if average.is_floating_point() else average.copy_(value)
