"""Options, output and checks that several commands share."""

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from declip.errors import UserError

PIPE_WIDTH = 10_000
"""Columns of a line that goes to a file or another program: tables there have whole lines."""

console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)


def expand(path: str) -> Path:
    """Read a path option; `~` is expanded here because shells leave it in `--out=~/x`."""
    return Path(path).expanduser()


def file(help: str, *names: str, metavar: str = "FILE") -> Any:
    """Declare an option that takes a path."""
    return typer.Option(*names, parser=expand, metavar=metavar, help=help)


Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps")]
Quiet = Annotated[bool, typer.Option("--quiet", help="show no progress")]
ImageColumn = Annotated[str, typer.Option(help="column of a table with images")]
CaptionColumn = Annotated[str, typer.Option(help="column of a table with captions")]
ImageRoot = Annotated[Path | None, file("folder of a table's image paths", metavar="DIR")]
Workers = Annotated[int | None, typer.Option(min=0, help="processes; default: one per core, at most 8")]
BatchSize = Annotated[int, typer.Option(min=1, help="images per forward pass")]
License = Annotated[str, typer.Option(help="license for the model card, such as mit")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an earlier export")]
JsonOut = Annotated[Path | None, file("also write the result to this file", "--json")]
UNKNOWN_LICENSE = "unknown: set it"


def say(line: str) -> None:
    """Print a line as it is: no markup, no line breaks; of several ranks the first alone does."""
    if os.environ.get("RANK", "0") == "0":
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def fail(message: str, status: int = 2) -> NoReturn:
    """Print an error with its rank, if there are several, and exit."""
    rank = f"rank {os.environ['RANK']}: " if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ else ""
    Console(stderr=True).print(f"[bold red]Error:[/] {escape(rank + message)}", highlight=False, soft_wrap=True)
    sys.exit(status)


def check_source(source: str, option: str) -> None:
    """Refuse a source whose path does not exist, before torch is imported; names, URLs and patterns are left."""
    if re.match(r"[\w-]{2,}:", source) or "::" in source or any(sign in source for sign in "*?[{"):
        return
    if not source or not Path(source).expanduser().exists():
        raise UserError(
            f"There is no file or folder '{source}' ({option}). Give a table (.csv, .jsonl, .parquet …), a folder of "
            "images with captions, tar shards such as 'data/{00000..00331}.tar', or builtin:emoji."
        )


def check_model(model: str) -> None:
    """Refuse a model whose path does not exist, before torch is imported."""
    if not re.match(r"[\w-]{2,}:", model) and not Path(model).expanduser().exists():
        raise UserError(
            f"There is no model at '{model}'. Give a run folder, a checkpoint folder, a weights file, "
            "hf-hub:OWNER/NAME or open_clip:MODEL/TAG."
        )
