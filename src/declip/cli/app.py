"""The command ``declip``: every command parses its arguments and calls the API."""

import errno
from typing import Annotated

import typer

import declip
from declip.cli import cache, data, recipes, weights
from declip.cli.choose import choose
from declip.cli.classify import classify
from declip.cli.compare import compare
from declip.cli.evaluate import evaluate
from declip.cli.options import fail
from declip.cli.search import embed, index, search
from declip.cli.serve import app as serve_app
from declip.cli.train import finetune, train
from declip.errors import UserError

app = typer.Typer(
    help="Train, evaluate and use contrastive language-image models when pairs are few.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DISK = (*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG)
"""Errors that the user can fix: a disk that is full, read-only, protected or failing, or a path that is too long."""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"declip {declip.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    pass


COMMANDS = (finetune, train, evaluate, compare, choose, classify, embed, search, weights.export)
for command in COMMANDS:
    app.command()(command)

app.command(name="app")(serve_app)
for group, name in ((data.group, "data"), (recipes.group, "recipes"), (cache.group, "cache"), (index, "index")):
    app.add_typer(group, name=name)


def main() -> None:
    """Run the command; a mistake in the input ends with one line and status 2, without a traceback."""
    # Commands raise; this is the only place that prints an error and ends the process.
    try:
        app()
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("Stopped. Finished parts are saved; run the same command again (declip train with --resume).", status=130)
    except OSError as error:
        if error.errno not in DISK:
            raise
        where = f"'{error.filename}'" if error.filename else "A file"
        advice = "Make room; continue a run with --resume." if error.errno in FULL else "Fix that or give another path."
        fail(f"{where} cannot be read or written: {error.strerror}. {advice}")
