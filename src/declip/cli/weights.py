"""The command ``declip export``."""

from pathlib import Path
from typing import Annotated

import typer

from declip.cli.options import UNKNOWN_LICENSE, License, Overwrite, file, say
from declip.recipe.starts import check_model

Out = Annotated[Path, file("folder to write", metavar="DIR")]


def export(
    model: Annotated[
        str, typer.Argument(help="a run folder, a checkpoint, weights of another library, or hf-hub:OWNER/NAME")
    ],
    format: Annotated[str, typer.Option("--format", help="open_clip, huggingface, onnx or safetensors")],
    out: Out,
    license: License = UNKNOWN_LICENSE,
    repo: Annotated[
        str | None, typer.Option(help="OWNER/NAME of the repository on the Hub, for the model card")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Export a model to a format of another library or to declip's (safetensors), with a model card."""
    check_model(model)
    from declip.interchange.export import export as run_export

    exported = run_export(model, format, out, license=license, overwrite=overwrite, repo=repo)
    say(f"Written: {exported.folder}. {exported}")
