"""A momentum teacher: a slow average of the model, which the losses compare with, and which is evaluated and exported.

python examples/momentum_teacher.py pairs.csv runs/momentum heldout.csv

With train.strategy=fsdp the teacher stays whole on every process.
"""

import sys
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

import declip
from declip.data.batch import Needs
from declip.data.pair import PairSource
from declip.models.dual_encoder import DualEncoder
from declip.supervision.contrastive import info_nce
from declip.supervision.term import Encodings, Rows, Similarity, Term
from declip.training.parallel import full_tensor
from declip.training.sinks import RunInfo


class MomentumTeacher(Term):
    """CLIP's loss between the model and an exponential moving average of it, as in MoCo; checkpoints have both."""

    needs = Needs(texts=1)
    reads_pixels = True
    run_state = ("teacher.",)
    title = "momentum teacher"
    momentum = 0.99

    def prepare(self, source: PairSource, model: DualEncoder) -> None:
        self.teacher = deepcopy(model).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    @torch.no_grad()
    def features(self, encoded: Encodings) -> dict[str, Tensor]:
        view = next(iter(encoded.batch.views.values()))
        image = self.teacher.encode_image(view.pixels)
        text = self.teacher.encode_text(encoded.batch.texts[0])
        return {"image": F.normalize(image, dim=-1), "text": F.normalize(text, dim=-1)}

    def loss(self, own: Rows, keys: Rows, similarity: Similarity, offset: int) -> Tensor:
        image, text = keys.extra["image"], keys.extra["text"]
        return info_nce(own.images[0], own.texts[0], image, text, similarity.scale, offset)

    @torch.no_grad()
    def after_step(self, model: DualEncoder) -> None:
        for name, slow in self.teacher.named_parameters():
            slow.lerp_(full_tensor(model.get_parameter(name)), 1 - self.momentum)
        for name, slow in self.teacher.named_buffers():
            slow.copy_(model.get_buffer(name))


class Teacher(declip.Sink):
    """Evaluates the teacher at logged steps whose number is a multiple of `every`, and exports it at the end."""

    def __init__(self, pairs: str, every: int = 100) -> None:
        self.pairs, self.every = pairs, every

    def start(self, info: RunInfo) -> None:
        self.info = info
        self.teacher = info.terms["momentum_teacher"].teacher

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        if step % self.every == 0 or step == self.info.steps:
            result = declip.evaluate(self.teacher, self.pairs, "retrieval")
            print(f"step {step}: R@1 of the teacher {result.text_to_image.r1:.1%}")
        if step == self.info.steps:
            folder = self.info.folder / "teacher"
            declip.export(self.teacher, "safetensors", folder, overwrite=True)


def main(
    data: str, out: str, heldout: str | None = None, every: int = 100, **overrides: object
) -> None:
    """Train the small demo model with its teacher; `declip search` and the others then read OUT/teacher."""
    overrides = {"loss_weights": {"contrastive": 0.5, "momentum_teacher": 0.5}, **overrides}
    terms, watch = {"momentum_teacher": MomentumTeacher}, Teacher(heldout or data, every)
    declip.train("demo-clip", overrides, out=out, data=data, terms=terms, callbacks=[watch])


if __name__ == "__main__":
    main(*sys.argv[1:4])
