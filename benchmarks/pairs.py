"""The pairs that are measured on: real emoji, or drawn shapes where the emoji have not been prepared."""

from PIL import Image, ImageDraw

from declip.data.pairs import Pair, PairSource
from declip.data.sources import open_source
from declip.errors import UserError

COLOURS = ("red", "green", "blue", "orange", "purple", "black", "brown", "pink")
SHAPES = ("circle", "square", "ring", "cross")


class Shapes:
    """Coloured shapes of the emoji's size, 96 x 96 pixels, each with a caption of the usual length."""

    name = "drawn shapes"

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> Pair:
        colour, shape = COLOURS[index % 8], SHAPES[index // 8 % 4]
        image = Image.new("RGB", (96, 96), "white")
        pen, edge = ImageDraw.Draw(image), 8 + index % 24
        box = (edge, edge, 96 - edge, 96 - edge)
        if shape == "square":
            pen.rectangle(box, fill=colour)
        elif shape == "cross":
            pen.line((edge, edge, 96 - edge, 96 - edge), colour, 9)
            pen.line((edge, 96 - edge, 96 - edge, edge), colour, 9)
        else:
            pen.ellipse(box, fill=colour if shape == "circle" else None, outline=colour, width=9)
        return Pair(f"shape {index}", image, self.captions(index))

    def captions(self, index: int) -> tuple[str, ...]:
        """One caption."""
        return (f"a {COLOURS[index % 8]} {SHAPES[index // 8 % 4]}, number {index}",)


def open_pairs() -> PairSource:
    """The built-in emoji where they are prepared, else shapes; the result names which."""
    try:
        return open_source("builtin:emoji")
    except UserError:
        return Shapes()
