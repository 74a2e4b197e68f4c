"""Remote shards through fsspec: which there are, what they weigh, and fetching one."""

import errno
import importlib
import json
import time
from pathlib import Path
from typing import Any

from declip.data.sources.shard_names import path_of
from declip.errors import UserError
from declip.io.atomic import FULL

TRIES = 3
PAUSE = 1.0
"""Seconds before the second try, twice as many before the third."""

VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "last_modified", "created")
"""What file systems call that which changes with a file; the first that is there is taken."""

SIZES = "sizes.json"
"""WebDataset's and open_clip's file beside the shards, with the number of pairs of each: {"00000.tar": 9999}."""

LARGEST_SIZES = 64 << 20
"""Bytes."""


class Unreachable(Exception):
    """A remote file cannot be read; says why, in one line."""


def _file_system(url: str) -> tuple[Any, str]:
    """The file system and the path on it. Asked for anew each time: fsspec then gives a forked process its own."""
    try:
        core = importlib.import_module("fsspec.core")
    except ImportError as error:
        raise UserError(
            f"Reading '{url}' needs fsspec. Install it: pip install 'declip[remote]', and what the kind of URL needs "
            "(s3fs, gcsfs, aiohttp for https, huggingface_hub for hf)."
        ) from error
    system, path = core.url_to_fs(url)
    return system, path


def look_up(url: str) -> list[tuple[str, int, str]]:
    """The shards behind a URL: one file, those that fit a pattern, or the .tar files of a folder.

    Returns:
        Of each its URL, its size in bytes, and what changes when it does.

    Raises:
        UserError: Nothing is there, or it cannot be asked for.
    """
    try:
        system, path = _file_system(url)
        if "*" in path or not path_of(url).lower().endswith((".tar", ".gz", ".tgz")):
            pattern = path if "*" in path else f"{path.rstrip('/')}/*.tar"
            found = {system.unstrip_protocol(name): info for name, info in system.glob(pattern, detail=True).items()}
        else:
            found = {url: system.info(path)}
        shards = [(name, _size(info), _version(info)) for name, info in sorted(found.items())]
    except FileNotFoundError as error:
        signed = ", or its signature is no longer valid" if "?" in url else ""
        raise UserError(f"There is no shard '{url}', or its server does not answer{signed}.") from error
    except UserError:
        raise
    except Exception as error:  # each file system has errors of its own
        raise UserError(f"'{url}' cannot be reached: {_line(error)}.") from error
    if not shards:
        raise UserError(f"'{url}' holds no .tar file.")
    return shards


def _size(info: dict[str, Any]) -> int:
    return int(info.get("size") or 0)


def _version(info: dict[str, Any]) -> str:
    return next((f"{name} {info[name]}" for name in VERSIONS if info.get(name)), "")


def fetch(url: str, target: Path, size: int) -> None:
    """Copy a remote file.

    Args:
        url: The file.
        target: Where to; it is not there yet.
        size: The bytes it must have; 0 where the server does not say.

    Raises:
        Unreachable: It cannot be read, or came short, three times.
        OSError: There is no room for it.
    """
    for trial in range(TRIES):
        try:
            system, path = _file_system(url)
            system.get_file(path, str(target))
            came = target.stat().st_size
            if size and came != size:
                raise EOFError(f"{came:,} of {size:,} bytes came")
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
    """What `SIZES` in a remote folder says: the number of pairs by a shard's last name; empty where it is not there.

    Raises:
        UserError: It cannot be reached, or is not such a file.
    """
    url = f"{folder}/{SIZES}"
    try:
        system, path = _file_system(url)
        content = system.cat_file(path, 0, LARGEST_SIZES)
    except (FileNotFoundError, PermissionError):  # S3 forbids what is not there to those who may not list
        return {}
    except UserError:
        raise
    except Exception as error:  # each file system has errors of its own
        raise UserError(f"'{url}' cannot be reached: {_line(error)}.") from error
    try:
        found = json.loads(content)
        if all(isinstance(count, int) and 0 <= count < 2**31 for count in found.values()):
            return found
    except (ValueError, RecursionError, AttributeError):
        pass
    raise UserError(f"'{url}' is not a JSON object with a number of pairs for each shard. Mend or remove it.")


def _line(error: Exception) -> str:
    """The first line of an error, with its kind where it says nothing else."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300].rstrip('.')}" if lines else type(error).__name__
