"""The command ``declip``, with the small commands recipes, cache and export; commands only call the API."""

import errno
import sys
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

import declip
from declip.cli.data import group as data
from declip.cli.options import Command, Model, Overrides, console, fail, file, say
from declip.cli.search import choose, classify, embed, index, search, serve
from declip.cli.train import compare, evaluate, finetune, train
from declip.errors import UserError
from declip.io.outputs import check_export

recipes = typer.Typer(help="List the shipped recipes, or show one with all its keys.")


@recipes.callback(invoke_without_command=True)
def list_recipes(context: typer.Context) -> None:
    """List the shipped recipes with their image towers, data and loss weights."""
    if context.invoked_subcommand is not None:
        return
    from declip.recipe.load import load_recipe, recipe_names

    for name in recipe_names():
        recipe = load_recipe(name)
        losses = ", ".join(f"{weight:g} {loss}" for loss, weight in recipe.active_losses.items())
        own = recipe.finetune.pretrained is not None
        towers = "your weights" if own else f"{recipe.image.model}, {recipe.image.size} px"
        line = f"[bold]{name}[/]  {towers}, {recipe.data.label}: {losses}"
        console.print(line, highlight=False, soft_wrap=True)


@recipes.command("show")
def show_recipe(
    recipe: Annotated[str, Argument(help="name of a shipped recipe, or a YAML file")],
    overrides: Overrides = None,
) -> None:
    """Print a recipe as YAML, with every key and default."""
    from declip.recipe.load import load_recipe, parse_overrides

    loaded = load_recipe(recipe, parse_overrides(overrides or []))
    say(loaded.to_yaml().rstrip())


cache = typer.Typer(
    help="Show and clear the cache folder: features of frozen towers, shards, built-in sets."
)


@cache.command("show")
def show_cache() -> None:
    """Print the size of each folder of the cache and when it was last used."""
    from datetime import datetime

    from declip.io.atomic import CACHE_VARIABLE, cache_folder
    from declip.io.cache import cache_entries

    say(f"{cache_folder()} (set {CACHE_VARIABLE} to move it)")
    for name, group in groupby(cache_entries(), key=lambda entry: entry.path.parent.name):
        entries = list(group)
        last = max(entry.used for entry in entries)
        used = datetime.fromtimestamp(last).strftime("%Y-%m-%d")
        size = sum(entry.size for entry in entries) / 1e6
        say(f"{name:<12} {size:>12,.1f} MB  {len(entries):>6,} entries  {used}")


@cache.command("clear")
def remove_cached(
    folder: Annotated[
        str | None,
        Argument(help="name of one folder; default: features, shards, heads, orders and tables"),
    ] = None,
) -> None:
    """Remove cached files that can be computed or downloaded again. Files in use stay."""
    from declip.io.cache import clear_cache

    say(f"{clear_cache(folder) / 1e6:,.1f} MB freed.")


def export(
    model: Model,
    format: Annotated[
        Literal["open_clip", "huggingface", "onnx", "safetensors"],
        Option(metavar="FORMAT", help="open_clip, huggingface, onnx or safetensors"),
    ],
    out: Annotated[Path, file("folder to write", metavar="DIR")],
    license: Annotated[
        str, Option(help="license for the model card, such as mit")
    ] = "unknown: set it",
    repo: Annotated[
        str | None, Option(help="OWNER/NAME of the repository on the Hub, for the model card")
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="replace an existing export")] = False,
) -> None:
    """Export a model to a format of another library or to declip's (safetensors), with a model card."""
    check_export(out, overwrite)
    from declip.interchange.export import export as run_export

    exported = run_export(model, format, out, license=license, overwrite=overwrite, repo=repo)
    say(f"Written: {exported.folder}. {exported}")


app = typer.Typer(
    help="Train, evaluate and use contrastive language-image models when pairs are few.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of a wrong option, argument or command; typer exports only the class below it.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]
DISK = (*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG)
"""Errors that the user can fix: a disk that is full, read-only, protected or failing, or a path that is too long."""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"declip {declip.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        Option(
            "--version", callback=_print_version, is_eager=True, help="print the version and exit"
        ),
    ] = False,
) -> None:
    pass


COMMANDS = (finetune, train, evaluate, compare, choose, classify, embed, search, export)
for command in COMMANDS:
    app.command()(command)
app.command(name="app")(serve)
for group, name in ((data, "data"), (recipes, "recipes"), (cache, "cache"), (index, "index")):
    app.add_typer(group, name=name)
for each in (app, data, recipes, cache, index):
    for registered in each.registered_commands:
        registered.cls = Command


def main() -> None:
    """Run the command; a mistake in the input ends with one line and status 2, without a traceback."""
    # Commands raise; this is the only place that prints an error and ends the process.
    try:
        status = app(standalone_mode=False)
    except UserError as error:
        fail(str(error))
    except UsageError as error:
        fail(_usage_message(error))
    except KeyboardInterrupt:
        fail(
            "Stopped. Finished parts are saved; run the same command again (declip train with --resume).",
            status=130,
        )
    except OSError as error:
        if error.errno not in DISK:
            raise
        where = f"'{error.filename}'" if error.filename else "A file"
        advice = (
            "Make room; continue a run with --resume."
            if error.errno in FULL
            else "Fix that or give another path."
        )
        fail(f"{where} cannot be read or written: {error.strerror}. {advice}")
    sys.exit(status or 0)  # torchrun takes 0 for an end, and not None


def _usage_message(error: Any) -> str:
    """Format a mistake in the words of a command line on one line, with the command whose help lists the right ones."""
    if error.ctx is None:  # without any word, the help was printed
        sys.exit(error.exit_code)
    words = error.format_message().replace("Value error, ", "").split()
    message = " ".join(words).rstrip(".")
    return f"{message}. See `{error.ctx.command_path} --help`."
