"""Packages import only from packages below them, without a circle; loss names stay in `supervision/`."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import declip
from declip.supervision.objective import TERMS

SOURCE = Path(declip.__file__).parent
LAYERS = (
    ("errors",),
    ("io",),
    ("recipe",),
    ("closed_form", "data"),
    ("models",),
    ("supervision", "evaluation"),
    ("runs",),
    ("interchange",),
    ("training",),
    ("comparison", "inspection", "search"),
    ("reports",),
    ("fitting",),
    ("finetuning", "app"),
    ("api",),
    ("cli",),
)
TRAIN = ("supervision", "training", "comparison", "reports.run", "reports.comparison")
"""Runs of gradient steps."""
FEW = (
    "fitting",
    "search",
    "inspection",
    "app",
    "reports.fitted",
    "reports.inspection",
    "reports.sheets",
)
"""What few pairs, or none, need: it takes an encoder and pairs, no recipe of a run and no run folder."""
BOTH = ("finetuning", "api", "cli", "", "__main__")
"""The commands, and what decides between a fit and a run; all other packages are the core."""
ASKING = ("evaluation", "search", "inspection", "fitting", "reports", "app", "runs", "api", "cli")
MODELS = ("model", "encoder", "base")  # names of encoders in these packages
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules():
    """The syntax tree of each module, by name."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES = modules()


def imports(name):
    """The modules of the package that a module imports, also inside functions and for types."""
    found = set()
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    inside = {
        module.removeprefix("declip.")
        for module in found
        if module and module.startswith("declip.")
    }
    return {module for module in inside if module in MODULES and module != name}


IMPORTS = {name: imports(name) for name in MODULES}


def test_packages_import_only_from_below():
    against = set()
    for name, targets in IMPORTS.items():
        package = name.split(".")[0]
        if package in ("", "__main__"):
            continue
        for target in targets:
            other = target.split(".")[0]
            if package != other and LEVEL[other] >= LEVEL[package]:
                against.add((name, target))
    assert not against


def wing(name):
    """The wing of a module: "train", "few", "both" or "core"."""
    for wing, members in (("train", TRAIN), ("few", FEW), ("both", BOTH)):
        if any(name == member or (member and name.startswith(f"{member}.")) for member in members):
            return wing
    return "core"


def test_no_wing_imports_the_other_and_the_core_neither():
    against = set()
    for name, targets in IMPORTS.items():
        own = wing(name)
        forbidden = {
            "core": {"train", "few", "both"},
            "train": {"few", "both"},
            "few": {"train", "both"},
        }
        for target in targets:
            if wing(target) in forbidden.get(own, set()):
                against.add((name, target))
    assert not against


def test_no_circle_of_modules():
    TopologicalSorter(
        {name: targets for name, targets in IMPORTS.items() if name}
    ).prepare()  # names the circle


def test_no_class_name_twice():
    seen = {}
    for name, tree in sorted(MODULES.items()):
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                assert node.name not in seen, f"{node.name} is in {seen[node.name]} and in {name}"
                seen[node.name] = name


HOME = ("supervision", "recipe")
ALLOWED = {("data.plan", "contrastive")}
"""The name of an image view."""
TENSOR_NAMES = {"interchange.official"}
"""Maps the official implementation's names of tensors to ours."""


def loss_names(tree):
    """Losses that a module names: as a string, as a section of the recipe, or by the key of its weight."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text, keys = node.value, ("loss_weights", "terms")
            found |= {
                name
                for name in TERMS
                if text == name or any(f"{key}.{name}" in text for key in keys)
            }
        if isinstance(node, ast.Attribute) and node.attr in TERMS.keys() - {
            "contrastive",
            "sigmoid",
        }:  # torch.sigmoid
            found.add(node.attr)
    return found


def test_no_loss_is_named_outside_supervision_and_recipes():
    named = set()
    for module, tree in MODULES.items():
        if module.split(".")[0] not in HOME and module not in TENSOR_NAMES:
            named |= {(module, name) for name in loss_names(tree)}
    assert named <= ALLOWED, f"declare on `Term` what {sorted(named - ALLOWED)} need to know"


def test_what_a_model_has_is_looked_up_in_one_file():
    """Elsewhere code asks an `Encoder`, which has all that is asked of it."""
    guesses = []
    for name, tree in MODULES.items():
        if name == "models.encoder" or name.split(".")[0] not in ASKING:
            continue
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("getattr", "hasattr"):
                asked = ast.unparse(call.args[0])
                guesses += [f"{name}: {asked}"] if asked.split(".")[-1] in MODELS else []
    assert guesses == []
