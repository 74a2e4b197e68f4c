"""Remote shards through fsspec: listing them with their sizes, and fetching one."""

import importlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from declip.errors import UserError
from declip.io.atomic import FULL

T = TypeVar("T")

TRIES = 3
PAUSE = 1.0  # seconds before the second try, twice as many before the third

SIZES, LARGEST_SIZES = "sizes.json", 64 << 20
"""WebDataset's and open_clip's file next to the shards, with the number of pairs of each, and its bytes at most."""


class UnreadableShard(Exception):
    """A shard cannot be read; the message is the reason, in one line."""


@contextmanager
def _reached(url: str) -> Iterator[tuple[Any, str]]:
    """The file system of a URL and the path on it; their errors, each system has its own, become `UnreadableShard`."""
    try:
        core = importlib.import_module("fsspec.core")
        yield core.url_to_fs(url)  # requested each time: fsspec then gives a forked process its own
    except ImportError as error:
        raise UserError(
            f"Reading '{url}' needs fsspec. Install it: pip install 'declip[remote]', and what the kind of URL needs "
            "(s3fs, gcsfs, huggingface_hub for hf)."
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        line = (str(error).strip().splitlines() or [""])[0][:300].rstrip(".")
        raise UnreadableShard(f"{url}: {type(error).__name__}: {line}") from error


def _again(work: Callable[..., T]) -> Callable[..., T]:
    """Do it up to `TRIES` times: of many requests one may fail."""

    @wraps(work)
    def trying(*given: Any) -> T:
        for trial in range(1, TRIES):
            try:
                return work(*given)
            except UnreadableShard:
                time.sleep(PAUSE * 2 ** (trial - 1))
        return work(*given)

    return trying


@_again
def look_up(url: str) -> list[tuple[str, int, str]]:
    """URL, size and description of the shards of a URL: one file, those of a pattern, or a folder's .tar files."""
    with _reached(url) as (system, path):
        if "*" in path or not path.partition("?")[0].lower().endswith((".tar", ".gz", ".tgz")):
            pattern = path if "*" in path else f"{path.rstrip('/')}/*.tar"
            globbed = system.glob(pattern, detail=True)
            files = {system.unstrip_protocol(name): info for name, info in sorted(globbed.items())}
        else:
            files = {url: system.info(path)}
        if not files:
            raise FileNotFoundError("no .tar file")
    # Without the address that a redirect led to: it is often signed anew each time.
    kept = {name: {key: value for key, value in info.items() if key != "url"} for name, info in files.items()}
    return [(name, int(info.get("size") or 0), str(info)) for name, info in kept.items()]


@_again
def fetch(url: str, target: Path, size: int) -> None:
    """Copy a remote file of `size` bytes (0: unknown); raises `UnreadableShard`, or OSError where the disk is full."""
    try:
        with _reached(url) as (system, path):
            system.get_file(path, str(target))
            received = target.stat().st_size
            if size and received != size:
                raise EOFError(f"{received:,} of {size:,} bytes came")
    except UnreadableShard:
        target.unlink(missing_ok=True)
        raise


def counts(folder: str) -> dict[str, int]:
    """The number of pairs by a shard's last name, from `SIZES` in a remote folder; empty where it is missing."""
    with _reached(f"{folder}/{SIZES}") as (system, path):
        if not system.exists(path):
            return {}
        sizes = json.loads(system.cat_file(path, 0, LARGEST_SIZES))
        if not all(isinstance(count, int) and 0 <= count < 2**31 for count in sizes.values()):
            raise ValueError("not a number of pairs for each shard; fix or remove it")
        return sizes
