"""Loss names are known in `supervision/` and in recipes only; what others need to know is declared on `Term`."""

import ast
from pathlib import Path

import declip
from declip.supervision.objective import TERMS

SOURCE = Path(declip.__file__).parent
HOME = ("supervision/", "recipe/")
ALLOWED = {("data/batch.py", "contrastive")}
"""The name of an image view."""
TENSOR_NAMES = {"interchange/official.py"}
"""Maps the official implementation's names of tensors to ours."""


def loss_names(path):
    """Losses that a file names: as a string, as a section of the recipe, or by the key of its weight."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        found |= {name for name in TERMS if text == name or f"loss_weights.{name}" in text or f"terms.{name}" in text}
        if isinstance(node, ast.Attribute) and node.attr in TERMS.keys() - {"contrastive", "sigmoid"}:  # torch.sigmoid
            found.add(node.attr)
    return found


def test_no_loss_is_named_outside_supervision_and_recipes():
    named = set()
    for path in SOURCE.rglob("*.py"):
        place = path.relative_to(SOURCE).as_posix()
        if not place.startswith(HOME) and place not in TENSOR_NAMES:
            named |= {(place, name) for name in loss_names(path)}
    assert named <= ALLOWED, f"declare on `Term` what {sorted(named - ALLOWED)} need to know"
