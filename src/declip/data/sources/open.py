"""Open a source of pairs by its name, or its images alone."""

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from declip.data.columns import DEFAULT, Columns
from declip.data.pair import BrokenPair, Origin, Pair, PairSource, is_unicode, raise_broken
from declip.data.sources.folder import FolderSource
from declip.data.sources.names import holds, names_shards
from declip.data.sources.pair_list import LIST_KIND, read_pair_list
from declip.data.sources.python_items import PREFIX, Items, ItemSource
from declip.data.sources.shards import ShardSource
from declip.data.sources.table import TABLE_KINDS, TableSource, find_table
from declip.errors import UserError
from declip.io.plugins import check_builtin, load_plugin, names_plugin

Sources = Mapping[str, PairSource | Items]
"""Python objects by the names that a recipe has for them."""
NO_SOURCES: Sources = MappingProxyType({})


def held_out_sets(given: Any) -> list[Any]:
    """A list of held-out sets; a list of dicts or (image, caption) is one set."""
    if given is None:
        return []
    if not isinstance(given, list | tuple):
        return [given]
    is_one = any(isinstance(item, Mapping | tuple) for item in given)
    if is_one:
        return [given]
    return list(given)


def name_sources(*given: Any) -> tuple[list[Any], Sources]:
    """Name Python objects, for a recipe; strings, paths and None stay as they are."""
    names = list[Any](given)
    sources = dict[str, Any]()
    for index, item in enumerate(given):
        if item is not None and not isinstance(item, str | Path):
            size = len(item) if hasattr(item, "__len__") else "?"  # refused when it is opened
            name = f"{PREFIX}{type(item).__qualname__}({size})"
            while name in sources:
                name += "+"
            sources[name] = item
            names[index] = name
    return names, sources


def open_source(
    spec: str | Path | PairSource | Items, columns: Columns = DEFAULT, sources: Sources = NO_SOURCES
) -> PairSource:
    """Open a source of pairs.

    Args:
        spec: A built-in set such as "builtin:emoji"; a table; a folder or a pattern of Parquet files; a folder of
            images with a metadata table, or with a text file for each image; tar shards: a .tar file, a folder of them,
            a pattern, a brace range such as "data/{00000..00331}.tar" or a URL; a list of pairs (.pairs); NAME:REST for
            the source NAME of a plugin. In Python also a source, or any object that `ItemSource` takes.
        columns: The columns of a table, or the keys of a Python object's dicts.
        sources: Python objects that `spec`, or the list that it names, may name.

    Examples:
        >>> open_source("pairs.csv")[0].captions()
        ('a red square',)
    """
    # --- objects and names
    if isinstance(spec, PairSource):
        return spec
    if not isinstance(spec, str | Path):
        return ItemSource(spec, columns)
    text = str(spec)
    if text in sources:
        return open_source(sources[text], columns)
    if text.startswith(PREFIX):
        raise UserError(
            f"'{text}' was a Python object. Pass it again in Python: declip.train(recipe, data=object)."
        )
    if names_plugin(text):
        return _open_with_plugin(text, columns)
    # --- tables, shards and folders
    path = Path(text).expanduser()
    table = find_table(text)
    if table is not None:
        return TableSource(table, columns)
    if names_shards(text) and text.lower().endswith(TABLE_KINDS):
        raise UserError(
            f"'{text}' is not one table on this machine. Name 'data/*.parquet', or a list of tables."
        )
    if names_shards(text) or (path.is_dir() and holds(path, ".tar")):
        return ShardSource(text)
    if path.is_dir():
        return FolderSource(path)
    if not path.exists():
        raise UserError(
            f"'{path}' does not exist. Give a table, a folder of images, tar shards, or builtin:emoji."
        )
    if path.suffix.lower() != LIST_KIND or not path.is_file():
        return TableSource(path, columns)  # which refuses what is not a table
    listed = read_pair_list(path)
    return listed.of(open_source(listed.source, listed.columns, sources), path)


def _open_with_plugin(text: str, columns: Columns) -> PairSource:
    check_builtin(text)
    kind, _, rest = text.partition(":")
    source = load_plugin("sources", kind)(rest, columns)
    if not isinstance(source, PairSource):
        returned = type(source).__name__
        raise UserError(
            f"The source '{kind}:' of a plugin returned a {returned}, not a PairSource."
        )
    return source


class ImageSource:
    """The images of a source by number, without its captions unless `captioned`."""

    def __init__(self, source: PairSource, captioned: bool = True) -> None:
        self.source = source
        self.captioned = captioned
        self.name = source.name

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Pair:
        """Image `index` as a pair whose captions, origin and key can be read whatever is wrong with the pair."""
        try:
            pair = self.source[index]
        except BrokenPair as broken:
            fail = partial(raise_broken, broken)
            pair = Pair(broken.key, captions=fail, open=fail)
        return Pair(
            # Not unique; characters that are not Unicode become "?"
            pair.key.encode(errors="replace").decode(),
            partial(_captions_of, pair) if self.captioned else tuple,
            pair.open,
            partial(_origin_of, pair),
        )


def _captions_of(pair: Pair) -> tuple[str, ...]:
    """The captions; none if they cannot be used."""
    with suppress(BrokenPair):
        return pair.captions()
    return ()


def _origin_of(pair: Pair) -> Origin:
    """Where the image is stored; without a path if its name is not UTF-8, which no table can hold."""
    with suppress(BrokenPair):
        origin = pair.origin()
        if not is_unicode(origin.path):
            origin = origin._replace(path="")
        return origin
    return Origin()


def open_images(spec: str | Path | PairSource | Items, columns: Columns = DEFAULT) -> ImageSource:
    """Open the images of a source as `open_source` does; `columns.caption` is None for a table without captions."""
    source = open_source(spec, columns)
    return ImageSource(
        source, captioned=columns.caption is not None or not isinstance(source, TableSource)
    )
