"""Features of frozen towers, computed once and saved by a key of their input."""

import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from declip.errors import UserError
from declip.evaluation.encode import text_features
from declip.io.atomic import cache_folder
from declip.io.cache import FEATURES, hold, trim_cache
from declip.models.dual_encoder import DualEncoder
from declip.models.inference import chunked, hash_tensors, inference_tower
from declip.models.layers import IMAGE, PROJECTIONS, TEXT

KEY, FILE = 16, "features.sqlite"  # bytes of a key; file of a tower
BATCH = 64  # captions that the tower sees at a time
FEATURE_VERSION = 1  # increase it when preprocessing, tokenizers or towers compute other features of the same input


class FrozenEncoder:
    """A model for `declip.evaluation.protocols.evaluate_all` with pooled features in the cache folder.

    Features are found by the tower's weights and the pixels or token ids, so that another run with the same towers, or
    a later evaluation of this one, computes its heads alone.
    """

    def __init__(self, model: DualEncoder) -> None:
        self.model, key = model, partial(text_key, padding=model.tokenizer.padding)
        folders = [cache_folder() / FEATURES / f"pooled-{tower_digest(model, tower)}" for tower in (IMAGE, TEXT)]
        self._images = PooledFeatures(folders[0], _pixel_key, inference_tower(model))
        self._texts = PooledFeatures(folders[1], key, model.text_tower)
        trim_cache(FEATURES, keep=folders)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)  # preprocessing and tokenizer are the model's

    def pool_images(self, images: Tensor) -> Tensor:
        """(n, 3, S, S) normalized → (n, v) float32, before the projection."""
        return self._images.of(images)

    def pool_captions(self, captions: Sequence[str], shown: bool = False) -> Tensor:
        """(m, w) float32, before the projection; rows of equal captions equal bit for bit."""
        return text_features(self.model, captions, encode=self._texts.of, batch_size=BATCH, progress=shown)

    def encode_image(self, images: Tensor) -> Tensor:
        """(n, 3, S, S) normalized → (n, d) float32 of length 1."""
        return F.normalize(self.model.image_tower.proj(self._images.of(images)).float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(n, L) ids → (n, d) float32 of length 1."""
        return F.normalize(self.model.text_tower.text_projection(self._texts.of(tokens)).float(), dim=-1)


class PooledFeatures:
    """The pooled features of a tower by its input, in SQLite; the tower runs only on inputs that are missing."""

    def __init__(self, folder: Path, key: Callable[[Tensor], bytes], tower: Any) -> None:
        self.folder, self.key, self.tower = folder, key, tower
        with self._database():
            self._held = hold(folder)
        with suppress(OSError):  # of a read-only cache
            os.utime(folder)  # `declip.io.cache` removes what was opened longest ago

    def of(self, batch: Tensor) -> Tensor:
        """(n, …) inputs → (n, w) float32."""
        keys = [self.key(row) for row in batch.cpu()]
        with self._database() as file:
            found = {key: file.execute("SELECT row FROM features WHERE key = ?", (key,)).fetchone() for key in keys}
        rows = {key: row[0] for key, row in found.items() if row is not None}
        if new := {key: number for number, key in enumerate(keys) if key not in rows}:
            fresh = batch[[*new.values()]]
            features = chunked(self.tower.pool, fresh) if fresh.ndim == 4 else self.tower.pool(fresh)
            computed = [*zip(new, (row.tobytes() for row in features.float().cpu().numpy()), strict=True)]
            rows |= computed
            with self._database() as file:
                file.executemany("INSERT OR IGNORE INTO features VALUES (?, ?)", computed)
        content = bytearray(b"".join(rows[key] for key in keys))
        return torch.frombuffer(content, dtype=torch.float32).view(len(keys), -1).to(batch.device)

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """A transaction: what a killed process did not finish is undone by the next one."""
        try:
            # Also what was removed from outside, which costs the features and not the run
            self.folder.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.folder / FILE, timeout=60)) as file, file:
                file.execute("CREATE TABLE IF NOT EXISTS features (key BLOB PRIMARY KEY, row BLOB NOT NULL)")
                yield file
        except (sqlite3.Error, OSError) as error:
            raise UserError(
                f"The features in '{self.folder}' cannot be read or written: {error}. Make room on the disk, run "
                "`declip cache clear`, or set DECLIP_CACHE to a folder on another disk."
            ) from error


def _pixel_key(pixels: Tensor) -> bytes:
    return hashlib.blake2b(pixels.contiguous().numpy().tobytes(), digest_size=KEY).digest()


def text_key(row: Tensor, padding: int) -> bytes:
    """Hash token ids (L,) without the padding at their end."""
    ids = row.numpy()
    length = int(np.flatnonzero(ids != padding).max(initial=-1)) + 1
    return hashlib.blake2b(ids[:length].tobytes(), digest_size=KEY).digest()


def tower_digest(model: DualEncoder, tower: str) -> str:
    """Hash a tower's weights except the projection, its recipe section, and the versions of the code."""
    # Equal weights may compute other features: with another pooling, activation or number of heads, or in other code.
    section = model.recipe.image if tower == IMAGE else model.recipe.text
    versions = FEATURE_VERSION, torch.__version__, timm.__version__, PIL.__version__  # Pillow decodes and resizes
    known = [section.model_dump(mode="json"), versions]
    digest = hashlib.sha256(json.dumps(known).encode())
    state = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(tower)}
    hash_tensors(digest, {name: tensor for name, tensor in state.items() if not name.startswith(PROJECTIONS)})
    return digest.hexdigest()[:24]
