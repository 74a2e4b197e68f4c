"""Starting the page: the port is taken first, then the index is opened or made, then requests are answered."""

import json
import logging
import re
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from declip.app.gallery import Gallery
from declip.app.run_folders import RunFolders
from declip.errors import UserError
from declip.interchange.load import load
from declip.runs.folder import RECIPE
from declip.search.embed import embed
from declip.search.encoding import fingerprint
from declip.search.index import Index
from declip.search.manifest import MANIFEST

LOOPBACK = ("localhost", "127.0.0.1", "::1")

SMALLEST_MANIFEST = {"layout", "parts", "model"}
"""Keys that tell an index's manifest from a file that happens to have its name."""


def take_port(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet.

    Raises:
        UserError: The port is taken or not allowed, or there is no such host.
    """
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
    except (OSError, OverflowError) as error:
        bound.close()
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"Port {port} of {host} cannot be used: {why}. Choose another one with --port; 0 takes any that is free."
        ) from error
    return bound


def address_of(bound: socket.socket) -> str:
    """What to type into a browser."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def is_index(source: str) -> bool:
    """Whether a source is the folder of an index."""
    try:
        tree = json.loads((Path(source).expanduser() / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(tree, dict) and tree.keys() >= SMALLEST_MANIFEST


def open_gallery(
    model: str,
    source: str,
    folder: Path | None = None,
    runs: Sequence[Path] = (),
    *,
    image_column: str = "image",
    caption_column: str | None = "caption",
    image_root: str | None = None,
    workers: int = 0,
    device: str = "auto",
    progress: bool = False,
) -> Gallery:
    """Open an index, or embed a source into one first; later calls embed only what is new.

    Args:
        model: What `declip.load` opens; of an index the one that made it.
        source: An index, or what `declip.embed` embeds.
        folder: Where the index of a source goes; None for a folder below "indices" that is named after the source and
            the model's fingerprint.
        runs: Folders of runs; where there are none and the model is a run, that one.
        image_column: As `declip.embed` has it; so for those that follow.
        caption_column: For tables.
        image_root: For tables.
        workers: Processes that read pictures while they are embedded.
        device: Where the model is loaded to.
        progress: Show progress bars.

    Raises:
        UserError: As `declip.embed` and `Index` do, or an index is asked to be embedded elsewhere.
    """
    if not runs and (Path(model) / RECIPE).is_file():
        runs = [Path(model)]
    folders = RunFolders(runs)
    if is_index(source):
        if folder is not None:
            raise UserError(f"'{source}' is an index already, so --index '{folder}' has no use. Leave it out.")
        index = Index.open(source, model=model, device=device)
    else:
        loaded = load(model, device)
        index = embed(
            loaded,
            source,
            out=folder or usual_folder(fingerprint(loaded), source),
            captions=True,
            workers=workers,
            image_column=image_column,
            caption_column=caption_column,
            image_root=image_root,
            loaded_from=model,
            progress=progress,
        )
    if not len(index):
        raise UserError(f"The index '{index.folder}' holds no image. Embed some first: declip embed.")
    gallery = Gallery(index, model, folders)
    # Another model is refused now, and the first page need not wait for what all need.
    _ = index.model, gallery.queue
    return gallery


def usual_folder(digest: str, source: str) -> Path:
    """Where the index of a source goes by default: another model's has another folder, so that none is refused."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", Path(source).name.removeprefix("builtin:")).strip("-") or "source"
    return Path("indices") / f"{name[:40]}-{digest[:8]}"


def serve(gallery: Gallery, bound: socket.socket, host: str, ready: Callable[[], None]) -> None:
    """Answer requests until Ctrl-C.

    Args:
        gallery: What is shown.
        bound: Where to listen.
        host: What the user called that.
        ready: Called once, before the first request is answered.
    """
    import uvicorn

    from declip.app.web import build

    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    config = uvicorn.Config(
        build(gallery, host),
        access_log=False,
        log_config=None,
        server_header=False,
        limit_concurrency=128,
        timeout_graceful_shutdown=2,
        lifespan="on",
    )
    ready()
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[bound])
