"""Lists of some pairs of a source, as files."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import numpy as np

from declip.data.columns import Columns
from declip.data.pair import BrokenPair, PairSource
from declip.data.sources.names import absolute, relative, resolve, stored_path
from declip.data.sources.subset import Subset
from declip.errors import UserError
from declip.io.atomic import write_text

LIST_KIND = ".pairs"


class PairList(NamedTuple):
    """A list of pairs of a source: its name, columns and size, rising indices, and a digest of some of their keys."""

    source: str
    columns: Columns
    total: int
    indices: list[int]
    digest: str = ""

    def of(self, source: PairSource, where: Path) -> Subset:
        """The listed pairs of the opened source; `where` names the list if they are others now."""
        now = ""
        if len(source) != self.total:
            now = f"{len(source):,}"
        elif self.digest and self.digest_in(source) != self.digest:
            now = "others, or these in another order"
        if now:
            problem = f"'{where}' lists pairs of '{self.source}' when it had {self.total:,}; now it has {now}."
            raise UserError(f"{problem} Write the list again in another folder.")
        return Subset(source, np.array(self.indices, np.int64))

    def digest_in(self, source: PairSource) -> str:
        """Hash of up to 64 keys that a source has at the listed indices."""
        keys = list[str]()
        for index in self.indices[:: max(1, len(self.indices) // 32)]:
            with suppress(BrokenPair):
                keys.append(source[index].key)
        joined = "\n".join(keys).encode("utf-8", "surrogatepass")
        return hashlib.blake2b(joined, digest_size=8).hexdigest()


def list_of(spec: str, columns: Columns, source: PairSource, indices: Iterable[int]) -> PairList:
    """A list of pairs of the opened source `spec`; for a list of pairs, it refers to the source of that."""
    listed = PairList(spec, columns, len(source), [])
    positions: Sequence[int] = range(len(source))
    if spec.lower().endswith(LIST_KIND) and isinstance(source, Subset):
        listed = read_pair_list(Path(spec).expanduser())
        source = source.source
        positions = listed.indices
    listed = listed._replace(indices=[positions[index] for index in indices])
    digest = "" if source.remote else listed.digest_in(source)  # its keys would have to be fetched
    return listed._replace(digest=digest)


Lists = Mapping[str, PairList]
"""Lists of pairs by the paths of their files, which may not be written yet."""
NO_LISTS: Lists = MappingProxyType({})


def write_pair_list(path: Path, listed: PairList) -> None:
    """Write a list of pairs, with paths that stay valid when the project moves, see `relative`."""
    columns = asdict(listed.columns)
    columns["root"] = stored_path(columns["root"], path.parent) or None
    source = relative(absolute(listed.source), path.parent)
    fields = listed._asdict() | {"source": source, "columns": columns}
    write_text(path, json.dumps(fields) + "\n")


def write_others(
    path: Path, spec: str, columns: Columns, source: PairSource, excluded: Collection[int]
) -> int:
    """Write a list of the pairs of the opened source `spec` but some, and return their number."""
    others = [index for index in range(len(source)) if index not in excluded]
    if not others:
        raise UserError(
            f"'{path}' is not written: all pairs of '{source.name}' are excluded, and none is left."
        )
    write_pair_list(path, list_of(spec, columns, source, others))
    return len(others)


def read_pair_list(path: Path) -> PairList:
    """Read a list of pairs; raises `UserError` if the file is invalid."""
    try:
        return _parse(path)
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise UserError(
            f"'{path}' is not a list of pairs that declip wrote. Pass the pairs themselves."
        ) from error


def _parse(path: Path) -> PairList:
    """Parse a list of pairs; an invalid file raises an error of any class."""
    listed = PairList(**json.loads(path.read_text("utf-8")))
    columns = Columns(**cast(Mapping[str, Any], listed.columns))
    if columns.root:
        columns = replace(columns, root=resolve(str(columns.root), path.parent))
    listed = listed._replace(source=resolve(listed.source, path.parent), columns=columns)
    indices = np.asarray(listed.indices)
    steps = np.diff(indices, prepend=-1, append=listed.total)
    rising = indices.dtype == np.int64 and (steps > 0).all()
    names = (listed.source, columns.image, columns.group or "", columns.root or "")
    texts = all(isinstance(name, str) for name in names)
    of_a_list = listed.source.lower().endswith(LIST_KIND)  # perhaps of itself
    if of_a_list or not (rising and texts):
        raise ValueError("the source, a column or an index is invalid")
    return listed
