"""Numbers, durations and untrusted text for the terminal, pages and tables, and reading YAML."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import regex
import yaml

try:  # ten times as fast; wheels of PyYAML have it
    from yaml import CSafeDumper as SafeDumper
    from yaml import CSafeLoader as SafeLoader
except ImportError:
    from yaml import SafeDumper, SafeLoader  # type: ignore[assignment]

# Control characters, line ends, surrogates and marks of writing direction.
_UNSEEN = regex.compile(r"[\p{Cc}\p{Cs}\p{Co}\p{Zl}\p{Zp}\u200e\u200f\u202a-\u202e\u2066-\u2069]")

MAX_CHARACTERS, MAX_DEPTH = 1 << 17, 20  # limits of a recipe; the shipped ones have some 3,000 characters and 4 levels

# YAML 1.1 reads 5e-4 as text, 010 as 8 and 1:30 as 90.
_FRACTION = r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
NUMBERS = {"int": r"[-+]?[0-9][0-9_]*", "float": rf"{_FRACTION}|[-+]?\.(?:inf|nan)"}

# Beginnings of cells that a spreadsheet evaluates; an apostrophe before them makes them text.
FORMULA = re.compile(r"'*[=+\-@\t\r]")


def shown(text: str, most: int = 160) -> str:
    """Replace control characters in a text from the data, and truncate it to `most` characters."""
    plain = _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", text[: most + 1])
    return plain if len(plain) <= most else f"{plain[: most - 1].rstrip()}…"


def about(number: float) -> str:
    """Format a number with two digits: 1,834 is "1,800", 0.0512 is "0.051"."""
    return f"{float(f'{number:.2g}'):,.0f}" if number >= 10 else f"{number:.2g}"


def plural(count: int, one: str) -> str:
    """Format a count with a noun: "1 pair", "2,000 pairs"."""
    return f"{count:,} {one if count == 1 else one + 's'}"


def listed(words: Iterable[object]) -> str:
    """Join words: "a, b and c"."""
    given = [f"{word:,}" if isinstance(word, int) else str(word) for word in words]
    return given[0] if len(given) == 1 else f"{', '.join(given[:-1])} and {given[-1]}" if given else "nothing"


def short_count(number: int) -> str:
    """Abbreviate a round number: 2000 is "2k", 2500 "2.5k", 1234 "1,234"."""
    for size, unit in ((1_000_000, "M"), (1_000, "k")):
        if number >= size and number % (size // 10) == 0:
            return f"{number / size:g}{unit}"
    return f"{number:,}"


def percent(fraction: float) -> str:
    """Format a fraction in percent, small ones with more digits: 0.0008 is "0.08 %", 0.367 is "36.7 %"."""
    digits = ".2g" if fraction and fraction < 0.001 else ".2f" if fraction < 0.01 else ".1f"
    return f"{100 * fraction:{digits}} %"


def duration(seconds: float) -> str:
    """Format seconds: "43 s", "5 min 12 s", "3 h 5 min"."""
    hours, minutes, rest = round(seconds) // 3600, round(seconds) % 3600 // 60, round(seconds) % 60
    words = f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return words.replace(" ", "\N{NO-BREAK SPACE}")


def one_line(error: Exception, longest: int = 300) -> str:
    """Format the message of an error on one line, or its class if the message is empty."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= longest else f"{text[:longest]} …"


def plain_cell(cell: str) -> str:
    """A cell that a spreadsheet does not compute as a formula."""
    return f"'{cell}" if FORMULA.match(cell) else cell


class _Loader(SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        count = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [name for name, times in count.items() if times > 1]:
            raise yaml.YAMLError(f"the key '{twice[0]}' is given twice; the second would replace the first")
        return super().construct_mapping(node, deep)


class _Dumper(SafeDumper):
    """Quotes text that `_Loader` would read as a number."""


for kind in (_Loader, _Dumper):
    kind.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] not in NUMBERS]
        for first, known in kind.yaml_implicit_resolvers.items()
    }
    for name, pattern in NUMBERS.items():
        kind.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(f"^(?:{pattern})$"), list("-+0123456789."))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda _, node: float(re.sub(r"\.(?=inf|nan)", "", node.value)))


def read_yaml(text: str) -> Any:
    """Read YAML from an untrusted file; raises `YAMLError`.

    No tag creates an object; aliases, of which a few lines can expand to gigabytes, are refused.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"it has more than {MAX_CHARACTERS:,} characters")
    try:
        depth = 0
        for event in yaml.parse(text, SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > MAX_DEPTH:
                raise yaml.YAMLError(f"it has aliases, or more than {MAX_DEPTH} levels; write it out")
        return yaml.load(text, _Loader)  # a SafeLoader
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:  # a bad date, number …
        raise yaml.YAMLError(str(error)) from error


def write_yaml(tree: Any) -> str:
    """Write YAML that `read_yaml` reads as the same tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
