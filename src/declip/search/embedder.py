"""Embed batches of rows in the workers of another engine: Ray Data, datasets, Daft, Spark."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from declip.data.columns import DEFAULT, Columns
from declip.data.pair import BrokenPair, as_texts, clean_captions
from declip.data.sources.open import ImageSource, open_source
from declip.data.sources.python_items import ItemSource
from declip.data.sources.shard_files import absolute
from declip.errors import UserError
from declip.evaluation.encode import BatchReader, image_features, text_features
from declip.interchange.read import load
from declip.models.dual_encoder import DualEncoder
from declip.models.inference import Engine, Precision, fingerprint, image_encoder, precision_of


class Embedder:
    """Embed batches of rows: the function that Ray Data, datasets, Daft and Spark call in their workers.

    It is pickled without weights: each process loads the model once. The vectors are those of `declip.embed`.

    Args:
        model: What `declip.load` opens, by a path or name that every worker can read.
        image: Column of images: PIL images, arrays (H, W, 3) uint8, paths, bytes, or dicts of `bytes` and `path`.
        text: Column of texts to embed instead.
        id: Column that identifies a row; it is copied.
        source: A source of `declip.embed` to read the images from, such as tar shards, opened in each process. `id` is
            then the column of their numbers, and becomes their key.
        columns: Columns of the source, if it is a table.
        precision: As in `declip.load`.
        engine: As in `declip.load`.

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
        text: str | None = None,
        id: str = "id",
        source: str | Path | None = None,
        columns: Columns = DEFAULT,
        device: str = "auto",
        precision: Precision = "auto",
        engine: Engine = "torch",
    ) -> None:
        # Workers may have another working directory.
        self.model, self.source, self.columns = absolute(model), source and absolute(source), columns
        self.image, self.text, self.id = image, text, id
        self.device, self.precision, self.engine = device, precision, engine

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Embed the rows of a batch, whose columns are lists or arrays.

        Returns:
            For each row: `id`; `vector`, (n, d) float32 of length 1, or zeros if the row is broken; `error`, the
            reason, else empty; `model`, its fingerprint and precision, which `Index.from_parquet` checks.
        """
        model, encode, made_by = _load(self.model, self.device, self.precision, self.engine)
        ids, vectors = _column(batch, self.id, "id"), None
        if self.text is not None:
            errors, texts = _read_texts(_column(batch, self.text, "text"))
            vectors = text_features(model, texts) if texts else None
        else:
            places: Sequence[int] = range(len(ids))
            if self.source is None:
                source = _items(_column(batch, self.image, "image"))
            else:
                places, source = ids, _open(self.source, self.columns)
                ids = [source.key(place) for place in places]
            errors, pixels = _read_images(model, source, places)
            vectors = image_features(model, torch.cat(pixels), encode) if pixels else None
        # An array without gaps: of lists with None, Ray makes pickled objects.
        rows = np.zeros((len(ids), model.recipe.embed_dim), np.float32)  # type: ignore[union-attr]
        if vectors is not None:
            rows[[not error for error in errors]] = vectors.numpy()
        return {"id": ids, "vector": rows, "error": errors, "model": [made_by] * len(ids)}


@lru_cache(1)
def _load(
    where: str, device: str, precision: Precision, engine: Engine
) -> tuple[DualEncoder, Callable[[Tensor], Tensor], str]:
    """The model of this process, the function that encodes many images, and what identifies both."""
    model = load(where, device, precision, engine)
    return model, image_encoder(model), f"{fingerprint(model)} {precision_of(model)}"


def _column(batch: Mapping[str, Any], name: str, argument: str) -> list[Any]:
    if name not in batch:
        columns = ", ".join(map(str, batch))
        raise UserError(f"The batch has no column '{name}' but {columns}. Name one of them: Embedder(…, {argument}=…).")
    return list(batch[name])


@lru_cache(1)
def _open(source: str, columns: Columns) -> ImageSource:
    return ImageSource(open_source(source, columns), captioned=False)


def _items(images: Sequence[Any]) -> ImageSource:
    return ImageSource(ItemSource([(image, None) for image in images] or [None]), captioned=False)


def _read_images(model: DualEncoder, source: ImageSource, places: Sequence[int]) -> tuple[list[str], list[Tensor]]:
    """Why each image cannot be used, or an empty text, and the pixels (1, 3, S, S) of those that can."""
    errors, usable = list[str](), list[Tensor]()
    reader = BatchReader(model, lambda place: (source.read_lazy(place).image, place))
    for place in places:
        pixels, _, broken = reader([place])  # alone, to know what is wrong with it
        errors.append("; ".join(f"{reason}: {detail}" for reason, detail in broken.details.items()))
        usable += [] if pixels is None else [pixels]
    return errors, usable


def _read_texts(texts: Sequence[Any]) -> tuple[list[str], list[str]]:
    """Why each text cannot be used, or an empty text, and those that can, cleaned."""
    errors, usable = list[str](), list[str]()
    for number, text in enumerate(texts):
        try:
            usable += clean_captions(as_texts(text, "unreadable text", str(number)), str(number))
            errors.append("")
        except BrokenPair as broken:
            errors.append(": ".join(filter(None, (broken.reason, broken.detail))))
    return errors, usable
