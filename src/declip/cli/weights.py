"""The command ``declip export``."""

from pathlib import Path
from typing import Annotated

import typer

from declip.cli.options import UNKNOWN_LICENSE, License, Overwrite, check_model, file, say

Out = Annotated[Path, file("folder to write", metavar="DIR")]


def export(
    model: Annotated[str, typer.Argument(help="run, checkpoint, weights of any library, hf-hub:OWNER/NAME")],
    format: Annotated[str, typer.Option("--format", help="open_clip, huggingface, onnx or safetensors")],
    out: Out,
    license: License = UNKNOWN_LICENSE,
    repo: Annotated[str | None, typer.Option(help="OWNER/NAME of its future repository on the Hub")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Export a model for another library, or any weights as one file of declip (safetensors), with a model card."""
    check_model(model)
    from declip.interchange.export import export as run_export

    exported = run_export(model, format, out, license=license, overwrite=overwrite, repo=repo)
    checked = "" if exported.difference is None else f" {exported}"  # otherwise a warning was logged
    say(f"Written: {exported.folder}.{checked}")
