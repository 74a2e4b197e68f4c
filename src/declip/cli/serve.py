"""The command ``declip app``: it parses words, opens what they name, and serves the page."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from declip.errors import UserError

PORT = 8765


def app(
    model: Annotated[str, typer.Argument(help="a run folder, a checkpoint, a weights file, or open_clip:MODEL/TAG")],
    source: Annotated[str, typer.Argument(help="an index, a folder of images, a table, tar shards, or builtin:NAME")],
    index: Annotated[
        Path | None, typer.Option(metavar="DIR", help="where the source's index goes; by default below indices/")
    ] = None,
    runs: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="a run folder, or one that holds some; again for more")
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen on; this machine alone by default")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes any that is free")] = PORT,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="open the page in a browser")] = False,
    image_column: Annotated[str, typer.Option(help="a table's column of images")] = "image",
    caption_column: Annotated[str, typer.Option(help="a table's column of captions; '' for none")] = "caption",
    image_root: Annotated[str | None, typer.Option(help="folder that image paths are relative to")] = None,
    workers: Annotated[int, typer.Option(min=0, help="processes that read images to embed")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda …")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress shown")] = False,
) -> None:
    """Look at a model and its pairs in a browser: classify, search, neighbors, wrong pairs, runs."""
    _need("starlette", "uvicorn")
    from declip.app.start import LOOPBACK, address_of, open_gallery, serve, take_port

    console = Console(stderr=True)
    bound = take_port(host, port)
    with bound:
        if host not in LOOPBACK:
            console.print(
                f"Warning: the page will be open to everyone who can reach {host}: there is no password, and who opens "
                "it sees all pictures and captions of the source and can keep this machine busy.",
                style="yellow",
                highlight=False,
                soft_wrap=True,
            )
        try:
            gallery = open_gallery(
                model,
                source,
                index,
                runs or (),
                image_column=image_column,
                caption_column=caption_column,
                image_root=image_root,
                workers=workers,
                device=device,
                progress=not quiet,
            )
        except KeyboardInterrupt:
            console.print("Stopped. The parts of the index written so far are kept; the same command goes on.")
            raise typer.Exit(130) from None
        address = address_of(bound)

        def ready() -> None:
            images = f"{len(gallery.index):,} images of {gallery.index.manifest.source.name}"
            console.print(f"{images}, index {gallery.index.folder}", highlight=False, soft_wrap=True, markup=False)
            console.print(f"Open {address} (Ctrl-C ends)", highlight=False, soft_wrap=True, markup=False)
            if browser:
                import webbrowser

                webbrowser.open(address)

        serve(gallery, bound, host, ready)


def _need(*packages: str) -> None:
    """Say what to install where a package of the extra is missing."""
    from importlib.util import find_spec

    if missing := [name for name in packages if find_spec(name) is None]:
        raise UserError(f"The page needs {' and '.join(missing)}, not installed here: pip install 'declip[app]'.")
