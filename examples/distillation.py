"""Distillation from a fixed teacher: the similarities of a batch follow those of another model.

python examples/distillation.py pairs.csv runs/student runs/teacher

The teacher has both towers, any width, and the tokenizer and context length of the learner.
"""

import sys
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

import declip
from declip.data.pair import PairSource
from declip.errors import UserError
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.supervision.contrastive import scaled_similarity, to_float32
from declip.supervision.term import Encodings, Rows, Similarity, Term

Compared = tuple[Tensor, Tensor, Tensor | float]


def relational_distillation(learner: Compared, teacher: Compared) -> Tensor:
    """Divergence of the learner's similarities from the teacher's: CLIP-KD's contrastive relational distillation.

    Equation 2 of dataset reinforcement (arXiv 2311.17049) in one direction. Equals the plain loop
        mean over b of  Σₙ p[n]·(log p[n] - log q[n])
        p = softmax over n of s·rows[b]·keys[n] of the teacher, q that of the learner, each with its own s
    Each has rows (B, d) of this rank, keys (N, d) of all ranks, L2-normalized, and the inverse temperature s; the
    teacher's, of any width, get no gradient.
    """
    with torch.no_grad():
        target = scaled_similarity(*teacher).log_softmax(dim=1)
    return F.kl_div(
        scaled_similarity(*learner).log_softmax(dim=1),
        target,
        reduction="batchmean",
        log_target=True,
    )


class Distillation(Term):
    """The similarities of each image view with the caption follow those of a teacher, in both directions.

    The teacher sees the contrastive or else the first view in its own size, and the clean caption.
    """

    reads_pixels = True
    title = "distillation"
    explanation = "Follows a teacher, another model."
    teacher: str
    """What `declip.load` takes; a subclass sets it."""

    def __init__(self, recipe: Recipe, model: DualEncoder) -> None:
        super().__init__(recipe, model)
        self.chunk = recipe.train.grad_cache_chunk or recipe.train.batch_size
        self.preprocessor = model.preprocessor

    def prepare(self, source: PairSource, model: DualEncoder) -> None:
        teacher = declip.load(self.teacher, device=str(model.device))
        captions = ["a photo of 2 dogs", *source[0].captions()]
        if not teacher.has_text or not torch.equal(
            teacher.tokenize(captions), model.tokenize(captions)
        ):
            raise UserError(
                f"'{self.teacher}' lacks a text tower, or has another tokenizer or text.context_length."
            )
        self._fixed = [
            teacher.requires_grad_(False)
        ]  # in a list, so that checkpoints do not store it
        ours, theirs = self.preprocessor, teacher.preprocessor
        affine = ours.std / theirs.std, (ours.mean - theirs.mean) / theirs.std
        self._factor, self._shift = (values.view(3, 1, 1).to(model.device) for values in affine)

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    @torch.no_grad()
    def features(self, encoded: Encodings) -> dict[str, Tensor]:
        (teacher,) = self._fixed
        view = next(iter(encoded.batch.views.values()))  # the contrastive view comes first
        # In chunks: the teacher keeps no activations.
        pixels, tokens = view.pixels.split(self.chunk), encoded.batch.texts[0].split(self.chunk)
        image = torch.cat(
            [teacher.encode_image(self._as_seen_by(teacher, part)) for part in pixels]
        )  # (B, d')
        return {"image": image, "text": torch.cat([teacher.encode_text(part) for part in tokens])}

    def _as_seen_by(self, teacher: DualEncoder, pixels: Tensor) -> Tensor:
        """Convert (B, 3, S, S) to the size and statistics of the teacher's images."""
        size = teacher.preprocessor.size
        if pixels.shape[-1] != size:
            pixels = F.interpolate(
                to_float32(pixels), (size, size), mode="bilinear", antialias=True
            )
        return pixels * self._factor + self._shift

    def loss(self, own: Rows, keys: Rows, similarity: Similarity, offset: int) -> Tensor:
        ours, theirs = similarity.scale, self._fixed[0].logit_scale.exp()
        to_text = (own.extra["image"], keys.extra["text"])
        to_image = (own.extra["text"], keys.extra["image"])
        losses = [
            relational_distillation((view, keys.texts[0], ours), (*to_text, theirs))
            for view in own.images
        ]
        losses += [
            relational_distillation((own.texts[0], view, ours), (*to_image, theirs))
            for view in keys.images
        ]
        return torch.stack(losses).mean()


def main(data: str, out: str, teacher: str | None = None, **overrides: object) -> None:
    """Train the small demo model with a teacher; without one, an equal model is trained first."""
    given = teacher or str(
        declip.train("demo-few-clip", overrides, out=f"{out}-teacher", data=data).folder
    )

    class Taught(Distillation):
        teacher = given

    overrides = {"loss_weights": {"contrastive": 0.5, "distillation": 0.5}, **overrides}
    declip.train("demo-few-clip", overrides, out=out, data=data, terms={"distillation": Taught})


if __name__ == "__main__":
    main(*sys.argv[1:4])
