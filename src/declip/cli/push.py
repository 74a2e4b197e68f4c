"""The command ``declip push``."""

from typing import Annotated

import typer

from declip.cli.options import UNKNOWN_LICENSE, License, check_model, say


def push(
    model: Annotated[str, typer.Argument(metavar="RUN", help="run, checkpoint, weights, or hf-hub:OWNER/NAME")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="repository on the Hub, created if missing")],
    private: Annotated[bool, typer.Option("--private", help="create a repository that only its owner sees")] = False,
    format: Annotated[
        str | None, typer.Option(help="as of declip export; default: open_clip where it can hold the model, else ours")
    ] = None,
    license: License = UNKNOWN_LICENSE,
) -> None:
    """Upload a model with its card to the Hugging Face Hub."""
    check_model(model)
    from declip.interchange.push import push as run_push

    say(f"Pushed: {run_push(model, repo, private=private, format=format, license=license)}")
    say(f'Load it in Python: declip.load("hf-hub:{repo}")')
