"""Draw the figures of the method pages and of CONTRIBUTING.md: `python scripts/draw_figures.py` writes docs/figures/.

Lines and text have the color of the surrounding text, for light and dark pages. Drawings are 400 px wide, so that
text stays readable on a phone.
"""

from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "docs" / "figures"
WIDTH = 400
STYLE = "svg{color:#222}@media (prefers-color-scheme:dark){svg{color:#ddd}}"
"""For the file alone, as on GitHub; in the site a drawing is part of the page and inherits its color."""

IMAGE, TEXT, TERM, PLAIN = "#3b7dd8", "#d9822b", "#2e9e5b", "#888888"


def drawing(height: int, title: str, *parts: str | Iterable[str]) -> str:
    """Assemble an SVG."""
    inner = "\n".join(part if isinstance(part, str) else "\n".join(part) for part in parts)
    arrow = (
        '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto-start-reverse">'
        '<path d="M0 0 8 4 0 8z" fill="currentColor"/></marker>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="13">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n'
        f"<defs>{arrow}</defs>\n{inner}\n</svg>\n"
    )


def words(
    x: float,
    y: float,
    text: str,
    size: int = 13,
    anchor: str = "middle",
    color: str = "currentColor",
) -> str:
    """Draw a line of text with its middle (or its start) at x and its baseline at y."""
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{color}">{escape(text)}</text>'


def box(
    x: float,
    y: float,
    width: float,
    height: float,
    lines: str,
    color: str = PLAIN,
    dashed: bool = False,
) -> str:
    """Draw a tinted box with centered lines of text."""
    rows = lines.split("\n")
    top = y + height / 2 - 8 * (len(rows) - 1) + 4.5
    inside = "".join(
        words(x + width / 2, top + 16 * number, row) for number, row in enumerate(rows)
    )
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{color}" fill-opacity=".18" '
        f'stroke="{color}"{dash}/>{inside}'
    )


def arrow(
    *points: tuple[float, float],
    dashed: bool = False,
    both: bool = False,
    color: str = "currentColor",
) -> str:
    """Draw a line through points with an arrowhead at its end, or at both."""
    path = "M" + " ".join(f"{x} {y}" for x, y in points)
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    start = ' marker-start="url(#tip)"' if both else ""
    return f'<path d="{path}" fill="none" stroke="{color}" stroke-width="1.3"{dash}{start} marker-end="url(#tip)"/>'


def down(top: float, bottom: float, *columns: float) -> list[str]:
    """Draw vertical arrows between two heights."""
    return [arrow((x, top), (x, bottom)) for x in columns]


def boxes(y: float, height: float, color: str, *row: tuple[float, float, str]) -> list[str]:
    """Boxes next to each other, each by x, width and text."""
    return [box(x, y, width, height, text, color) for x, width, text in row]


def matrix(
    x: float, y: float, rows: int, columns: int, cell: float, dark: Callable[[int, int], bool]
) -> list[str]:
    """A grid of cells, some of them dark."""
    return [
        f'<rect x="{x + c * cell}" y="{y + r * cell}" width="{cell}" height="{cell}" stroke="currentColor" '
        f'stroke-width=".6" fill="{TERM}" fill-opacity="{0.75 if dark(r, c) else 0.08}"/>'
        for r in range(rows)
        for c in range(columns)
    ]


def clip() -> str:
    """Draw two towers and the matrix of all images with all captions."""
    return drawing(
        330,
        "CLIP: images and captions of a batch meet in a matrix of cosines; the pairs are its diagonal",
        box(30, 10, 140, 34, "N images", IMAGE),
        box(230, 10, 140, 34, "N captions", TEXT),
        down(44, 64, 100, 300),
        box(30, 66, 140, 34, "image tower", IMAGE),
        box(230, 66, 140, 34, "text tower", TEXT),
        arrow((100, 100), (100, 170), (126, 170)),
        arrow((300, 100), (300, 120), (200, 120), (200, 142)),
        words(62, 150, "F", 15, color=IMAGE),
        words(62, 166, "length 1", 11),
        words(326, 122, "G", 15, color=TEXT),
        words(326, 138, "length 1", 11),
        matrix(130, 146, 5, 5, 28, lambda row, column: row == column),
        words(200, 304, "s · F Gᵀ: softmax over each row and each column"),
        words(200, 321, "the pair's own entry should be the largest"),
    )


def slip() -> str:
    """Draw CLIP with SimCLR between two views of the image."""
    return drawing(
        300,
        "SLIP: CLIP's contrastive loss, and SimCLR's between two more views of each image",
        box(130, 8, 100, 30, "image", IMAGE),
        box(280, 8, 100, 30, "caption", TEXT),
        arrow((150, 38), (60, 62)),
        arrow((180, 38), (165, 62)),
        arrow((205, 38), (262, 62)),
        boxes(64, 30, IMAGE, (15, 90, "view 1"), (120, 90, "view 2"), (222, 80, "mild view")),
        down(94, 116, 60, 165, 262),
        down(38, 116, 345),
        box(15, 118, 287, 30, "image tower, the same for all", IMAGE),
        box(312, 118, 80, 30, "text tower", TEXT),
        down(148, 170, 60, 165),
        down(148, 222, 262, 352),
        box(15, 172, 195, 30, "SimCLR head", IMAGE),
        down(202, 222, 60, 165),
        box(15, 224, 195, 44, "simclr: find the other view\namong all views of the batch", TERM),
        box(222, 224, 170, 44, "contrastive:\nCLIP's", TERM),
        words(112, 288, "weight 1", 11),
        words(307, 288, "weight 1", 11),
    )


def filip() -> str:
    """Draw patches and words, each with its best match."""
    best = {(0, 1), (1, 1), (2, 2), (3, 2), (4, 0)}
    names = ("a", "red", "apple", "here")
    return drawing(
        292,
        "FILIP: each patch finds its best word, and each word its best patch",
        box(20, 8, 110, 30, "image", IMAGE),
        box(270, 8, 110, 30, "caption", TEXT),
        arrow((75, 38), (75, 60)),
        arrow((325, 38), (325, 60)),
        words(75, 76, "patches", 12, color=IMAGE),
        words(325, 76, "words", 12, color=TEXT),
        [
            f'<rect x="{45 + 20 * (n % 3)}" y="{86 + 20 * (n // 3)}" width="20" height="20" fill="{IMAGE}" '
            f'fill-opacity="{0.12 + 0.07 * (n % 4)}" stroke="currentColor" stroke-width=".6"/>'
            for n in range(9)
        ],
        [box(282, 84 + 24 * n, 86, 20, name, TEXT) for n, name in enumerate(names)],
        matrix(148, 96, 5, 4, 26, lambda r, c: (r, c) in best),
        words(200, 88, "cosines", 11),
        arrow((107, 116), (144, 140)),
        arrow((280, 132), (256, 140)),
        words(200, 246, "image → text: mean over patches of the best word"),
        words(200, 263, "text → image: mean over words of the best patch"),
        words(200, 282, "then CLIP's loss on these instead of one cosine", 12),
    )


def declip() -> str:
    """Draw two views of an image, two of a caption, the towers, the queue, and the five losses with their weights."""

    def pairing(*points: tuple[float, float], dashed: bool = True) -> str:
        return arrow(*points, dashed=dashed, color=TERM)

    return drawing(
        424,
        "DeCLIP: two views of the image, two of the caption, a queue of past captions, and five losses between them",
        # --- views
        box(15, 8, 150, 30, "image", IMAGE),
        box(235, 8, 150, 30, "caption", TEXT),
        *(arrow((x, 38), (x + dx, 58)) for x, dx in ((70, -20), (110, 20), (290, -20), (330, 20))),
        boxes(60, 30, IMAGE, (15, 70, "view 1"), (95, 70, "view 2")),
        boxes(60, 30, TEXT, (235, 70, "masked"), (315, 70, "EDA")),
        # --- towers and features; those of the second views go around the first
        down(90, 110, 50, 130, 270, 350),
        boxes(112, 30, IMAGE, (15, 150, "image tower")),
        boxes(112, 30, TEXT, (235, 150, "text tower")),
        down(142, 188, 45, 355),
        arrow((15, 127), (5, 127), (5, 304), (13, 304)),
        arrow((385, 127), (395, 127), (395, 304), (387, 304)),
        boxes(190, 28, IMAGE, (15, 60, "F₁")),
        boxes(290, 28, IMAGE, (15, 60, "F₂")),
        boxes(190, 28, TEXT, (325, 60, "G₁")),
        boxes(290, 28, TEXT, (325, 60, "G₂")),
        # --- losses between images and captions
        box(140, 190, 120, 28, "contrastive 0.1", TERM),
        *(pairing((x, 204), (end, 204), dashed=False) for x, end in ((140, 78), (260, 322))),
        box(140, 240, 120, 28, "multi_view 0.3", TERM),
        *(pairing((x, y), end) for x, y, end in ((160, 240, (78, 206)), (160, 268, (78, 301)))),
        *(pairing((x, y), end) for x, y, end in ((240, 240, (322, 206)), (240, 268, (322, 301)))),
        pairing((200, 304), (78, 304)),
        pairing((200, 304), (322, 304)),
        # --- losses of one side
        box(13, 240, 88, 28, "simsiam 0.2", TERM),
        *(arrow((45, y), (45, end), color=TERM) for y, end in ((240, 220), (268, 288))),
        box(296, 232, 93, 44, "masked_\nlanguage 0.2", TERM),
        arrow((355, 232), (355, 220), color=TERM),
        # --- the queue
        box(235, 346, 150, 44, "queue of 65,536\npast captions", TEXT, dashed=True),
        arrow((355, 318), (355, 344)),
        words(345, 337, "search", 11, "end"),
        box(78, 346, 104, 44, "nearest_\nneighbor 0.2", TERM),
        arrow((235, 368), (184, 368)),
        arrow((78, 368), (45, 368), (45, 320), color=TERM),
        words(200, 414, "F, G: features. Green: losses with their weights", 12),
    )


def defilip() -> str:
    """Draw DeCLIP's losses on the features, FILIP's on the tokens."""
    return drawing(
        250,
        "DeFILIP: DeCLIP's five losses on whole features, FILIP's loss on patches and words of the first views",
        box(15, 8, 170, 30, "image, two views", IMAGE),
        box(215, 8, 170, 30, "caption, two views", TEXT),
        down(38, 58, 100, 300),
        box(15, 60, 170, 30, "image tower", IMAGE),
        box(215, 60, 170, 30, "text tower", TEXT),
        down(90, 128, 60, 340),
        arrow((140, 90), (140, 108), (200, 108), (200, 128)),
        arrow((260, 90), (260, 108), (202, 108)),
        words(60, 146, "features", 12, color=IMAGE),
        words(340, 146, "features", 12, color=TEXT),
        words(200, 146, "patches, words", 12),
        down(152, 172, 60, 200),
        arrow((340, 152), (340, 162), (90, 162), (90, 172)),
        box(15, 174, 150, 62, "DeCLIP's five losses\n0.1 0.3 0.2 0.2 0.2", TERM),
        box(180, 174, 205, 62, "late_interaction\nof view 1 and caption 1: 0.2", TERM),
    )


def architecture() -> str:
    """The packages that a pair passes, from its source to the trained model's use."""
    steps = (
        ("source", "data/sources/", "PairSource", PLAIN),
        ("pair", "data/pair.py: image, captions", "Pair", PLAIN),
        ("views", "data/plan.py, images/, text/", "uint8 crops, token ids", IMAGE),
        ("batch", "data/loader.py, loader.py", "PairBatch", IMAGE),
        ("towers", "models/dual_encoder.py", "TowerOutputs", IMAGE),
        ("features", "supervision/objective.py", "Rows, gathered once", TEXT),
        ("losses", "supervision/*.py", "scalars, and their total", TERM),
        ("step", "training/step.py", "gradient, optimizer", TERM),
        ("checkpoint", "runs/checkpoint.py", "checkpoints/step-N", PLAIN),
        ("evaluation", "evaluation/, reports/", "report.html", PLAIN),
        ("use", "search/, interchange/, app/", "search, export", PLAIN),
    )
    parts: list[str] = []
    for number, (name, where, result, color) in enumerate(steps):
        y = 8 + 44 * number
        parts.append(box(8, y, 92, 30, name, color))
        parts.append(words(110, y + 12, where, 12, "start"))
        parts.append(
            words(110, y + 27, result, 11, "start", color if color != PLAIN else "currentColor")
        )
        if number:
            parts.append(arrow((54, y - 14), (54, y - 1)))
    return drawing(
        8 + 44 * len(steps),
        "From a source of pairs to the use of the model, one call per arrow",
        parts,
    )


FIGURES = {draw.__name__: draw for draw in (clip, slip, filip, declip, defilip, architecture)}


if __name__ == "__main__":
    for name, draw in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")
