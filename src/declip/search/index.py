"""An index of pictures: searched by text, by picture or both, and changed without being made anew."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from declip.data.checks import check_range
from declip.data.pair import PairSource
from declip.data.sources.origin import Origin
from declip.errors import UserError, unknown
from declip.evaluation.encode import Encoder
from declip.interchange.load import load
from declip.search import maintenance
from declip.search.approximate import ApproximateSearch, import_faiss
from declip.search.encoding import caption_encoder, fingerprint, query_vector
from declip.search.exact import nearest
from declip.search.manifest import Approximate, Manifest
from declip.search.parts import Row
from declip.search.pictures import Pictures
from declip.search.store import Over, Store

log = logging.getLogger("declip")

MOST = 10_000
"""Results of a search at most."""


@dataclass(frozen=True)
class Hit:
    """A picture that was found.

    Attributes:
        id: Its row's, for `Index.picture`, `Index.neighbors` and `Index.vectors`.
        key: What the source calls it.
        score: The cosine of its vector and the query's.
        captions: None or more.
        place: In the source, when it was embedded.
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
        """As plain data."""
        place = {"place": self.place, "path": self.origin.path, "offset": self.origin.offset, "size": self.origin.size}
        return {"id": self.id, "key": self.key, "score": self.score, "captions": list(self.captions), **place}


class Index:
    """An index as `declip.embed` writes it.

    Args:
        folder: Where it is.
        model: The model that made it, or what `declip.load` opens; None loads the one that the manifest names.
        source: Where the pictures are now, if not where the manifest says.
        device: Where a model is loaded to.
        check: As `Store` has it.

    Raises:
        UserError: There is no index, it is damaged, or it is of a newer version.
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
        self._given, self._device = model, device
        self._store = Store(self.folder, check)
        self._pictures = Pictures(self.manifest.source, source)
        update = self.manifest.update
        if update is not None and not update.finished:
            log.warning(
                "The index '%s' is unfinished: %s of %s images were read. The same `declip embed` goes on.",
                self.folder,
                f"{update.done:,}",
                f"{update.total:,}",
            )

    @classmethod
    def open(cls, folder: str | Path, **options: Any) -> "Index":
        """Open an index; arguments as the class has them."""
        return cls(folder, **options)

    def __len__(self) -> int:
        """Images that a search can find."""
        return len(self._store.live)

    @property
    def manifest(self) -> Manifest:
        """What the index says of itself."""
        return self._store.manifest

    @property
    def ids(self) -> np.ndarray:
        """(n,) int64, of the images that a search can find, rising."""
        return self._store.ids[self._store.live]

    @cached_property
    def model(self) -> Encoder:
        """The model that made the index.

        Raises:
            UserError: It can't be loaded, or is another one.
        """
        made_by = self.manifest.model
        given = made_by.spec if self._given is None else self._given
        if isinstance(given, str) and not given:
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
        """(d,) float32 of length 1, the vector of a text, a picture, or both: see `encoding.query_vector`."""
        return query_vector(self.model, text, image, weights, template)

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
        """Find pictures by a text, a picture, or both.

        Args:
            text: What to look for.
            image: A picture, or its file.
            weights: Of text and picture, where both are given.
            template: A sentence with ``{}`` for the text, or a shipped template set's name.
            k: How many, at most.
            over: "images" compares with the pictures' vectors; "captions" with their captions', where the index has
                them.
            exact: True for exact search; None takes the approximate index where there is one.

        Returns:
            The nearest, the best first.

        Raises:
            UserError: Nothing to search for, a picture that can't be read, `k` out of its range, or another model.
        """
        check_range("k", k, 1, MOST)
        ids, scores = self.nearest(self.query(text, image, weights, template)[None], k, over=over, exact=exact)
        return self._hits(ids[0], scores[0])

    def neighbors(self, id: int, k: int = 10, *, exact: bool | None = None) -> list[Hit]:
        """The pictures most like one of the index, without itself.

        Raises:
            UserError: There is no such id, or `k` is out of its range.
        """
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
            k: How many, at most.
            over: As `search` has it.
            exact: As `search` has it.

        Returns:
            Ids (n, k') int64 and cosines (n, k') float32, the best first.

        Raises:
            UserError: `over` is something else, or captions have no vectors here.
        """
        if over not in ("images", "captions"):
            raise unknown("place to search", over, ("images", "captions"))
        if over == "images" and not exact and self._approximate is not None:
            return self._approximate.nearest(queries, k)
        return nearest(queries, self._store.blocks(over), k)

    def row(self, id: int) -> Row:
        """An image of the index; raises `UserError` where there is no such id."""
        return self._store.row(int(self._store.positions([id])[0]))

    def vectors(self, ids: Sequence[int] | np.ndarray, over: Over = "images") -> Tensor:
        """(n, d) float32, the vectors of images, or of their captions: zeros where an image has none.

        Raises:
            UserError: An id is not there, or captions have no vectors here.
        """
        return self._store.vectors(self._store.positions(ids), over)

    def keys(self) -> list[str]:
        """The key of each image in the order of `ids`; more than one may have it."""
        return self._store.keys()

    def captions(self) -> list[str]:
        """The first caption of each image in the order of `ids`, empty where it has none."""
        return self._store.first_captions()

    def picture(self, id: int) -> Image.Image:
        """An image's picture, read from the source now; RGB and upright.

        Raises:
            UserError: There is no such id, or its picture is not in the source any more or can't be read.
        """
        return self._pictures.open(self.row(id))

    def remove(self, keys: Sequence[str]) -> int:
        """Hide images, at once and from later calls of `embed`; see `maintenance.remove`."""
        return self._changed(maintenance.remove(self.folder, keys))

    def restore(self, keys: Sequence[str]) -> int:
        """Undo `remove`; see `maintenance.restore`."""
        return self._changed(maintenance.restore(self.folder, keys))

    def compact(self) -> int:
        """Drop hidden rows from the disk; see `maintenance.compact`. Returns the bytes freed."""
        return self._changed(maintenance.compact(self.folder))

    def approximate(self) -> Approximate:
        """Make the approximate index, or bring it up to date, and measure its recall; needs faiss."""
        import_faiss()
        return self._changed(maintenance.make_approximate(self.folder, caption_encoder(self.model)))

    def summary(self) -> str:
        """What is in the index and what was left out, in a line each."""
        manifest = self.manifest
        size = sum(part.bytes for part in manifest.parts)
        lines = [f"{len(self):,} images, {manifest.dimension} numbers each in {manifest.dtype}, {size / 1e6:,.1f} MB"]
        if manifest.update is not None:
            for said, state in (("Left out", "skipped"), ("Without caption", "uncaptioned")):
                for reason, row in getattr(manifest.update, state)["reasons"].items():
                    if state == "uncaptioned" and row["count"] == len(self):
                        lines.append(f"{said}: all of them")
                        continue
                    lines.append(f"{said}: {row['count']:,} × {reason}, such as {', '.join(row['examples'])}")
        if hidden := len(manifest.removed) + len(manifest.gone):
            lines.append(f"Hidden: {len(manifest.removed):,} removed, {len(manifest.gone):,} gone from the source")
            lines[-1] += "" if 2 * hidden < manifest.rows else "; `declip index compact` frees their room"
        if (there := manifest.approximate) is not None:
            kinds = [f"{there.images.recall:.1%} (pictures as queries, n = {there.images.queries})"]
            if there.texts is not None:
                kinds.append(f"{there.texts.recall:.1%} (texts, n = {there.texts.queries})")
            lines.append(f"Approximate: {there.probed} of {there.lists} lists; recall@10 of exact: {', '.join(kinds)}")
        return "\n".join(lines)

    @cached_property
    def _approximate(self) -> ApproximateSearch | None:
        there = self.manifest.approximate
        if there is None:
            return None
        try:
            import_faiss()
        except UserError as error:
            log.warning("Search is exact. %s", error)
            return None
        return ApproximateSearch(self._store, there)

    def _changed(self, result: Any) -> Any:
        """Read the folder anew."""
        self._store = Store(self.folder, check=False)
        self.__dict__.pop("_approximate", None)
        return result

    def _hits(self, ids: Tensor, scores: Tensor) -> list[Hit]:
        rows = [self._store.row(int(position)) for position in self._store.positions(ids.numpy())]
        return [
            Hit(row.id, row.key, float(score), row.captions, row.place, row.origin)
            for row, score in zip(rows, scores, strict=True)
        ]
