"""A model whose towers are frozen, for evaluation: each image and text goes through them once."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor

from declip.data.feature_store import KEY, FeatureStore
from declip.data.pair import PairSource
from declip.errors import UserError
from declip.interchange.read import read
from declip.io.atomic import cache_folder
from declip.models.dual_encoder import DualEncoder, has_text
from declip.models.layers import IMAGE, TEXT
from declip.supervision.distillation import Distillation
from declip.supervision.objective import Objective
from declip.training.frozen import text_key, tower_digest


class FrozenEncoder:
    """A model for `declip.evaluation.protocols.evaluate_all` with pooled features in the cache folder.

    They are found by the tower's weights and the pixels or token ids, so that another run with the same towers, or a
    later evaluation of this one, computes its heads alone.
    """

    def __init__(self, model: DualEncoder) -> None:
        self.model = model
        self._images, self._texts = (
            cache_folder() / "features" / f"pooled-{tower_digest(model, tower)}" for tower in (IMAGE, TEXT)
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)  # preprocessing and tokenizer are the model's

    def encode_image(self, images: Tensor) -> Tensor:
        """(n, 3, S, S) normalized → (n, d) float32 of length 1."""
        tower = self.model.image_tower
        pooled = _once(self._images, images, _pixel_key, tower.pool, tower.pre_logits_width)
        return F.normalize(tower.proj(pooled).float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(n, L) ids → (n, d) float32 of length 1."""
        tower = self.model.text_tower
        pooled = _once(self._texts, tokens, text_key, tower.pool, tower.width)
        return F.normalize(tower.text_projection(pooled).float(), dim=-1)


def set_teacher(objective: Objective, source: PairSource, model: DualEncoder) -> None:
    """Load the fixed teacher of a loss that has one; it must read captions as the learner does."""
    for term in objective.terms.values():
        if not isinstance(term, Distillation) or term.given == "ema":
            continue
        teacher = read(term.given).check().build().to(model.device)  # not `as_start`, which has no projections
        if not has_text(teacher):
            raise UserError(f"distillation.teacher={term.given} has no text tower. Give one with both towers.")
        captions = ["a photo of 2 dogs", *source.captions(0)]
        if not torch.equal(*(each.tokenize(captions).cpu() for each in (model, teacher))):
            raise UserError(
                f"distillation.teacher={term.given} has another tokenizer or text.context_length than the model. Give "
                "a teacher with the same ones, or its weights as finetune.pretrained too."
            )
        term.set_teacher(teacher)


def _once(
    folder: Path, batch: Tensor, key: Callable[[Tensor], bytes], pool: Callable[[Tensor], Tensor], width: int
) -> Tensor:
    """Pool the rows of a batch that the store lacks, and read all."""
    keys = [key(row) for row in batch.cpu()]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        store = FeatureStore(folder, width, torch.float32)
        new = {key: number for number, key in enumerate(keys) if key not in store}
        if new:
            store.append([*new], pool(batch[[*new.values()]]))
        return store.rows()[store.places(keys)].to(batch.device)


def _pixel_key(pixels: Tensor) -> bytes:
    return hashlib.blake2b(pixels.contiguous().numpy().tobytes(), digest_size=KEY).digest()
