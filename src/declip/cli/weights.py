"""The commands ``declip export``, ``declip import`` and ``declip interpolate``: they parse words and call the API."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from declip.errors import UserError

console = Console()


def export(
    model: Annotated[str, typer.Argument(help="a run, a checkpoint, weights, or huggingface:OWNER/NAME")],
    format: Annotated[str, typer.Option("--format", help="open_clip, huggingface, onnx or safetensors")],
    out: Annotated[Path, typer.Option(help="the folder to write")],
    license: Annotated[str, typer.Option(help="for the model card, such as mit")] = "unknown: set it",
    repo: Annotated[str | None, typer.Option(help="open_clip: OWNER/NAME on the Hub, to load it from there")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a folder that is not empty")] = False,
) -> None:
    """Write a model for another library, or as one file, with a model card."""
    from declip.interchange.export import export as run_export

    exported = run_export(model, format, out, license=license, overwrite=overwrite, repo=repo)
    checked = "" if exported.difference is None else f" {exported}"  # else a warning has said so
    console.print(f"Written: {exported.folder}.{checked}", highlight=False, soft_wrap=True, markup=False)


def import_(
    file: Annotated[
        str, typer.Argument(help="a checkpoint; MODEL/TAG, MODEL/FILE or a folder; huggingface:OWNER/NAME")
    ],
    source: Annotated[str, typer.Option("--from", help="declip-authors, open_clip or huggingface")],
    out: Annotated[Path, typer.Option(help="the folder to write; declip reads it")],
    license: Annotated[str, typer.Option(help="for the model card, such as mit")] = "unknown: set it",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a folder that is not empty")] = False,
) -> None:
    """Make another library's weights a model of ours."""
    from declip.interchange.import_weights import import_weights

    folder = import_weights(file, source, out, license=license, overwrite=overwrite)
    console.print(f"Written: {folder}", highlight=False, soft_wrap=True, markup=False)


def interpolate(
    run: Annotated[str, typer.Argument(help="the folder of a run that was fine-tuned")],
    share: Annotated[
        list[float] | None, typer.Option(help="of the fine-tuned weights, 0 to 1; may be given again")
    ] = None,
    on: Annotated[list[str] | None, typer.Option("--dataset", help="what to measure on; may be given again")] = None,
    protocol: Annotated[str, typer.Option(help="how to measure: zero-shot or retrieval")] = "zero-shot",
    figure: Annotated[Path | None, typer.Option(help="also draw the measures over the share: PNG or SVG")] = None,
    out: Annotated[Path | None, typer.Option(help="the folder to write one mixture to; declip reads it")] = None,
    license: Annotated[str, typer.Option(help="for the model card, such as mit")] = "unknown: set it",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a folder that is not empty")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda …")] = "auto",
) -> None:
    """Mix fine-tuned weights with those they started from (WiSE-FT): measure mixtures, or write one."""
    from declip.interchange import interpolate as mixing

    if not on and out is None:
        raise UserError(
            "Say what to measure the mixtures on, --dataset SET, or where to write one, --alpha 0.5 --out DIR."
        )
    if out is not None and (share is None or len(share) != 1):
        raise UserError(f"--out writes one mixture, but --alpha was given {len(share or [])} times. Give one.")
    if figure is not None and not on:
        raise UserError("--figure draws what was measured. Say on what: --dataset SET.")
    if on:
        shares = share or [0, 0.25, 0.5, 0.75, 1]
        table = Table("share of the fine-tuned", title=run)
        for name in on:
            table.add_column(name, justify="right")
        found = []
        for mixed in mixing.measure_mixtures(run, shares, on, protocol, device):
            found.append(mixed)
            table.add_row(f"{mixed.share:g}", *(mixing.first_measure(result) for result in mixed.results))
        console.print(table)
        if figure is not None:
            mixing.draw_mixtures(found, figure)
            console.print(f"Written: {figure}", highlight=False, soft_wrap=True, markup=False)
    if out is not None and share is not None:
        written = mixing.write_mixture(run, share[0], out, license=license, overwrite=overwrite)
        console.print(f"Written: {written}", highlight=False, soft_wrap=True, markup=False)
