"""Make the icons' cache: fetch the packages, choose the icons, draw them, and write everything once."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.progress import Progress

from declip.data.emoji_concepts import TEXT_PACKAGES, read_json
from declip.data.emoji_icons import IconSet
from declip.data.icons import ICONS
from declip.data.icons_select import PACKAGE, TAGS, Icon, choose
from declip.data.icons_sets import licence_of, split_of
from declip.data.npm import fetch_packages
from declip.data.picture_build import progress_bar, version_of, write_pictures, write_record
from declip.data.rendering import OVERSIZE, Draw, drawer, rasterise
from declip.errors import UserError
from declip.io.atomic import atomic_write

SIDE = 64
"""Pixels. Icons are plain: at 64 px their lines are one to five pixels wide."""

VERSIONS = {PACKAGE: "2.2.535", **TAGS, **TEXT_PACKAGES}
"""Version by package; the names of icons are the classes of the test, and so must not change under it."""

PATIENCE = 3600
"""Seconds to fetch 112 MB."""

COLUMNS = [(name, pa.string()) for name in ("split", "set", "title", "author", "licence", "name", "category")]


def prepare_icons(cache: str | Path | None = None, progress: bool = True) -> Path:
    """Fetch and draw the icons, unless a whole cache is there already.

    Args:
        cache: Folder of the cache; None for the usual one.
        progress: Show a progress bar.

    Returns:
        The folder that holds them.

    Raises:
        UserError: No network, no npm, no resvg-py, no room or no right to write.
    """
    folder = ICONS.folder(cache)
    try:
        ICONS.check(folder, images_too=True)
    except UserError:
        draw = drawer()
        with tempfile.TemporaryDirectory() as packages, progress_bar(progress) as bar:
            step = bar.add_task(f"fetching {len(VERSIONS)} packages", total=None)
            fetch_packages(VERSIONS, Path(packages), PATIENCE)
            bar.remove_task(step)
            build_icons(Path(packages), folder, draw, bar=bar)
    return folder


def build_icons(packages: Path, folder: Path, draw: Draw, bar: Progress | None = None) -> None:
    """Make the cache from unpacked packages; it appears whole or not at all.

    Args:
        packages: Folder of unpacked packages, by name.
        folder: What to make; what was there is replaced at the end.
        draw: From SVG to PNG.
        bar: Progress bar to report to.
    """
    chosen, left_out = choose(packages)
    infos = read_json(packages / PACKAGE / "collections.json")
    total = sum(map(len, chosen.values()))
    with atomic_write(folder) as beside:
        drawn = _drawn(packages / PACKAGE / "json", chosen, infos, draw)
        rows, dropped = write_pictures(beside, drawn, COLUMNS, total, bar)
        _write_record(beside, packages, rows, infos, {"sets": left_out, "drawings": dict(dropped)})
        ICONS.check(beside, images_too=True)


def _drawn(
    folder: Path, chosen: Mapping[str, list[Icon]], infos: Mapping[str, Any], draw: Draw
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Each icon's row and pixels.

    Held-out sets first: of two equal drawings the first is kept, so that training has none of the test's.
    """
    for prefix in sorted(chosen, key=lambda prefix: (("test", "validation", "train").index(split_of(prefix)), prefix)):
        icons = IconSet(folder, f"{prefix}.json")
        for icon in chosen[prefix]:
            yield _row(icon, infos[prefix]), rasterise(icons.svg(icon.drawing, OVERSIZE * SIDE), draw, SIDE)


def _row(icon: Icon, info: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "key": f"{icon.set}/{icon.drawing}",
        "split": split_of(icon.set),
        "set": icon.set,
        "title": info["name"],
        "author": info.get("author", {}).get("name", ""),
        "licence": licence_of(info),
        "name": icon.name,
        "category": icon.category,
        "captions": [icon.name, *icon.others],
        "keywords": icon.keywords,
    }


def _write_record(
    folder: Path, packages: Path, rows: list[dict[str, Any]], infos: Mapping[str, Any], left_out: Mapping[str, Any]
) -> None:
    """Write what the cache was made from and the licences."""
    for name in VERSIONS:
        kept = folder / "licences" / name.replace("/", "-")
        kept.mkdir(parents=True)
        for pattern in ("LICEN[CS]E*", "README*", "readme*", "collections.json", "package.json"):
            for path in sorted((packages / name).glob(pattern)):
                shutil.copyfile(path, kept / path.name)
    drawn = Counter(row["set"] for row in rows)
    manifest = {
        "layout": ICONS.layout,
        "side": SIDE,
        "pairs": len(rows),
        "splits": dict(Counter(row["split"] for row in rows)),
        "drawn": {prefix: {"images": n, "licence": licence_of(infos[prefix])} for prefix, n in drawn.items()},
        "left_out": left_out,
        "packages": {name: read_json(packages / name / "package.json")["version"] for name in VERSIONS},
        "resvg_py": version_of("resvg-py"),
    }
    write_record(folder, manifest, _notice(infos, drawn))


def _notice(infos: Mapping[str, Any], drawn: Counter[str]) -> str:
    lines = [
        "The drawings in this folder belong to others. Show the line of its set wherever you show a drawing.",
        f"All were rendered at {SIDE} px over white, margins cut off, from {PACKAGE} {VERSIONS[PACKAGE]}.",
        "",
    ]
    for prefix, count in sorted(drawn.items()):
        info = infos[prefix]
        licence, author = info.get("license", {}), info.get("author", {})
        lines.append(f"{info['name']} by {author.get('name', '')}, {licence_of(info)}: {count} drawings")
        lines.append(f"  from {author.get('url', '')}, licence: {licence.get('url', '')}")
    lines += ["", "Keywords: " + ", ".join(f"{name} {version}" for name, version in TAGS.items()) + " (ISC, MIT)"]
    return "\n".join(lines) + "\n"
