"""Make the emoji cache: fetch the packages, match drawings to concepts, draw them, and write everything once."""

import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import Progress

from declip.data.emoji import DESIGNS, EMOJI, IMAGES, Design
from declip.data.emoji_concepts import TEXT_PACKAGES, Concept, read_concepts, read_json, tidy
from declip.data.emoji_groups import group_of, is_held_out
from declip.data.emoji_icons import IconSet, charted_names, match
from declip.data.npm import fetch_packages
from declip.data.picture_build import progress_bar, version_of, write_record
from declip.data.picture_cache import TABLE
from declip.data.rendering import INVISIBLE, OVERSIZE, Draw, drawer, rasterise
from declip.errors import UserError
from declip.io.atomic import atomic_write

SIDE = 96
"""Pixels. A view of a 64 px model that shows 44 % of the drawing still has a pixel of its own for each of the model's;
smaller blurs the crops, larger only costs disk (28 kB a drawing now)."""

Matches = dict[Design, dict[str, str]]
"""Name of the drawing by the concept's code, for each designer."""


def prepare_emoji(cache: str | Path | None = None, progress: bool = True) -> Path:
    """Fetch and draw the emoji, unless a whole cache is there already.

    Args:
        cache: Folder of the cache; None for the usual one.
        progress: Show a progress bar.

    Returns:
        The folder that holds them.

    Raises:
        UserError: No network, no npm, no resvg-py, no room or no right to write.
    """
    folder = EMOJI.folder(cache)
    try:
        EMOJI.check(folder, images_too=True)
    except UserError:
        draw = drawer()
        with tempfile.TemporaryDirectory() as packages, progress_bar(progress) as bar:
            versions = TEXT_PACKAGES | {design.package: design.version for design in DESIGNS}
            step = bar.add_task(f"fetching {len(versions)} packages", total=None)
            fetch_packages(versions, Path(packages))
            bar.remove_task(step)
            build_emoji(Path(packages), folder, draw, bar=bar)
    return folder


def build_emoji(packages: Path, folder: Path, draw: Draw, bar: Progress | None = None) -> None:
    """Make the cache from unpacked packages; it appears whole or not at all.

    Args:
        packages: Folder of unpacked packages, by name.
        folder: What to make; what was there is replaced at the end.
        draw: From SVG to PNG.
        bar: Progress bar to report to.
    """
    concepts, layers = read_concepts(packages)
    sets = {design: IconSet(packages / design.package) for design in DESIGNS}
    layers.insert(1, charted_names(sets.values(), concepts))
    found = {design: match(icons, concepts, layers) for design, icons in sets.items()}
    _name_by_designers(concepts, sets, found)
    tidy(concepts)
    drawings = [(d, concepts[c], names[c]) for d, names in found.items() for c in concepts if c in names]
    step = None if bar is None else bar.add_task("drawing", total=len(drawings))
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    with atomic_write(folder) as beside:
        beside.mkdir()
        with (beside / IMAGES).open("wb") as file:
            # Written in order and not through a memory map: on a full disk a map dies of SIGBUS, this with a message.
            shape = (len(drawings), SIDE, SIDE, 3)
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for index, (design, concept, name) in enumerate(drawings):
                pixels = rasterise(sets[design].svg(name, OVERSIZE * SIDE), draw, SIDE)
                file.write(pixels.tobytes())
                key = f"{design.key}/{concept.code}"
                if pixels.min() > INVISIBLE:
                    left_out.append(key)
                else:
                    rows.append(
                        {"key": key, "image": index, "design": design.key, "drawing": name, **_meaning(concept)}
                    )
                if bar is not None and step is not None:
                    bar.advance(step)
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), beside / TABLE)
        _write_record(beside, packages, rows, left_out)
        EMOJI.check(beside, images_too=True)


SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image", pa.int64()),
        ("design", pa.string()),
        ("drawing", pa.string()),
        ("code", pa.string()),
        ("name", pa.string()),
        ("category", pa.string()),
        ("group", pa.string()),
        ("held_out", pa.bool_()),
        ("captions", pa.list_(pa.string())),
        ("keywords", pa.list_(pa.string())),
    ]
)


def _meaning(concept: Concept) -> dict[str, Any]:
    """The columns that all drawings of a concept share."""
    group = group_of(concept.name)
    return {
        "code": concept.code,
        "name": concept.name,
        "category": concept.category,
        "group": group,
        "held_out": is_held_out(group),
        "captions": [concept.name, *concept.names],
        "keywords": concept.keywords,
    }


def _name_by_designers(concepts: dict[str, Concept], sets: dict[Design, IconSet], found: Matches) -> None:
    """Add the names that the designers give their drawings of each concept."""
    for design, icons in sets.items():
        if design.spelled:
            for code, drawing in found[design].items():
                names = (name.replace("-", " ") for name in (drawing, *icons.other_names(drawing)))
                concepts[code].names += [name.replace("flag for flag", "flag for") for name in names]


def _write_record(folder: Path, packages: Path, rows: list[dict[str, Any]], left_out: list[str]) -> None:
    """Write what the cache was made from and the licences."""
    drawn = Counter(row["design"] for row in rows)
    origins = {}
    for name in (*TEXT_PACKAGES, *(design.package for design in DESIGNS)):
        origins[name] = _origin(packages / name)
        kept = folder / "licences" / name.replace("/", "-")
        kept.mkdir(parents=True)
        for pattern in ("LICEN[CS]E*", "README*", "info.json", "package.json"):
            for path in sorted((packages / name).glob(pattern)):
                shutil.copyfile(path, kept / path.name)
    manifest = {
        "layout": EMOJI.layout,
        "side": SIDE,
        "pairs": len(rows),
        "drawn": dict(drawn),
        "left_out": left_out,
        "packages": origins,
        "resvg_py": version_of("resvg-py"),
    }
    write_record(folder, manifest, _notice(origins, drawn))


def _origin(package: Path) -> dict[str, str]:
    """Version, licence and author of a package, as it tells them itself."""
    told = read_json(package / "package.json")
    info = read_json(package / "info.json") if (package / "info.json").exists() else {}
    licence, author = info.get("license", {}), info.get("author", {})
    return {
        "version": told["version"],
        "licence": licence.get("spdx") or told.get("license", ""),
        "licence_url": licence.get("url", ""),
        "author": author.get("name", ""),
        "source": author.get("url", "") or told.get("homepage", ""),
    }


def _notice(origins: dict[str, dict[str, str]], drawn: Counter[str]) -> str:
    lines = ["The drawings in this folder belong to others. Show these lines wherever you show a drawing.", ""]
    for design in DESIGNS:
        origin = origins[design.package]
        lines.append(
            f"{design.credit}: {drawn[design.key]} drawings, rendered at {SIDE} px over white, margins cut off."
        )
        lines.append(f"  from {origin['source']} through {design.package} {origin['version']}")
        lines.append(f"  licence: {origin['licence']} {origin['licence_url']}")
    lines += ["", "Names and keywords:"]
    for name in TEXT_PACKAGES:
        lines.append(f"  {name} {origins[name]['version']}, {origins[name]['licence']}, {origins[name]['source']}")
    return "\n".join(lines) + "\n"
