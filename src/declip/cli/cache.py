"""The commands ``declip cache show`` and ``declip cache clear``."""

from itertools import groupby
from typing import Annotated

import typer

from declip.cli.options import say

group = typer.Typer(help="Show and clear the cache folder: features of frozen towers, shards, built-in sets.")


@group.command()
def show() -> None:
    """Print the size of each folder of the cache and when it was last used."""
    from datetime import datetime

    from declip.io.atomic import CACHE_VARIABLE, cache_folder
    from declip.io.cache import cache_entries

    say(f"{cache_folder()} (set {CACHE_VARIABLE} to move it)")
    for name, entries in groupby(cache_entries(), key=lambda entry: entry.path.parent.name):
        found = list(entries)
        used = datetime.fromtimestamp(max(entry.used for entry in found)).strftime("%Y-%m-%d")
        say(f"{name:<12} {sum(entry.size for entry in found) / 1e6:>12,.1f} MB  {len(found):>6,} entries  {used}")


@group.command()
def clear(
    folder: Annotated[
        str | None, typer.Argument(help="name of one folder; default: features, shards, heads and tables")
    ] = None,
) -> None:
    """Remove cached files that can be computed or downloaded again. Files in use stay."""
    from declip.io.cache import clear_cache

    say(f"{clear_cache(folder) / 1e6:,.1f} MB freed.")
