"""Embed batches of rows in the processes of other programs, such as Ray Data and Spark."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from declip.data.columns import DEFAULT, Columns
from declip.data.pair import BrokenPair
from declip.data.sources.names import absolute
from declip.data.sources.open import ImageSource, open_source
from declip.data.sources.python_items import ItemSource
from declip.errors import UserError
from declip.evaluation.encode import image_features
from declip.interchange.read import load
from declip.models.dual_encoder import DualEncoder
from declip.models.fingerprint import fingerprint
from declip.models.inference import image_encoder
from declip.models.precision import Precision, precision_of

COLUMNS = ("id", "vector", "error", "model")


class Embedder:
    """Embed batches of rows: the function that Ray Data, datasets, Daft and Spark call in their workers.

    It is pickled without weights: each process loads the model once. The vectors are those of `declip.embed`.

    Args:
        model: What `declip.load` opens, by a path or name that every worker can read.
        image: Column of images: PIL images, arrays (H, W, 3) uint8, paths, bytes, or dicts of `bytes` and `path`.
        id: Column that identifies a row; it is copied.
        source: A source of `declip.embed` to read the images from, such as tar shards, opened in each process. `id` is
            then the column of their numbers, and becomes their key.
        columns: Columns of the source, if it is a table.
        precision: As in `declip.load`.

    Examples:
        >>> embed = declip.Embedder("runs/demo", image="photo", id="name")
        >>> sorted(embed({"name": ["red"], "photo": ["photos/red.png"]}))
        ['error', 'id', 'model', 'vector']
    """

    def __init__(
        self,
        model: str | Path,
        *,
        image: str = "image",
        id: str = "id",
        source: str | Path | None = None,
        columns: Columns = DEFAULT,
        device: str = "auto",
        precision: Precision = "auto",
    ) -> None:
        # Workers may have another working directory.
        self.model = absolute(model)
        self.source = source and absolute(source)
        self.columns = columns
        self.image = image
        self.id = id
        self.device = device
        self.precision = precision

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Embed the rows of a batch, whose columns are lists or arrays.

        Returns:
            For each row: `id`; `vector`, (n, d) float32 of length 1, or zeros if the row is broken; `error`, the
            reason, else empty; `model`, its fingerprint and precision, which `Index.from_parquet` checks.
        """
        model, encode, made_by = _load(self.model, self.device, self.precision)
        ids = _column(batch, self.id, "id")
        if self.source is None:
            given = _column(batch, self.image, "image")
            items: list[Any] = [(image, None) for image in given]
            source = ImageSource(ItemSource(items or [None]), captioned=False)
            images = [source[index] for index in range(len(ids))]
        else:
            source = _open(self.source, self.columns)
            unknown = [index for index in ids if not 0 <= index < len(source)]
            if unknown:
                raise UserError(
                    f"There is no image {unknown[0]} in '{source.name}': it has {len(source):,}, from 0 on."
                )
            images = [source[int(index)] for index in ids]
            ids = [image.key for image in images]
        # --- why each image cannot be used, and the pixels (3, S, S) of those that can
        errors = [""] * len(images)
        pixels = list[Tensor]()
        for row, image in enumerate(images):
            try:
                pixels.append(model.preprocessor.fast(image.open()))
            except BrokenPair as broken:
                errors[row] = f"{broken.reason}: {broken.detail}"
        # --- an array without gaps: of lists with None, Ray makes pickled objects
        vectors = np.zeros((len(ids), model.recipe.embed_dim), np.float32)
        if pixels:
            stacked = torch.stack(pixels).contiguous(memory_format=torch.channels_last)
            usable = [not error for error in errors]
            vectors[usable] = image_features(model, stacked, encode).numpy()
        return {"id": ids, "vector": vectors, "error": errors, "model": [made_by] * len(ids)}


@lru_cache(1)
def _load(
    where: str, device: str, precision: Precision
) -> tuple[DualEncoder, Callable[[Tensor], Tensor], str]:
    """The model of this process, the function that encodes many images, and what identifies both."""
    model = load(where, device, precision)
    made_by = f"{fingerprint(model)} {precision_of(model)}"
    return model, image_encoder(model), made_by


def _column(batch: Mapping[str, Any], name: str, argument: str) -> list[Any]:
    if name not in batch:
        columns = ", ".join(map(str, batch))
        raise UserError(
            f"The batch has no column '{name}' but {columns}. Name one of them: Embedder(…, {argument}=…)."
        )
    return list(batch[name])


@lru_cache(1)
def _open(source: str, columns: Columns) -> ImageSource:
    return ImageSource(open_source(source, columns), captioned=False)
