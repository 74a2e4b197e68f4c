"""mkdocs hooks: add pages of the repository, render formulas as MathML, inline the drawings.

Formulas are `$…$` and `$$…$$`, as in GitHub's Markdown; browsers render MathML without scripts.
"""

import base64
import html
import json
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RESULTS = "benchmarks/results"
MOVED = {
    "](first-hour.ipynb)": "](first-hour.md)",
    "](../CONTRIBUTING.md": "](contributing.md",
    "](../CHANGELOG.md": "](changelog.md",
}
KINDS = {".html", ".json", ".jsonl", ".md", ".png", ".svg"}

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
DRAWING = re.compile(r'<img alt="([^"]*)" src="[^"]*?figures/([a-z-]+\.svg)"\s*/?>')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add CONTRIBUTING.md, CHANGELOG.md, the notebook as a page, and the measurements that the pages link to."""
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "contributing.md", content=contributing))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "changelog.md", content=changes))
    files.append(
        File.generated(config, "first-hour.md", content=notebook_page(DOCS / "first-hour.ipynb"))
    )
    for path in sorted((ROOT / RESULTS).rglob("*")):
        if path.suffix in KINDS:
            place = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links at the pages that `on_files` added."""
    for there, here in ((f"](../{RESULTS}/", f"]({RESULTS}/"), *MOVED.items()):
        markdown = markdown.replace(there, here)
    return markdown


def on_page_content(content: str, page: Page, **_: Any) -> str:
    """Render formulas as MathML, keep numbers unbroken, and inline drawings, so that they take the page's colors."""
    content = FORMULA.sub(_mathml, content)
    content = content.replace(" ± ", "\u00a0±\u00a0").replace(" %", "\u00a0%")
    return DRAWING.sub(_inlined, content)


def notebook_page(path: Path) -> str:
    """Render a notebook (format 4) as Markdown: text, code and output."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        parts += [_output(output) for output in cell["outputs"]]
    return "\n\n".join(part for part in parts if part) + "\n"


def _output(output: dict[str, Any]) -> str:
    """Render one output of a cell; anything but text and PNG is left out."""
    if output["output_type"] == "stream":
        return (
            f"```text\n{''.join(output['text']).rstrip()}\n```"
            if output["name"] == "stdout"
            else ""
        )
    data = output.get("data", {})
    if "image/png" in data:
        image = base64.b64encode(base64.b64decode("".join(data["image/png"]))).decode()
        return f'<img class="output" alt="output of the cell" src="data:image/png;base64,{image}">'
    return f"```text\n{''.join(data['text/plain'])}\n```" if "text/plain" in data else ""


def _mathml(found: re.Match[str]) -> str:
    block = found[1] == "div"
    drawn = convert(html.unescape(found[2]).strip(), display="block" if block else "inline")
    return f'<div class="formula">{drawn}</div>' if block else drawn


def _inlined(found: re.Match[str]) -> str:
    drawing = (DOCS / "figures" / found[2]).read_text(encoding="utf-8")
    drawing = re.sub(r"<style>.*?</style>|<\?xml.*?\?>", "", drawing, flags=re.DOTALL)
    return drawing.replace("<svg ", f'<svg class="drawing" role="img" aria-label="{found[1]}" ', 1)
