"""The commands ``declip data``: download a built-in set, write shards, inspect pairs."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from declip.cli import options as opt
from declip.cli.options import console, file, reads_images, say
from declip.errors import UserError
from declip.io.outputs import check_outputs, write_output

group = typer.Typer(help="Download, shard and inspect pairs.", no_args_is_help=True)


@group.command()
def download(
    name: Annotated[str, Argument(help="a built-in set, such as builtin:emoji")],
    cache: Annotated[
        Path | None, file("cache folder; default: DECLIP_CACHE, or ~/.cache/declip", metavar="DIR")
    ] = None,
    quiet: opt.Quiet = False,
) -> None:
    """Download a built-in set and render its images, once."""
    from declip.data.builtin.sets import download as fetch

    say(f"Ready: {fetch(name, cache, progress=not quiet)}")


PAGE_WIDTH = 100  # columns of the report in a file or a pipe
WITHOUT_MODEL = ("batch_size", "device", "precision")


@group.command()
@partial(reads_images, without=WITHOUT_MODEL)
def shard(
    source: opt.Source,
    out: Annotated[Path, file("folder to write the tar shards to", metavar="DIR")],
    size: Annotated[int, Option(help="pixels of the shorter side; smaller images are not enlarged")] = 256,
    shard_pairs: Annotated[int, Option(help="pairs per shard")] = 10_000,
    exclude: Annotated[Path | None, file("list of pairs to leave out, from `declip app` or `data inspect`")] = None,
    *,
    reading: dict[str, Any],
) -> None:
    """Shrink the images of a source and write tar shards. Run the command again to continue after an interruption."""
    from declip.data.prepare import shard_source

    made = shard_source(source, out, size=size, shard_pairs=shard_pairs, exclude=exclude, **reading)
    say(made.summary())


@group.command()
@partial(reads_images, without=WITHOUT_MODEL)
def inspect(
    source: opt.Source,
    sample: Annotated[int, Option(help="number of pairs to read, chosen at random")] = 2000,
    everything: Annotated[bool, Option("--all", help="read all pairs")] = False,
    check_leakage: Annotated[opt.Several, opt.source("test set; find its images among the pairs; repeatable")] = None,
    size: Annotated[int, Option(help="image size in training, in pixels")] = 224,
    batch_size: Annotated[int, Option(help="batch size in training, to count false negatives")] = 128,
    seed: Annotated[int, Option(help="seed of the sample and of the examples")] = 0,
    json_out: opt.JsonOut = None,
    html_out: Annotated[Path | None, file("also write a page with images", "--html")] = None,
    exclude: Annotated[Path | None, file("list to write, of the copies among the pairs; reads all pairs")] = None,
    *,
    reading: dict[str, Any],
) -> None:
    """Inspect pairs before training: sizes, lengths, duplicates, broken pairs, and suggested settings."""
    from declip.inspection.scan import Inspection, inspect_source
    from declip.reports.inspection import exclusions, page, summary

    check_outputs((json_out, html_out, exclude))
    if exclude and not check_leakage:
        raise UserError("--exclude lists the copies that --check-leakage finds. Give a test set with --check-leakage.")
    options: dict[str, Any] = {"seed": seed, "size": size, "batch_size": batch_size, **reading}
    read = None if everything or exclude else sample
    inspection = inspect_source(source, read, check_leakage=check_leakage or (), **options)
    console.print(summary(inspection), width=None if console.is_terminal else PAGE_WIDTH)
    outputs = ((Inspection.to_json, json_out, "--json"), (page, html_out, "--html"), (exclusions, exclude, "--exclude"))
    for make, path, option in outputs:
        if path is not None:
            say(f"Written: {write_output(path, make(inspection), option)}")
    if inspection.usable == 0:
        raise typer.Exit(2)
