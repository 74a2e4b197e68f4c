"""The command ``declip classify``."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from declip.cli.options import check_source, file, reads_images, say
from declip.errors import UserError
from declip.io.atomic import check_writable
from declip.io.csv_file import csv_path
from declip.recipe.starts import check_model
from declip.search.class_names import read_options


@partial(reads_images, captions=False)
def classify(
    images: Annotated[str, typer.Argument(help="a folder, an image, a pattern in quotes, a table, or tar shards")],
    model: Annotated[str, typer.Option(help="a run folder, a checkpoint, a weights file, or open_clip:MODEL/TAG")],
    classes: Annotated[
        str | None, typer.Option(metavar="FILE|LIST", help="a file with one class per line, or a list: cat,dog")
    ] = None,
    examples: Annotated[
        str | None, typer.Option(metavar="FOLDER|TABLE", help="labeled images: a folder per class, or a table")
    ] = None,
    label_column: Annotated[str | None, typer.Option(help="table column of classes in the examples")] = None,
    head: Annotated[Path | None, file("a classifier that --save wrote, instead of --classes and --examples")] = None,
    save: Annotated[Path | None, file("save the classifier that is fitted to the examples")] = None,
    out: Annotated[Path | None, file("write the probability of every class to this .csv file")] = None,
    templates: Annotated[str, typer.Option(help="name of a template set, or a template with {}")] = "plain",
    *,
    reading: dict[str, Any],
) -> None:
    """Classify images into classes by their names, by examples, or both. Without --out, print a line per image."""
    # Before torch is imported, which takes seconds.
    check_model(model)
    if save is not None and examples is None:
        raise UserError("--save requires --examples: it saves the classifier that is fitted to them.")
    names = read_options(classes, examples, head)
    check_writable((save, out and csv_path(out)))
    if examples is not None:
        check_source(examples, "--examples")
    from declip.search.classify import classify as run_classification

    fitted: dict[str, Any] = {"examples": examples, "head": head, "label_column": label_column}
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
