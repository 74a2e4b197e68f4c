"""The command ``declip explain``."""

from pathlib import Path
from typing import Annotated

import typer

from declip.cli.options import Device, expand, file, say
from declip.errors import UserError
from declip.io.atomic import check_writable
from declip.recipe.starts import check_model


def explain(
    model: Annotated[str, typer.Argument(help="a run folder, a checkpoint, a weights file, or builtin:lite2-minilm")],
    image: Annotated[Path, typer.Argument(parser=expand, metavar="IMAGE", help="an image file")],
    text: Annotated[str, typer.Argument(help="what to look for in the image")],
    out: Annotated[Path, file("image to write: a heat map over the given one (PNG)")],
    size: Annotated[int | None, typer.Option(min=8, help="pixels of the sides that the model sees")] = None,
    device: Device = "auto",
) -> None:
    """Show where a text fits in an image: draw a heat map over the image."""
    # --- checks that need no torch, whose import takes seconds
    check_writable((out,))
    check_model(model)
    if not image.is_file():
        raise UserError(f"There is no image '{image}'. Give a file.")
    if not text.strip():
        raise UserError("The text is empty. Give what to look for, such as 'a red apple'.")

    from declip.data.images.decode import decode
    from declip.data.pair import BrokenPair
    from declip.interchange.read import load
    from declip.io.atomic import atomic_write
    from declip.reports.heat_map import heat_map

    try:
        picture = decode(image, image.name)
    except BrokenPair as error:
        raise UserError(f"'{image}' cannot be used: {error}. Give another image.") from error
    found = load(model, device).similarity_map(picture, text, size)
    top, left = divmod(int(found.argmax()), found.shape[1])
    with atomic_write(out, "choose another file with --out") as target:
        heat_map(picture, found.numpy()).save(target, "PNG")
    say(
        f"Most similar at {left}, {top} of {picture.width} × {picture.height} pixels: {found.max():.2f}, "
        f"mean {found.mean():.2f}.\nWritten: {out}"
    )
