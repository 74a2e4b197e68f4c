"""Download a source of a plugin."""

from pathlib import Path

from declip.errors import UserError, unknown
from declip.io.plugins import BUILTIN, check_builtin, load_plugin, names_plugin, plugins


def download(name: str, cache: Path | None = None, progress: bool = True) -> Path:
    """Download a source of a plugin, such as builtin:emoji, unless it is there, and return its folder.

    Args:
        name: KIND:REST, where KIND is an entry point in the group ``declip.downloads``; without a
            colon, a built-in set.
        cache: Cache folder; None: the default one.
        progress: Whether progress is shown on standard error.
    """
    kind, colon, rest = name.partition(":")
    if not names_plugin(name) and Path(name).expanduser().exists():
        problem = f"'{name}' is not a built-in set but a path"
        raise UserError(f"{problem}, which every command takes without a download.")
    if not colon:
        kind = BUILTIN
        rest = name
    if kind != BUILTIN and kind not in plugins("downloads"):
        raise unknown("source to download", kind, [BUILTIN, *plugins("downloads")])
    check_builtin(f"{kind}:{rest}")
    return load_plugin("downloads", kind)(rest, cache, progress)
