"""The manifest of an index: `manifest.json`, the one file whose renaming makes a change count."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import declip
from declip.data.pair import SkipCounter
from declip.errors import UserError
from declip.io.atomic import atomic_write, remove

if TYPE_CHECKING:
    from declip.data.sources.image_source import ImageSource

MANIFEST, LOCK = "manifest.json", ".lock"
LAYOUT = 1  # raised when the files change their meaning
ELSEWHERE = "choose another folder with --out"

Count = Annotated[int, Field(ge=0)]
Dtype = Literal["float16", "float32"]
Precision = Literal["fp32", "bf16"]
Over = Literal["images", "captions"]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class ManifestEntry(BaseModel):
    """A section of the manifest; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


class SourceEntry(ManifestEntry):
    """The source of the images: the arguments of `open_images`, where `spec` is empty for a Python object."""

    spec: str
    name: str
    image_column: str = "image"
    caption_column: str | None = "caption"
    image_root: str | None = None

    def open(self, elsewhere: str | Path | None = None) -> "ImageSource":
        """Open the source, or its copy elsewhere."""
        from declip.data.sources.image_source import open_images  # imports torch: not before a path is known to exist

        options = self.model_dump(exclude={"spec", "name"})
        return open_images(self.spec if elsewhere is None else elsewhere, **options)


class ModelEntry(ManifestEntry):
    """The model that made the vectors; `spec` is what `declip.load` opens, empty for a Python object."""

    spec: str
    fingerprint: Digest
    precision: Precision


class PartEntry(ManifestEntry):
    """A file of rows."""

    file: str = Field(pattern=r"^part-\d{6,}\.arrow$")
    rows: Count
    bytes: Count
    sha256: Digest


class Update(ManifestEntry):
    """The progress of the last call of `embed`.

    Attributes:
        first_id: Id of its first row.
        digest: Hash of the images to embed: the same for the same work.
        total: Number of images to embed.
        done: How many of them are in parts, or counted as broken.
        skipped: Broken images, as `SkipCounter.to_dict` gives them.
        uncaptioned: Usable images without captions, in the same form.
    """

    first_id: Count
    digest: Digest
    total: Count
    done: Count = 0
    finished: bool = False
    skipped: dict[str, Any] = Field(default_factory=lambda: SkipCounter().to_dict())
    uncaptioned: dict[str, Any] = Field(default_factory=lambda: SkipCounter().to_dict())


class MeasuredRecall(ManifestEntry):
    """Fraction of the exact nearest `k` that approximate search finds, a mean over `queries`."""

    recall: float = Field(ge=0, le=1)
    k: int = Field(ge=1)
    queries: int = Field(ge=1)


class ApproximateEntry(ManifestEntry):
    """The approximate index.

    Attributes:
        covered: Rows with a smaller id are in it; later ones are searched exactly.
        lists: Cells that the vectors are sorted into.
        probed: Cells that a search looks into.
        images: Recall with images of the index as queries.
        texts: Recall with captions of the index, or ImageNet's class names where it has none; None for a model
            without text.
    """

    file: str = Field(pattern=r"^approximate-\d+\.faiss$")
    bytes: Count
    covered: Count
    lists: int = Field(ge=1)
    probed: int = Field(ge=1)
    images: MeasuredRecall
    texts: MeasuredRecall | None = None


class Manifest(ManifestEntry):
    """Everything about an index except its rows.

    Attributes:
        dimension: Width of the vectors; 0 before the first part.
        captions: Whether captions have vectors too.
        removed: Ids that the user removed; their images are not embedded again.
        gone: Ids whose images have left the source, or have changed and were embedded again.
        excluded: Keys that the user removed and whose rows a compaction has dropped.
        approximate: None where all search is exact.
    """

    layout: int = LAYOUT
    declip: str = declip.__version__
    model: ModelEntry
    source: SourceEntry
    dimension: Count = 0
    dtype: Dtype
    captions: bool
    parts: list[PartEntry] = []
    next_id: Count = 0
    update: Update | None = None
    removed: list[Count] = []
    gone: list[Count] = []
    excluded: list[str] = []
    approximate: ApproximateEntry | None = None

    @property
    def rows(self) -> int:
        """Rows in the parts, hidden ones included."""
        return sum(part.rows for part in self.parts)

    @property
    def size(self) -> int:
        """Bytes of all files that the manifest names."""
        return sum(entry.bytes for entry in self.files())

    @property
    def next_part(self) -> int:
        """Number of the next part."""
        return 1 + max((int(part.file[5:-6]) for part in self.parts), default=-1)

    @property
    def skipped(self) -> SkipCounter:
        """Broken images of the last call of `embed`."""
        return SkipCounter() if self.update is None else SkipCounter.from_dict(self.update.skipped)

    def files(self) -> Iterator[PartEntry | ApproximateEntry]:
        """The entries that name a file."""
        yield from self.parts
        if self.approximate is not None:
            yield self.approximate

    def save(self, folder: Path) -> None:
        """Write the manifest durably; raises `UserError` where that fails."""
        with atomic_write(folder / MANIFEST, ELSEWHERE, durable=True) as beside:
            beside.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an index; raises `UserError` where there is none, or it is damaged or of another layout."""
    path = folder / MANIFEST
    if not path.is_file():
        problem = f"has no {MANIFEST}" if folder.is_dir() else "is not there"
        raise UserError(f"'{folder}' {problem}, so it is no index. Make one: declip embed MODEL SOURCE --out {folder}.")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        layout, version = int(tree["layout"]), str(tree["declip"])[:40]
        if layout == LAYOUT:
            return Manifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
    else:
        raise UserError(
            f"The index '{folder}' was written by declip {version} in layout {layout}; this version reads layout "
            f"{LAYOUT} alone. Use that version, or embed again into another folder."
        )
    raise UserError(f"'{path}' is damaged: {problem}. Embed again into another folder, or restore a copy.")


@contextmanager
def locked_index(folder: Path, new: bool = False) -> Iterator[Path]:
    """Lock an index, which may be `new`; files that its manifest does not name are removed, before and after.

    Raises:
        UserError: Another process changes it, it holds something else, or it cannot be written.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        if new:
            folder.mkdir(parents=True, exist_ok=True)
            others = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
            if others and MANIFEST not in others:
                raise UserError(f"'{folder}' already holds something else, such as '{others[0]}'; {ELSEWHERE}.")
        else:
            read_manifest(folder)
        lock.acquire()
    except Timeout as error:
        raise UserError(f"Another process is writing to '{folder}'. Wait for it, or {ELSEWHERE}.") from error
    except OSError as error:
        raise UserError(f"'{folder}' cannot be written: {error.strerror}. Fix that, or {ELSEWHERE}.") from error
    try:
        _tidy(folder)
        yield folder
        _tidy(folder)
    finally:
        lock.release()


def _tidy(folder: Path) -> None:
    """Remove half-written files of a killed process, and whole ones that no manifest came to name."""
    for left in folder.glob(".*.partial"):
        remove(left)
    if (folder / MANIFEST).is_file():
        named = {entry.file for entry in read_manifest(folder).files()}
        for path in (*folder.glob("part-*.arrow"), *folder.glob("approximate-*.faiss")):
            if path.name not in named:
                remove(path)
