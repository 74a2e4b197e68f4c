"""Packages import only from packages below them, and no modules import each other in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import declip

SOURCE = Path(declip.__file__).parent
LAYERS = (
    ("errors", "_version"),
    ("io",),
    ("recipe",),
    ("data",),
    ("models",),
    ("supervision", "evaluation"),
    ("runs",),
    ("interchange",),
    ("training",),
    ("comparison", "inspection", "search"),
    ("reports",),
    ("app", "finetuning"),
    ("api",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules():
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name):
    """The modules of the package that a module imports, also inside functions and for types."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    inside = {module.removeprefix("declip.") for module in found if module and module.startswith("declip.")}
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


def test_no_circle_of_modules():
    TopologicalSorter({name: targets for name, targets in IMPORTS.items() if name}).prepare()  # names the circle


def test_no_class_name_twice():
    seen = {}
    for name, path in sorted(MODULES.items()):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                assert node.name not in seen, f"{node.name} is in {seen[node.name]} and in {name}"
                seen[node.name] = name
