"""A model whose features can be worked out by hand: an image is its mean color, a text the colors it names."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from declip.data.pair import BrokenPair, Pair, PairSource, SkipCounter
from declip.evaluation.datasets import Dataset
from declip.evaluation.encode import SourceFeatures
from declip.evaluation.linear_probe import linear_probe

COLORS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
    "white": (255, 255, 255),
}
WORDS = list(COLORS)
OTHER = len(WORDS) + 1  # the id of every word that is no color


class ColorModel(nn.Module):
    """Knows the colors; `gain` is a weight without effect on the direction of a feature."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.frozen = nn.BatchNorm1d(3)
        self.logit_scale = nn.Parameter(torch.tensor(2.66))
        self.passes = []

    def preprocess(self, images):
        pixels = [np.asarray(image.resize((4, 4)), dtype=np.float32) / 255 for image in images]
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)

    def encode_image(self, images):
        self.passes.append(("image", len(images), self.training, torch.is_grad_enabled()))
        return self.gain * images.mean((2, 3))

    def tokenize(self, texts):
        ids = [
            [WORDS.index(word) + 1 if word in WORDS else OTHER for word in text.split()]
            for text in texts
        ]
        width = max(map(len, ids))
        return torch.tensor([row + [0] * (width - len(row)) for row in ids])

    def encode_text(self, tokens):
        self.passes.append(("text", len(tokens), self.training, torch.is_grad_enabled()))
        table = torch.zeros(OTHER + 1, 3)
        table[1:OTHER] = torch.tensor(list(COLORS.values())) / 255
        return self.gain * (table[tokens].sum(1) + 1e-3)


class PaintedSource(PairSource):
    """Images of one color each; places in `broken` cannot be read."""

    def __init__(self, colors, captions=None, classes=None, broken=(), name="painted"):
        self.name, self.colors, self.broken = name, list(colors), set(broken)
        self.texts = list(captions) if captions is not None else [(color,) for color in colors]
        if classes is not None:
            self.class_names = tuple(classes)
            labels = np.array([self.class_names.index(color) for color in colors])
            self.columns = {"label": labels}

    def __len__(self):
        return len(self.colors)

    def __getitem__(self, index):
        if index in self.broken:
            raise BrokenPair("truncated image", f"row {index}")
        image = Image.new("RGB", (8, 8), COLORS[self.colors[index]])
        return Pair.of(f"row {index}", image, self.texts[index])


def features_of(images, captions=None, texts=None):
    """Features that no model made."""
    captions = captions if captions is not None else [()] * len(images)
    return SourceFeatures(
        "hand", np.arange(len(images)), images, tuple(captions), texts, SkipCounter()
    )


class KnownSource(PairSource):
    """Rows of a `Labeled` as a source, whose pairs are not read."""

    def __init__(self, rows, classes):
        self.name, self.rows, self.columns = "known", rows, {"label": rows.labels.numpy()}
        self.class_names = tuple(map(str, range(classes)))

    def __len__(self):
        return len(self.rows.labels)

    def __getitem__(self, index):
        raise NotImplementedError


def probe(parts, classes):
    """A linear probe of known features, by split."""
    sources = {which: KnownSource(rows, classes) for which, rows in parts.items()}
    dataset = Dataset(
        "known", {which: (lambda source=source: source) for which, source in sources.items()}
    )
    return linear_probe(dataset, lambda source: features_of(source.rows.features))


@pytest.fixture
def model():
    return ColorModel()


@pytest.fixture
def painted():
    return PaintedSource
