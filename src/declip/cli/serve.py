"""The command ``declip app``. Wrong paths and a port in use are refused before torch is imported."""

import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from declip.cli import options as opt
from declip.cli.options import existing, file
from declip.errors import UserError

PORT = 8765
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def app(
    model: opt.Model,
    source: Annotated[str, typer.Argument(callback=existing, help="an index, or a folder, table or built-in set")],
    index: opt.IndexFolder = None,
    caption: Annotated[Path | None, file("caption images, and save captions in this .csv file")] = None,
    host: Annotated[str, typer.Option(help="address to listen on; default: this machine only")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="port; 0: any free port")] = PORT,
    device: opt.Device = "auto",
    precision: opt.Precision = "auto",
    engine: opt.Engine = "torch",
    quiet: opt.Quiet = False,
) -> None:
    """Open a model and its pairs in a browser: classify, search, find wrong pairs, caption images."""
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise UserError(f"The app requires {' and '.join(missing)}: pip install 'declip[app]'.")
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    # The port is taken before the source is embedded, which may take hours.
    with take_port(host, port) as bound:
        from declip.app.server import open_state, serve

        if host not in ("localhost", "127.0.0.1", "::1"):
            console.print(
                f"Warning: everyone who can reach {host} can open the app. It has no password; all images and "
                "captions of the source can be seen, and requests can keep this machine busy.",
                style="yellow",
            )
        state = open_state(
            model, source, index, device=device, precision=precision, engine=engine, progress=not quiet, caption=caption
        )
        images = f"{len(state.index):,} images of {state.index.info.source.name}"
        console.print(f"{images}, index {state.index.folder}")
        console.print(f"Open {address_of(bound)} (Ctrl-C stops)")
        serve(state, bound, host)


def take_port(host: str, port: int) -> socket.socket:
    """Listen on a port; raises `UserError` if the host does not exist, or the port is in use or not allowed."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(
            f"Port {port} of '{host}' cannot be used: {error.strerror}. Choose another --port (0: any free port)."
        ) from error


def address_of(bound: socket.socket) -> str:
    """The address to open in a browser."""
    host, port = bound.getsockname()[:2]
    host = ANY_ADDRESS.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"
