"""What an image and a query both resemble: pairs that a model was fitted to, and classes that it knows."""

from pathlib import Path

import torch
from PIL import Image

from declip.closed_form.neighbors import both_resemble
from declip.errors import UserError
from declip.interchange import starter
from declip.interchange.read import read_start
from declip.models.dual_encoder import DualEncoder
from declip.models.encoder import Encoder
from declip.models.neighbors import NeighborProjection
from declip.runs.fitted import KNOWN, FittedRun, is_fitted


def has_anchors(where: str | Path) -> bool:
    """Whether a model compares with known pairs or classes that have names; no weights are read."""
    folder = Path(where).expanduser()
    return starter.matches(str(where)) or (folder / KNOWN).is_file()


def anchor_names(where: str | Path) -> list[str]:
    """Captions of the known pairs of a fit, and names of known classes; empty for other models."""
    if starter.matches(str(where)):
        classes = read_start(str(where)).named_classes()
        if classes is None:
            return []
        return list(classes.names)
    folder = Path(where).expanduser()
    if not is_fitted(folder):
        return []
    return [caption for _, caption in FittedRun(folder).known]


@torch.no_grad()
def resembled(
    model: Encoder,
    names: list[str],
    text: str,
    images: list[Image.Image],
    count: int,
) -> list[tuple[str, ...]]:
    """Name up to `count` anchors that a text and each of the images both resemble, the most similar first."""
    sides = _sides(model)
    if sides is None or len(sides[0].anchors) != len(names):
        raise UserError(
            "The model compares with no known pairs or classes, so a result cannot be explained. Use a built-in start, "
            "or the folder of `declip finetune`, and leave --why out for other models."
        )
    assert isinstance(model, DualEncoder)
    image_side = sides[0].side
    text_side = sides[1].side
    tokens = model.tokenize([text])
    of_text = model.text_tower.pool(tokens)[0].float().cpu()
    tower = model.image_tower
    dtype = next(tower.parameters()).dtype
    found = []
    for image in images:
        pixels = model.preprocess(image).to(dtype)
        of_image = tower.pool(pixels)[0].float().cpu()
        rows = both_resemble(image_side, text_side, of_image, of_text, 2 * count)
        distinct = dict.fromkeys(names[row] for row in rows)  # captions may repeat
        found.append(tuple(distinct)[:count])
    return found


def _sides(model: Encoder) -> tuple[NeighborProjection, NeighborProjection] | None:
    if not isinstance(model, DualEncoder):
        return None
    image = model.image_tower.proj
    text = model.text_tower.text_projection
    if isinstance(image, NeighborProjection) and isinstance(text, NeighborProjection):
        return image, text
    return None
