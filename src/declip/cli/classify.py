"""The command ``declip classify``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from declip.cli.options import BatchSize, Device, ImageColumn, ImageRoot, Precision, Quiet, check_model, file, say
from declip.data.columns import Columns


def classify(
    images: Annotated[str, typer.Argument(help="a folder, an image, a pattern in quotes, a table, or tar shards")],
    classes: Annotated[
        str, typer.Option(metavar="FILE|LIST", help="a file with one class per line, or a list: cat,dog")
    ],
    model: Annotated[str, typer.Option(help="a run folder, a checkpoint, a weights file, or open_clip:MODEL/TAG")],
    out: Annotated[Path | None, file("write the probability of every class to this .csv file")] = None,
    templates: Annotated[str, typer.Option(help="name of a template set, or a template with {}")] = "plain",
    batch_size: BatchSize = 256,
    workers: Annotated[int, typer.Option(min=0, help="processes that read images; 0: the main process")] = 0,
    image_column: ImageColumn = "image",
    image_root: ImageRoot = None,
    device: Device = "auto",
    precision: Precision = "auto",
    quiet: Quiet = False,
) -> None:
    """Classify images into classes that you name. Without --out, print one line per image, separated by tabs."""
    # Before torch is imported, which takes seconds.
    check_model(model)
    from declip.data.pair import printable
    from declip.search.classify import classify as run_classification

    def print_line(one: Any) -> None:
        typer.echo(f"{printable(one.image)}\t{one.best}\t{one.probability:.4f}")

    result = run_classification(
        model,
        images,
        classes,
        templates=templates,
        out=out,
        batch_size=batch_size,
        workers=workers,
        columns=Columns(image_column, caption=None, root=image_root),
        device=device,
        precision=precision,
        progress=not quiet,
        on_prediction=print_line if out is None else None,
    )
    if out is None:
        for line in result.skipped.lines():
            typer.echo(f"Left out: {line}", err=True)
    else:
        say(f"{result.summary()}\nWritten: {out}")
