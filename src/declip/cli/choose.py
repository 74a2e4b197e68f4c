"""The command ``declip choose``."""

from pathlib import Path
from typing import Annotated

import typer

from declip.cli.options import (
    BatchSize,
    CaptionColumn,
    Device,
    ImageColumn,
    ImageRoot,
    Precision,
    Quiet,
    Workers,
    check_source,
    file,
    say,
)
from declip.data.pair import Columns
from declip.io.atomic import atomic_write, check_writable
from declip.io.csv_file import csv_path
from declip.recipe.starts import check_model


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
    batch_size: BatchSize = 256,
    workers: Workers = None,
    image_column: ImageColumn = "image",
    caption_column: CaptionColumn = "caption",
    image_root: ImageRoot = None,
    device: Device = "auto",
    precision: Precision = "auto",
    quiet: Quiet = False,
) -> None:
    """Choose the images that you should caption next, by their features; the most useful come first."""
    # Before torch is imported, which takes seconds.
    check_model(model)
    check_source(images, "IMAGES")
    if have is not None:
        check_source(have, "--have")
    check_writable((csv_path(out), sheet_out))
    from declip.search.choose import choose as run_choice

    choice = run_choice(
        model,
        images,
        count,
        have=have,
        out=out,
        index=index,
        columns=Columns(image_column, caption_column or None, root=image_root),
        device=device,
        precision=precision,
        seed=seed,
        batch_size=batch_size,
        workers=workers,
        progress=not quiet,
    )
    say(f"{choice.summary()}\nWritten: {out}")
    if sheet_out is not None:
        from declip.reports.sheets import search_sheet

        drawn = search_sheet(choice.index, choice.images, f"The first to caption: {out.name}", order="in their order")
        with atomic_write(sheet_out, "choose another file with --contact-sheet") as target:
            drawn.save(target, "PNG")
        say(f"Written: {sheet_out}")
