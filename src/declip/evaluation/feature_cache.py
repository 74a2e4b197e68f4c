"""Features of a source before or after the projection, kept on the disk for the next probe."""

import hashlib
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from declip.data.pair import PairSource, SkipCounter
from declip.data.sources.image_source import ImageSource
from declip.errors import UserError, unknown
from declip.evaluation.encode import EncodedImages, Encoder, encode_images
from declip.evaluation.model_hash import model_hash, tensor_bytes
from declip.io.atomic import atomic_write, cache_folder, save_tensors

log = logging.getLogger("declip")

FEATURES = ("backbone", "embedding")
FeatureKind = Literal["backbone", "embedding"]

FORMAT = 2
"""Counts up when what is stored changes, so that older files are not found."""

SPOT_CHECKS = 4
SPOT_TOLERANCE = 1e-2
"""Relative. Another device, thread count or batch changes features by 1e-5 or so; other images or code by far more."""


def encoder_of(model: Encoder, kind: str) -> Callable[[Tensor], Tensor]:
    """The function from normalized pixels (n, 3, S, S) to features (n, width) that probes read.

    Args:
        model: The model.
        kind: "backbone" is `model.encode_backbone`, the pooled feature before the projection, not normalized, as in
            CLIP (Radford et al. 2021, appendix A.3); "embedding" is `model.encode_image`.

    Raises:
        UserError: another kind, or a model without `encode_backbone`.
    """
    if kind not in FEATURES:
        raise unknown("kind of features", kind, FEATURES)
    if kind == "embedding":
        return model.encode_image
    encode = getattr(model, "encode_backbone", None)
    if encode is None:
        raise UserError(
            f"{type(model).__name__} has no `encode_backbone`, so its features before the projection cannot be had. "
            "Probe the projected ones with features='embedding', or give the model that method: normalized pixels "
            "(n, 3, S, S) to (n, width)."
        )
    return encode


class FeatureCache:
    """Encodes the images of sources, or finds them encoded.

    A file in the cache folder's ``features`` is found by a SHA-256 of

    - every tensor of the model's `state_dict` (name, dtype, shape, bytes) and the name of its class,
    - what its preprocessing makes of one fixed picture of noise, which changes with size, crop, filter and norm,
    - the kind of features, and the source's name, split, length, labels and class names,
    - every image's path, size and modification time, or the hash of its bytes in a table's cell,

    so a change of any of them is a miss. What a hash of these can't see (the code of the model, images of a source
    without files) is sampled: on a hit, `SPOT_CHECKS` images are encoded again and must agree. A file that is damaged
    or disagrees is made anew; one that cannot be written is only logged.

    Args:
        model: The model.
        kind: "backbone" or "embedding", see `encoder_of`.
        enabled: Read and write files; a model without `state_dict` never does.
        batch: Images a pass.
        workers: Processes that read images; 0 reads in this one.
        progress: Show a bar for what takes long.

    Raises:
        UserError: as `encoder_of`.
    """

    def __init__(
        self,
        model: Encoder,
        kind: str = "backbone",
        *,
        enabled: bool = True,
        batch: int = 256,
        workers: int = 0,
        progress: bool = False,
    ) -> None:
        self.model, self.kind, self.encode = model, kind, encoder_of(model, kind)
        self.batch, self.workers, self.progress = batch, workers, progress
        self._of_model = model_hash(model) if enabled and hasattr(model, "state_dict") else None

    def images(self, source: PairSource, split: str) -> EncodedImages:
        """The features of a source; without captions, which probes do not read.

        Args:
            source: The images.
            split: Which split of its set it is.

        Raises:
            UserError: not one image of the source can be read.
        """
        if self._of_model is None:
            return self._encode(source)
        path = self.path(source, split)
        found = _read(path)
        if found is not None and self._agrees(source, found):
            log.info("Features of %s, %s: %s from %s", source.name, split, _size(found.features), path)
            return found
        made = self._encode(source)
        try:
            _write(path, made)
            log.info("Features of %s, %s: %s kept in %s", source.name, split, _size(made.features), path)
        except (UserError, OSError, SafetensorError) as error:
            log.warning("The features of %s, %s, are not kept: %s", source.name, split, error)
        return made

    def path(self, source: PairSource, split: str) -> Path:
        """Where the features of a source are kept, whether they are there or not."""
        found = hashlib.sha256(self._of_model or b"")
        found.update(json.dumps([FORMAT, self.kind, source.name, split, len(source)]).encode())
        if (labels := getattr(source, "labels", None)) is not None:
            found.update(np.asarray(labels, dtype=np.int64).tobytes())
            found.update(json.dumps(list(getattr(source, "class_names", ()))).encode())
        images = ImageSource(source)
        for index in range(len(source)):
            found.update(json.dumps(images.origin(index)).encode())
        readable = re.sub(r"[^\w.-]+", "-", f"{Path(source.name).name}-{split}-{self.kind}")[:80]
        return cache_folder() / "features" / f"{readable}-{found.hexdigest()[:24]}.safetensors"

    def _encode(self, source: PairSource, indices: np.ndarray | None = None) -> EncodedImages:
        return encode_images(
            self.model,
            source,
            self.encode,
            indices=indices,
            batch=self.batch,
            workers=0 if indices is not None else self.workers,
            progress=self.progress,
        )

    def _agrees(self, source: PairSource, found: EncodedImages) -> bool:
        """Whether a few images, encoded again, give what was kept."""
        rows = np.unique(np.linspace(0, len(found.indices) - 1, SPOT_CHECKS, dtype=np.int64))
        try:
            again = self._encode(source, found.indices[rows])
        except UserError:
            return False
        kept = found.features[rows]
        if again.features.shape != kept.shape:
            return False
        error = (again.features - kept).norm(dim=1)
        return bool((error <= SPOT_TOLERANCE * kept.norm(dim=1)).all())


def _read(path: Path) -> EncodedImages | None:
    """What a file holds, or None where it is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            features, indices, about = file.get_tensor("features"), file.get_tensor("indices"), file.metadata()
        if about["sha256"] != _digest(features, indices):
            raise ValueError("its checksum differs")
        skipped = SkipCounter.from_dict(json.loads(about["skipped"]))
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        log.warning("'%s' is damaged and made anew: %s", path, error)
        return None
    return EncodedImages(indices.numpy(), features, ((),) * len(features), skipped)


def _write(path: Path, made: EncodedImages) -> None:
    features, indices = made.features.contiguous(), torch.from_numpy(made.indices)
    about = {"sha256": _digest(features, indices), "skipped": json.dumps(made.skipped.to_dict())}
    with atomic_write(path) as beside:
        save_tensors({"features": features, "indices": indices}, beside, about)


def _digest(features: Tensor, indices: Tensor) -> str:
    found = hashlib.sha256(tensor_bytes(features))
    found.update(tensor_bytes(indices))
    return found.hexdigest()


def _size(features: Tensor) -> str:
    rows, width = features.shape
    return f"{rows:,} × {width:,}, {features.nbytes / 1e6:,.1f} MB"
