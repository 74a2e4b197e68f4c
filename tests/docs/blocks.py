"""The code of the documentation: found in its pages, checked, and run as a reader would type it.

Run are `python`, `shell` and `yaml` blocks, in their order, in one folder and one Python for each page. A shell line
that begins with `declip` runs in this process, another one in bash. Only checked, not run, is what needs more than a
small folder has: another program (`pip`, `torchrun` …), the network, a whole data set, a tower for photographs, hours.
"""

import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from declip import cli
from declip.recipe_file import load_recipe, parse_overrides, recipe_names

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ELSEWHERE = ("open_clip:", "huggingface:", "timm:", "/data/", "imagenet:", "ckpt.pth.tar")
"""Words of what is not in the folder."""

ENDLESS = ("compare", "app")
"""Commands that start processes for minutes, or that serve until they are stopped."""

NOT_HERE = ("pip", "python3", "make", "torchrun", "sbatch", "git", "pytest", "python")
LARGEST_RUN = 64
"""Pixels; a larger tower is checked only."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text and the line of the page that it begins at."""

    kind: str
    code: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [Block(found[1], found[2], text.count("\n", 0, found.start()) + 1) for found in FENCE.finditer(text)]


def lines(code: str) -> Iterator[str]:
    """The commands of a shell block, those over several lines as one."""
    for line in code.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield line.strip()


def declip_commands(page: Path) -> Iterator[list[str]]:
    """The words of each `declip` command in a page's blocks, fenced or indented, also below torchrun and sbatch."""
    text = page.read_text(encoding="utf-8")
    indented = "".join(found[0] for found in re.finditer(r"^    .*\n", text, re.MULTILINE))
    for line in lines("".join(block.code for block in blocks(page)) + indented):
        for start in ("declip ", "torchrun ", "sbatch "):
            if (
                line.startswith(start)
                and "…" not in line
                and not re.search(r"\b(RECIPE|INDEX|MODEL|SOURCE|RUN)\b", line)
            ):
                words = shlex.split(line, comments=True)
                if start == "declip ":
                    yield words
                elif "-m" in words:
                    yield words[words.index("-m") + 1 :]
                elif "scripts/train.sbatch" in words:
                    yield ["declip", "train", *words[words.index("scripts/train.sbatch") + 1 :]]


def check(words: list[str]) -> dict[str, Any]:
    """Whether the command, its options and, of a shipped recipe, the keys exist; gives the parameters."""
    command: Any = get_command(cli.app)
    rest = words[1:]
    while hasattr(command, "commands"):
        command, rest = command.commands[rest[0]], rest[1:]
    given: dict[str, Any] = command.make_context(words[1], rest).params
    if words[1] == "train" and (given["recipe"] in recipe_names() or Path(given["recipe"]).is_file()):
        given["resolved"] = load_recipe(given["recipe"], parse_overrides(given["overrides"] or []))
    return given


class Reader:
    """Follows a page in the present folder.

    Args:
        monkeypatch: Puts the words of a command where the command line takes them from.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.names: dict[str, Any] = {"__name__": "page"}
        self.ran: list[str] = []

    def follow(self, page: Path) -> None:
        """Do all that a page says."""
        for block in blocks(page):
            where = f"{page.name}:{block.line}"
            if block.kind == "python":
                code = compile(block.code, where, "exec")
                if not _elsewhere(block.code):
                    exec(code, self.names)
                    self.ran.append(where)
            elif block.kind == "yaml":
                self._keep(block.code, where)
            elif block.kind == "shell":
                for line in lines(block.code):
                    self._type(line, where)

    def _keep(self, code: str, where: str) -> None:
        """Save a recipe under the name that its first line says, and read it."""
        named = re.match(r"# (\S+\.yaml)\n", code)
        assert named, f"{where}: the first line of a recipe is its name, such as '# mine.yaml'"
        Path(named[1]).write_text(code, encoding="utf-8")
        load_recipe(named[1])
        self.ran.append(where)

    def _type(self, line: str, where: str) -> None:
        words = shlex.split(line, comments=True)
        if words[0] in NOT_HERE:
            return
        if words[0] != "declip":
            subprocess.run(["bash", "-ec", line], check=True, stdout=subprocess.DEVNULL)
            return
        resolved = check(words).get("resolved")
        large = resolved is not None and resolved.image.size > LARGEST_RUN
        if words[1] in ENDLESS or large or _elsewhere(line):
            return
        self.monkeypatch.setattr("sys.argv", words)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code, f"{where}: {line} ended with {ended.value.code}"
        self.ran.append(line)


def _elsewhere(code: str) -> bool:
    return any(word in code for word in ELSEWHERE)
