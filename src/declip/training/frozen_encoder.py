"""Features of frozen towers, computed once and saved as rows found by a key."""

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import timm
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor

from declip.errors import UserError
from declip.evaluation.encode import eval_mode
from declip.io.atomic import FULL, cache_folder
from declip.io.cache import FEATURES, LOCK, trim_cache
from declip.io.pool import pairs_bar
from declip.models.dual_encoder import DualEncoder
from declip.models.inference import chunked, inference_tower
from declip.models.layers import IMAGE, PROJECTIONS, TEXT

KEY = 16  # bytes of a key

BATCH = 64  # captions that the tower sees at a time
FEATURE_VERSION = 1  # increase it when preprocessing, tokenizers or towers compute other features of the same input


class FeatureStore:
    """Rows of numbers by key, in two files that only grow: the keys, and the rows in the same order.

    The rows of a block are written before its keys, so a process that is killed loses at most the last block. One
    process at a time may append; call `refresh` first where another one may have.
    """

    def __init__(self, folder: Path, width: int, dtype: torch.dtype) -> None:
        self.width, self.dtype, self._bytes = width, dtype, width * dtype.itemsize
        self._keys, self._rows = folder / "keys", folder / "rows"
        folder.mkdir(parents=True, exist_ok=True)
        for path in (self._keys, self._rows):
            path.touch()
        os.utime(folder)  # `declip.io.cache` removes what was opened longest ago
        self._count, self._places = 0, dict[bytes, int]()
        self.refresh()

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def refresh(self) -> None:
        """Read the keys that were appended since the last call, by any process."""
        count = min(self._keys.stat().st_size // KEY, self._rows.stat().st_size // self._bytes)
        if count <= self._count:
            return
        with self._keys.open("rb") as file:
            file.seek(KEY * self._count)
            stored = file.read(KEY * (count - self._count))
        for number in range(self._count, count):
            start = KEY * (number - self._count)
            self._places[stored[start : start + KEY]] = number
        self._count = count

    def append(self, keys: list[bytes], rows: Tensor) -> None:
        """Write new rows (n, width) under their keys; if the disk is full, earlier rows stay valid."""
        content = rows.to(self.dtype).contiguous().cpu().view(torch.uint8).numpy().tobytes()
        try:
            # Rows first: a key without its row would be read as a neighbor's.
            for path, size, block in ((self._rows, self._bytes, content), (self._keys, KEY, b"".join(keys))):
                with path.open("r+b") as file:
                    file.truncate(self._count * size)
                    file.seek(self._count * size)
                    file.write(block)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise UserError(
                f"No room left on the disk for features in '{self._rows}'. Free some with `declip cache clear`, or set "
                "DECLIP_CACHE to a folder on another disk."
            ) from error
        self._places |= {key: self._count + number for number, key in enumerate(keys)}
        self._count += len(keys)

    def places(self, keys: Iterable[bytes]) -> np.ndarray:
        """The row numbers of keys, (n,) int64."""
        return np.fromiter((self._places[key] for key in keys), np.int64)

    def rows(self) -> Tensor:
        """All rows, (n, width), mapped from the disk."""
        if not self._count:
            return torch.empty(0, self.width, dtype=self.dtype)
        with self._rows.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), self._count * self._bytes, access=mmap.ACCESS_COPY)
        return torch.frombuffer(mapped, dtype=self.dtype).view(self._count, self.width)


class FrozenEncoder:
    """A model for `declip.evaluation.protocols.evaluate_all` with pooled features in the cache folder.

    Features are found by the tower's weights and the pixels or token ids, so that another run with the same towers, or
    a later evaluation of this one, computes its heads alone.
    """

    def __init__(self, model: DualEncoder) -> None:
        self.model = model
        images, texts, padding = model.image_tower, model.text_tower, model.tokenizer.padding
        folders = [cache_folder() / FEATURES / f"pooled-{tower_digest(model, tower)}" for tower in (IMAGE, TEXT)]
        self._images = _PooledFeatures(folders[0], images.pre_logits_width, _pixel_key, inference_tower(model))
        self._texts = _PooledFeatures(folders[1], texts.width, partial(text_key, padding=padding), texts)
        trim_cache(keep=folders)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)  # preprocessing and tokenizer are the model's

    def pool_images(self, images: Tensor) -> Tensor:
        """(n, 3, S, S) normalized → (n, v) float32, before the projection."""
        return self._images.of(images)

    def pool_captions(self, captions: Sequence[str], shown: bool = False, title: str = "Captions") -> Tensor:
        """Encode captions up to the projection: (m, w) float32, rows of equal captions equal bit for bit."""
        distinct = sorted(
            set(captions), key=lambda caption: (len(caption), caption)
        )  # batches of one length have little padding
        found: list[Tensor] = []
        with eval_mode(self.model) as device, pairs_bar(shown) as bar:
            task = bar.add_task(title, total=len(distinct))
            for start in range(0, len(distinct), BATCH):
                batch = distinct[start : start + BATCH]
                found.append(self._texts.of(self.model.tokenize(batch).to(device)).cpu())
                bar.advance(task, len(batch))
        place = {caption: row for row, caption in enumerate(distinct)}
        return torch.cat(found)[torch.tensor([place[caption] for caption in captions])]

    def encode_image(self, images: Tensor) -> Tensor:
        """(n, 3, S, S) normalized → (n, d) float32 of length 1."""
        return F.normalize(self.model.image_tower.proj(self._images.of(images)).float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(n, L) ids → (n, d) float32 of length 1."""
        return F.normalize(self.model.text_tower.text_projection(self._texts.of(tokens)).float(), dim=-1)


class _PooledFeatures:
    """The pooled features of a tower by its input; the tower runs only on inputs that are not stored."""

    def __init__(self, folder: Path, width: int, key: Callable[[Tensor], bytes], tower: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.key, self.tower, self.lock = key, tower, FileLock(folder / LOCK)
        with self.lock:
            self.store = FeatureStore(folder, width, torch.float32)

    def of(self, batch: Tensor) -> Tensor:
        """(n, …) inputs → (n, w) float32."""
        keys = [self.key(row) for row in batch.cpu()]
        if any(key not in self.store for key in keys):
            with self.lock:
                self.store.refresh()  # another process may have computed them
                new = {key: number for number, key in enumerate(keys) if key not in self.store}
                if new:
                    fresh = batch[[*new.values()]]
                    features = chunked(self.tower.pool, fresh) if fresh.ndim == 4 else self.tower.pool(fresh)
                    self.store.append([*new], features)
        return self.store.rows()[self.store.places(keys)].to(batch.device)


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
    section = None if model.recipe is None else (model.recipe.image if tower == IMAGE else model.recipe.text)
    versions = FEATURE_VERSION, torch.__version__, timm.__version__, PIL.__version__  # Pillow decodes and resizes
    known = [section and section.model_dump(mode="json"), versions]
    digest = hashlib.sha256(json.dumps(known).encode())
    for name, tensor in model.state_dict().items():
        if name.startswith(tower) and not name.startswith(PROJECTIONS):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]
