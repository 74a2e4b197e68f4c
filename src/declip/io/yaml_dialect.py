"""Read and write YAML of recipes and lists: numbers as people write them, and nothing that can harm."""

import re
from collections import Counter
from typing import Any

import yaml

try:  # ten times as fast; wheels of PyYAML have it
    from yaml import CSafeDumper as SafeDumper
    from yaml import CSafeLoader as SafeLoader
except ImportError:
    from yaml import SafeDumper, SafeLoader  # type: ignore[assignment]  # the same, in Python

# limits of a recipe; the shipped ones have some 3,000 characters and 4 levels
MAX_CHARACTERS = 1 << 17
MAX_DEPTH = 20

# YAML 1.1 reads 5e-4 as text, 010 as 8 and 1:30 as 90.
_FRACTION = (
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
)
NUMBERS = {"int": r"[-+]?[0-9][0-9_]*", "float": rf"{_FRACTION}|[-+]?\.(?:inf|nan)"}


class _Loader(SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        count = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [name for name, times in count.items() if times > 1]:
            raise yaml.YAMLError(
                f"the key '{twice[0]}' is given twice; the second would replace the first"
            )
        return super().construct_mapping(node, deep)


class _Dumper(SafeDumper):
    """Quotes text that `_Loader` would read as a number."""


for kind in (_Loader, _Dumper):
    kind.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] not in NUMBERS]
        for first, known in kind.yaml_implicit_resolvers.items()
    }
    for name, pattern in NUMBERS.items():
        kind.add_implicit_resolver(
            f"tag:yaml.org,2002:{name}", re.compile(f"^(?:{pattern})$"), list("-+0123456789.")
        )
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
_Loader.add_constructor(
    "tag:yaml.org,2002:float", lambda _, node: float(re.sub(r"\.(?=inf|nan)", "", node.value))
)


def read_yaml(text: str) -> Any:
    """Read YAML from an untrusted file; raises `YAMLError`.

    No tag creates an object; aliases, of which a few lines can expand to gigabytes, are refused.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"it has more than {MAX_CHARACTERS:,} characters")
    try:
        depth = 0
        for event in yaml.parse(text, SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(
                event, yaml.CollectionEndEvent
            )
            if isinstance(event, yaml.AliasEvent) or depth > MAX_DEPTH:
                raise yaml.YAMLError(
                    f"it has aliases, or more than {MAX_DEPTH} levels; write it out"
                )
        return yaml.load(text, _Loader)  # a SafeLoader
    # A bad date, number …
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise yaml.YAMLError(str(error)) from error


def write_yaml(tree: Any) -> str:
    """Write YAML that `read_yaml` reads as the same tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
