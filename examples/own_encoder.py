"""An encoder of your own on the command line: images by their colors, texts by their letters.

declip finetune pairs.csv --from examples/own_encoder.py:make --out runs/colors
declip embed examples/own_encoder.py:make+runs/colors pictures --out indices/colors
declip search indices/colors "a red square" --model examples/own_encoder.py:make+runs/colors
declip evaluate examples/own_encoder.py:make+runs/colors --dataset heldout.csv --task retrieval
"""

from string import ascii_lowercase

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import one_hot

SIDE = 4  # cells of an image, in each direction
LENGTH = 64  # letters that are read of a text


class Colors:
    """Embeds images by the mean colors of their cells, texts by the numbers of their letters."""

    def preprocess(self, images: list[Image]) -> Tensor:
        """Images → (n, 3, 4, 4) from 0 to 1."""
        pixels = []
        for image in images:
            small = image.convert("RGB").resize((SIDE, SIDE))
            pixels.append(torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8))
        return torch.stack(pixels).view(-1, SIDE, SIDE, 3).permute(0, 3, 1, 2) / 255

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(n, 3, 4, 4) → (n, 48)."""
        return pixels.flatten(1)

    def tokenize(self, texts: list[str]) -> Tensor:
        """Texts → (m, 64) numbers of letters from 1, padded by 0."""
        rows = torch.zeros(len(texts), LENGTH, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            letters = [ascii_lowercase.find(letter) + 1 for letter in text.lower()[:LENGTH]]
            row[: len(letters)] = torch.tensor(letters)
        return rows

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(m, 64) → (m, 27)."""
        return one_hot(tokens, len(ascii_lowercase) + 1).sum(dim=1).float()

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that distinguish this model from others of its class: it has none."""
        return {}


def make() -> Colors:
    """What FILE.py:make opens."""
    return Colors()
