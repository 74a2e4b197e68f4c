"""Datasets of Hugging Face's package `datasets`: from the Hub, from a folder of `save_to_disk`, or open in Python."""

import logging
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from declip.data.sources.rows import LARGE_TABLE, ArrowRows
from declip.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

HUB = re.compile(r"hf://datasets/(?P<name>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w./-]+))?(?::(?P<split>[^/]+))?/?")
STATE, SPLITS = "state.json", "dataset_dict.json"
"""Files that `save_to_disk` writes: into the folder of a dataset, and into that of several splits."""


def names_dataset(spec: str) -> bool:
    """Whether a name is a dataset of the Hub; a longer path on it means shards."""
    return HUB.fullmatch(spec) is not None


def is_dataset(given: Any) -> bool:
    """Whether this is a dataset: of the Hub by its name, a folder of `save_to_disk`, or an object of the package."""
    if not isinstance(given, str | Path):
        return type(given).__module__.partition(".")[0] == "datasets" and hasattr(given, "with_format")
    folder = Path(given).expanduser()
    return names_dataset(str(given)) or (folder / STATE).is_file() or (folder / SPLITS).is_file()


class DatasetRows(ArrowRows):
    """Rows of a dataset in the memory-mapped Arrow files of the package; images stay undecoded."""

    def __init__(self, given: "str | Path | Dataset") -> None:
        if not isinstance(given, str | Path):
            dataset, path = given, Path(type(given).__name__)
        elif names_dataset(str(given)):
            dataset, path = _from_hub(str(given)), Path(str(given).removeprefix("hf://datasets/"))
        else:
            path = Path(given).expanduser()
            dataset = _from_disk(path)
        super().__init__(path)
        if not hasattr(dataset, "features"):
            raise UserError(f"'{path}' has the splits {', '.join(dataset)}. Name one: its folder, or dataset['train'].")
        self._fingerprint, self._arrow = dataset._fingerprint, dataset.with_format("arrow")[:]
        self._local = self.path if self.path.is_dir() else Path()
        self.arrow_schema, self.columns = self._arrow.schema, self._arrow.column_names

    @property
    def folder(self) -> Path:
        return self._local

    def version(self) -> tuple[object, ...]:
        return ("datasets", self._fingerprint, len(self._arrow))

    def is_large(self) -> bool:
        return self._arrow.nbytes > LARGE_TABLE

    def choose(self, image: str, caption: str, keywords: str | None = None, group: str | None = None) -> None:
        self.image, self.caption, self.keywords, self.group = image, caption, keywords, group
        self.wanted = list(dict.fromkeys(filter(None, (image, caption, keywords, group))))
        self._large, self.table = self.is_large(), self._arrow.select(self.wanted)  # mapped by the package already

    def batches(self) -> Iterator[pa.RecordBatch]:
        yield from self._arrow.select(self.wanted).to_batches()


def _package() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError("Reading this dataset needs the package datasets: pip install 'declip[datasets]'.") from error
    return datasets


@lru_cache(4)  # a table is opened for its captions and for its labels
def _from_hub(spec: str) -> Any:
    name, revision, split = HUB.fullmatch(spec).group("name", "revision", "split")  # type: ignore[union-attr]
    package, retries = _package(), logging.getLogger("huggingface_hub")
    level = retries.level
    retries.setLevel(logging.ERROR)  # it repeats its reason twelve times before the error has it
    try:
        return package.load_dataset(name, revision=revision, split=split or "train")
    except Exception as error:  # of the package, of the network, or of what the repository holds
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"'{spec}' cannot be read from the Hub ({type(error).__name__}: {reason}). It needs a network or a copy in "
            "the cache; check the name, and the split after the colon."
        ) from error
    finally:
        retries.setLevel(level)


def _from_disk(folder: Path) -> Any:
    package = _package()
    try:
        return package.load_from_disk(str(folder))
    except Exception as error:
        raise UserError(f"The dataset in '{folder}' is damaged: {type(error).__name__}: {error}.") from error
