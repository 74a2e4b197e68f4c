"""The description of an index, `index.json`: its model, its source, its options, and the name of its files."""

from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError

import declip
from declip.data.columns import DEFAULT, Columns
from declip.data.pair import SkipCounter
from declip.data.sources.names import is_missing, resolve
from declip.errors import UserError, newer
from declip.io.atomic import put_back, write_text
from declip.io.outputs import INDEX_FILE
from declip.io.text import one_line
from declip.recipe.starts import is_own

LAYOUT = 6  # raised when the files change their meaning

Count = Annotated[int, Field(ge=0, lt=2**40)]
Dtype = Literal["float16", "float32"]
Over = Literal["images", "captions"]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def is_index(folder: Path) -> bool:
    """Whether a folder looks like an index."""
    return (folder / INDEX_FILE).is_file()


class InfoSection(BaseModel, extra="forbid"):
    """A section of index.json; unknown keys are refused."""


class SourceInfo(InfoSection):
    """The source of the images; `path` is empty for a Python object. Paths are as `stored_path` stores them."""

    path: str
    name: str
    columns: Columns = DEFAULT

    def columns_of(self, folder: Path) -> Columns:
        """The columns of the source of the index in `folder`."""
        root = self.columns.root
        if root is None:
            return self.columns
        return replace(self.columns, root=resolve(str(root), folder))


class ModelInfo(InfoSection):
    """The model that made the vectors; `path` is what `declip.load` opens, empty for a Python object."""

    path: str
    name: str  # for messages
    fingerprint: Digest

    def locate(self, folder: Path) -> str:
        """What `declip.load` opens now for the index in `folder`; raises `UserError` if there is nothing to open."""
        path = resolve(self.path, folder)
        if not path:
            raise UserError(
                f"The index '{folder}' was made by a Python object, {self.name}. Pass it as model=, or give --model."
            )
        if is_own(path):
            raise UserError(
                f"The index '{folder}' was made by '{path}', a Python file, which runs only where you name it. "
                f"If you trust the file, give --model {quote(path)}."
            )
        if is_missing(path):
            raise UserError(
                f"The model of the index '{folder}' is no longer at '{path}'. Give its path with --model."
            )
        return path

    def __str__(self) -> str:
        return f"'{self.name}' (fingerprint {self.fingerprint[:8]})"


class IndexInfo(InfoSection):
    """Everything about an index except its rows and vectors."""

    layout: Literal[6] = 6
    declip: str = declip.__version__
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat())
    model: ModelInfo
    source: SourceInfo
    dtype: Dtype
    captions: bool  # whether captions have vectors too
    # That computed the vectors; "bf16, fp32" if some in each
    precision: str = Field("", max_length=60)
    rows: Count = 0
    dimension: Count = 0  # width of the vectors
    # In the last call of `embed`
    skipped: dict[str, Any] = Field(default_factory=lambda: SkipCounter().to_dict())

    def save(self, folder: Path) -> None:
        """Write index.json durably; raises `UserError` if that fails."""
        write_text(folder / INDEX_FILE, self.model_dump_json(indent=1) + "\n", durable=True)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read index.json; raises `UserError` if it is missing, damaged, or of another version of declip."""
        path = folder / INDEX_FILE
        content = _content(path)
        if content is None and not folder.exists():
            raise UserError(
                f"'{folder}' does not exist. Make an index: declip embed MODEL SOURCE --out {quote(str(folder))}."
            )
        if content is None:
            others = folder.is_dir() and any(path.name[0] != "." for path in folder.iterdir())
            raise UserError(
                f"'{folder}' is not a complete index of this version of declip: it has no {INDEX_FILE}. Make one, or "
                f"continue an interrupted call: declip embed MODEL SOURCE --out {'indices/NEW' if others else folder}."
            )
        # A stranger's file: pydantic checks every value, and no path in it is opened without asking the source.
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            for problem in error.errors():
                if problem["loc"] != ("layout",):
                    continue
                layout = problem["input"]
                if isinstance(layout, int) and layout > LAYOUT:
                    raise newer(path) from error
            raise UserError(
                f"'{path}' is damaged, or of another version of declip: {one_line(error)}. Embed again into another "
                "folder."
            ) from error


def _content(path: Path) -> bytes | None:
    """The bytes of index.json; None without one. Waits while another process replaces the folder."""
    for _ in range(3):
        with suppress(OSError):
            return path.read_bytes()
        put_back(path.parent)
    return None
