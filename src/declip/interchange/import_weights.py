"""The way in: weights of another library as one file of ours, which `declip.load` reads and training can start from."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from declip.errors import UserError, unknown
from declip.interchange.declip_file import CARD, FILE, IMAGE_USAGE, USAGE, write_declip_file
from declip.interchange.export import check_out, folder_beside
from declip.interchange.from_huggingface import PREFIX as HUGGINGFACE
from declip.interchange.from_huggingface import fetch, read_folder
from declip.interchange.from_open_clip import from_open_clip
from declip.interchange.load import read_authors_file
from declip.interchange.model_card import NO_LICENCE, model_card
from declip.interchange.open_clip import FOLDER, PREFIX, read_open_clip
from declip.interchange.provenance import Provenance
from declip.models.dual_encoder import DualEncoder
from declip.models.no_text import has_text

Heads = Mapping[str, Tensor]


def _of_authors(file: str) -> tuple[DualEncoder, Heads]:
    model, objective = read_authors_file(Path(file))
    heads = objective.state_dict() if objective is not None else {}
    # The authors do not save their queue, so it is empty.
    return model, {n: t for n, t in heads.items() if isinstance(t, Tensor) and not n.startswith("queue.")}


def _of_open_clip(file: str) -> tuple[DualEncoder, Heads]:
    given = file.removeprefix(PREFIX)
    if Path(given).is_file():
        raise UserError(
            f"'{given}' does not say which model its weights are of. Write MODEL/{given}, where MODEL is for example "
            "ViT-B-32 (ViT-B-32-quickgelu for weights trained with QuickGELU)."
        )
    spec = f"{FOLDER}{given}" if Path(given).is_dir() else given
    return from_open_clip(read_open_clip(f"{PREFIX}{spec}")), {}


def _of_huggingface(file: str) -> tuple[DualEncoder, Heads]:
    return read_folder(fetch(file) if file.startswith(HUGGINGFACE) else Path(file))


SOURCES: Mapping[str, Callable[[str], tuple[DualEncoder, Heads]]] = {
    "declip-authors": _of_authors,
    "open_clip": _of_open_clip,
    "huggingface": _of_huggingface,
}
"""What reads each source: a file's name → the model and the heads that only training uses, by the objective's names."""


def import_weights(
    file: str | Path, source: str, out: str | Path, *, license: str = NO_LICENCE, overwrite: bool = False
) -> Path:
    """Write another library's weights as a folder that `declip.load` reads: declip.safetensors and a model card.

    Args:
        file: Of "declip-authors" a checkpoint, with both towers or the image tower alone; of "open_clip" what follows
            "open_clip:" in `declip.load`, or a folder that open_clip wrote; of "huggingface" a folder of transformers'
            `CLIPModel`, or ``huggingface:OWNER/NAME``.
        source: "declip-authors", "open_clip" or "huggingface".
        out: The folder to write; it appears when all of it is there.
        license: For the card.
        overwrite: Replace a folder that is not empty.

    Returns:
        The folder.

    Raises:
        UserError: unknown source, a file that is not of it (what differs first is named), a folder that is in use or
            cannot be written.
    """
    if source not in SOURCES:
        raise unknown("source of weights", source, SOURCES)
    check_out(Path(out), overwrite)
    model, heads = SOURCES[source](str(file))
    with folder_beside(Path(out)) as beside:
        write_declip_file(model, beside / FILE, heads)
        provenance = Provenance(model.recipe, origin=f"`{Path(file).name}` ({source})")
        usage = USAGE if has_text(model) else IMAGE_USAGE
        card = model_card(model, provenance, "declip", usage, license=license)
        (beside / CARD).write_text(card, encoding="utf-8")
    return Path(out)
