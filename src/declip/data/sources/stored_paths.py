"""Paths in files of a project, such as an index or a list of pairs, that stay valid when the project moves."""

import os
from pathlib import Path

from declip.data.sources.shard_files import absolute, names_shards


def stored_path(given: object, folder: Path) -> str:
    """Path of a source or a model as a file in `folder` stores it; empty for a Python object.

    It is relative to the folder if both are below the working directory, else absolute.
    """
    if not isinstance(given, str | Path) or not str(given):
        return ""
    return relative(absolute(given), folder)


def relative(path: str, folder: Path) -> str:
    """A path as `stored_path` stores it, without resolving links; anything but an absolute path stays."""
    project, place = os.getcwd(), str(folder.resolve())
    inside = all(os.path.isabs(one) and os.path.commonpath([one, project]) == project for one in (path, place))
    return os.path.relpath(path, place) if inside and not path.startswith(place + os.sep) else path


def resolve(path: str, folder: Path) -> str:
    """The absolute path of what `stored_path` stored; URLs and names such as builtin:emoji stay."""
    return os.path.normpath(folder.resolve() / path) if path.startswith(os.pardir + os.sep) else path


def is_missing(path: str) -> bool:
    """Whether this is an absolute path that does not exist, unlike a name such as open_clip:MODEL/TAG."""
    return os.path.isabs(path) and not names_shards(path) and not os.path.exists(path)
