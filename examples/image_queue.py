"""DeCLIP's third supervision from the other side: each caption is compared with neighbors of its image in a queue.

python examples/image_queue.py pairs.csv runs/queue
"""

import sys

import torch
from torch import Tensor

import declip
from declip.data.batch import Needs
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.supervision.contrastive import ContrastiveTerm
from declip.supervision.nearest_neighbor import Queue, neighbor_contrast
from declip.supervision.term import Encodings, Rows, Similarity


class ImageQueue(ContrastiveTerm):
    """Contrastive loss between captions and the nearest earlier image of each image; the queue is in checkpoints."""

    needs = Needs(texts=1)
    run_state = ("queue.",)

    def __init__(self, recipe: Recipe, model: DualEncoder) -> None:
        super().__init__(recipe, model)
        self.queue = Queue(recipe.nearest_neighbor.queue_size, recipe.embed_dim)
        self.pending: Tensor | None = None  # (N, d), written after the step

    def features(self, encoded: Encodings) -> dict[str, Tensor]:
        images = encoded.images[0].detach()
        return {
            "neighbors": self.queue.nearest(images)
            if len(self.queue)
            else torch.zeros(len(images)).long()
        }

    def loss(self, own: Rows, keys: Rows, similarity: Similarity, offset: int) -> Tensor:
        self.pending = keys.images[0].detach()
        if not len(self.queue):
            return own.texts.sum() * 0.0  # nothing to find yet
        neighbors = self.queue.features[keys.extra["neighbors"]]
        return neighbor_contrast(own.texts, neighbors[None], similarity.scale, offset)

    def after_step(self, model: DualEncoder) -> None:
        if self.pending is not None:
            self.queue.push(self.pending)
            self.pending = None


def main(data: str, out: str, **overrides: object) -> None:
    """Train the small demo model with CLIP's loss and this one."""
    overrides = {"loss_weights": {"contrastive": 0.8, "image_queue": 0.2}, **overrides}
    declip.train("demo-clip", overrides, out=out, data=data, terms={"image_queue": ImageQueue})


if __name__ == "__main__":
    main(*sys.argv[1:3])
