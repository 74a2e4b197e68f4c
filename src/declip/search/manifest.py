"""What an index says of itself: `manifest.json`, the one file whose renaming makes a change count."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import declip
from declip.data.pair import SkipCounter
from declip.data.sources.image_source import ImageSource, open_images
from declip.errors import UserError
from declip.io.atomic import atomic_write, remove

MANIFEST, LOCK = "manifest.json", ".lock"
LAYOUT = 1
"""Raised when the files change their meaning."""

ELSEWHERE = "choose another folder with --out"

Count = Annotated[int, Field(ge=0)]
Dtype = Literal["float16", "float32"]
Precision = Literal["fp32", "bf16"]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Source(_Entry):
    """Where the pictures are.

    Attributes:
        spec: What `open_images` opens; empty where the source was a Python object.
        name: The source's name.
        image_column: As `open_images` has it; so for the two that follow.
        caption_column: For tables; None where captions are not read.
        image_root: For tables.
    """

    spec: str
    name: str
    image_column: str = "image"
    caption_column: str | None = "caption"
    image_root: str | None = None

    def open(self, elsewhere: str | Path | None = None) -> ImageSource:
        """Open it, or what it has become elsewhere; raises `UserError` as `open_images` does."""
        return open_images(
            self.spec if elsewhere is None else elsewhere,
            image_column=self.image_column,
            caption_column=self.caption_column,
            image_root=self.image_root,
        )


class ModelOf(_Entry):
    """Which model made the vectors.

    Attributes:
        spec: What `declip.load` opens; empty where the model was a Python object.
        fingerprint: Of its weights, its preprocessing and its tokenizer.
        precision: Of the towers while the vectors were made.
    """

    spec: str
    fingerprint: Digest
    precision: Precision


class Part(_Entry):
    """A file of rows.

    Attributes:
        file: Its name.
        rows: In it.
        bytes: Of it.
        sha256: Of it.
    """

    file: str = Field(pattern=r"^part-\d{6,}\.arrow$")
    rows: Count
    bytes: Count
    sha256: Digest


class Update(_Entry):
    """The last call of `embed`: whether it came to its end, and what it read.

    Attributes:
        first_id: Of its first row.
        digest: Of the images that it has to embed.
        total: How many they are.
        done: How many of them are in parts, or counted as broken.
        finished: Whether it came to its end.
        skipped: Broken images, as `SkipCounter.to_dict` has them.
        uncaptioned: Images without captions that can be used, likewise.
    """

    first_id: Count
    digest: Digest
    total: Count
    done: Count = 0
    finished: bool = False
    skipped: dict[str, Any] = Field(default_factory=lambda: SkipCounter().to_dict())
    uncaptioned: dict[str, Any] = Field(default_factory=lambda: SkipCounter().to_dict())


class Recall(_Entry):
    """How many of the nearest the approximate index finds, measured against exact search.

    Attributes:
        recall: Share of the exact nearest `k` that are among its nearest `k`.
        k: 10.
        queries: How many queries it is the mean of.
    """

    recall: float = Field(ge=0, le=1)
    k: int = Field(ge=1)
    queries: int = Field(ge=1)


class Approximate(_Entry):
    """The approximate index.

    Attributes:
        file: Its name.
        bytes: Of it.
        covered: Rows with an id below are in it; later ones are searched exactly.
        lists: Cells that the vectors are sorted into.
        probed: Cells that a search looks into.
        images: Recall for pictures of the index as queries.
        texts: Recall for captions of the index as queries, or ImageNet's class names where it has none; None for a
            model without text.
    """

    file: str = Field(pattern=r"^approximate-\d+\.faiss$")
    bytes: Count
    covered: Count
    lists: int = Field(ge=1)
    probed: int = Field(ge=1)
    images: Recall
    texts: Recall | None = None


class Manifest(_Entry):
    """Everything about an index but its rows.

    Attributes:
        layout: `LAYOUT`.
        declip: The version that wrote it.
        model: What made the vectors.
        source: Where the pictures are.
        dimension: Numbers of a vector; 0 before the first part.
        dtype: Of the numbers.
        captions: Whether captions have vectors too.
        parts: In the order of their ids.
        next_id: The id that the next row gets.
        update: The last call of `embed`.
        removed: Ids that the user took out; their pictures are not embedded again.
        gone: Ids whose pictures are no longer in the source, or have changed and are there anew.
        excluded: Keys that the user took out and whose rows a compaction has dropped.
        approximate: None where all search is exact.
    """

    layout: int = LAYOUT
    declip: str = declip.__version__
    model: ModelOf
    source: Source
    dimension: Count = 0
    dtype: Dtype
    captions: bool
    parts: list[Part] = []
    next_id: Count = 0
    update: Update | None = None
    removed: list[Count] = []
    gone: list[Count] = []
    excluded: list[str] = []
    approximate: Approximate | None = None

    @property
    def rows(self) -> int:
        """Rows in the parts, dead ones included."""
        return sum(part.rows for part in self.parts)

    @property
    def live(self) -> int:
        """Rows that a search can find."""
        return self.rows - len(self.removed) - len(self.gone)

    @property
    def skipped(self) -> SkipCounter:
        """The broken images that the last call of `embed` met."""
        return SkipCounter() if self.update is None else SkipCounter.from_dict(self.update.skipped)

    def save(self, folder: Path) -> None:
        """Write it; it is on the disk when this returns.

        Raises:
            UserError: It cannot be written.
        """
        with atomic_write(folder / MANIFEST, ELSEWHERE, durable=True) as beside:
            beside.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an index.

    Raises:
        UserError: There is no index, or it is damaged or of a newer version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        what = f"has no {MANIFEST}" if folder.is_dir() else "is not there"
        raise UserError(f"'{folder}' {what}, so it is no index. Make one: declip embed MODEL SOURCE --out {folder}.")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        layout, version = int(tree["layout"]), str(tree["declip"])[:40]
        if layout > LAYOUT:
            raise UserError(
                f"The index '{folder}' was written by declip {version} in layout {layout}; this version knows "
                f"{LAYOUT}. Install a newer declip, or embed again into another folder."
            )
        return Manifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise _damaged(path, f"{where}: {first['msg']}") from error
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"'{path}' is damaged: {why}. Embed again into another folder, or bring back a copy.")


@contextmanager
def held(folder: Path, new: bool = False) -> Iterator[Path]:
    """Keep an index for this process to change, without what a killed process left half written in it.

    Args:
        folder: The index.
        new: Whether it may be missing; it is made then.

    Raises:
        UserError: Another process changes it, it holds something else, or it cannot be written.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        if new:
            folder.mkdir(parents=True, exist_ok=True)
            others = sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))
            if others and MANIFEST not in others:
                raise UserError(f"'{folder}' already holds something else, such as '{others[0]}'; {ELSEWHERE}.")
        else:
            read_manifest(folder)
        lock.acquire()
    except Timeout as error:
        raise UserError(f"Another process is writing to '{folder}'. Wait for it, or {ELSEWHERE}.") from error
    except OSError as error:
        raise UserError(f"'{folder}' cannot be written: {error.strerror}. Mend that, or {ELSEWHERE}.") from error
    try:
        _tidy(folder)
        yield folder
    finally:
        lock.release()


def _tidy(folder: Path) -> None:
    """Remove what a killed process left: half written files, and whole ones that no manifest came to name."""
    for left in folder.glob(".*.partial"):
        remove(left)
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        named = {entry.file for entry in (*manifest.parts, manifest.approximate) if entry is not None}
        for path in (*folder.glob("part-*.arrow"), *folder.glob("approximate-*.faiss")):
            if path.name not in named:
                remove(path)
