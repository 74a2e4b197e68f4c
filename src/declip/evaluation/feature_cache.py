"""Features of a source before or after the projection, stored on the disk for the next probe."""

import hashlib
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from declip.data.pair import PairSource, SkipCounter
from declip.data.sources.image_source import ImageSource
from declip.errors import UserError, unknown
from declip.evaluation.encode import Encoder, SourceFeatures, encode_images
from declip.io.atomic import atomic_write, cache_folder, save_tensors

log = logging.getLogger("declip")

FEATURES = ("backbone", "embedding")
FeatureKind = Literal["backbone", "embedding"]

FORMAT = 2
"""Version of the files' content."""

SPOT_CHECKS = 4
SPOT_TOLERANCE = 1e-2
"""Relative. Another device, thread count or batch size changes features by about 1e-5; other images by far more."""


def encoder_of(model: Encoder, kind: str) -> Callable[[Tensor], Tensor]:
    """Return the function from normalized pixels (n, 3, S, S) to the features (n, width) that probes read.

    Args:
        kind: "backbone" is `model.encode_backbone`, the pooled feature before the projection, not normalized, as in
            CLIP (Radford et al. 2021, appendix A.3); "embedding" is `model.encode_image`.
    """
    if kind not in FEATURES:
        raise unknown("kind of features", kind, FEATURES)
    if kind == "embedding":
        return model.encode_image
    encode = getattr(model, "encode_backbone", None)
    if encode is None:
        raise UserError(
            f"{type(model).__name__} has no `encode_backbone`, a method from pixels (n, 3, S, S) to features "
            "(n, width) before the projection. Add it, or probe the projected ones with features='embedding'."
        )
    return encode


def model_hash(model: Encoder) -> bytes:
    """SHA-256 of a model: every tensor of its `state_dict`, its class name, and its preprocessing.

    The preprocessing enters by its output for one fixed image of noise, which changes with size, crop, filter and norm.
    """
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, value in sorted(model.state_dict().items()):  # type: ignore[attr-defined]  # the caller looked
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(_bytes(value))
    noise = np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)
    pixels = model.preprocess([Image.fromarray(noise)])
    digest.update(f"{tuple(pixels.shape)}".encode())
    digest.update(_bytes(pixels.float()))
    return digest.digest()


class FeatureCache:
    """Encodes the images of sources, or reads their features from the cache folder.

    A file is found by a SHA-256 of

    - the model, see `model_hash`,
    - the kind of features, and the source's name, split, length, labels and class names,
    - every image's path, size and modification time, or the hash of its bytes in a table's cell,

    so a change of any of them is a miss. What these cannot show (the code of the model, images of a source without
    files) is sampled: on a hit, `SPOT_CHECKS` images are encoded again and must agree. A file that is damaged or
    disagrees is replaced; failing to write one is only logged.

    Args:
        kind: See `encoder_of`.
        enabled: Read and write files; a model without `state_dict` never does.
    """

    def __init__(
        self,
        model: Encoder,
        kind: str = "backbone",
        *,
        enabled: bool = True,
        batch_size: int = 256,
        workers: int = 0,
        progress: bool = False,
    ) -> None:
        self.model, self.kind, self.encode = model, kind, encoder_of(model, kind)
        self.reading = {"batch_size": batch_size, "workers": workers, "progress": progress}
        self._model_hash = model_hash(model) if enabled and hasattr(model, "state_dict") else None

    def images(self, source: PairSource, split: str) -> SourceFeatures:
        """Return the features of a source, without captions."""
        if self._model_hash is None:
            return self._encode(source)
        path = self.path(source, split)
        stored = _read(path, source.name)
        if stored is not None and self._agrees(source, stored):
            log.info("Features of %s, %s: %s from %s", source.name, split, _size(stored.images), path)
            return stored
        features = self._encode(source)
        try:
            _write(path, features)
            log.info("Features of %s, %s: %s stored in %s", source.name, split, _size(features.images), path)
        except (UserError, OSError, SafetensorError) as error:
            log.warning("The features of %s, %s, are not stored: %s", source.name, split, error)
        return features

    def path(self, source: PairSource, split: str) -> Path:
        """The file for the features of a source, whether it is there or not."""
        digest = hashlib.sha256(self._model_hash or b"")
        digest.update(json.dumps([FORMAT, self.kind, source.name, split, len(source)]).encode())
        if source.labels is not None:
            digest.update(np.asarray(source.labels, dtype=np.int64).tobytes())
            digest.update(json.dumps(list(source.class_names or ())).encode())
        images = ImageSource(source)
        for index in range(len(source)):
            digest.update(json.dumps(images.origin(index)).encode())
        readable = re.sub(r"[^\w.-]+", "-", f"{Path(source.name).name}-{split}-{self.kind}")[:80]
        return cache_folder() / "features" / f"{readable}-{digest.hexdigest()[:24]}.safetensors"

    def _encode(self, source: PairSource, indices: np.ndarray | None = None) -> SourceFeatures:
        # A few images are read sooner than worker processes start.
        reading: dict[str, Any] = self.reading if indices is None else {**self.reading, "workers": 0}
        return encode_images(self.model, source, self.encode, indices=indices, **reading)

    def _agrees(self, source: PairSource, stored: SourceFeatures) -> bool:
        """Whether a few images, encoded again, give the stored features."""
        rows = np.unique(np.linspace(0, len(stored) - 1, SPOT_CHECKS, dtype=np.int64))
        try:
            again = self._encode(source, stored.indices[rows]).images
        except UserError:
            return False
        expected = stored.images[rows]
        if again.shape != expected.shape:
            return False
        return bool(((again - expected).norm(dim=1) <= SPOT_TOLERANCE * expected.norm(dim=1)).all())


def _read(path: Path, name: str) -> SourceFeatures | None:
    """Read a file; None where it is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            features, indices, about = file.get_tensor("features"), file.get_tensor("indices"), file.metadata()
        if about["sha256"] != _digest(features, indices):
            raise ValueError("its checksum differs")
        skipped = SkipCounter.from_dict(json.loads(about["skipped"]))
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        log.warning("'%s' is damaged and will be replaced: %s", path, error)
        return None
    no_captions = ((),) * len(features)
    return SourceFeatures(name, indices.numpy(), features, no_captions, None, np.arange(0), skipped)


def _write(path: Path, features: SourceFeatures) -> None:
    images, indices = features.images.contiguous(), torch.from_numpy(features.indices)
    about = {"sha256": _digest(images, indices), "skipped": json.dumps(features.skipped.to_dict())}
    with atomic_write(path) as temporary:
        save_tensors({"features": images, "indices": indices}, temporary, about)


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's memory, without a copy where it is contiguous on the host."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _size(features: Tensor) -> str:
    rows, width = features.shape
    return f"{rows:,} × {width:,}, {features.nbytes / 1e6:,.1f} MB"
