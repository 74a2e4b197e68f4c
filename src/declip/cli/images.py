"""The commands that read images with a model: ``declip choose``, ``classify`` and ``explain``."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from declip.cli import options as opt
from declip.cli.options import existing, expand, file, reads_images, say, write_sheet
from declip.errors import UserError
from declip.io.atomic import check_writable, csv_path
from declip.search.class_names import read_options


@reads_images
def choose(
    images: Annotated[str, typer.Argument(callback=existing, help="a folder of images, a table, or an index")],
    model: opt.ModelOption,
    out: Annotated[Path, file("table to write, with an empty column for captions")],
    count: Annotated[int, typer.Option(min=1, help="number of images to choose")] = 200,
    have: Annotated[str | None, opt.source("existing pairs; their images count as chosen", metavar="PAIRS")] = None,
    index: opt.IndexFolder = None,
    sheet_out: opt.SheetOut = None,
    seed: Annotated[int, typer.Option(min=0, help="seed of the sample, if there are more than 20,000 images")] = 0,
    *,
    reading: dict[str, Any],
) -> None:
    """Choose the images that you should caption next, by their features; the most useful come first."""
    check_writable((csv_path(out), sheet_out))
    from declip.search.choose import choose as run_choice

    choice = run_choice(model, images, count, have=have, out=out, index=index, seed=seed, **reading)
    say(f"{choice.summary()}\nWritten: {out}")
    if sheet_out is not None:
        from declip.reports.sheets import search_sheet

        title = f"The first to caption: {out.name}"
        write_sheet(sheet_out, search_sheet(choice.index, choice.images, title, order="in their order"))


@partial(reads_images, captions=False)
def classify(
    images: Annotated[str, typer.Argument(help="a folder, an image, a pattern in quotes, a table, or tar shards")],
    model: opt.ModelOption,
    classes: Annotated[
        str | None, typer.Option(metavar="FILE|LIST", help="a file with one class per line, or a list: cat,dog")
    ] = None,
    examples: Annotated[
        str | None, opt.source("labeled images: a folder per class, or a table", metavar="FOLDER|TABLE")
    ] = None,
    label_column: Annotated[str | None, typer.Option(help="table column of classes in the examples")] = None,
    head: Annotated[Path | None, file("a classifier that --save wrote, instead of --classes and --examples")] = None,
    save: Annotated[Path | None, file("save the classifier that is fitted to the examples")] = None,
    reject: Annotated[bool, typer.Option("--reject", help="assign images of other classes to 'none of these'")] = False,
    out: Annotated[Path | None, file("write the probability of every class to this .csv file")] = None,
    templates: Annotated[str, typer.Option(help="name of a template set, or a template with {}")] = "plain",
    *,
    reading: dict[str, Any],
) -> None:
    """Classify images into classes by their names, by examples, or both. Without --out, print a line per image."""
    if save is not None and examples is None:
        raise UserError("--save requires --examples: it saves the classifier that is fitted to them.")
    names = read_options(classes, examples, head, reject)
    check_writable((save, out and csv_path(out)))
    from declip.search.classify import classify as run_classification

    fitted: dict[str, Any] = {"examples": examples, "head": head, "reject": reject, "label_column": label_column}
    fitted |= {"templates": templates, "out": out, "on_prediction": _print if out is None else None}
    _print_result(run_classification(model, images, names, **fitted, **reading), save, out)


def _print_result(result: Any, save: Path | None, out: Path | None) -> None:
    """Print what was fitted, saved, written and left out, and save the classifier."""
    if result.classifier is not None:
        typer.echo(result.classifier.summary(), err=True)
        if save is not None:
            result.classifier.save(save)
            typer.echo(f"Written: {save}", err=True)
    if out is None:
        for line in result.skipped.lines():
            typer.echo(f"Left out: {line}", err=True)
    else:
        say(f"{result.summary()}\nWritten: {out}")


def _print(prediction: Any) -> None:
    """Print a prediction as a row of a table."""
    from declip.data.pair import printable

    typer.echo(f"{printable(prediction.image)}\t{prediction.best}\t{prediction.probability:.4f}")


def explain(
    model: opt.Model,
    image: Annotated[Path, typer.Argument(parser=expand, metavar="IMAGE", help="an image file")],
    text: Annotated[str, typer.Argument(help="what to look for in the image")],
    out: Annotated[Path, file("image to write: a heat map over the given one (PNG)")],
    size: Annotated[int | None, typer.Option(min=8, help="pixels of the sides that the model sees")] = None,
    device: opt.Device = "auto",
) -> None:
    """Show where a text fits in an image: draw a heat map over the image."""
    # --- checks that need no torch, whose import takes seconds
    check_writable((out,))
    if not image.is_file():
        raise UserError(f"There is no image '{image}'. Give a file.")
    if not text.strip():
        raise UserError("The text is empty. Give what to look for, such as 'a red apple'.")

    from declip.data.images.decode import decode
    from declip.data.pair import BrokenPair
    from declip.interchange.read import load
    from declip.io.atomic import atomic_write
    from declip.reports.sheets import heat_map

    try:
        picture = decode(image, image.name)
    except BrokenPair as error:
        raise UserError(f"'{image}' cannot be used: {error}. Give another image.") from error
    found = load(model, device).similarity_map(picture, text, size)
    top, left = divmod(int(found.argmax()), found.shape[1])
    with atomic_write(out, "choose another file with --out") as target:
        heat_map(picture, found.numpy()).save(target, "PNG")
    say(
        f"Most similar at {left}, {top} of {picture.width} × {picture.height} pixels: {found.max():.2f}, "
        f"mean {found.mean():.2f}.\nWritten: {out}"
    )
