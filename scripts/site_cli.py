"""Write docs/cli.md, the page of all commands, from the commands themselves: `python scripts/site_cli.py`."""

from collections.abc import Iterator
from inspect import cleandoc, signature
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from typer.main import get_command

from declip.cli.app import app

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"

BEGINNING = """# All commands

Every command with its arguments and options, as `declip COMMAND --help` prints them. `[KEY=VALUE]...` are \
[recipe keys](keys.md). A command ends with status 0, with 2 after a mistake in the input, and with 1 after other \
errors. `declip --version` prints the version. This page is written by `python scripts/site_cli.py`."""


def cli_page() -> str:
    """Render the page as Markdown."""
    sections = [BEGINNING]
    root = get_command(app)
    for name, command in _leaves("declip", root):
        sections.append(_section(name, command))
    return "\n\n".join(sections) + "\n"


def _leaves(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Each command below a group, with its words."""
    inner_commands = getattr(command, "commands", None)
    if inner_commands is None:
        yield name, command
        return
    if command.invoke_without_command and name != "declip":
        yield name, command
    for inner, each in inner_commands.items():
        yield from _leaves(f"{name} {inner}", each)


def _section(name: str, command: Any) -> str:
    context = command.context_class(command, info_name=name)
    usage = " ".join(command.collect_usage_pieces(context))
    declared = signature(command.callback).parameters
    hints = {each: declared[each].annotation for each in declared}
    shown = [each for each in command.params if each.name != "help" and not each.hidden]
    lines = [f"## {name}", "", cleandoc(command.help or "").replace("\n", " "), ""]
    lines += ["```text", f"{name} {usage}".rstrip(), "```"]
    if shown:
        lines += ["", "| argument or option | default | meaning |", "|---|---|---|"]
    lines += [_row(parameter, _choices(hints.get(parameter.name))) for parameter in shown]
    return "\n".join(lines)


def _row(parameter: Any, choices: tuple[str, ...]) -> str:
    cells = (_written(parameter, choices), _default(parameter), parameter.help or "")
    escaped = [cell.replace("|", "&#124;").replace("\n", " ") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _choices(hint: Any) -> tuple[str, ...]:
    """Values of a `Literal`, also inside of `list[…]` and `… | None`."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    found: tuple[str, ...] = ()
    for inner in get_args(hint):
        found += _choices(inner)
    return found


def _written(parameter: Any, choices: tuple[str, ...]) -> str:
    """A parameter as it is typed."""
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name}`"
    options = parameter.opts if any(parameter.opts) else parameter.secondary_opts
    names = ", ".join(sorted(options, key=len, reverse=True))
    if parameter.is_flag:
        return f"`{names}`"
    value = parameter.metavar or ",".join(choices) or "VALUE"
    return f"`{names} {value}`"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    if value is None or isinstance(value, bool) or value == ():
        return ""
    if isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    return f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(cli_page(), encoding="utf-8")
