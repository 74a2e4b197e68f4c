"""An index of images: searched by text, by image or both."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from declip.data.images.decode import Picture
from declip.data.pair import BrokenPair, PairSource, SkipCounter, cells_of, printable
from declip.data.sources.names import is_missing, resolve
from declip.data.sources.open import ImageSource, open_images
from declip.data.sources.python_items import Items
from declip.errors import UserError, check_range
from declip.evaluation.encode import check_widths, eval_mode, image_features
from declip.evaluation.prompt_sets import read_templates
from declip.evaluation.zero_shot import class_features
from declip.interchange.read import folder_or_name, loaded, read_text
from declip.models.device import pick_device
from declip.models.encoder import Encoder
from declip.models.fingerprint import fingerprint
from declip.models.precision import Precision, convert
from declip.search.checks import read_query
from declip.search.class_words import add_classes
from declip.search.explain import anchor_names, resembled
from declip.search.info import Dtype, Over
from declip.search.language import language_note
from declip.search.parquet import index_parquet
from declip.search.ranking import NO_COPY, Where, distinct, matching, near_copy
from declip.search.store import IndexedImage, open_index
from declip.search.writer import describe_model

log = logging.getLogger("declip")
MOST = 10_000  # maximum number of results of a search
ROWS = 8_192  # vectors whose products are kept at a time
# float32 bytes of a block, which stays in a core's cache between conversion and product
BLOCK_BYTES = 2 << 20


@dataclass(frozen=True)
class Hit(IndexedImage):
    """A search result: an image, and the cosine of its vector and the query."""

    score: float
    copies: tuple[str, ...] = ()  # keys of its near copies, and of others of its group, best first
    resembles: tuple[str, ...] = ()  # see `Index.explain`

    def to_dict(self) -> dict[str, Any]:
        """The hit as plain data."""
        return {
            "id": self.id,
            "key": self.key,
            "score": self.score,
            "captions": list(self.captions),
            "copies": list(self.copies),
            "resembles": list(self.resembles),
            "index": self.index,
            "path": self.origin.path,
            "offset": self.origin.offset,
            "size": self.origin.size,
        }


class Index:
    """An index that `declip.embed` wrote. An open index does not change while `embed` updates it.

    Args:
        model: The model that made the index, or its new path; the default is the path in index.json.
        source: New path of the images, if they were moved.
        device: Device of the model.
        precision: Of queries, as in `declip.load`; it may differ from that of the index.

    Examples:
        >>> hits = declip.Index("indices/photos").search("a red square", k=3)
        >>> len(hits)
        3
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        model: str | Path | Encoder | None = None,
        source: str | Path | PairSource | Items | None = None,
        device: str = "auto",
        precision: Precision = "fp32",
    ) -> None:
        self.folder = Path(folder).expanduser()
        self._model_given = folder_or_name(model)
        self._source_given = source
        self._device = device
        self._precision = precision
        self._columns: dict[str, list[tuple[str, ...]]] = {}  # that were read
        self.info, self._store = open_index(self.folder)

    @classmethod
    def open(cls, folder: str | Path, **options: Any) -> "Index":
        """Open an index; options as of the class."""
        return cls(folder, **options)

    @classmethod
    def from_parquet(
        cls,
        files: str | Path | Sequence[str | Path],
        *,
        model: str | Path | Encoder,
        out: str | Path,
        dtype: Dtype = "float16",
        overwrite: bool = False,
    ) -> "Index":
        """Make an index in the folder `out` of Parquet files with the columns that `Embedder` returns.

        The ids become the keys; rows with an error are counted. To see images, open the index with `source`, whose keys
        are the ids.

        Args:
            files: A file, a folder, a pattern, or several.
            model: The model that made the vectors; each row names its fingerprint, which must be this model's.
        """
        index_parquet(files, model, Path(out).expanduser(), dtype, overwrite)
        return cls(out, model=model)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._store)

    @cached_property
    def ids(self) -> np.ndarray:
        """(n,) int64, 0 to n - 1: the rows of the files."""
        return np.arange(len(self))

    @cached_property
    def model(self) -> Encoder:
        """The model that made the index; raises `UserError` if it cannot be loaded, or is another one."""
        made_by = self.info.model
        path = self._model_path()
        model = loaded(path, self._device, self._precision)
        given = describe_model(model, path, self.folder)
        if given.fingerprint != made_by.fingerprint:
            raise UserError(
                f"The index '{self.folder}' was made by another model: {made_by}, not {given}. "
                "Cosines of two models cannot be compared. Give that model with --model, or embed "
                "again into another folder."
            )
        return model

    @cached_property
    def text_model(self) -> Encoder:
        """The model to encode texts with: without its image tower, if that would have to be loaded first."""
        if "model" in vars(self) or not isinstance(self._model_given, str | Path | None):
            return self.model
        read = read_text(self._model_path())
        if read is None:
            return self.model
        weights, tensors = read
        model = weights.build().to(pick_device(self._device)).eval()
        if fingerprint(model, tensors) != self.info.model.fingerprint:
            return self.model  # refuses another model, with the difference
        return convert(model, self._precision)

    def _model_path(self) -> Any:
        """What was given as the model, by default the path in index.json."""
        given = self._model_given
        if given is None:
            return self.info.model.locate(self.folder)
        return given

    def query(
        self,
        text: str | Picture | None = None,
        image: Picture | None = None,
        weights: tuple[float, float] = (1.0, 1.0),
        template: str | None = None,
    ) -> Tensor:
        """(d,) float32 of length 1, the vector of a text, an image, or both; arguments as for `search`."""
        words, picture = read_query(text, image, weights)
        vectors = []
        if words:
            templates = ["{}"]
            if template is not None:
                templates = read_templates(template)[1]
            vector = class_features(self.text_model, [words], templates)[0]
            note = language_note(words, self.text_model)
            if note:
                log.warning(note)
            vectors.append(add_classes(vector, words, self.text_model, lambda: self.model))
        if picture is not None:
            with eval_mode(self.model):
                pixels = self.model.preprocess([picture])
            features = image_features(self.model, pixels, self.model.encode_image)
            vectors.append(features[0])
        if len(vectors) == 1:
            return vectors[0]
        return mix(vectors[0], vectors[1], weights)

    def search(
        self,
        text: str | Picture | None = None,
        image: Picture | None = None,
        *,
        weights: tuple[float, float] = (1.0, 1.0),
        template: str | None = None,
        k: int = 10,
        over: Over = "images",
        where: Where | None = None,
        group: str | None = None,
        copies: bool = False,
    ) -> list[Hit]:
        """Find images by a text, an image, or both.

        Near copies (cosine above 0.99) are one hit, unless most images are as similar.

        Args:
            text: A text, or an image, which is the same as `image`.
            image: An image, its file, or an array (H, W, 3) of uint8.
            weights: Weights of text and image in their sum; a negative weight searches for images unlike it.
            template: A template with ``{}`` for the text, or the name of a template set, whose vectors are averaged.
            over: "images" compares with the vectors of the images, "captions" with those of their captions.
            where: Only images whose table has these values: a value, or several, by column.
            group: Column of the table; images with the same value in it are one hit.
            copies: Whether near copies are hits of their own, such as for a model that tells images poorly apart.

        Returns:
            The `k` best hits, the best first; `Hit.copies` names the images that it stands for.
        """
        check_range("k", k, 1, MOST)
        query = self.query(text, image, weights, template)
        return self.hits(query, k, over=over, where=where, group=group, copies=copies)

    def hits(
        self,
        query: Tensor,
        k: int = 10,
        *,
        over: Over = "images",
        where: Where | None = None,
        group: str | None = None,
        copies: bool = False,
    ) -> list[Hit]:
        """As `search`, by the vector (d,) of a query."""
        vectors = torch.from_numpy(self._store.matrix(over))
        check_widths(query, vectors)
        ids = torch.from_numpy(self.ids)
        if where:
            columns = {name: self.column(name) for name in where}
            ids = torch.from_numpy(matching(columns, where))
            vectors = vectors[ids]
        groups = None
        if group is not None:
            groups = self.column(group)
        # --- all images, the best first; those without captions have vectors of zeros
        scores = products(query[None], vectors)[0]  # (n,)
        if over == "captions":
            scores.masked_fill_(~vectors.any(1), -torch.inf)
        scores, order = scores.sort(descending=True, stable=True)
        ranking = ids[order[: int(scores.isfinite().sum())]]
        # --- near copies, and images of one group, as one hit
        images = torch.from_numpy(self._store.matrix("images"))
        limit = NO_COPY if copies else near_copy(images)
        found = distinct(ranking, images, k, groups, limit)
        # --- the first image of each hit, and the keys of the others
        firsts = ranking[[positions[0] for positions in found]]
        others = list(chain.from_iterable(positions[1:] for positions in found))
        keys = iter(self._store.keys(ranking[others].numpy()))
        hits = []
        for positions, row in zip(found, self.rows(firsts.numpy()), strict=True):
            alike = tuple(islice(keys, len(positions) - 1))
            score = float(scores[positions[0]])
            hits.append(Hit(**vars(row), score=score, copies=alike))
        return hits

    def nearest(self, queries: Tensor, k: int, *, over: Over = "images") -> tuple[Tensor, Tensor]:
        """Find ids (n, k') int64 and cosines (n, k') float32 nearest to vectors (n, d) of length 1, the best first."""
        queries = torch.as_tensor(queries, dtype=torch.float32)
        fits = queries.ndim == 2 and queries.shape[1] == self.info.dimension
        if not fits or k < 0 or not queries.isfinite().all():
            raise UserError(
                f"queries has shape {tuple(queries.shape)} and k is {k}; expected (n, {self.info.dimension}) without "
                "NaN, and k >= 0."
            )
        # Images without captions have vectors of zeros among those of captions.
        ids = torch.from_numpy(self.ids)
        vectors = torch.from_numpy(self._store.matrix(over))
        return nearest(queries, ids, vectors, k, skip_zeros=over == "captions")

    @property
    def column_names(self) -> Sequence[str]:
        """The columns of the source's table; none if it is no table, or is no longer there."""
        try:
            return list(self._source.source.cells)
        except UserError:
            return ()

    def column(self, name: str) -> list[tuple[str, ...]]:
        """Read a column of the source's table: the cells of each image in the order of `ids`.

        An image that is in several rows of the table has several cells.
        """
        if name not in self._columns:
            cells = cells_of(self._source.source, name)
            indices = self._store.column("index").to_pylist()
            places = map(self._locate, self.keys(), indices)
            self._columns[name] = [cells[place] for place in places]
        return self._columns[name]

    def row(self, id: int) -> IndexedImage:
        """An image's key, captions and origin; raises `UserError` for an unknown id."""
        return self.rows([id])[0]

    def rows(self, ids: Sequence[int] | np.ndarray) -> list[IndexedImage]:
        """As `row`, of several images, in the order of `ids`."""
        return self._store.rows(self._store.check(ids))

    def vectors(self, ids: Sequence[int] | np.ndarray, over: Over = "images") -> Tensor:
        """(n, d) float32, the vectors of images, or of their captions: zeros if an image has none."""
        rows = self._store.matrix(over)[self._store.check(ids)]
        return torch.as_tensor(rows, dtype=torch.float32)

    def keys(self) -> list[str]:
        """The key of each image in the order of `ids`; several images may share one."""
        return self._store.column("key").to_pylist()

    def paths(self) -> list[str]:
        """The file or shard of each image in the order of `ids`, as `resolve` reads it; empty if it has none."""
        return self._store.column("path").to_pylist()

    def captions(self) -> list[list[str]]:
        """The captions of each image in the order of `ids`."""
        return self._store.column("captions").to_pylist()

    def explain(self, text: str, hits: Sequence[Hit], count: int = 3) -> list[Hit]:
        """Say of each hit which known pairs or classes its image and the text both resemble.

        Its image is encoded again, as an index has vectors alone. For built-in starts, whose classes
        are named, and folders of `declip finetune`, whose pairs are named by their captions.
        """
        found = self.resembled(text, [hit.id for hit in hits], count)
        named = zip(hits, found, strict=True)
        return [replace(hit, resembles=names) for hit, names in named]

    def resembled(self, text: str, ids: Sequence[int], count: int = 3) -> list[tuple[str, ...]]:
        """As `explain`, of images by their ids."""
        images = [self.image(id) for id in ids]
        return resembled(self.model, self.known_names, text, images, count)

    @cached_property
    def known_names(self) -> list[str]:
        """Captions of the pairs and names of the classes that the model compares with; may be empty."""
        given = self._model_given
        if not isinstance(given, str | Path):
            given = self.info.model.locate(self.folder)
        return anchor_names(given)

    def image(self, id: int) -> Image.Image:
        """Read an image from the source, RGB and upright; raises `UserError` if there is no such image any more."""
        row = self.row(id)
        source = self._source
        index = self._locate(row.key, row.index)
        try:
            return source[index].open().decoded()
        except BrokenPair as broken:
            raise UserError(
                f"The image '{printable(row.key)}' cannot be read any more: {broken}."
            ) from broken

    def _locate(self, key: str, index: int) -> int:
        """The index of an image in the current source; raises `UserError` if it has no such image."""
        # By the row's key, among what the source itself lists: no path in the index is ever opened.
        source = self._source
        if index < len(source) and source[index].key == key:
            return index
        if key not in self._indices:  # the source has changed since
            raise UserError(f"'{printable(key)}' is no longer in '{source.name}'.")
        return self._indices[key]

    def summary(self) -> str:
        """The contents of the index, and what was left out, a line each."""
        info = self.info
        files = self._store.files
        size = sum(files.values())
        made = ""
        if info.precision:
            made = f", computed in {info.precision}"
        lines = [
            f"{len(self):,} images, {info.dimension} numbers each in {info.dtype}{made}, {size / 1e6:,.1f} MB"
        ]
        lines += [f"Left out: {line}" for line in SkipCounter.from_dict(info.skipped).lines()]
        counts = pc.list_value_length(self._store.column("captions"))
        uncaptioned = counts.to_pylist().count(0)
        if uncaptioned:
            lines.append(f"Without caption: {uncaptioned:,}")
        return "\n".join([*lines, f"Files: {', '.join(map(str, files))}"])

    @cached_property
    def _source(self) -> ImageSource:
        saved = self.info.source
        given = self._source_given
        if given is None:
            given = resolve(saved.path, self.folder)
            if not given or is_missing(given):
                raise UserError(
                    f"The images of the index '{self.folder}' are not at '{given or saved.name}'. Give --source, or "
                    "open the index with source=, a path or a Python object."
                )
        return open_images(given, saved.columns_of(self.folder))

    @cached_property
    def _indices(self) -> dict[str, int]:
        """The first index of each key in the current source."""
        backwards = reversed(range(len(self._source)))
        return {self._source[index].key: index for index in backwards}


def products(queries: Tensor, vectors: Tensor) -> Tensor:
    """Products (n, m) of queries (n, d) float32 and vectors (m, d) of any float type, in float32."""
    n, d = queries.shape
    rows = max(1, BLOCK_BYTES // (4 * d))
    buffer = torch.empty(rows, d)
    scores = torch.empty(n, len(vectors))
    for start in range(0, len(vectors), rows):
        piece = vectors[start : start + rows]
        if piece.dtype != torch.float32:
            piece = buffer[: len(piece)].copy_(piece)
        scores[:, start : start + rows] = queries @ piece.T
    return scores


def nearest(
    queries: Tensor, ids: Tensor, vectors: Tensor, k: int, skip_zeros: bool = False
) -> tuple[Tensor, Tensor]:
    """Find the vectors with the largest products, taken in float32 whatever the vectors' type.

    The plain loop::

        scores = [(q @ vector, id) for id, vector in zip(ids, vectors) if vector.any() or not skip_zeros]
        sorted(scores, key=lambda pair: (-pair[0], pair[1]))[:k]

    Which of several equal scores come last is arbitrary. Queries are (n, d) float32, ids (m,) int64, increasing,
    vectors (m, d) of any float type. Returns ids and scores, (n, k'), the best first, where k' is `k` or the number of
    vectors if that is smaller.
    """
    n = len(queries)
    best_ids = torch.empty(n, 0, dtype=torch.int64)
    best = torch.empty(n, 0)
    for own, block in zip(ids.split(ROWS), vectors.split(ROWS), strict=True):
        scores = products(queries, block)  # (n, rows of the block)
        if skip_zeros:
            scores.masked_fill_(~block.any(1), -torch.inf)
        # --- the best of the block: of equal ones at its end topk takes any
        columns = scores.topk(min(k, scores.shape[1])).indices
        # (n, k) by id, so that stable sorting orders equal scores by id
        columns = columns.sort(dim=1).values
        # --- the best so far
        best_ids = torch.cat([best_ids, own[columns]], dim=1)
        best = torch.cat([best, scores.gather(1, columns)], dim=1)
        order = best.argsort(dim=1, descending=True, stable=True)[:, :k]
        best_ids = best_ids.gather(1, order)
        best = best.gather(1, order)
    shown = int(best.isfinite().sum(1).min()) if n else 0
    return best_ids[:, :shown], best[:, :shown]


def mix(text: Tensor, image: Tensor, weights: tuple[float, float]) -> Tensor:
    """Normalized weighted sum of two unit vectors (d,); raises `UserError` if they cancel."""
    both = weights[0] * text + weights[1] * image
    if both.norm() < 1e-6:
        raise UserError(
            f"With weights {weights[0]:g} and {weights[1]:g} nothing is left of the query. Give others."
        )
    return normalize(both, dim=-1)
