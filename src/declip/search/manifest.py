"""The manifest of an index: `manifest.json`, the one file whose renaming makes a change count."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import declip
from declip.data.columns import DEFAULT, Columns
from declip.data.pair import SkipCounter
from declip.errors import UserError
from declip.io.atomic import ELSEWHERE, locked_folder, remove, write_text

if TYPE_CHECKING:
    from declip.data.sources.image_source import ImageSource

MANIFEST = "manifest.json"

Count = Annotated[int, Field(ge=0)]
Dtype = Literal["float16", "float32"]
Over = Literal["images", "captions"]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class ManifestEntry(BaseModel):
    """A section of the manifest; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


class SourceEntry(ManifestEntry):
    """The source of the images: the arguments of `open_images`, where `spec` is empty for a Python object."""

    spec: str
    name: str
    columns: Columns = DEFAULT

    def open(self, elsewhere: str | Path | None = None) -> "ImageSource":
        """Open the source, or its copy elsewhere."""
        from declip.data.sources.image_source import open_images  # imports torch: not before a path is known to exist

        return open_images(self.spec if elsewhere is None else elsewhere, self.columns)


class ModelEntry(ManifestEntry):
    """The model that made the vectors; `spec` is what `declip.load` opens, empty for a Python object."""

    spec: str
    fingerprint: Digest


class PartEntry(ManifestEntry):
    """A file of rows."""

    file: str = Field(pattern=r"^part-\d{6,}\.arrow$")
    rows: Count
    bytes: Count
    sha256: Digest


class Manifest(ManifestEntry):
    """Everything about an index except its rows."""

    layout: Literal[3] = 3  # raised when the files change their meaning
    declip: str = declip.__version__
    model: ModelEntry
    source: SourceEntry
    dimension: Count = 0  # width of the vectors; 0 before the first part
    dtype: Dtype
    captions: bool  # whether captions have vectors too
    parts: list[PartEntry] = []
    next_id: Count = 0
    reached: Count | None = None  # place in the source that an unfinished `embed` has come to
    skipped: dict[str, Any] = Field(default_factory=lambda: SkipCounter().to_dict())  # in the last call of `embed`

    @property
    def next_part(self) -> int:
        """Number of the next part."""
        return 1 + max((int(part.file[5:-6]) for part in self.parts), default=-1)

    def save(self, folder: Path) -> None:
        """Write the manifest durably; raises `UserError` where that fails."""
        write_text(folder / MANIFEST, self.model_dump_json(indent=1) + "\n", durable=True)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an index; raises `UserError` where there is none, or it is damaged or of another layout."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"'{folder}' is no index: no {MANIFEST}. Make one: declip embed MODEL SOURCE --out {folder}.")
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except OSError as error:
        problem = str(error)
    raise UserError(
        f"'{path}' is damaged, or of another version of declip: {problem}. Embed again into another folder."
    )


@contextmanager
def locked_index(folder: Path) -> Iterator[Path]:
    """Lock an index, created if missing; parts that its manifest does not name are removed, before and after."""
    with locked_folder(folder, MANIFEST, ELSEWHERE):
        _remove_unnamed(folder)
        yield folder
        _remove_unnamed(folder)


def _remove_unnamed(folder: Path) -> None:
    if (folder / MANIFEST).is_file():
        named = {part.file for part in read_manifest(folder).parts}
        for path in folder.glob("part-*.arrow"):
            if path.name not in named:
                remove(path)
