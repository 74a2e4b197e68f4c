"""Remote shards through fsspec: listing them with their sizes, and fetching one."""

import errno
import importlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from declip.data.sources.shard_names import path_of
from declip.errors import UserError
from declip.io.atomic import FULL

TRIES = 3
PAUSE = 1.0  # seconds before the second try, twice as many before the third

VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "last_modified", "created")
"""Fields by which file systems identify a file's version; the first that exists is used."""

SIZES, LARGEST_SIZES = "sizes.json", 64 << 20
"""WebDataset's and open_clip's file next to the shards, with the number of pairs of each, and its bytes at most."""


class Unreachable(Exception):
    """A remote file cannot be read; the message is the reason, in one line."""


def _file_system(url: str) -> tuple[Any, str]:
    """The file system and the path on it, requested each time: fsspec then gives a forked process its own."""
    try:
        core = importlib.import_module("fsspec.core")
    except ImportError as error:
        raise UserError(
            f"Reading '{url}' needs fsspec. Install it: pip install 'declip[remote]', and what the kind of URL needs "
            "(s3fs, gcsfs, aiohttp for https, huggingface_hub for hf)."
        ) from error
    return core.url_to_fs(url)


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    """Turn the errors of file systems, each of which has its own, into a `UserError`; missing files stay."""
    try:
        yield
    except (UserError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        raise UserError(f"'{url}' cannot be reached: {_line(error)}.") from error


def look_up(url: str) -> list[tuple[str, int, str]]:
    """URL, size in bytes and version of the shards of a URL: one file, those of a pattern, or a folder's .tar files."""
    try:
        with _reaching(url):
            system, path = _file_system(url)
            if "*" in path or not path_of(url).lower().endswith((".tar", ".gz", ".tgz")):
                pattern = path if "*" in path else f"{path.rstrip('/')}/*.tar"
                globbed = system.glob(pattern, detail=True)
                files = {system.unstrip_protocol(name): info for name, info in sorted(globbed.items())}
            else:
                files = {url: system.info(path)}
    except OSError as error:
        signed = ", or its signature is no longer valid" if "?" in url else ""
        raise UserError(f"There is no shard '{url}', or its server does not answer{signed}.") from error
    if not files:
        raise UserError(f"'{url}' holds no .tar file.")
    return [
        (
            name,
            int(info.get("size") or 0),
            next((f"{field} {info[field]}" for field in VERSIONS if info.get(field)), ""),
        )
        for name, info in files.items()
    ]


def fetch(url: str, target: Path, size: int) -> None:
    """Copy a remote file of `size` bytes (0: unknown) to a new path.

    Raises:
        Unreachable: It could not be read, or was truncated, three times.
        OSError: There is no room for it.
    """
    for trial in range(TRIES):
        try:
            system, path = _file_system(url)
            system.get_file(path, str(target))
            received = target.stat().st_size
            if size and received != size:
                raise EOFError(f"{received:,} of {size:,} bytes came")
            return
        except UserError:
            raise
        except Exception as error:  # each file system has errors of its own
            target.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            if trial == TRIES - 1 or getattr(error, "errno", None) == errno.ENOENT:
                raise Unreachable(f"{url}: {_line(error)}") from error
            time.sleep(PAUSE * 2**trial)


def counts(folder: str) -> dict[str, int]:
    """The number of pairs by a shard's last name, from `SIZES` in a remote folder; empty where it is missing."""
    url = f"{folder}/{SIZES}"
    try:
        with _reaching(url):
            system, path = _file_system(url)
            content = system.cat_file(path, 0, LARGEST_SIZES)
        sizes = json.loads(content)
        if all(isinstance(count, int) and 0 <= count < 2**31 for count in sizes.values()):
            return sizes
    except (FileNotFoundError, PermissionError):  # S3 denies missing files to users who may not list them
        return {}
    except UserError:
        raise
    except (ValueError, RecursionError, AttributeError):
        pass
    raise UserError(f"'{url}' is not a JSON object with a number of pairs for each shard. Fix or remove it.")


def _line(error: Exception) -> str:
    """An error's kind and first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300].rstrip('.')}" if lines else type(error).__name__
