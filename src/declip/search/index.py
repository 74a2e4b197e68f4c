"""An index of images: searched by text, by image or both, and changed without embedding again."""

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from declip.data.images.decode import decode
from declip.data.pair import BrokenPair, PairSource, printable
from declip.data.sources.image_source import ImageSource
from declip.data.sources.origin import Origin
from declip.errors import UserError, check_range, unknown
from declip.evaluation.encode import Encoder, measuring, text_features
from declip.evaluation.feature_cache import model_hash
from declip.evaluation.zero_shot import class_features, read_templates
from declip.interchange.read import load
from declip.io.text import percent
from declip.search.approximate import ApproximateSearch, import_faiss, refresh, without_hidden
from declip.search.exact import nearest
from declip.search.manifest import ApproximateEntry, Manifest, Over, Precision, locked_index
from declip.search.store import IndexedImage, Store, write_part

log = logging.getLogger("declip")

MOST = 10_000  # results of a search at most
PROBE = "a photo of two red apples, and a dog"  # the token ids of this text distinguish two tokenizers
SHORTEST = 1e-6  # length of a weighted sum of two unit vectors below which they cancel


@dataclass(frozen=True)
class Hit:
    """A search result.

    Attributes:
        id: For `Index.image`, `Index.neighbors` and `Index.vectors`.
        key: The source's name of the image.
        score: Cosine of the image's vector and the query.
        place: Number of the image in the source when it was embedded.
        origin: Its file or shard, with offset and size in bytes.
    """

    id: int
    key: str
    score: float
    captions: tuple[str, ...]
    place: int
    origin: Origin

    @property
    def caption(self) -> str:
        """The first caption, empty where there is none."""
        return self.captions[0] if self.captions else ""

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
        check: Whether to check the parts' checksums; None does up to 2 GB.

    Raises:
        UserError: There is no index, it is damaged, or it is of another layout.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        model: str | Path | Encoder | None = None,
        source: str | Path | PairSource | None = None,
        device: str = "auto",
        check: bool | None = None,
    ) -> None:
        self.folder = Path(folder).expanduser()
        self._given_model, self._given_source, self._device = model, source, device
        self._store = Store(self.folder, check)
        update = self.manifest.update
        if update is not None and not update.finished:
            log.warning(
                "The index '%s' is unfinished: %s of %s images were read. The same `declip embed` continues.",
                self.folder,
                f"{update.done:,}",
                f"{update.total:,}",
            )

    @classmethod
    def open(cls, folder: str | Path, **options: Any) -> "Index":
        """Open an index; the options are the arguments of the class."""
        return cls(folder, **options)

    def __len__(self) -> int:
        """Number of images that a search can find."""
        return len(self._store.live)

    @property
    def manifest(self) -> Manifest:
        """The index's manifest."""
        return self._store.manifest

    @property
    def ids(self) -> np.ndarray:
        """(n,) int64, rising, of the images that a search can find."""
        return self._store.ids[self._store.live]

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
            now = f"'{given}'" if isinstance(given, str | Path) else "the one given"
            raise UserError(
                f"The index '{self.folder}' holds vectors of another model than {now}; cosines between two models' "
                f"vectors mean nothing. It was made by '{made_by.spec or 'a Python object'}' as that was then. Give "
                "that with --model, or embed again into another folder."
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
        if text is not None:
            if not text.strip():
                raise UserError("The text to search for is empty. Give some words, or an image with --image.")
            templates = ["{}"] if template is None else read_templates(template)[1]
            vectors.append(class_features(self.model, [text.strip()], templates)[0])
        if image is not None:
            if not isinstance(image, Image.Image):
                try:
                    image = decode(Path(image).expanduser(), str(image))
                except BrokenPair as broken:
                    raise UserError(f"The image to search for cannot be used: {broken}.") from broken
            with measuring(self.model):
                pixels = self.model.preprocess([image.convert("RGB")])
            vectors.append(image_vectors(self.model, pixels, "fp32")[0])
        if not vectors:
            raise UserError("There is nothing to search for. Give a text, an image (--image FILE), or both.")
        if len(vectors) == 1:
            return vectors[0]
        if len(weights) != 2 or not all(map(math.isfinite, weights)):
            raise UserError(f"weights is {weights}; give two numbers, of text and image, such as 0.7,0.3.")
        return mix(vectors[0], vectors[1], weights)

    def search(
        self,
        text: str | None = None,
        image: str | Path | Image.Image | None = None,
        *,
        weights: tuple[float, float] = (1.0, 1.0),
        template: str | None = None,
        k: int = 10,
        over: Over = "images",
        exact: bool | None = None,
    ) -> list[Hit]:
        """Find images by a text, an image, or both.

        Args:
            image: An image, or its file.
            weights: Weights of text and image, where both are given: the query is the normalized weighted sum of their
                unit vectors. A negative weight searches for images unlike it.
            template: A sentence with ``{}`` for the text, or a shipped template set's name: then the mean over it.
            k: Number of results, at most.
            over: "images" compares with the vectors of the images, "captions" with those of their captions.
            exact: True for exact search; None takes the approximate index where there is one.

        Returns:
            The nearest, the best first.

        Raises:
            UserError: No query, an image that cannot be read, `k` out of its range, or another model.
        """
        check_range("k", k, 1, MOST)
        ids, scores = self.nearest(self.query(text, image, weights, template)[None], k, over=over, exact=exact)
        return self._hits(ids[0], scores[0])

    def neighbors(self, id: int, k: int = 10, *, exact: bool | None = None) -> list[Hit]:
        """The images most like one of the index, without itself."""
        check_range("k", k, 1, MOST)
        ids, scores = self.nearest(self.vectors([id]), k + 1, exact=exact)
        others = ids[0] != id
        return self._hits(ids[0][others][:k], scores[0][others][:k])

    def nearest(
        self, queries: Tensor, k: int, *, over: Over = "images", exact: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """Find the nearest of many vectors at once.

        Args:
            queries: (n, d) float32 of length 1.

        Returns:
            Ids (n, k') int64 and cosines (n, k') float32, the best first.
        """
        if over not in ("images", "captions"):
            raise unknown("place to search", over, ("images", "captions"))
        if over == "images" and not exact and self._approximate is not None:
            return self._approximate.nearest(queries, k)
        return nearest(queries, self._store.blocks(over), k)

    def row(self, id: int) -> IndexedImage:
        """An image's key, captions and origin; raises `UserError` where there is no such id."""
        return self._store.row(int(self._store.positions([id])[0]))

    def vectors(self, ids: Sequence[int] | np.ndarray, over: Over = "images") -> Tensor:
        """(n, d) float32, the vectors of images, or of their captions: zeros where an image has none."""
        return self._store.vectors(self._store.positions(ids), over)

    def keys(self) -> list[str]:
        """The key of each image in the order of `ids`; several images may share one."""
        keys = self._store.column("key")
        return [keys[position] for position in self._store.live.tolist()]

    def captions(self) -> list[str]:
        """The first caption of each image in the order of `ids`, empty where it has none."""
        captions = self._store.column("captions")
        return [captions[position][0] if captions[position] else "" for position in self._store.live.tolist()]

    def image(self, id: int) -> Image.Image:
        """Read an image from the source, RGB and upright.

        Only what the source itself lists is read, by the row's key: no path in the index is ever opened.

        Raises:
            UserError: There is no such id, or its image has left the source or cannot be read.
        """
        return self._read(self.row(id))

    def remove(self, keys: Sequence[str]) -> int:
        """Hide images by key, now and from later calls of `embed`; returns the number of hidden rows.

        Raises:
            UserError: A key is not in the index (nothing is hidden then), or it cannot be written.
        """
        with self._changing() as store:
            ids = store.ids_of(keys) - set(store.ids[store.dead].tolist())
            store.manifest.removed = sorted({*store.manifest.removed, *ids})
        return len(ids)

    def restore(self, keys: Sequence[str]) -> int:
        """Undo `remove`; rows that were compacted meanwhile come back with the next `embed`.

        Returns:
            The number of rows that were brought back, or will be.
        """
        with self._changing() as store:
            manifest = store.manifest
            compacted = set(keys) & set(manifest.excluded)
            ids = store.ids_of([key for key in keys if key not in compacted]) & set(manifest.removed)
            manifest.removed = sorted(set(manifest.removed) - ids)
            manifest.excluded = [key for key in manifest.excluded if key not in compacted]
        return len(ids) + len(compacted)

    def compact(self) -> int:
        """Write the parts again without hidden rows; ids stay. Returns the bytes freed."""
        with self._changing(check=True) as store:
            manifest, before = store.manifest, store.manifest.size
            dropped = {store.row(at).key for at in np.flatnonzero(np.isin(store.ids, manifest.removed)).tolist()}
            parts = [
                write_part(self.folder, number, batch)
                for number, batch in enumerate(store.live_batches(), manifest.next_part)
            ]
            if manifest.approximate is not None:
                manifest.approximate = without_hidden(store, manifest.approximate)
            manifest.parts, manifest.removed, manifest.gone = parts, [], []
            manifest.excluded = sorted({*manifest.excluded, *dropped})
        return before - manifest.size

    def approximate(self) -> ApproximateEntry:
        """Make the approximate index, or bring it up to date, and measure its recall; needs faiss."""
        import_faiss()
        encode = text_encoder(self.model)
        with self._changing() as store:
            return refresh(store, encode)

    def summary(self) -> str:
        """The contents of the index, and what was left out, a line each."""
        manifest = self.manifest
        size = sum(part.bytes for part in manifest.parts)
        lines = [f"{len(self):,} images, {manifest.dimension} numbers each in {manifest.dtype}, {size / 1e6:,.1f} MB"]
        if (update := manifest.update) is not None:
            for title, state in (("Left out", update.skipped), ("Without caption", update.uncaptioned)):
                for reason, row in state["reasons"].items():
                    if state is update.uncaptioned and row["count"] == len(self):
                        lines.append(f"{title}: all of them")
                        continue
                    lines.append(f"{title}: {row['count']:,} × {reason}, such as {', '.join(row['examples'])}")
        if hidden := len(manifest.removed) + len(manifest.gone):
            lines.append(f"Hidden: {len(manifest.removed):,} removed, {len(manifest.gone):,} gone from the source")
            lines[-1] += "" if 2 * hidden < manifest.rows else "; `declip index compact` frees their space"
        if (entry := manifest.approximate) is not None:
            kinds = [f"{percent(entry.images.recall)} (images as queries, n = {entry.images.queries})"]
            if entry.texts is not None:
                kinds.append(f"{percent(entry.texts.recall)} (texts, n = {entry.texts.queries})")
            lines.append(f"Approximate: {entry.probed} of {entry.lists} lists; recall@10 of exact: {', '.join(kinds)}")
        return "\n".join(lines)

    @cached_property
    def _approximate(self) -> ApproximateSearch | None:
        entry = self.manifest.approximate
        if entry is None:
            return None
        try:
            import_faiss()
        except UserError as error:
            log.warning("Search is exact. %s", error)
            return None
        return ApproximateSearch(self._store, entry)

    @contextmanager
    def _changing(self, check: bool = False) -> Iterator[Store]:
        """Give the locked rows, save their manifest when all went well, and read the folder again."""
        with locked_index(self.folder):
            store = Store(self.folder, check)
            yield store
            store.manifest.save(self.folder)
        self._store = Store(self.folder, check=False)
        self.__dict__.pop("_approximate", None)

    def _hits(self, ids: Tensor, scores: Tensor) -> list[Hit]:
        rows = [self._store.row(int(position)) for position in self._store.positions(ids.numpy())]
        return [
            Hit(row.id, row.key, float(score), row.captions, row.place, row.origin)
            for row, score in zip(rows, scores, strict=True)
        ]

    def _read(self, row: IndexedImage) -> Image.Image:
        source, place = self._source, row.place
        if place >= len(source) or source.key(place) != row.key:  # the source has changed since
            if row.key not in self._places:
                raise UserError(f"'{printable(row.key)}' is no longer in '{source.name}'.")
            place = self._places[row.key]
        try:
            return source[place].image
        except BrokenPair as broken:
            raise UserError(f"The image '{printable(row.key)}' cannot be read any more: {broken}.") from broken

    @cached_property
    def _source(self) -> ImageSource:
        given, entry = self._given_source, self.manifest.source
        if given is not None and not isinstance(given, str | Path):
            return ImageSource(given)
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


def image_vectors(model: Encoder, pixels: Tensor, precision: Precision) -> Tensor:
    """Encode (n, 3, S, S) normalized pixels to (n, d) float32 on the CPU, L2-normalized."""
    with measuring(model) as device, torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        return normalize(model.encode_image(pixels.to(device)).float(), dim=-1).cpu()


def text_encoder(model: Encoder) -> Callable[[list[str]], Tensor] | None:
    """Texts to (m, d) float32 on the CPU, L2-normalized; None for an image tower alone."""
    try:
        model.tokenize([PROBE])
    except UserError:
        return None
    return lambda texts: text_features(model, texts)


def mix(text: Tensor, image: Tensor, weights: tuple[float, float]) -> Tensor:
    """Normalized weighted sum of two unit vectors (d,); raises `UserError` where they cancel."""
    both = weights[0] * text + weights[1] * image
    if both.norm() < SHORTEST:
        raise UserError(f"With weights {weights[0]:g} and {weights[1]:g} nothing is left of the query. Give others.")
    return normalize(both, dim=-1)
