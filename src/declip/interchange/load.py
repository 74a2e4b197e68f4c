"""Loading a model: a run folder or a checkpoint of ours, or a checkpoint of the authors'."""

from pathlib import Path

import yaml
from safetensors import SafetensorError

from declip.config import Recipe
from declip.errors import UserError
from declip.interchange.declip_authors import read_declip_authors
from declip.models.dual_encoder import DualEncoder
from declip.training.build import pick_device
from declip.training.checkpoint import STATE, list_checkpoints, load_checkpoint, newest_good, part
from declip.training.run import RECIPE


def load(where: str | Path, device: str = "auto") -> DualEncoder:
    """Load a trained model, in evaluation mode.

    Args:
        where: A run folder (its newest good checkpoint), a checkpoint folder inside one, or a file with the authors'
            weights (``.pth``, ``.pth.tar``, ``.pt``).
        device: "auto", "cpu", "cuda", …

    Returns:
        The model: `encode_image(preprocess(images))` and `encode_text(tokenize(texts))`. Averaged weights are taken
        where the run kept them.

    Raises:
        UserError: nothing there, nothing loadable there, or a damaged file.
    """
    path = Path(where)
    if not path.exists():
        raise UserError(f"There is no model at '{where}'. Give a run folder, a checkpoint folder, or a weights file.")
    if path.is_file():
        return read_declip_authors(path)[0].to(pick_device(device)).eval()
    return _from_checkpoint(path).to(pick_device(device)).eval()


def _from_checkpoint(path: Path) -> DualEncoder:
    if (path / STATE).is_file():
        found = load_checkpoint(path)
    elif list_checkpoints(path):
        newest, problems = newest_good(path)
        if newest is None:
            raise UserError(f"No checkpoint in '{path}' is whole. {problems[0]}")
        found = newest
    else:
        what = "has no checkpoint yet" if (path / RECIPE).is_file() else f"is not a run folder: it has no {RECIPE}"
        raise UserError(f"'{path}' {what}. Give a run folder, or a folder in its checkpoints.")
    model = DualEncoder.from_recipe(Recipe.model_validate(yaml.safe_load(found.recipe)))
    try:
        model.load_state_dict(part("average", found.weights) or part("model", found.weights))
    except (RuntimeError, SafetensorError) as error:
        raise UserError(
            f"The weights in '{path}' do not fit their recipe: {str(error).splitlines()[-1].strip()}"
        ) from error
    return model
