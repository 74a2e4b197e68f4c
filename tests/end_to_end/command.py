"""What tests of the command share: how its fixture is called, and a recipe for it."""

from collections.abc import Callable
from pathlib import Path

import yaml

from conftest import TINY, WEIGHTS

Command = Callable[..., tuple[int, str]]


def write_recipe(path: Path, table: Path, **data: object) -> Path:
    tree = {**TINY, "data": {"source": str(table), **data}, "loss_weights": WEIGHTS["clip"]}
    path.write_text(yaml.safe_dump(tree))
    return path
