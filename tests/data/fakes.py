"""Small stand-ins for the tests of data: JPEG files, a source of noise, a tokenizer, and loaders by their options."""

import numpy as np
from PIL import Image

from conftest import encoded
from declip.data.batch import Plan, TextSpec, ViewSpec
from declip.data.loader import Assembler, PairLoader
from declip.data.pair import BrokenPair, Pair, PairSource
from declip.recipe.schema import ImageView, TextView


def scene(width=150, height=101, seed=0):
    """Smooth colors with some grain, as a photograph has them."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), 3)
    grain = generator.normal(0, 4, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))


def jpeg(image=None, **options):
    """A JPEG file of an image, of a scene by default."""
    return encoded(image or scene(), "JPEG", **{"quality": 90} | options)


class Noise(PairSource):
    """Images of noise, two captions a pair; some broken, by place and reason."""

    def __init__(self, count=30, broken=None):
        self.name, self.count, self.broken = "fake", count, broken or {}

    def __len__(self):
        return self.count

    def captions(self, index):
        return tuple(f"{index} {word} of a small dog under the green tree by night" for word in ("photo", "sketch"))

    def __getitem__(self, index):
        if index in self.broken:
            raise BrokenPair(self.broken[index], f"pair-{index}")
        noise = np.random.default_rng(index).integers(0, 256, (16, 20, 3), dtype=np.uint8)
        return Pair(f"pair-{index}", Image.fromarray(noise), self.captions(index))


class Words:
    """A tokenizer with an id a word."""

    vocabulary, start, end, mask, padding = 5003, 5000, 5001, 5002, 0
    words = range(start)

    def __init__(self, context=32):
        self.context, self.word_of = context, {}

    def encode(self, text):
        ids = [1 + sum(31**place * ord(c) for place, c in enumerate(word)) % 4999 for word in text.split()]
        self.word_of |= dict(zip(ids, text.split(), strict=True))
        return [self.start, *ids[: self.context - 2], self.end]

    def decode(self, ids):
        return " ".join(self.word_of[number] for number in ids[1:-1])


def make_loader(
    source, *, size=12, context=32, views=("first", "second"), texts=2, mask=0.15, whole_context=False, **options
):
    """A loader; options go to `TextView`, the loader and the assembler."""
    text = {name: options.pop(name) for name in TextView.model_fields.keys() & options}
    specs = tuple(ViewSpec(name, size, ImageView()) for name in views)
    plan = Plan(specs, TextSpec(texts, TextView(**text), mask, whole_context), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    loading = {name: options.pop(name) for name in {"start_step", "workers", "max_broken_fraction"} & options.keys()}
    assembler = Assembler(source, Words(context), plan, **({"batch_size": 6, "seed": 3} | options))
    return PairLoader(assembler, **loading)
