"""Options, output and checks that commands share."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Collection
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from typer import Argument, Option
from typer.core import TyperCommand

from declip.data.columns import Columns, MissingColumns
from declip.errors import UserError
from declip.io.outputs import INDEX_FILE, check_folder, output_file
from declip.recipe.starts import check_model

if TYPE_CHECKING:
    from PIL.Image import Image

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
PIPE_WIDTH = 10_000  # columns of output to a file or a pipe, so that lines of tables are not broken
console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)


def expand(path: str) -> Path:
    """Parse a path option; `~` is expanded because shells do not expand it in `--out=~/x`."""
    return Path(path).expanduser()


def file(help: str, *names: str, metavar: str = "FILE") -> Any:
    """Declare an option that takes a path."""
    return Option(*names, parser=expand, metavar=metavar, help=help)


def folder(help: str, marker: str) -> Any:
    """Declare an option for a folder to write: a new one, or one with the file `marker`."""

    def check(param: typer.CallbackParam, given: Path | None) -> Path | None:
        if given is not None:
            check_folder(given, marker, remedy=f"Choose another {param.opts[0]}.")
        return given

    return Option(parser=expand, callback=check, metavar="DIR", help=help)


def existing(param: typer.CallbackParam, given: Any) -> Any:
    """Refuse a source whose path does not exist; names, URLs and patterns pass."""
    from declip.recipe.checks import as_list, check_source

    name = param.opts[0]
    option = name if name.startswith("-") else name.upper()
    for source in as_list(given):
        check_source(source, option)
    return given


def source(help: str, *names: str, metavar: str = "SET") -> Any:
    """Declare an option that takes a source."""
    return Option(*names, callback=existing, metavar=metavar, help=help)


def known(model: str | None) -> str | None:
    """Refuse a model whose path does not exist."""
    if model is not None:
        if model.lower().endswith(TABLES):
            raise UserError(f"'{model}' is a table, not a model. Write the model before the table.")
        check_model(model)
    return model


def device(name: str) -> str:
    """Refuse an unknown device."""
    from declip.recipe.schema import known_device

    return known_device(name)


def templates(given: str | None) -> str | None:
    """Refuse an unknown template set."""
    from declip.evaluation.prompt_sets import read_templates

    if given is not None:
        read_templates(given)
    return given


Several = list[str] | None
MODEL = "a run folder, a checkpoint, a weights file, a name such as open_clip:MODEL/TAG, or FILE.py:function"
Model = Annotated[str, Argument(callback=known, help=MODEL)]
Source = Annotated[
    str,
    Argument(callback=existing, help="a table, a folder of images, tar shards, or builtin:NAME"),
]
Device = Annotated[str, Option(callback=device, help="auto, cpu, cuda, cuda:1 or mps")]
Overrides = Annotated[
    Several, Argument(metavar="[KEY=VALUE]...", help="recipe keys to set, such as train.steps=500")
]
Precision = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    Option(help="precision of the towers; auto: the fastest that the device supports"),
]
Progress = Annotated[bool, Option(" /--quiet", show_default=False, help="show no progress")]
Terms = Annotated[
    Path | None, file("Python file of losses of your own, TERMS = {NAME: CLASS}", "--terms")
]
Resume = Annotated[bool, Option("--resume", help="continue the run in the run folder")]
ImageColumn = Annotated[str, Option(help="table column of image paths")]
CaptionColumn = Annotated[
    list[str],
    Option(help='table column of captions, or a template such as "a {color} {kind}"; repeatable'),
]
ImageRoot = Annotated[
    Path | None, file("folder that image paths in a table are relative to", metavar="DIR")
]
TEMPLATES = Option(callback=templates, help="name of a template set, or a template with {}")
Workers = Annotated[
    int | None, Option(min=0, help="number of processes; default: one per core, at most 8")
]
Shots = Annotated[
    list[int] | None,
    Option(min=1, help="with few-shot: number of examples per class; default: 4; repeatable"),
]
BatchSize = Annotated[int, Option(min=1, help="images per forward pass")]
JsonOut = Annotated[Path | None, file("also write the result as JSON", "--json")]
SheetOut = Annotated[
    Path | None, file("also write an image of the results (PNG)", "--contact-sheet")
]
Overwrite = Annotated[bool, Option("--overwrite", help="replace files that exist")]
IndexFolder = Annotated[
    Path | None,
    folder("folder of the index; default: in indices/, named after the source", INDEX_FILE),
]
READING: dict[str, tuple[Any, Any]] = {
    "batch_size": (BatchSize, 256),
    "workers": (Workers, None),
    "image_column": (ImageColumn, "image"),
    "caption_column": (CaptionColumn, ["caption"]),
    "image_root": (ImageRoot, None),
    "device": (Device, "auto"),
    "precision": (Precision, "auto"),
    "progress": (Progress, True),
}
"""Options of commands that read images, and their defaults."""


class Command(TyperCommand):
    """A command whose help shows no type for flags, and that answers options that are an argument or a recipe key."""

    def get_params(self, ctx: Any) -> list[Any]:
        parameters = super().get_params(ctx)
        for flag in (each for each in parameters if getattr(each, "is_flag", False)):
            flag.metavar = ""
        return parameters

    def invoke(self, ctx: Any) -> Any:
        parameters = {parameter.name for parameter in self.params}
        try:
            return super().invoke(ctx)
        except MissingColumns as error:
            option = ""
            if "image_column" in parameters:
                option = "--{}-column NAME"
            form = "data.columns.{}=NAME" if {"overrides", "words"} & parameters else option
            raise MissingColumns(error.table, error.columns, error.missing, form) from error

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        names = {
            name
            for parameter in self.params
            for name in (*parameter.opts, *parameter.secondary_opts)
        }
        parameters = {parameter.name for parameter in self.params}
        for option in (word.partition("=")[0] for word in args):
            if option in {*names, "--", "--help"}:
                continue
            if option == "--model" and "model" in parameters:
                raise UserError(
                    f"The model is the first argument, not --model: {ctx.command_path} MODEL …"
                )
            if option.startswith("--") and {"overrides", "words"} & parameters:
                from declip.recipe.load import unknown_key

                raise UserError(
                    f"There is no option {option}; recipe keys are KEY=VALUE. {unknown_key(option[2:])}"
                )
        return super().parse_args(ctx, args)


def reads_images(
    command: Callable[..., None], without: Collection[str] = ()
) -> Callable[..., None]:
    """Add the options `READING` to a command, whose parameter `reading` gets them as arguments of the Python API."""
    own = [
        parameter
        for parameter in signature(command).parameters.values()
        if parameter.name != "reading"
    ]
    options = [name for name in READING if name not in without]

    @wraps(command)
    def run(**given: Any) -> None:
        reading = {name: given.pop(name) for name in options}
        image = reading.pop("image_column")
        names = [*filter(None, reading.pop("caption_column", []))]
        captions = names[0] if len(names) == 1 else names or None
        reading["columns"] = Columns(image, captions, root=reading.pop("image_root"))
        command(**given, reading=reading)

    shared = [
        Parameter(
            name, Parameter.KEYWORD_ONLY, annotation=READING[name][0], default=READING[name][1]
        )
        for name in options
    ]
    run.__signature__ = Signature([*own, *shared])  # type: ignore[attr-defined]  # typer reads it
    return run


def say(line: str) -> None:
    """Print a line without markup or line breaks, on the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def write_image(path: Path, image: "Image", option: str, overwrite: bool) -> None:
    """Write an image as PNG."""
    with output_file(path, option, overwrite) as target:
        image.save(target, "PNG")
    say(f"Written: {path}")


def _is_first(message: str, folder: Path) -> bool:
    """Whether no other process has left a mark for a message in the folder of torchrun's attempt."""
    digest = hashlib.sha256(message.encode(errors="replace")).hexdigest()[:16]
    try:
        (folder / f"{digest}.printed").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def fail(message: str, status: int = 2) -> NoReturn:
    """Print an error, with the rank if there are several, and exit.

    Under torchrun, of the processes of a machine that have the same error only the first prints it.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file is None or _is_first(message, Path(error_file).parents[1]):
        several = os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ
        text = f"rank {os.environ['RANK']}: {message}" if several else message
        error_console = Console(stderr=True)
        error_console.print(f"[bold red]Error:[/] {escape(text)}", highlight=False, soft_wrap=True)
    if error_file is not None:  # what torchrun repeats below its own traceback
        told = {"message": message, "extraInfo": {"timestamp": int(time.time())}}
        Path(error_file).write_text(json.dumps({"message": told}), encoding="utf-8")
    sys.exit(status)
