"""The command ``declip choose``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from declip.cli.options import check_source, file, reads_images, say, write_sheet
from declip.io.atomic import check_writable
from declip.io.csv_file import csv_path
from declip.recipe.starts import check_model


@reads_images
def choose(
    images: Annotated[str, typer.Argument(help="a folder of images, a table, or an index")],
    model: Annotated[str, typer.Option(help="a run folder, a checkpoint, a weights file, or open_clip:MODEL/TAG")],
    out: Annotated[Path, file("table to write, with an empty column for captions")],
    count: Annotated[int, typer.Option(min=1, help="number of images to choose")] = 200,
    have: Annotated[
        str | None, typer.Option(metavar="PAIRS", help="existing pairs; their images count as chosen")
    ] = None,
    index: Annotated[
        Path | None, file("folder of the index; default: in indices/, named after the source", metavar="DIR")
    ] = None,
    sheet_out: Annotated[Path | None, file("also write an image of the chosen images (PNG)", "--contact-sheet")] = None,
    seed: Annotated[int, typer.Option(min=0, help="seed of the sample, if there are more than 20,000 images")] = 0,
    *,
    reading: dict[str, Any],
) -> None:
    """Choose the images that you should caption next, by their features; the most useful come first."""
    # Before torch is imported, which takes seconds.
    check_model(model)
    check_source(images, "IMAGES")
    if have is not None:
        check_source(have, "--have")
    check_writable((csv_path(out), sheet_out))
    from declip.search.choose import choose as run_choice

    choice = run_choice(model, images, count, have=have, out=out, index=index, seed=seed, **reading)
    say(f"{choice.summary()}\nWritten: {out}")
    if sheet_out is not None:
        from declip.reports.sheets import search_sheet

        title = f"The first to caption: {out.name}"
        write_sheet(sheet_out, search_sheet(choice.index, choice.images, title, order="in their order"))
