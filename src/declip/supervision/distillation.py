"""Distillation from a teacher: an exponential moving average of the learner, or stored features of another model."""

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
from declip.supervision.chunked import mean_in_blocks
from declip.supervision.contrastive import scaled_similarity, to_float32
from declip.supervision.soft_targets import caption_hashes
from declip.supervision.term import Encodings, Rows, Similarity, Term, require

Compared = tuple[Tensor, Tensor, Tensor | float]


def feature_distillation(images: Tensor, texts: Tensor, teacher_image: Tensor, teacher_text: Tensor) -> Tensor:
    """Squared distance to the teacher's features: CLIP-KD's feature distillation (arXiv 2307.12732).

    Equals the plain loop
        mean over v, b of |images[v, b] - teacher_image[b]|² + mean over t, b of |texts[t, b] - teacher_text[b]|²

    Args:
        images, texts: (V, B, d) and (T, B, d), L2-normalized.
        teacher_image, teacher_text: (B, d), L2-normalized; they get no gradient.
    """
    of_images = (to_float32(images) - to_float32(teacher_image.detach())).square().sum(dim=-1).mean()
    of_texts = (to_float32(texts) - to_float32(teacher_text.detach())).square().sum(dim=-1).mean()
    return of_images + of_texts


def relational_distillation(learner: Compared, teacher: Compared, max_logit_bytes: float | None = None) -> Tensor:
    """Divergence of the learner's similarities from the teacher's: CLIP-KD's contrastive relational distillation.

    Equation 2 of dataset reinforcement (arXiv 2311.17049) in one direction. Equals the plain loop
        mean over b of  Σₙ p[n]·(log p[n] - log q[n])
        p = softmax over n of s·rows[b]·keys[n] of the teacher, q that of the learner, each with its own s

    Args:
        learner: Rows (B, d) of this rank and keys (N, d) of all ranks, L2-normalized, and the inverse temperature s.
        teacher: The same of the teacher, of any width; it gets no gradient.
        max_logit_bytes: See `mean_in_blocks`.
    """

    def loss(start: int, stop: int) -> Tensor:
        with torch.no_grad():
            target = scaled_similarity(teacher[0][start:stop], *teacher[1:]).log_softmax(dim=1)
        logits = scaled_similarity(learner[0][start:stop], *learner[1:]).log_softmax(dim=1)
        return F.kl_div(logits, target, reduction="sum", log_target=True)

    row_bytes = 2 * len(learner[1]) * to_float32(learner[1]).itemsize
    return mean_in_blocks(loss, len(learner[0]), row_bytes, max_logit_bytes)


class Distillation(Term):
    """The learner follows a teacher, which sees the image of each pair and the clean caption.

    With "ema" both towers follow their moving averages, which see the contrastive or else the first view. After each
    step the average moves by 1 - decay towards the learner. It is always in evaluation mode: batch norm uses averaged
    statistics, and there is no dropout. Else the similarities of each view with the caption follow those of another
    model, of any width, that has encoded all pairs without augmentation.
    """

    run_state = ("",)
    title = "distillation"
    explanation = "Follows a teacher: an average of the model's earlier weights, or another model."
    image_tower: ImageTower
    text_tower: AnyTextTower
    stored: tuple[Tensor, ...] | None = None
    """Of another model: features of all images and captions, the captions' sorted hashes, inverse temperature."""

    def __init__(self, recipe: Recipe, model: DualEncoder) -> None:
        super().__init__(recipe, model)
        self.teacher, self.decay = recipe.distillation.teacher, recipe.distillation.decay
        self.reads_pixels, self.chunk = self.teacher == "ema", recipe.train.grad_cache_chunk or recipe.train.batch_size
        self.padding = model.tokenizer.padding

    def prepare(self, source: PairSource, model: DualEncoder, shown: bool = False) -> None:
        if self.teacher == "ema":
            self.image_tower = deepcopy(model.image_tower).eval().requires_grad_(False)
            self.text_tower = deepcopy(model.text_tower).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    @torch.no_grad()
    def features(self, encoded: Encodings) -> dict[str, Tensor]:
        batch = encoded.batch
        if self.stored is not None:
            images, texts, hashes, _ = self.stored
            wanted = caption_hashes(batch.texts[:1], self.padding)[0]
            places = torch.searchsorted(hashes, wanted).clamp(max=len(hashes) - 1)
            text = texts[places] * (hashes[places] == wanted)[:, None]  # 0 for a caption that has changed
            return {"image": images[require(batch.sample_ids) % len(images)], "text": text}
        if "image_tower" not in self._modules:
            step = "objective.prepare" if self.reads_pixels else "declip.training.frozen_encoder.set_teacher"
            raise UserError(f"distillation has no teacher yet: call {step} before training.")
        view = next(iter(batch.views.values()))  # the contrastive one comes first
        image = torch.cat([self.image_tower(part).pooled for part in view.pixels.split(self.chunk)])
        text = torch.cat([self.text_tower(part).pooled for part in batch.texts[0].split(self.chunk)])
        return {"image": F.normalize(to_float32(image), dim=-1), "text": F.normalize(to_float32(text), dim=-1)}

    def keys(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return features if self.stored else {}  # the average compares each pair with itself alone

    def loss(self, own: Rows, keys: Rows, similarity: Similarity, offset: int) -> Tensor:
        image, text = own.extra["image"], own.extra["text"]
        if self.stored is None:
            return feature_distillation(own.images, own.texts, image, text)
        ours, theirs, limit = similarity.scale, self.stored[-1], self.max_logit_bytes
        to_text, to_image = (image, keys.extra["text"], theirs), (text, keys.extra["image"], theirs)
        losses = [relational_distillation((view, keys.texts[0], ours), to_text, limit) for view in own.images]
        losses += [relational_distillation((own.texts[0], view, ours), to_image, limit) for view in keys.images]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def after_step(self, model: DualEncoder) -> None:
        values = dict(chain(model.named_parameters(), model.named_buffers()))
        for name, average in chain(self.named_parameters(), self.named_buffers()):
            value = values[name]
            average.lerp_(value, 1 - self.decay) if average.is_floating_point() else average.copy_(value)
