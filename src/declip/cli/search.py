"""The commands that use a model: embed, search, index, app, choose and classify."""

import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from typer import Argument, Option

from declip.cli import options as opt
from declip.cli.options import (
    console,
    existing,
    expand,
    file,
    known,
    reads_images,
    say,
    write_image,
)
from declip.errors import UserError, check_installed
from declip.io.atomic import csv_path
from declip.io.outputs import (
    INDEX_FILE,
    check_outputs,
    csv_table,
    png_path,
    result_json,
    write_output,
)

if TYPE_CHECKING:
    from declip.search.index import Hit

index = typer.Typer(
    help="Show an index of images, or make one of Parquet files.", no_args_is_help=True
)


INDEX: dict[str, Any] = {
    "metavar": "INDEX",
    "parser": expand,
    "help": "a folder written by `declip embed`",
}
Folder = Annotated[Path, Argument(**INDEX)]


@reads_images
def embed(
    model: opt.Model,
    source: opt.Source,
    out: Annotated[Path, opt.folder("folder of the index", INDEX_FILE)],
    captions: Annotated[
        bool, Option("--captions", help="also store a vector of the captions of each image")
    ] = False,
    dtype: Annotated[
        Literal["float16", "float32"], Option(help="type of the stored vectors")
    ] = "float16",
    overwrite: Annotated[
        bool, Option("--overwrite", help="also replace an index of another model, source or option")
    ] = False,
    *,
    reading: dict[str, Any],
) -> None:
    """Write the vectors of images to an index. Run the command again to continue or to update the index."""
    from declip.search.embed import embed as run_embedding

    made = run_embedding(
        model, source, out=out, captions=captions, dtype=dtype, overwrite=overwrite, **reading
    )
    say(f"Ready: {made.folder}: {made.summary()}")


def search(
    folder: Folder,
    text: Annotated[str | None, Argument(help="text to search for")] = None,
    image: Annotated[Path | None, file("image to search for, alone or with the text")] = None,
    weights: Annotated[str, Option(help="weights of text and image, if both are given")] = "1,1",
    k: Annotated[int, Option("-k", "--k", min=1, max=10_000, help="number of results")] = 10,
    over: Annotated[Literal["images", "captions"], Option(help="vectors to search")] = "images",
    template: Annotated[str | None, opt.TEMPLATES] = None,
    where: Annotated[
        list[str] | None,
        Option(
            metavar="COLUMN=VALUE",
            help="only images with this value in a column of their table; repeatable",
        ),
    ] = None,
    group: Annotated[
        str | None,
        Option(metavar="COLUMN", help="one result for each value of a column of the table"),
    ] = None,
    copies: Annotated[
        bool, Option("--copies", help="list near copies as results of their own")
    ] = False,
    why: Annotated[
        bool,
        Option("--why", help="also name known pairs or classes that text and image resemble"),
    ] = False,
    model: Annotated[
        str | None, Option(callback=known, help="new path of the model, if it was moved")
    ] = None,
    source: Annotated[
        str | None, opt.source("new path of the images, if they were moved", metavar="TEXT")
    ] = None,
    device: opt.Device = "auto",
    precision: opt.Precision = "fp32",
    out: Annotated[Path | None, file("also write the results as a table (.csv)")] = None,
    sheet_out: opt.SheetOut = None,
    json_out: opt.JsonOut = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Search an index by a text, an image, or both."""
    from declip.search.checks import parse_where, read_query
    from declip.search.info import IndexInfo, is_index

    # --- checks
    table = None
    if out is not None:
        table = csv_path(out)
    check_outputs((table, png_path(sheet_out, "--contact-sheet"), json_out), overwrite)
    wanted = parse_where(where or [])
    if text is not None and is_index(expand(text)) and not is_index(folder):
        raise UserError(
            f"'{text}' is an index and '{folder}' is not: the arguments look swapped. Give the index first: "
            f"{shlex.join(['declip', 'search', text, str(folder)])}."
        )
    both = _two_numbers(weights)
    if why and not text:
        raise UserError("--why explains what an image shares with a text. Give a text.")
    IndexInfo.read(folder)
    query, picture = read_query(text, image, both)
    # --- search
    from declip.search.index import Index

    opened = Index.open(folder, model=model, source=source, device=device, precision=precision)
    shown: dict[str, Any] = {"where": wanted, "group": group, "copies": copies}
    hits = opened.search(query, picture, weights=both, template=template, k=k, over=over, **shown)
    if why:
        hits = opened.explain(query, hits)
    _print_hits(hits, group)
    # --- files
    if table is not None:
        _write_hits(table, hits, overwrite)
        say(f"Written: {table}")
    if json_out is not None:
        asked = {
            "index": str(folder),
            "text": text,
            "image": None if image is None else str(image),
            "weights": both,
        }
        found = [hit.to_dict() for hit in hits]
        result = result_json({**asked, **shown, "over": over, "hits": found})
        say(f"Written: {write_output(json_out, result, '--json', overwrite)}")
    if sheet_out is not None:
        from declip.reports.sheets import search_sheet

        title = query or f"like {image.name if image else ''}"
        sheet = search_sheet(opened, hits, title, picture)
        write_image(sheet_out, sheet, "--contact-sheet", overwrite)


def _print_hits(hits: "list[Hit]", group: str | None) -> None:
    from declip.io.text import sanitize
    from declip.reports.page import Table, rich_table

    if not hits:
        say("No results: no image has these values, or captions.")
        return
    header = ["", "cosine", "image", "caption"]
    with_copies = any(hit.copies for hit in hits)
    if with_copies:
        header.append("near copies" if group is None else f"others of {group}")
    explained = any(hit.resembles for hit in hits)
    if explained:
        header.insert(4, "both resemble")
    rows = []
    for number, hit in enumerate(hits, 1):
        texts = [hit.key, "; ".join(hit.captions[:2])]
        if explained:
            texts.append("; ".join(hit.resembles))
        cells = [str(number), f"{hit.score:.3f}"]
        cells += [sanitize(text, len(text)) for text in texts]
        if with_copies:
            cells.append(f"+ {len(hit.copies):,}" if hit.copies else "")
        rows.append(tuple(cells))
    console.print(rich_table(Table("", tuple(header), tuple(rows), texts=len(header))))


def _write_hits(path: Path, hits: "list[Hit]", overwrite: bool) -> None:
    """Write hits as a table that a spreadsheet opens."""
    from declip.io.text import plain_cell

    header = ["rank", "cosine", "image", "caption", "copies"]
    explained = any(hit.resembles for hit in hits)
    if explained:
        header.append("both resemble")
    with csv_table(path, header, overwrite) as table:
        for number, hit in enumerate(hits, 1):
            texts = [hit.key, hit.caption, "; ".join(hit.copies)]
            if explained:
                texts.append("; ".join(hit.resembles))
            table.writerow((number, f"{hit.score:.4f}", *map(plain_cell, texts)))


@reads_images
def serve(
    model: opt.Model,
    source: Annotated[
        str, Argument(callback=existing, help="an index, or a folder, table or built-in set")
    ],
    index: opt.IndexFolder = None,
    caption: Annotated[
        Path | None, file("caption images, and save captions in this .csv file")
    ] = None,
    host: Annotated[
        str, Option(help="address to listen on; default: this machine only")
    ] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65_535, help="port; 0: any free port")] = 8765,
    *,
    reading: dict[str, Any],
) -> None:
    """Open a model and its pairs in a browser: classify, search, find wrong pairs, caption images."""
    for name in ("starlette", "uvicorn"):
        check_installed(name, "app", "The app")
    if caption is not None:
        csv_path(caption, "--caption")
    from declip.app import server

    errors = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    # The port is taken before the source is embedded, which may take hours.
    with server.take_port(host, port) as bound:
        if host not in ("localhost", "127.0.0.1", "::1"):
            errors.print(
                f"Warning: everyone who can reach {host} can open the app. It has no password; all images and "
                "captions of the source can be seen, and requests can keep this machine busy.",
                style="yellow",
            )
        state = server.open_state(model, source, index, caption=caption, **reading)
        images = f"{len(state.index):,} images of {state.index.info.source.name}"
        errors.print(f"{images}, index {state.index.folder}")
        errors.print(f"Open {server.address_of(bound)} (Ctrl-C stops)")
        server.serve(state, bound, host)


@index.command()
def show(folder: Folder) -> None:
    """Show the contents of an index, its model, and the images that were skipped."""
    from declip.search.info import IndexInfo

    IndexInfo.read(folder)
    from declip.search.index import Index

    opened = Index.open(folder)
    say(f"{folder}: {opened.summary()}")
    say(f"Source: {opened.info.source.path or opened.info.source.name}")
    say(f"Model: {opened.info.model}")


@index.command()
def from_parquet(
    files: Annotated[
        list[str], Argument(callback=existing, help="Parquet files, their folder, or a pattern")
    ],
    model: Annotated[str, Option(callback=known, help="the model that made the vectors")],
    out: Annotated[Path, opt.folder("folder of the index", INDEX_FILE)],
    overwrite: Annotated[
        bool, Option("--overwrite", help="also replace an index of another model")
    ] = False,
) -> None:
    """Make an index of the vectors that Ray Data, datasets, Daft or Spark wrote."""
    from declip.search.index import Index

    made = Index.from_parquet(files, model=model, out=out, overwrite=overwrite)
    say(f"Ready: {out}: {made.summary()}")


def _two_numbers(text: str) -> tuple[float, float]:
    try:
        first, second = map(float, text.split(","))
    except ValueError:
        raise UserError(
            f"--weights is '{text}'; give two numbers, of text and image, such as 0.7,0.3."
        ) from None
    return first, second


@reads_images
def choose(
    model: opt.Model,
    images: Annotated[
        str, Argument(callback=existing, help="a folder of images, a table, or an index")
    ],
    out: Annotated[Path, file("table to write, with an empty column for captions")],
    count: Annotated[int, Option(min=1, help="number of images to choose")] = 200,
    have: Annotated[
        str | None, opt.source("existing pairs; their images count as chosen", metavar="PAIRS")
    ] = None,
    index: opt.IndexFolder = None,
    sheet_out: opt.SheetOut = None,
    overwrite: opt.Overwrite = False,
    *,
    reading: dict[str, Any],
) -> None:
    """Choose the images that you should caption next, by their features; the most useful come first."""
    check_outputs((csv_path(out), png_path(sheet_out, "--contact-sheet")), overwrite)
    from declip.search.choose import choose as run_choice

    choosing: dict[str, Any] = {
        "have": have,
        "out": out,
        "overwrite": overwrite,
        "index": index,
    }
    choice = run_choice(model, images, count, **choosing, **reading)
    say(f"{choice.summary()}\nWritten: {out}")
    if sheet_out is not None:
        from declip.reports.sheets import search_sheet

        sheet = search_sheet(
            choice.index, choice.images, f"The first to caption: {out.name}", order="in their order"
        )
        write_image(sheet_out, sheet, "--contact-sheet", overwrite)


@partial(reads_images, without=("caption_column",))
def classify(
    model: opt.Model,
    images: Annotated[
        str,
        Argument(
            callback=existing,
            help="a folder, an image, a pattern in quotes, a table, or tar shards",
        ),
    ],
    classes: Annotated[
        str | None,
        Option(metavar="FILE|LIST", help="a file with one class per line, or a list: cat,dog"),
    ] = None,
    examples: Annotated[
        str | None,
        opt.source("labeled images: a folder per class, or a table", metavar="FOLDER|TABLE"),
    ] = None,
    label_column: Annotated[
        str | None, Option(help="table column of classes in the examples")
    ] = None,
    group_column: Annotated[
        str | None,
        Option(help="table column of objects in the examples; their images are left out together"),
    ] = None,
    head: Annotated[
        Path | None, file("a classifier that --save wrote, instead of --classes and --examples")
    ] = None,
    save: Annotated[Path | None, file("save the classifier that is fitted to the examples")] = None,
    out: Annotated[
        Path | None, file("write the probability of every class to this .csv file")
    ] = None,
    templates: Annotated[str, opt.TEMPLATES] = "plain",
    overwrite: opt.Overwrite = False,
    *,
    reading: dict[str, Any],
) -> None:
    """Classify images into classes by their names, by examples, or both. Without --out, print a line per image."""
    if save is not None and examples is None:
        raise UserError(
            "--save requires --examples: it saves the classifier that is fitted to them."
        )
    check_outputs((save,), overwrite)
    if group_column is not None and examples is None:
        raise UserError(
            f"--group-column {group_column} is a column of the examples. Give --examples TABLE."
        )
    reading["columns"] = replace(reading["columns"], group=group_column)
    from declip.search.checks import check_classes

    names = check_classes(classes, examples, head, out, overwrite)
    from declip.search.classify import classify as run_classification

    fitted: dict[str, Any] = {"examples": examples, "head": head, "label_column": label_column}
    fitted |= {"templates": templates, "out": out, "overwrite": overwrite}
    if out is None:
        fitted["on_prediction"] = _print
    result = run_classification(model, images, names, **fitted, **reading)
    if result.classifier is not None:
        typer.echo(result.classifier.summary(), err=True)
        if save is not None:
            result.classifier.save(save, overwrite=overwrite)
            typer.echo(f"Written: {save}", err=True)
    _print_result(result, out)


def _print_result(result: Any, out: Path | None) -> None:
    if out is None:
        for line in result.skipped.lines():
            typer.echo(f"Left out: {line}", err=True)
    else:
        say(f"{result.summary()}\nWritten: {out}")


def _print(prediction: Any) -> None:
    from declip.data.pair import printable

    image = printable(prediction.image)
    best = printable(prediction.best)
    typer.echo(f"{image}\t{best}\t{prediction.probability:.4f}")
