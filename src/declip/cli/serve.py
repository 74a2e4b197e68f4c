"""The command ``declip app``. Wrong paths and a taken port are answered before torch loads."""

import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from declip.cli.options import Device, Quiet, check_model, check_source, file
from declip.errors import UserError

PORT = 8765
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def app(
    model: Annotated[str, typer.Argument(help="a run folder, a checkpoint, a weights file, or open_clip:MODEL/TAG")],
    source: Annotated[str, typer.Argument(help="an index, or a source to embed: a folder, a table, builtin:NAME …")],
    index: Annotated[Path | None, file("folder of the source's index; default: below indices/", metavar="DIR")] = None,
    host: Annotated[str, typer.Option(help="address to listen on; this machine alone by default")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes any that is free")] = PORT,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Look at a model and its pairs in a browser: classify, search, wrong pairs."""
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise UserError(f"The app needs {' and '.join(missing)}, not installed here: pip install 'declip[app]'.")
    check_model(model)
    check_source(source, "SOURCE")
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    with take_port(host, port) as bound:
        from declip.app.server import open_state, serve

        if host not in ("localhost", "127.0.0.1", "::1"):
            console.print(
                f"Warning: the app will be open to everyone who can reach {host}: there is no password, and who opens "
                "it sees all images and captions of the source and can keep this machine busy.",
                style="yellow",
            )
        state = open_state(model, source, index, device=device, progress=not quiet)
        images = f"{len(state.index):,} images of {state.index.info.source.name}"
        console.print(f"{images}, index {state.index.folder}")
        console.print(f"Open {address_of(bound)} (Ctrl-C ends)")
        serve(state, bound, host)


def take_port(host: str, port: int) -> socket.socket:
    """Listen on a port; raises `UserError` where there is no such host, or the port is taken or not allowed."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(
            f"Port {port} of '{host}' cannot be used: {error.strerror}. Choose another one with --port (0 takes any "
            "that is free), or leave --host out for this machine alone."
        ) from error


def address_of(bound: socket.socket) -> str:
    """The address to type into a browser."""
    host, port = bound.getsockname()[:2]
    host = ANY_ADDRESS.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"
