"""The command ``declip app``. Wrong paths and a taken port are answered before torch loads."""

import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from declip.cli.options import (
    CaptionColumn,
    Device,
    ImageColumn,
    ImageRoot,
    Quiet,
    check_model,
    check_source,
    expand,
)
from declip.cli.search import Readers
from declip.errors import UserError

PORT = 8765
LOOPBACK = ("localhost", "127.0.0.1", "::1")
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def app(
    model: Annotated[str, typer.Argument(help="a run folder, a checkpoint, a weights file, or open_clip:MODEL/TAG")],
    source: Annotated[str, typer.Argument(help="an index, a folder of images, a table, tar shards, or builtin:NAME")],
    index: Annotated[
        Path | None,
        typer.Option(metavar="DIR", parser=expand, help="folder of the source's index; by default below indices/"),
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen on; this machine alone by default")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes any that is free")] = PORT,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="open the app in a browser")] = False,
    image_column: ImageColumn = "image",
    caption_column: CaptionColumn = "caption",
    image_root: ImageRoot = None,
    workers: Readers = 0,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Look at a model and its pairs in a browser: classify, search, neighbors, wrong pairs."""
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise UserError(f"The app needs {' and '.join(missing)}, not installed here: pip install 'declip[app]'.")
    check_model(model)
    check_source(source, "SOURCE")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with take_port(host, port) as bound:
        from declip.app.server import open_state, serve

        if host not in LOOPBACK:
            console.print(
                f"Warning: the app will be open to everyone who can reach {host}: there is no password, and who opens "
                "it sees all images and captions of the source and can keep this machine busy.",
                style="yellow",
            )
        try:
            state = open_state(
                model,
                source,
                index,
                image_column=image_column,
                caption_column=caption_column,
                image_root=image_root,
                workers=workers,
                device=device,
                progress=not quiet,
            )
        except KeyboardInterrupt:
            console.print("Stopped. The parts of the index written so far are kept; the same command continues.")
            raise typer.Exit(130) from None
        address = address_of(bound)

        def ready() -> None:
            images = f"{len(state.index):,} images of {state.index.manifest.source.name}"
            console.print(f"{images}, index {state.index.folder}", markup=False)
            console.print(f"Open {address} (Ctrl-C ends)", markup=False)
            if browser:
                import webbrowser

                webbrowser.open(address)

        serve(state, bound, host, ready)


def take_port(host: str, port: int) -> socket.socket:
    """Bind a socket; raises `UserError` where there is no such host, or the port is taken or not allowed."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(
            f"There is no address '{host}' here: {error.strerror}. Leave --host out for this machine alone."
        ) from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(1)  # two servers may be bound to one port as long as none listens
    except OSError as error:
        bound.close()
        raise UserError(
            f"Port {port} of {host} cannot be used: {error.strerror}. Choose another one with --port; 0 takes any that "
            "is free."
        ) from error
    return bound


def address_of(bound: socket.socket) -> str:
    """The address to type into a browser."""
    host, port = bound.getsockname()[:2]
    host = ANY_ADDRESS.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"
