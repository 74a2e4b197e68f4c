"""Datasets of Hugging Face's package `datasets`: from the Hub, from a folder of `save_to_disk`, or open in Python."""

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from declip.data.sources.rows import LARGE_TABLE, ArrowRows
from declip.errors import UserError
from declip.io.quiet import quiet

if TYPE_CHECKING:
    from datasets import Dataset

HUB = re.compile(r"hf://datasets/(?P<name>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w./-]+))?(?::(?P<split>[^/]+))?/?")
MARKS = ("state.json", "dataset_dict.json")
"""Files that `save_to_disk` writes: into the folder of a dataset, and into that of several splits."""


def names_dataset(spec: str) -> bool:
    """Whether a name is a dataset of the Hub; a longer path on it means shards."""
    return HUB.fullmatch(spec) is not None


def is_dataset(given: Any) -> bool:
    """Whether this is a dataset: of the Hub by its name, a folder of `save_to_disk`, or an object of the package."""
    if not isinstance(given, str | Path):
        return type(given).__module__.partition(".")[0] == "datasets" and hasattr(given, "num_rows")
    return names_dataset(str(given)) or any((Path(given).expanduser() / mark).is_file() for mark in MARKS)


class DatasetRows(ArrowRows):
    """Rows of a dataset in the memory-mapped Arrow files of the package; images stay undecoded."""

    def __init__(self, given: "str | Path | Dataset") -> None:
        named = isinstance(given, str | Path)
        super().__init__(
            Path(str(given).removeprefix("hf://datasets/") if named else type(given).__name__).expanduser()
        )
        written = [mark.stat().st_mtime_ns for name in MARKS if (mark := self.path / name).is_file()]
        dataset: Any = _load(str(given), *written) if named else given
        if not hasattr(dataset, "features"):
            raise UserError(
                f"'{self.path}' has the splits {', '.join(dataset)}. Name one: its folder, or dataset['train']."
            )
        self.folder = self.path if self.path.is_dir() else Path()
        self._fingerprint, self._arrow = dataset._fingerprint, dataset.with_format("arrow")[:]
        self.arrow_schema, self.columns = self._arrow.schema, self._arrow.column_names

    def version(self) -> list[object]:
        return ["datasets", self._fingerprint, len(self._arrow)]

    def is_large(self) -> bool:
        return self._arrow.nbytes > LARGE_TABLE

    def read(self) -> pa.Table:
        return self._arrow.select(self.wanted)  # mapped by the package already

    def batches(self) -> Iterator[pa.RecordBatch]:
        yield from self.read().to_batches()


@lru_cache(4)  # a table is opened for its captions and for its labels; the times of writing are part of the key
def _load(spec: str, *_: int) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError("Reading this dataset needs the package datasets: pip install 'declip[datasets]'.") from error
    try:
        if hub := HUB.fullmatch(spec):
            with quiet("huggingface_hub"):  # it logs each retry
                return datasets.load_dataset(hub["name"], revision=hub["revision"], split=hub["split"] or "train")
        return datasets.load_from_disk(str(Path(spec).expanduser()))
    except Exception as error:  # from the package, the network or the stored files
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"The dataset '{spec}' cannot be read ({type(error).__name__}: {reason}). Check its name, and the split "
            "after the colon; one of the Hub needs a network or a copy in the cache."
        ) from error
