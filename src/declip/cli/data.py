"""The commands ``declip data``: download a built-in set, write shards, inspect pairs."""

from pathlib import Path
from typing import Annotated

import typer

from declip.cli.options import (
    CaptionColumn,
    ImageColumn,
    ImageRoot,
    JsonOut,
    Quiet,
    Workers,
    check_source,
    console,
    file,
    say,
)
from declip.data.columns import Columns
from declip.errors import UserError
from declip.io.atomic import write_text

group = typer.Typer(help="Download, shard and inspect pairs.", no_args_is_help=True)


@group.command()
def download(
    name: Annotated[str, typer.Argument(help="a built-in set, such as builtin:emoji")],
    cache: Annotated[
        Path | None, file("where the set goes; default: DECLIP_CACHE or the user's cache", metavar="DIR")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Download and render a built-in set, once."""
    from declip.data.builtin import download as fetch

    say(f"Ready: {fetch(name, cache, progress=not quiet)}")


@group.command()
def shard(
    source: Annotated[str, typer.Argument(help="a table, a folder, tar shards, or builtin:NAME")],
    out: Annotated[Path, file("folder to write the tar shards to", metavar="DIR")],
    size: Annotated[int, typer.Option(help="largest shorter side of an image, in pixels")] = 256,
    shard_pairs: Annotated[int, typer.Option(help="pairs per shard")] = 10_000,
    exclude: Annotated[Path | None, file("list of pairs to leave out, as `declip app` saves it")] = None,
    workers: Workers = None,
    image_column: ImageColumn = "image",
    caption_column: CaptionColumn = "caption",
    image_root: ImageRoot = None,
    quiet: Quiet = False,
) -> None:
    """Shrink a source's images once and write them as tar shards; the same command continues."""
    check_source(source, "SOURCE")
    from declip.data.prepare import shard_source

    prepared = shard_source(
        source,
        out,
        size=size,
        shard_pairs=shard_pairs,
        workers=workers,
        columns=Columns(image_column, caption_column, root=image_root),
        exclude=exclude,
        progress=not quiet,
    )
    say(prepared.summary())


@group.command()
def inspect(
    source: Annotated[str, typer.Argument(help="a table, a folder, tar shards, or builtin:NAME")],
    sample: Annotated[int, typer.Option(help="pairs to read, spread over the source")] = 2000,
    everything: Annotated[bool, typer.Option("--all", help="read every pair instead")] = False,
    check_leakage: Annotated[
        list[str] | None, typer.Option(metavar="SET", help="test set whose images are looked for; repeatable")
    ] = None,
    size: Annotated[int, typer.Option(help="image size of the training, in pixels")] = 224,
    batch_size: Annotated[int, typer.Option(help="batch size of the training, for equal captions in a batch")] = 128,
    seed: Annotated[int, typer.Option(help="seed of the sample and of the examples shown")] = 0,
    workers: Workers = None,
    image_column: ImageColumn = "image",
    caption_column: CaptionColumn = "caption",
    image_root: ImageRoot = None,
    json_out: JsonOut = None,
    html_out: Annotated[Path | None, file("also write a page with images", "--html")] = None,
    exclude: Annotated[Path | None, file("list the copies that --check-leakage finds; reads all pairs")] = None,
    quiet: Quiet = False,
) -> None:
    """Inspect pairs before training: sizes, lengths, duplicates, broken pairs, and what follows from them."""
    for name in (source, *(check_leakage or ())):
        check_source(name, "SOURCE" if name == source else "--check-leakage")
    from declip.inspection import Inspection, inspect_source
    from declip.reports.inspection import exclusions, page, summary
    from declip.reports.page import check_writable

    check_writable((json_out, html_out, exclude))
    if exclude and not check_leakage:
        raise UserError("--exclude lists the copies that --check-leakage finds. Give a test set with --check-leakage.")
    inspection = inspect_source(
        source,
        None if everything or exclude else sample,
        seed=seed,
        workers=workers,
        size=size,
        batch_size=batch_size,
        check_leakage=check_leakage or (),
        columns=Columns(image_column, caption_column, root=image_root),
        progress=not quiet,
    )
    console.print(summary(inspection))
    for make, path in ((Inspection.to_json, json_out), (page, html_out), (exclusions, exclude)):
        if path is not None:
            write_text(path, make(inspection), "choose another place")
            say(f"Written: {path}")
    if inspection.usable == 0:
        raise typer.Exit(2)
