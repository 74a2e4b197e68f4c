"""The commands ``declip data``: download a built-in set, inspect pairs."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from declip.cli import options as opt
from declip.cli.options import console, file, reads_images, say
from declip.errors import UserError
from declip.io.outputs import check_outputs, write_output

group = typer.Typer(help="Download and inspect pairs.", no_args_is_help=True)


@group.command()
def download(
    name: Annotated[str, Argument(help="a built-in set, such as builtin:emoji")],
    progress: opt.Progress = True,
) -> None:
    """Download a built-in set and render its images, once."""
    from declip.data.sources.download import download as fetch

    say(f"Ready: {fetch(name, progress=progress)}")


PAGE_WIDTH = 100  # columns of the report in a file or a pipe
WITHOUT_MODEL = ("batch_size", "device", "precision")


@group.command()
@partial(reads_images, without=WITHOUT_MODEL)
def inspect(
    source: opt.Source,
    sample: Annotated[int, Option(help="number of pairs to read, chosen at random")] = 2000,
    everything: Annotated[bool, Option("--all", help="read all pairs")] = False,
    check_leakage: Annotated[
        opt.Several, opt.source("test set; find its images among the pairs; repeatable")
    ] = None,
    size: Annotated[int, Option(help="image size in training, in pixels")] = 224,
    batch_size: Annotated[
        int, Option(help="batch size in training, to count false negatives")
    ] = 128,
    json_out: opt.JsonOut = None,
    html_out: Annotated[Path | None, file("also write a page with images", "--html")] = None,
    without_copies: Annotated[
        Path | None, file("list to write (.pairs), of all other pairs; reads all")
    ] = None,
    overwrite: opt.Overwrite = False,
    *,
    reading: dict[str, Any],
) -> None:
    """Inspect pairs before training: sizes, lengths, duplicates, broken pairs, and suggested settings."""
    from declip.data.sources.open import open_source
    from declip.data.sources.pair_list import LIST_KIND, write_others
    from declip.inspection.results import Inspection
    from declip.inspection.scan import inspect_source
    from declip.io.text import plural
    from declip.reports.inspection import page, summary

    check_outputs((json_out, html_out, without_copies), overwrite)
    if without_copies and not (check_leakage and without_copies.suffix == LIST_KIND):
        problem = f"--without-copies {without_copies} lists the pairs that are no copy of one of --check-leakage."
        raise UserError(
            f"{problem} Give a test set with --check-leakage, and a file name that ends in {LIST_KIND}."
        )
    options: dict[str, Any] = {"size": size, "batch_size": batch_size, **reading}
    read = None if everything or without_copies else sample
    opened = open_source(source, reading["columns"])
    inspection = inspect_source(opened, read, check_leakage=check_leakage or (), **options)
    console.print(summary(inspection), width=None if console.is_terminal else PAGE_WIDTH)
    for make, path, option in (
        (Inspection.to_json, json_out, "--json"),
        (page, html_out, "--html"),
    ):
        if path is not None:
            say(f"Written: {write_output(path, make(inspection), option, overwrite)}")
    if without_copies:
        copies = {index for leakage in inspection.leakages for _, index in leakage.copies}
        count = write_others(without_copies, source, reading["columns"], opened, copies)
        say(f"Written: {without_copies}, a list of {plural(count, 'pair')}")
    if inspection.usable == 0:
        raise typer.Exit(2)
