"""Every block of every page runs or is checked; the site builds strictly and without network."""

import inspect
import json
import re
import runpy
import tomllib
import xml.etree.ElementTree as ET
from typing import get_args, get_type_hints
from urllib.parse import urlsplit

import matplotlib.pyplot as plt
import pytest
import yaml
from mkdocstrings import Inventory

import declip
from conftest import once
from declip.supervision.objective import TERMS
from declip.training.trackers import TRACKERS
from docs.blocks import FENCE, GLOBBED, INDENTED, ROOT, Reader, blocks, lines

DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
LANGUAGES = {"python", "shell", "yaml", "text", "csv", "json", "bibtex"}
WIDEST = 84
"""Characters of a shell line; the site's column cuts longer ones off."""


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem
)
def test_a_page_does_what_it_says(page, here, monkeypatch):
    if page.stem == "small-training":
        (here / "runs/demo").unlink()  # it trains what all others take for granted
    reader = Reader(monkeypatch)
    reader.follow(page)
    if page.stem == "tutorial":
        assert not reader.left
        made = ("pairs.html", "result.json", "exports/mine/declip.safetensors")
        assert [name for name in made if not (here / name).exists()] == []


def test_the_notebook_runs(here, tmp_path_factory, monkeypatch):
    place = tmp_path_factory.mktemp("notebook")
    monkeypatch.chdir(place)
    cells = json.loads((DOCS / "first-hour.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    smaller = {
        "builtin:lite2-minilm": str(here / "runs/vit"),
        "builtin:clipart": "builtin:emoji",
        "EVERY = 60, 4": "EVERY = 9, 3",
        "START, out": 'START, freeze="both", out',
    }
    for part, other in smaller.items():
        assert code.count(part) == 1
        code = code.replace(part, other)
    with plt.rc_context({"backend": "agg"}):
        exec(code, {"__name__": "first-hour"})
    assert len(plt.get_fignums()) == 7
    plt.close("all")
    assert (place / "exports/open_clip/open_clip_model.safetensors").is_file()


LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def test_links_to_headings_work_on_github_too():
    """Which knows no other anchors, such as those that the site has of Python names."""
    dead = []
    for page in PAGES:
        for name, anchor in LINK.findall(page.read_text(encoding="utf-8")):
            target = (page.parent / name if name else page).read_text(encoding="utf-8")
            headings = [
                re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-")
                for each in HEADING.findall(target)
            ]
            dead += [f"{page.name}: {name}#{anchor}"] * (anchor not in headings)
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_is_fenced_and_works_in_bash_and_zsh(page):
    assert {block.kind for block in blocks(page)} <= LANGUAGES
    assert not INDENTED.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    for code in (block.code for block in blocks(page) if block.kind == "shell"):
        assert [line for line in code.splitlines() if len(line) > WIDEST] == []
        assert [line for line in lines(code) if GLOBBED.search(QUOTED.sub("", line))] == []
        assert "#" not in QUOTED.sub("", code)


FROM_AN_INDEX = re.compile(r"pip install '?declip")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_page_installs_declip_from_an_index_that_has_none(page):
    assert not FROM_AN_INDEX.search(page.read_text(encoding="utf-8"))


ASKS = re.compile(
    r'<(?:script|img|iframe|source|video|audio|embed|object)\b[^>]*?\b(?:src|data)="([^"]+)"|<link\b[^>]*?>'
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site; any warning, such as a broken link or anchor, is an error."""
    return once(tmp_path_factory, "site", build_site)


def build_site(folder):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        patch.setattr("socket.socket.connect", _no_network)
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
        config.plugins.on_shutdown()


def _no_network(*_):
    raise AssertionError("the site asks for the network while it is built")


def test_all_pages_are_there_and_ask_nobody(site):
    pages = sorted(site.rglob("*.html"))
    names = {page.name for page in pages}
    added = {"first-hour.html", "contributing.html", "changelog.html"}
    assert {"index.html", "tutorial.html", "api.html", *added} <= names
    for page in (page for page in pages if "benchmarks" not in page.parts):
        text = page.read_text(encoding="utf-8")
        asked = [
            found[1] or "".join(re.findall(r'href="([^"]+)"', found[0]))
            for found in ASKS.finditer(text)
        ]
        assert asked
        assert [link for link in asked if urlsplit(link).netloc] == [], page.name
    for sheet in site.rglob("*.css"):
        assert not re.search(
            r"(?:@import|url\()\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")
        ), sheet.name


def test_the_index_for_programs_lists_every_page_and_name(site):
    listed = set(re.findall(r"\]\(([^)]+)\)", (site / "llms.txt").read_text(encoding="utf-8")))
    pages = {
        page.relative_to(site).as_posix()
        for page in site.rglob("*.html")
        if "benchmarks" not in page.parts
    }
    assert listed == pages - {"404.html"}
    names = Inventory.parse_sphinx((site / "objects.inv").open("rb"))
    assert {"declip.train", "declip.finetune", "declip.Classifier"} <= names.keys()


def test_the_page_of_keys_is_up_to_date_and_describes_every_key():
    script = runpy.run_path(str(ROOT / "scripts" / "site_keys.py"))
    page = script["PAGE"].read_text(encoding="utf-8")
    assert page == script["keys_page"](), "run: python scripts/site_keys.py"
    rows = dict(re.findall(r"^\| `([^`]+)` \| .*? \| (.*) \|$", page, re.MULTILINE))
    assert {"seed", "views.image.scale", "finetune.lora", "loss_weights"} <= rows.keys()
    assert all(map(str.strip, rows.values()))


def test_the_page_of_commands_is_up_to_date_and_describes_every_option():
    script = runpy.run_path(str(ROOT / "scripts" / "site_cli.py"))
    page = script["PAGE"].read_text(encoding="utf-8")
    assert page == script["cli_page"](), "run: python scripts/site_cli.py"
    assert {"## declip search", "## declip data download", "## declip cache clear"} <= set(
        page.splitlines()
    )
    rows = re.findall(r"^\| (`[^`]+`) \| .*? \| (.*) \|$", page, re.MULTILINE)
    assert len(rows) > 100
    assert [name for name, meaning in rows if not meaning.strip()] == []


def classes_of(hint):
    """The classes of declip that a type hint names."""
    if inspect.isclass(hint) and hint.__module__.startswith("declip"):
        return {hint}
    return set().union(*map(classes_of, get_args(hint)))


def test_the_page_of_the_api_has_every_public_name_and_what_functions_return():
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    described = set(re.findall(r"^::: (\S+)$", page, re.MULTILINE))
    described |= {
        name for names in re.findall(r"members: \[(.+)\]", page) for name in names.split(", ")
    }
    described = {name.rpartition(".")[2] for name in described}
    assert set(declip.__all__) - described == set()
    functions = [
        each for name in declip.__all__ if inspect.isfunction(each := getattr(declip, name))
    ]
    assert len(functions) > 8
    returned = set().union(*(classes_of(get_type_hints(each)["return"]) for each in functions))
    returned |= classes_of(get_type_hints(declip.Index.search)["return"])
    assert {each.__name__ for each in returned} - described == set()


@pytest.mark.parametrize(("page", "names"), [("method", TERMS), ("tracking", TRACKERS)])
def test_every_loss_and_tracker_has_a_line_on_its_page(page, names):
    listed = re.findall(
        r"^- `(\w+)`", (DOCS / f"{page}.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert names.keys() - set(listed) == set()


def test_formulas_are_mathml_and_drawings_part_of_the_page(site):
    for method in ("clip", "slip", "filip", "declip", "defilip"):
        text = (site / "methods" / f"{method}.html").read_text(encoding="utf-8")
        found = text.count('<svg class="drawing"'), "<math" in text, "arithmatex" in text
        assert found == (1, True, False)
        for formula in re.findall(r"<math.*?</math>", text, re.DOTALL):
            assert "\\" not in "".join(ET.fromstring(formula).itertext()), (
                "a command that was not understood"
            )


def test_drawings_are_those_that_the_script_draws():
    script = runpy.run_path(str(ROOT / "scripts" / "draw_figures.py"))
    for name, draw in script["FIGURES"].items():
        assert (ROOT / "docs" / "figures" / f"{name}.svg").read_text(encoding="utf-8") == draw()


def test_the_citation_names_this_version_of_the_software_and_then_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (cited["type"], cited["version"]) == ("software", declip.__version__)
    for folder in (ROOT, ROOT / "packages" / "declip-sets"):
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
        assert "version" in project["project"]["dynamic"], "read from src/declip/__init__.py"
    assert f"version = {{{declip.__version__}}}" in (ROOT / "README.md").read_text(encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changes, re.MULTILINE)[1] == declip.__version__
    assert "preferred-citation" not in cited, "GitHub would show that instead"
    assert "2110.05208" in str(cited["references"])
