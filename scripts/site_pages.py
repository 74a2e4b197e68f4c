"""What mkdocs is told beyond mkdocs.yml: pages that lie elsewhere, formulas as MathML, drawings inside the page.

Formulas are `$…$` and `$$…$$`, as in GitHub's Markdown, and become MathML here, which browsers draw by themselves.
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
from site_keys import keys_page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RESULTS = "benchmarks/results"
KINDS = {".html", ".json", ".jsonl", ".md", ".png", ".svg"}

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
DRAWING = re.compile(r'<img alt="([^"]*)" src="[^"]*?figures/([a-z-]+\.svg)"\s*/?>')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add CONTRIBUTING.md, the notebook as a page, all recipe keys, and the measurements that the pages link to."""
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "contributing.md", content=contributing))
    files.append(File.generated(config, "tour.md", content=notebook_page(DOCS / "tour.ipynb")))
    files.append(File.generated(config, "keys.md", content=keys_page()))
    for path in sorted((ROOT / RESULTS).rglob("*")):
        if path.suffix in KINDS:
            place = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links to what lies elsewhere in the repository: the measurements, and the notebook."""
    return markdown.replace(f"](../{RESULTS}/", f"]({RESULTS}/").replace("](tour.ipynb)", "](tour.md)")


def on_page_content(content: str, page: Page, **_: Any) -> str:
    """Formulas as MathML, drawings as part of the page so that they take its colors."""
    content = FORMULA.sub(_mathml, content)
    return DRAWING.sub(_inlined, content)


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: its text, its code, and what the code printed or drew.

    Args:
        path: The notebook, format 4.
    """
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
    """One output of a cell; what is neither text nor a picture is left out."""
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text']).rstrip()}\n```" if output["name"] == "stdout" else ""
    data = output.get("data", {})
    if "image/png" in data:
        picture = base64.b64encode(base64.b64decode("".join(data["image/png"]))).decode()
        return f'<img class="output" alt="what the cell draws" src="data:image/png;base64,{picture}">'
    return f"```text\n{''.join(data['text/plain'])}\n```" if "text/plain" in data else ""


def _mathml(found: re.Match[str]) -> str:
    block = found[1] == "div"
    drawn = convert(html.unescape(found[2]).strip(), display="block" if block else "inline")
    return f'<div class="formula">{drawn}</div>' if block else drawn


def _inlined(found: re.Match[str]) -> str:
    drawing = (DOCS / "figures" / found[2]).read_text(encoding="utf-8")
    drawing = re.sub(r"<style>.*?</style>|<\?xml.*?\?>", "", drawing, flags=re.DOTALL)
    return drawing.replace("<svg ", f'<svg class="drawing" role="img" aria-label="{found[1]}" ', 1)
