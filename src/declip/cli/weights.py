"""The commands ``declip export`` and ``declip interpolate``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from declip.cli.options import UNKNOWN_LICENSE, Device, License, Overwrite, check_model, console, file, say
from declip.errors import UserError

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


def interpolate(
    run: Annotated[str, typer.Argument(help="folder of a fine-tuning run")],
    alphas: Annotated[
        list[float] | None, typer.Option("--alpha", help="fraction of the fine-tuned weights, 0 to 1; repeatable")
    ] = None,
    datasets: Annotated[list[str] | None, typer.Option("--dataset", help="evaluation set; repeatable")] = None,
    task: Annotated[str, typer.Option(help="zero-shot or retrieval")] = "zero-shot",
    out: Annotated[Path | None, file("folder to write the one mixture to", metavar="DIR")] = None,
    license: License = UNKNOWN_LICENSE,
    overwrite: Overwrite = False,
    device: Device = "auto",
) -> None:
    """Interpolate between pretrained and fine-tuned weights (WiSE-FT): evaluate several, or export one."""
    if not datasets and out is None:
        raise UserError(
            "Nothing to do. Give evaluation sets, --dataset SET, or export one model, --alpha 0.5 --out DIR."
        )
    if out is not None and (alphas is None or len(alphas) != 1):
        raise UserError(f"--out exports one model, but --alpha was given {len(alphas or [])} times. Give it once.")
    check_model(run)
    from declip.interchange import interpolate as mixing

    if datasets:
        table = Table("alpha", title=run)
        for name in datasets:
            table.add_column(name, justify="right")
        for alpha, results in mixing.measure_mixtures(run, alphas or [0, 0.25, 0.5, 0.75, 1], datasets, task, device):
            table.add_row(f"{alpha:g}", *(mixing.first_measure(result) for result in results))
        console.print(table)
    if out is not None and alphas is not None:
        say(f"Written: {mixing.write_mixture(run, alphas[0], out, license=license, overwrite=overwrite)}")
