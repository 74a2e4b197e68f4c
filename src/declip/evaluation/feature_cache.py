"""Features of a source before or after the projection, stored on the disk for the next probe."""

import hashlib
import json
import logging
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from declip.data.pair import PairSource, SkipCounter
from declip.data.sources.image_source import ImageSource
from declip.errors import UserError, unknown
from declip.evaluation.encode import Encoder, SourceFeatures, encode_source
from declip.io.atomic import atomic_write, cache_folder

log = logging.getLogger("declip")

FeatureKind = Literal["backbone", "embedding"]
FEATURES = get_args(FeatureKind)

SPOT_CHECKS = 4
SPOT_TOLERANCE = 1e-2
"""Relative. Another device, thread count or batch size changes features by about 1e-5; other images by far more."""


def encoder_of(model: Encoder, kind: str) -> Callable[[Tensor], Tensor]:
    """The function from normalized pixels (n, 3, S, S) to the features (n, width) that probes read.

    "backbone" is `model.encode_backbone`, the pooled feature before the projection, not normalized, as in CLIP (Radford
    et al. 2021, appendix A.3); "embedding" is `model.encode_image`.
    """
    if kind not in FEATURES:
        raise unknown("kind of features", kind, FEATURES)
    encode = model.encode_image if kind == "embedding" else getattr(model, "encode_backbone", None)
    if encode is None:
        raise UserError(
            f"{type(model).__name__} has no `encode_backbone`, from pixels to features before the projection. Add it, "
            "or probe the projected ones with features='embedding'."
        )
    return encode


def model_hash(model: Encoder) -> bytes:
    """SHA-256 of a model: its class name, every tensor of its `state_dict`, and its preprocessing of fixed noise."""
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

    A file is found by a SHA-256 of the model, the kind of features, the source's name, split, labels and class names,
    and every image's path, size and modification time, or its bytes in a table's cell: a change of any is a miss. What
    these cannot show (the code of the model, images of a source without files) is sampled: on a hit, `SPOT_CHECKS`
    images are encoded again and must agree. A file that is damaged or disagrees is replaced; failing to write one is
    only logged.

    Args:
        enabled: Read and write files; a model without `state_dict` never does.
        reading: `batch_size`, `workers` and `progress` of `encode_source`.
    """

    def __init__(self, model: Encoder, kind: str = "backbone", *, enabled: bool = True, **reading: Any) -> None:
        self.model, self.kind, self.encode, self.reading = model, kind, encoder_of(model, kind), reading
        self._model_hash = model_hash(model) if enabled and hasattr(model, "state_dict") else None

    def images(self, source: PairSource, split: str) -> SourceFeatures:
        """Return the features of a source, without captions."""
        if self._model_hash is None:
            return self._encode(source)
        path = self.path(source, split)
        stored = _read(path, source.name)
        if stored is not None and self._agrees(source, stored):
            return stored
        features = self._encode(source)
        try:
            with atomic_write(path) as temporary, temporary.open("wb") as file:
                skipped = json.dumps(features.skipped.to_dict())
                np.savez(file, features=features.images.numpy(), indices=features.indices, skipped=skipped)
            log.info("Features of %s, %s: stored in %s", source.name, split, path)
        except (UserError, OSError) as error:
            log.warning("The features of %s, %s, are not stored: %s", source.name, split, error)
        return features

    def path(self, source: PairSource, split: str) -> Path:
        """The file for the features of a source, whether it is there or not."""
        digest = hashlib.sha256(self._model_hash or b"")
        digest.update(json.dumps([self.kind, source.name, split, len(source)]).encode())
        if source.labels is not None:
            digest.update(np.asarray(source.labels, dtype=np.int64).tobytes())
            digest.update(json.dumps(list(source.class_names or ())).encode())
        images = ImageSource(source)
        for index in range(len(source)):
            digest.update(json.dumps(images.origin(index)).encode())
        return cache_folder() / "features" / f"{split}-{self.kind}-{digest.hexdigest()[:24]}.npz"

    def _encode(self, source: PairSource, **reading: Any) -> SourceFeatures:
        return encode_source(self.model, source, encode=self.encode, texts=False, **self.reading | reading)

    def _agrees(self, source: PairSource, stored: SourceFeatures) -> bool:
        """Whether a few images, encoded again, give the stored features."""
        rows = np.unique(np.linspace(0, len(stored) - 1, SPOT_CHECKS, dtype=np.int64))
        try:
            # A few images are read sooner than worker processes start.
            again = self._encode(source, indices=stored.indices[rows], workers=0).images
        except UserError:
            return False
        expected = stored.images[rows]
        return again.shape == expected.shape and bool(
            ((again - expected).norm(dim=1) <= SPOT_TOLERANCE * expected.norm(dim=1)).all()
        )


def _read(path: Path, name: str) -> SourceFeatures | None:
    """Read a file, whose zip format has a checksum of each array; None where it is missing or damaged."""
    try:
        with np.load(path) as file:
            features, indices = torch.from_numpy(file["features"]), file["indices"]
            skipped = SkipCounter.from_dict(json.loads(file["skipped"].item()))
    except FileNotFoundError:
        return None
    except (
        OSError,
        EOFError,
        LookupError,
        TypeError,
        ValueError,
        NotImplementedError,
        BadZipFile,
        zlib.error,
    ) as error:
        log.warning("'%s' is damaged and will be replaced: %s", path, error)
        return None
    return SourceFeatures(name, indices, features, ((),) * len(features), None, skipped)


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's memory, without a copy where it is contiguous on the host."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
