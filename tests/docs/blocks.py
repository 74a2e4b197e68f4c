"""Find the code blocks of the documentation, check them, and run them as a reader would type them.

Every `python`, `shell` and `yaml` block is checked: commands, options and keys exist. Blocks run in their order, in one
folder and one Python per page, `declip` lines in this process. `why_not` names what is only checked: the network,
several processes, programs that install or take hours.
"""

import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from typer.main import get_command

from declip.cli import app as cli
from declip.recipe.load import load_recipe, parse_overrides, recipe_names

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^    (?:declip|python|torchrun|sbatch|pip|make|pytest) .*$", re.MULTILINE)
LOCAL = {
    r"(?<![`-])/data\b": "data",
    r"open_clip:[\w-]+/\w+": "runs/vit",
    r"huggingface:openai/[\w-]+": "downloads/clip-vit-base-patch32",
    r"huggingface:bert[\w-]+": "encoders/clinical",
    r"builtin:icons": "builtin:emoji",
    r"builtin:lite[02]-minilm|timm:\S+\+encoders/multilingual": "runs/vit",
    r"--format onnx": "--format safetensors",
}
"""Large or remote data and a slow format, which tests/interchange exports, and the local stand-in for each."""

CHECKED = {
    r"ViT-B-32/laion2b|data download builtin:(?:clipart|stamps)": "network",
    r"report_to=": "packages for tracking",
    r"^(?:torchrun|sbatch)\b": "several processes",
    r"^hf\b": "an account of the Hub",
    r"^(?:pip|make|pytest|git|python benchmarks/|python3 -m venv)": "installs, or takes minutes",
}
"""Lines that are only checked, and why."""

FILE = re.compile(r"# (\S+\.(?:py|yaml))\n")
"""The first line of a block that is a file, with its name."""

GLOBBED = re.compile(r"(?:^|\s)(?:[^\s'\"]*[\[\]{}*?~#][^\s'\"]*)")
"""Words that bash or zsh would expand, or take for a comment, unless they are quoted."""


class Block(NamedTuple):
    kind: str
    code: str
    line: int


def blocks(page):
    text = page.read_text(encoding="utf-8")
    return [
        Block(found[1], found[2], text.count("\n", 0, found.start()) + 1)
        for found in FENCE.finditer(text)
    ]


def lines(code):
    """Yield the commands of a shell block, continued lines joined."""
    for line in code.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield line.strip()


def check(words):
    """Assert that what a shell line names exists: command, options, keys, file, target, extra."""
    if "declip" in words and words[0] != "git":
        _check_declip(words[words.index("declip") :])
    if words[0] == "sbatch":
        script = next(at for at, word in enumerate(words) if word.endswith(".sbatch"))
        assert (ROOT / words[script]).is_file(), words[script]
        _check_declip(["declip", "train", *words[script + 1 :]])
    if words[0] == "python" and words[1] != "-m":
        script = (ROOT / words[1]).read_text(encoding="utf-8")
        for option in words[2:]:
            assert not option.startswith("--") or option == "--help" or f'"{option}"' in script, (
                f"{words[1]} {option}"
            )
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^([\w-]+ )*{words[1]}[ :]", makefile, re.MULTILINE), words[1]
    if words[0] == "pytest":
        assert all((ROOT / name).exists() for name in words[1:] if not name.startswith("-")), words
    if words[0] == "pip":
        for word in words[2:]:
            _check_project(word)


def _check_project(word):
    """Assert that a project that pip installs, of declip or in a folder, has the extras that are named."""
    named, _, extras = word.rstrip("]").partition("[")
    folder = ROOT if named == "declip" else ROOT / named
    if extras:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert set(extras.split(",")) <= set(project["optional-dependencies"]), word


def _check_declip(words):
    command = get_command(cli.app)
    rest = words[1:]
    while hasattr(command, "commands") and rest:
        command, rest = command.commands[rest[0]], rest[1:]
    given = command.make_context(words[1], rest).params
    if words[1] == "train" and (
        given["recipe"] in recipe_names() or Path(given["recipe"]).is_file()
    ):
        load_recipe(given["recipe"], parse_overrides(given["overrides"] or []))


def why_not(line):
    """Give the reason why a shell line is only checked; None where it is run."""
    return next((reason for pattern, reason in CHECKED.items() if re.search(pattern, line)), None)


class Reader:
    """Follow pages in the present folder; `left` are the lines that were only checked, with the reason."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        # timm looks its functions' module up
        monkeypatch.setitem(sys.modules, "page", module := ModuleType("page"))
        self.names = vars(module)
        self.left = {}
        monkeypatch.syspath_prepend("")  # Python finds modules in the present folder

    def follow(self, page):
        for block in blocks(page):
            where = f"{page.name}:{block.line}"
            code = block.code
            for there, local in LOCAL.items():
                code = re.sub(there, local, code)
            if named := FILE.match(code):
                Path(named[1]).write_text(code, encoding="utf-8")
            if block.kind == "python" and not named:
                exec(compile(code, where, "exec"), self.names)
            elif block.kind == "yaml":
                assert named, (
                    f"{where}: the first line of a recipe is its name, such as '# mine.yaml'"
                )
                load_recipe(named[1])
            elif block.kind == "shell":
                for line in lines(code):
                    self._type(line, where)

    def _type(self, line, where):
        words = shlex.split(line, comments=True)
        check(words)
        if reason := why_not(line):
            self.left[line] = reason
            return
        if words[0] == "python":
            module = words[1] == "-m"
            self.monkeypatch.setattr("sys.argv", words[1 + module :])
            run, name = (
                (runpy.run_module, words[2]) if module else (runpy.run_path, ROOT / words[1])
            )
            run(str(name), run_name="__main__")
        elif words[0] != "declip":
            subprocess.run(["bash", "-ec", line], check=True, stdout=subprocess.DEVNULL)
        else:
            port = ["--port", "0"] if words[1] == "app" else []
            self.monkeypatch.setattr("sys.argv", words + port)
            with pytest.raises(SystemExit) as ended:
                cli.main()
            assert not ended.value.code, f"{where}: {line} ended with {ended.value.code}"
