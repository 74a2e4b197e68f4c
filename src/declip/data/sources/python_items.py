"""Pairs from a Python object: anything with `__len__` and `__getitem__`, such as a list or a dataset of torch."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from PIL import Image

from declip.data.columns import DEFAULT, Columns, MissingColumns
from declip.data.images.decode import AnyImage, image_below, is_pixels
from declip.data.pair import BrokenPair, OnDemand, Pair, printable
from declip.data.sources.entry import EntrySource
from declip.data.sources.header import Captions, find_columns, read_captions
from declip.data.sources.rows import by_lower_name, cell_name, class_name, label_text
from declip.data.sources.splits import COLUMN, NUMBER_OF, group_number, split_numbers
from declip.errors import UserError

PREFIX = "python:"  # of the name of an object in a recipe, which cannot be opened from there
PEEKED_ITEMS = 100  # items read to learn their columns, until one can be read


class Items(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class ItemSource(EntrySource):
    """A source of the items of a Python object: dicts with the columns of a table, or tuples (image, captions).

    An image is a PIL image, (H, W, 3) uint8, a path, bytes, or a dict of `bytes` and `path`; captions are one string or
    several. An item alone is an image without captions. Where the object has `classes` and `targets`, as torchvision's
    datasets do, a number instead of a caption is a class.
    """

    def __init__(self, items: Items, columns: Columns = DEFAULT) -> None:
        self.name = type(items).__name__
        if self.name == "DataFrame" and hasattr(items, "to_dict"):  # of pandas
            items = items.to_dict("records")
        if isinstance(items, Mapping) and (
            self.name == "DatasetDict" or items.keys() & NUMBER_OF.keys()
        ):
            splits = [*items, "train"]
            raise UserError(
                f"This {self.name} has the splits {', '.join(splits[:-1])}. Pass one: object[{splits[0]!r}]."
            )
        if not (hasattr(items, "__len__") and hasattr(items, "__getitem__")) or isinstance(
            items, Mapping | bytes
        ):
            wanted = "an object with __len__ and __getitem__ that returns dicts or (image, caption), such as a list"
            raise UserError(f"A {self.name} is not a source of pairs. Pass a name, or {wanted}.")
        self.items = items
        if not len(items):
            raise UserError(f"The {self.name} has no items. It needs one for each pair.")
        # Reading an item of anything but a list may cost as much as its pixels.
        self._listed = isinstance(items, list | tuple)
        self.root = None if columns.root is None else Path(columns.root).expanduser()
        self._image = columns.image
        self._captions: Captions = {"": ("",)}  # of items that are not dicts
        item = self._first()
        numbers = dict[str, Callable[[], np.ndarray]]()
        if _is_row(item):
            names = list(item)
            self._image, self._captions, group = find_columns(names, columns, self.name)
            self.captions_from = " | ".join(map(printable, self._captions))
            self.cells = OnDemand({name: partial(self._texts, name) for name in names})
            if group:
                numbers["group"] = partial(self._groups, group)
            split = by_lower_name(names).get(COLUMN)
            if split:
                numbers["split"] = partial(self._splits, split)
        elif columns.group is not None:
            raise MissingColumns(self.name, [], {columns.group: "group"})
        classes = getattr(items, "classes", None)
        labels = getattr(items, "targets", None)
        if classes is not None and labels is not None and len(labels) == len(items):
            self.class_names = tuple(map(str, classes))
            numbers["label"] = partial(np.asarray, labels, np.int64)
        self.columns = OnDemand(numbers)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Pair:
        if self._listed:
            return super().__getitem__(index)
        # Reading an item may cost as much as its pixels: once, and not for the key.
        entry = cache(partial(self.entry, index))
        return Pair(f"item {index}", lambda: self.texts(*entry()), lambda: self.opened(*entry()))

    def _groups(self, column: str) -> np.ndarray:
        return np.array([group_number(cell) for cell in self._column(column)], np.int64)

    def _splits(self, column: str) -> np.ndarray:
        """Those that a key names; they would have to be read with the pixels where the items are no list."""
        if not self._listed:
            remedy = "Pass a list of dicts, only those of the split 'train', or dicts without the key to train on all."
            raise UserError(f"The items of the {self.name} have the key '{column}'. {remedy}")
        names = pa.array(map(cell_name, self._column(column)), pa.string())
        return split_numbers(pa.chunked_array([names]), f"The key '{column}' of the {self.name}")

    def _texts(self, column: str) -> list[tuple[str, ...]]:
        return [(label_text(cell),) for cell in self._column(column)]

    def entry(self, index: int) -> tuple[str, tuple[Any, Mapping[str, Any]]]:
        """The key; the image and the cells of its captions by column."""
        item = self._read(index)
        key = f"item {index}"
        cells = dict[str, Any]()
        if _is_row(item):
            cells = item
            item = cells.get(self._image)
        elif isinstance(item, tuple | list) and len(item) == 2:
            columns = chain.from_iterable(self._captions.values())
            item, captions = item
            cells = dict.fromkeys(columns, captions)
        if isinstance(item, str | Path) and self._listed:
            key = str(item)
        return key, (item, cells)

    def texts(self, key: str, entry: Any) -> tuple[str, ...]:
        def cell(column: str) -> Any:
            return class_name(entry[1].get(column), self.class_names or ())

        return read_captions(self._captions, [cell], "unreadable item", key)

    def content(self, key: str, entry: Any) -> AnyImage:
        image, _ = entry
        if isinstance(image, Mapping):
            image = image.get("bytes") or image.get("path")
        if isinstance(image, str | Path) and str(image):
            path = Path(image).expanduser()
            if self.root is None:
                return path
            return image_below(self.root, str(path), key, follow=True)
        if is_pixels(image):
            return Image.fromarray(image)
        if isinstance(image, bytes | Image.Image):
            return image
        reason = "unreadable image"
        if image is None or isinstance(image, str):
            reason = "missing image"
        raise BrokenPair(
            reason, key, f"a {type(image).__name__}, not a PIL image, uint8 (H, W, 3) or path"
        )

    def _column(self, name: str) -> Iterator[Any]:
        """The cell of each item, None where it has none or cannot be read."""
        for index in range(len(self)):
            item = None
            with suppress(BrokenPair):
                item = self._read(index)
            yield item.get(name) if isinstance(item, Mapping) else None

    def _first(self) -> Any:
        for index in range(min(len(self), PEEKED_ITEMS)):
            with suppress(BrokenPair):
                return self._read(index)
        return None

    def _read(self, index: int) -> Any:
        try:
            return self.items[index]
        except BrokenPair:
            raise
        except Exception as error:  # of any kind: it is the user's code
            raise BrokenPair(
                "unreadable item", f"item {index}", f"{type(error).__name__}: {error}"
            ) from error


def _is_row(item: Any) -> bool:
    return isinstance(item, Mapping) and not item.keys() <= {"bytes", "path"}  # else of an image
