"""Names of pretrained weights."""

import os
import re
from difflib import get_close_matches
from pathlib import Path

from declip.errors import UserError

HUB = ("hf-hub", "huggingface")  # prefixes of names of repositories
NAMED = ("open_clip:", "timm:", *(f"{prefix}:" for prefix in HUB))
OWN = re.compile(r"(?P<file>.+?\.py):(?P<function>\w+)(?:\+(?P<fit>.+))?", re.DOTALL)
"""FILE.py:function, which returns an encoder of the user's own; +FOLDER: with the heads that a fit in it has."""
STARTS = {"builtin:lite0-minilm": 128, "builtin:lite2-minilm": 192}
"""Built-in starts, with the image size on a CPU: 224 and 260 pixels, their own sizes, take 3 and 2 times as long."""


def no_model(given: str) -> UserError:
    """Build the error for weights that are neither a path nor a name that is known."""
    path = Path(given).expanduser()
    names = os.listdir(path.parent) if path.parent.is_dir() else []
    near = get_close_matches(path.name, names, n=1)
    meant = ""
    if near:
        meant = str(path.parent / near[0])
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", given):
        meant = f"hf-hub:{given}"
    hub = f" Did you mean '{meant}'?" if meant else ""
    return UserError(
        f"Cannot find the model '{given}'.{hub} Give a run folder, a checkpoint folder, a weights file, a folder of "
        "transformers' CLIPModel or SiglipModel, or of open_clip, hf-hub:OWNER/NAME, open_clip:MODEL/TAG, "
        "timm:NAME.TAG, builtin:lite2-minilm or FILE.py:function."
    )


def is_own(model: object) -> bool:
    """Whether this names an encoder of the user's own, whose file would be run to open it."""
    return OWN.fullmatch(str(model)) is not None


def check_model(model: str) -> None:
    """Refuse a path that does not exist; names are looked up when they are opened."""
    if model.endswith(".py"):
        raise UserError(
            f"'{model}' is a Python file. Also name its function that returns the encoder: {model}:make."
        )
    if (
        not is_own(model)
        and model not in STARTS
        and not model.startswith(NAMED)
        and not Path(model).expanduser().exists()
    ):
        raise no_model(model)
