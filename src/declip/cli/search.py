"""The commands ``declip embed``, ``declip search`` and ``declip index``: they parse words and call the API."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from declip.errors import UserError

index = typer.Typer(help="Look after an index of pictures.", no_args_is_help=True)
console = Console()

Folder = Annotated[Path, typer.Argument(metavar="INDEX", help="a folder that `declip embed` wrote")]
Keys = Annotated[list[str], typer.Argument(metavar="KEY...", help="as `declip search` shows them")]


def embed(
    model: Annotated[str, typer.Argument(help="a run folder, a checkpoint, a weights file, or open_clip:MODEL/TAG")],
    source: Annotated[str, typer.Argument(help="a folder of images, a table, tar shards, or builtin:NAME")],
    out: Annotated[Path, typer.Option(help="the folder of the index")],
    captions: Annotated[bool, typer.Option("--captions", help="also store vectors of the captions")] = False,
    dtype: Annotated[str, typer.Option(help="of the stored numbers: float16 or float32")] = "float16",
    precision: Annotated[str, typer.Option(help="of the model: fp32 or bf16")] = "fp32",
    approximate: Annotated[
        bool | None,
        typer.Option(help="make an approximate index (needs faiss); by default beyond a million images"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="images a pass")] = 256,
    workers: Annotated[int, typer.Option(min=0, help="processes that read images")] = 0,
    image_column: Annotated[str, typer.Option(help="a table's column of images")] = "image",
    caption_column: Annotated[str, typer.Option(help="a table's column of captions; '' for none")] = "caption",
    image_root: Annotated[str | None, typer.Option(help="folder that image paths are relative to")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda …")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress shown")] = False,
) -> None:
    """Write the vectors of a source's images to an index. The same command later goes on, or adds what is new."""
    from declip.search.embed import embed as run_embedding

    try:
        made = run_embedding(
            model,
            source,
            out=out,
            captions=captions,
            dtype=cast(Any, dtype),  # told apart where it is used
            precision=cast(Any, precision),
            approximate=approximate,
            batch=batch,
            workers=workers,
            image_column=image_column,
            caption_column=caption_column,
            image_root=image_root,
            device=device,
            progress=not quiet,
        )
    except KeyboardInterrupt:
        Console(stderr=True).print("Stopped. The parts written so far are kept; the same command goes on.")
        raise typer.Exit(130) from None
    _say(f"Ready: {out}: {made.summary()}")


def search(
    folder: Folder,
    text: Annotated[str | None, typer.Argument(help="what to look for")] = None,
    image: Annotated[Path | None, typer.Option(help="a picture to search with, alone or with the text")] = None,
    weights: Annotated[str, typer.Option(help="of text and picture, where both are given")] = "1,1",
    k: Annotated[int, typer.Option("-k", "--k", help="images to show")] = 10,
    over: Annotated[str, typer.Option(help="compare with images, or with captions where they have vectors")] = "images",
    template: Annotated[str | None, typer.Option(help="a template set, or one template with {}")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="don't use the approximate index")] = False,
    model: Annotated[str | None, typer.Option(help="where the model that made the index is now")] = None,
    source: Annotated[str | None, typer.Option(help="where the images are now, for --contact-sheet")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda …")] = "auto",
    sheet_out: Annotated[Path | None, typer.Option("--contact-sheet", help="also write a contact sheet, PNG")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="also write what was found to this file")] = None,
) -> None:
    """Find images in an index by a text, a picture, or both."""
    import json

    from declip.data.pair import printable
    from declip.reports.inspection_output import check_writable, saved
    from declip.search.index import Index

    check_writable((sheet_out, json_out))
    opened = Index.open(folder, model=model, source=source, device=device)
    both = _two_numbers(weights)
    hits = opened.search(text, image, weights=both, template=template, k=k, over=cast(Any, over), exact=exact or None)
    table = Table("", "cosine", "image", "caption", box=None, header_style="dim")
    for number, hit in enumerate(hits, 1):
        table.add_row(
            str(number), f"{hit.score:.3f}", escape(printable(hit.key)), escape(printable("; ".join(hit.captions[:2])))
        )
    console.print(table)
    if json_out is not None:
        asked = {"index": str(folder), "text": text, "image": None if image is None else str(image), "weights": both}
        found = json.dumps({**asked, "over": over, "hits": [hit.to_dict() for hit in hits]}, indent=1)
        with saved(json_out) as target:
            target.write_text(found + "\n", encoding="utf-8")
        _say(f"Written: {json_out}")
    if sheet_out is not None:
        _write_sheet(opened, hits, text, image, sheet_out)


def _write_sheet(opened: Any, hits: Any, text: str | None, image: Path | None, path: Path) -> None:
    from declip.data.images.decode import decode
    from declip.reports.inspection_output import saved
    from declip.reports.search_sheet import sheet

    picture = None if image is None else decode(image, str(image))
    title = text or f"like {image.name if image else ''}"
    drawn = sheet(opened, hits, title, picture)
    with saved(path) as target:
        drawn.save(target, "PNG")
    _say(f"Written: {path}")


@index.command()
def show(folder: Folder) -> None:
    """What is in an index, what made it, and what was left out. Looks at every part's checksum."""
    from declip.search.index import Index

    opened = Index.open(folder, check=True)
    made_by, source = opened.manifest.model, opened.manifest.source
    _say(f"{folder}: {opened.summary()}")
    _say(f"Source: {source.spec or source.name}")
    _say(f"Model: {made_by.spec or 'a Python object'}, {made_by.precision}, fingerprint {made_by.fingerprint[:12]}")


@index.command()
def remove(folder: Folder, keys: Keys) -> None:
    """Take images out: no search shows them any more, and `declip embed` leaves them out."""
    from declip.search.maintenance import remove as run

    _say(f"{run(folder, keys):,} images removed.")


@index.command()
def restore(folder: Folder, keys: Keys) -> None:
    """Bring removed images back."""
    from declip.search.maintenance import restore as run

    _say(f"{run(folder, keys):,} images restored.")


@index.command()
def compact(folder: Folder) -> None:
    """Write an index anew without its hidden images."""
    from declip.search.maintenance import compact as run

    _say(f"{run(folder) / 1e6:,.1f} MB freed.")


@index.command()
def approximate(
    folder: Folder,
    model: Annotated[str | None, typer.Option(help="where the model that made the index is now")] = None,
) -> None:
    """Make the approximate index, or bring it up to date, and measure its recall."""
    from declip.search.index import Index

    opened = Index.open(folder, model=model)
    opened.approximate()
    _say(opened.summary())


def _two_numbers(text: str) -> tuple[float, float]:
    try:
        first, second = map(float, text.split(","))
    except ValueError:
        raise UserError(
            f"--weights is '{text}'; give two numbers, the text's and the picture's, such as 0.7,0.3."
        ) from None
    return first, second


def _say(line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True, markup=False)
