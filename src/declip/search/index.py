"""An index of images: searched by text, by image or both."""

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from PIL import Image
from torch import Tensor, as_tensor, float32
from torch.nn.functional import normalize

from declip.data.images.decode import decode
from declip.data.pair import BrokenPair, PairSource, SkipCounter, printable
from declip.data.sources.image_source import ImageSource
from declip.data.sources.open import open_source
from declip.data.sources.python_items import Items
from declip.errors import UserError, check_range
from declip.evaluation.encode import Encoder, measuring, model_hash
from declip.evaluation.zero_shot import class_features, read_templates
from declip.interchange.read import load
from declip.io.atomic import atomic_write
from declip.search.exact import nearest
from declip.search.manifest import Manifest, Over
from declip.search.store import COLUMNS, IndexedImage, Store

log = logging.getLogger("declip")

MOST = 10_000  # results of a search at most
PROBE = "a photo of two red apples, and a dog"  # the token ids of this text distinguish two tokenizers
SHORTEST = 1e-6  # length of a weighted sum of two unit vectors below which they cancel


@dataclass(frozen=True)
class Hit(IndexedImage):
    """A search result: an image, and the cosine of its vector and the query."""

    score: float

    def to_dict(self) -> dict[str, Any]:
        """The hit as plain data."""
        place = {"place": self.place, "path": self.origin.path, "offset": self.origin.offset, "size": self.origin.size}
        return {"id": self.id, "key": self.key, "score": self.score, "captions": list(self.captions), **place}


class Index:
    """An index as `declip.embed` writes it.

    Args:
        model: The model that made it, or what `declip.load` opens; None loads the one that the manifest names.
        source: Where the images are now, if not where the manifest says.
        device: Where a model is loaded to.

    Raises:
        UserError: There is no index, it is damaged, or it is of another layout.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        model: str | Path | Encoder | None = None,
        source: str | Path | PairSource | Items | None = None,
        device: str = "auto",
    ) -> None:
        self.folder = Path(folder).expanduser()
        self._given_model, self._given_source, self._device = model, source, device
        self._store = Store(self.folder)
        if self.manifest.reached is not None:
            log.warning("The index '%s' is unfinished. The same `declip embed` continues.", self.folder)

    @classmethod
    def open(cls, folder: str | Path, **options: Any) -> "Index":
        """Open an index; the options are the arguments of the class."""
        return cls(folder, **options)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.ids)

    @property
    def manifest(self) -> Manifest:
        """The index's manifest."""
        return self._store.manifest

    @property
    def ids(self) -> np.ndarray:
        """(n,) int64, rising."""
        return self._store.ids

    @cached_property
    def model(self) -> Encoder:
        """The model that made the index; raises `UserError` where it cannot be loaded, or is another one."""
        made_by = self.manifest.model
        given = made_by.spec if self._given_model is None else self._given_model
        if given == "":
            raise UserError(
                "The index was made by a model that was a Python object. Open it with model=, or search with --model."
            )
        model = load(given, self._device) if isinstance(given, str | Path) else given
        if fingerprint(model) != made_by.fingerprint:
            raise UserError(
                f"The index '{self.folder}' holds vectors of another model, '{made_by.spec or 'a Python object'}' as "
                "it was then; cosines between two models' vectors mean nothing. Give that model, or embed again "
                "into another folder."
            )
        return model

    def query(
        self,
        text: str | None = None,
        image: str | Path | Image.Image | None = None,
        weights: tuple[float, float] = (1.0, 1.0),
        template: str | None = None,
    ) -> Tensor:
        """(d,) float32 of length 1, the vector of a text, an image, or both; arguments as for `search`."""
        vectors = []
        if text and not text.isspace():
            templates = ["{}"] if template is None else read_templates(template)[1]
            vectors.append(class_features(self.model, [text.strip()], templates)[0])
        if image is not None:
            given = image if isinstance(image, Image.Image) else Path(image).expanduser()
            try:
                upright = decode(given, str(image))
            except BrokenPair as broken:
                raise UserError(f"The image to search for cannot be used: {broken}.") from broken
            with measuring(self.model):
                pixels = self.model.preprocess([upright])
            vectors.append(image_vectors(self.model, pixels)[0])
        if not vectors:
            raise UserError("There is nothing to search for. Give a text, an image (--image FILE), or both.")
        return vectors[0] if len(vectors) == 1 else mix(vectors[0], vectors[1], weights)

    def search(
        self,
        text: str | None = None,
        image: str | Path | Image.Image | None = None,
        *,
        weights: tuple[float, float] = (1.0, 1.0),
        template: str | None = None,
        k: int = 10,
        over: Over = "images",
    ) -> list[Hit]:
        """Find images by a text, an image, or both.

        Args:
            image: An image, or its file.
            weights: Weights of text and image, where both are given: the query is the normalized weighted sum of their
                unit vectors. A negative weight searches for images unlike it.
            template: A sentence with ``{}`` for the text, or a shipped template set's name: then the mean over it.
            k: Number of results, at most.
            over: "images" compares with the vectors of the images, "captions" with those of their captions.

        Returns:
            The nearest, the best first.

        Raises:
            UserError: No query, an image that cannot be read, `k` out of its range, or another model.
        """
        check_range("k", k, 1, MOST)
        ids, scores = self.nearest(self.query(text, image, weights, template)[None], k, over=over)
        return self._hits(ids[0], scores[0])

    def neighbors(self, id: int, k: int = 10) -> list[Hit]:
        """The images most like one of the index, without itself."""
        check_range("k", k, 1, MOST)
        ids, scores = self.nearest(self.vectors([id]), k + 1)
        others = ids[0] != id
        return self._hits(ids[0][others][:k], scores[0][others][:k])

    def nearest(self, queries: Tensor, k: int, *, over: Over = "images") -> tuple[Tensor, Tensor]:
        """Find the nearest of many vectors at once.

        Args:
            queries: (n, d) of length 1, numbers of any type.

        Returns:
            Ids (n, k') int64 and cosines (n, k') float32, the best first.
        """
        queries = as_tensor(queries, dtype=float32)
        if queries.ndim != 2 or queries.shape[1] != self.manifest.dimension or k < 0:
            raise UserError(f"Give queries (n, {self.manifest.dimension}), not {tuple(queries.shape)}, and k from 0.")
        if not queries.isfinite().all():
            raise UserError("A query is not finite. Leave it out.")
        return nearest(queries, self._store.blocks(over), k)

    def row(self, id: int) -> IndexedImage:
        """An image's key, captions and origin; raises `UserError` where there is no such id."""
        return self._store.row(int(self._store.positions([id])[0]))

    def vectors(self, ids: Sequence[int] | np.ndarray, over: Over = "images") -> Tensor:
        """(n, d) float32, the vectors of images, or of their captions: zeros where an image has none."""
        return self._store.vectors(self._store.positions(ids), over)

    def keys(self) -> list[str]:
        """The key of each image in the order of `ids`; several images may share one."""
        return self._store.table["key"].to_pylist()

    def image(self, id: int) -> Image.Image:
        """Read an image from the source, RGB and upright.

        Only what the source itself lists is read, by the row's key: no path in the index is ever opened.

        Raises:
            UserError: There is no such id, or its image has left the source or cannot be read.
        """
        row, source = self.row(id), self._source
        place: int | None = row.place
        if row.place >= len(source) or source.key(row.place) != row.key:  # the source has changed since
            place = self._places.get(row.key)
        if place is None:
            raise UserError(f"'{printable(row.key)}' is no longer in '{source.name}'.")
        try:
            return source[place].image
        except BrokenPair as broken:
            raise UserError(f"The image '{printable(row.key)}' cannot be read any more: {broken}.") from broken

    def export(self, path: str | Path, *, over: Over = "images") -> Path:
        """Write the vectors for other programs, in the order of `ids`, part by part.

        Args:
            path: .parquet with all columns, vectors as lists of float32; or .npy, (n, d) of the stored type, with the
                ids, keys and paths of its rows in a file of the same name and .csv behind it.
            over: The vectors in .npy.
        """
        path, table = Path(path).expanduser(), self._store.table
        if path.suffix not in (".parquet", ".npy"):
            raise UserError(f"Vectors are written to .parquet or .npy, not to '{path.name}'.")
        with atomic_write(path, "give another file") as target:
            if path.suffix == ".parquet":
                types = [f.with_type(pa.list_(pa.float32())) if f.name in COLUMNS.values() else f for f in table.schema]
                with pq.ParquetWriter(target, pa.schema(types)) as writer:
                    for batch in table.to_batches():
                        writer.write_table(pa.Table.from_batches([batch]).cast(pa.schema(types)))
            else:
                shape, start = (len(self), self.manifest.dimension), 0
                mapped = np.lib.format.open_memmap(target, "w+", self.manifest.dtype, shape)
                for block in self._store.blocks(over):
                    mapped[start : start + len(block.ids)] = block.vectors.numpy()
                    start += len(block.ids)
                mapped.flush()
                with atomic_write(path.with_name(f"{path.name}.csv"), "give another file") as rows:
                    pa.csv.write_csv(table.select(["id", "key", "path"]), rows)
        return path

    def summary(self) -> str:
        """The contents of the index, and what was left out, a line each."""
        manifest = self.manifest
        size = sum(part.bytes for part in manifest.parts)
        lines = [f"{len(self):,} images, {manifest.dimension} numbers each in {manifest.dtype}, {size / 1e6:,.1f} MB"]
        lines += [f"Left out: {line}" for line in SkipCounter.from_dict(manifest.skipped).lines()]
        if uncaptioned := self._store.table["captions"].to_pylist().count([]):
            lines.append(f"Without caption: {uncaptioned:,}")
        return "\n".join(lines)

    def _hits(self, ids: Tensor, scores: Tensor) -> list[Hit]:
        return [Hit(**vars(self.row(int(id))), score=float(score)) for id, score in zip(ids, scores, strict=True)]

    @cached_property
    def _source(self) -> ImageSource:
        given, entry = self._given_source, self.manifest.source
        if given is not None and not isinstance(given, str | Path):
            return ImageSource(open_source(given, entry.columns))
        if given is None and not entry.spec:
            raise UserError(
                f"The index was made of '{entry.name}', a Python object. To see its images, open the index with "
                "source=, that object or what it was opened from."
            )
        return entry.open(given)

    @cached_property
    def _places(self) -> dict[str, int]:
        """The first place of each key in the source as it is now."""
        places: dict[str, int] = {}
        for place in range(len(self._source)):
            places.setdefault(self._source.key(place), place)
        return places


def fingerprint(model: Encoder) -> str:
    """SHA-256, in hexadecimal, of a model's weights, preprocessing and tokenizer."""
    if not hasattr(model, "state_dict"):
        raise UserError(f"{type(model).__name__} has no `state_dict`, so it cannot be distinguished from other models.")
    digest = hashlib.sha256(model_hash(model))
    try:
        digest.update(repr(model.tokenize([PROBE]).tolist()).encode())
    except UserError:  # an image tower alone
        digest.update(b"no text")
    return digest.hexdigest()


def image_vectors(model: Encoder, pixels: Tensor) -> Tensor:
    """Encode (n, 3, S, S) normalized pixels to (n, d) float32 on the CPU, L2-normalized."""
    with measuring(model) as device:
        vectors = normalize(model.encode_image(pixels.to(device)).float(), dim=-1).cpu()
    if not vectors.isfinite().all():
        raise UserError("The model's image features are not finite: its weights are damaged. Try another checkpoint.")
    return vectors


def mix(text: Tensor, image: Tensor, weights: tuple[float, float]) -> Tensor:
    """Normalized weighted sum of two unit vectors (d,); raises `UserError` where they cancel."""
    if len(weights) != 2 or not all(map(math.isfinite, weights)):
        raise UserError(f"weights is {weights}; give two numbers, of text and image, such as 0.7,0.3.")
    both = weights[0] * text + weights[1] * image
    if both.norm() < SHORTEST:
        raise UserError(f"With weights {weights[0]:g} and {weights[1]:g} nothing is left of the query. Give others.")
    return normalize(both, dim=-1)
