"""Distillation: the similarities of the learner follow those of a teacher, a fixed model."""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from declip.errors import UserError
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.supervision.contrastive import mean_in_blocks, scaled_similarity, to_float32
from declip.supervision.term import Encodings, Rows, Similarity, Term

Compared = tuple[Tensor, Tensor, Tensor | float]


def relational_distillation(learner: Compared, teacher: Compared, max_logit_bytes: float | None = None) -> Tensor:
    """Divergence of the learner's similarities from the teacher's: CLIP-KD's contrastive relational distillation.

    Equation 2 of dataset reinforcement (arXiv 2311.17049) in one direction. Equals the plain loop
        mean over b of  Σₙ p[n]·(log p[n] - log q[n])
        p = softmax over n of s·rows[b]·keys[n] of the teacher, q that of the learner, each with its own s
    Each has rows (B, d) of this rank, keys (N, d) of all ranks, L2-normalized, and the inverse temperature s; the
    teacher's, of any width, get no gradient.
    """

    def loss(start: int, stop: int) -> Tensor:
        with torch.no_grad():
            target = scaled_similarity(teacher[0][start:stop], *teacher[1:]).log_softmax(dim=1)
        logits = scaled_similarity(learner[0][start:stop], *learner[1:]).log_softmax(dim=1)
        return F.kl_div(logits, target, reduction="sum", log_target=True)

    row_bytes = 2 * len(learner[1]) * to_float32(learner[1]).itemsize
    return mean_in_blocks(loss, len(learner[0]), row_bytes, max_logit_bytes)


class Distillation(Term):
    """The similarities of each image view with the caption follow those of a teacher, in both directions.

    The teacher, always in evaluation mode, has any width and the same tokenizer. It sees the contrastive or else the
    first view, and the clean caption.
    """

    reads_pixels = True
    title = "distillation"
    explanation = "Follows a teacher, another model."

    def __init__(self, recipe: Recipe, model: DualEncoder) -> None:
        super().__init__(recipe, model)
        self.given = recipe.distillation.teacher
        self.chunk = recipe.train.grad_cache_chunk or recipe.train.batch_size
        self.preprocessor = model.preprocessor
        self._fixed: list[DualEncoder] = []  # in a list, so that checkpoints do not store it

    def set_teacher(self, teacher: DualEncoder) -> None:
        """Set the teacher, which has the tokenizer of the learner."""
        ours, theirs = self.preprocessor, teacher.preprocessor
        affine = ours.std / theirs.std, (ours.mean - theirs.mean) / theirs.std
        self._factor, self._shift = (values.view(3, 1, 1).to(teacher.device) for values in affine)
        self._fixed = [teacher.eval().requires_grad_(False)]

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    @torch.no_grad()
    def features(self, encoded: Encodings) -> dict[str, Tensor]:
        if not self._fixed:
            raise UserError("distillation has no teacher yet: call declip.training.frozen_encoder.set_teacher first.")
        (teacher,) = self._fixed
        view = next(iter(encoded.batch.views.values()))  # the contrastive view comes first
        # In chunks: the teacher keeps no activations.
        pixels, tokens = view.pixels.split(self.chunk), encoded.batch.texts[0].split(self.chunk)
        image = torch.cat([teacher.image_tower(self._as_seen_by(teacher, part)).pooled for part in pixels])  # (B, d')
        text = torch.cat([teacher.text_tower(part).pooled for part in tokens])  # (B, d')
        return {"image": F.normalize(to_float32(image), dim=-1), "text": F.normalize(to_float32(text), dim=-1)}

    def _as_seen_by(self, teacher: DualEncoder, pixels: Tensor) -> Tensor:
        """Convert (B, 3, S, S) to the size and statistics of the teacher's images."""
        size = teacher.preprocessor.size
        if pixels.shape[-1] != size:
            pixels = F.interpolate(pixels.float(), (size, size), mode="bilinear", antialias=True)
        return pixels * self._factor + self._shift

    def loss(self, own: Rows, keys: Rows, similarity: Similarity, offset: int) -> Tensor:
        ours, theirs, limit = similarity.scale, self._fixed[0].logit_scale.exp(), self.max_logit_bytes
        to_text = own.extra["image"], keys.extra["text"], theirs
        to_image = own.extra["text"], keys.extra["image"], theirs
        losses = [relational_distillation((view, keys.texts[0], ours), to_text, limit) for view in own.images]
        losses += [relational_distillation((own.texts[0], view, ours), to_image, limit) for view in keys.images]
        return torch.stack(losses).mean()
