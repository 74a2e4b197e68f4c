"""From a model to vectors: which model it is, pictures and captions on their way in, and the query."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import Dataset

from declip.data.images.decode import decode
from declip.data.pair import BrokenPair, SkipCounter
from declip.data.sources.image_source import ImageSource
from declip.data.sources.origin import Origin
from declip.errors import UserError
from declip.evaluation.encode import Encoder, measuring, text_features
from declip.evaluation.model_hash import model_hash
from declip.evaluation.zero_shot import class_features, read_templates

PROBE = "a photo of two red apples, and a dog"
"""What its tokenizer makes of this tells a model's from another's."""

SHORTEST = 1e-6
"""Of a weighted sum of two vectors of length 1; below it the two cancel and nothing is left to search with."""


def fingerprint(model: Encoder) -> str:
    """SHA-256, in hexadecimal, of a model's weights, preprocessing and tokenizer.

    Raises:
        UserError: the model has no `state_dict`.
    """
    if not hasattr(model, "state_dict"):
        raise UserError(f"{type(model).__name__} has no `state_dict`, so nothing tells it from another model.")
    found = hashlib.sha256(model_hash(model))
    try:
        found.update(repr(model.tokenize([PROBE]).tolist()).encode())
    except UserError:  # an image tower alone
        found.update(b"no text")
    return found.hexdigest()


@dataclass
class Loaded:
    """A batch as it comes from the files.

    Attributes:
        places: Of the images that can be used, in the source.
        pixels: (n, 3, S, S) normalized; None where not one can be used.
        keys: Of each.
        origins: Of each.
        captions: Of each; there may be none.
        skipped: The other images.
        uncaptioned: Images without captions.
    """

    places: list[int] = field(default_factory=list)
    pixels: Tensor | None = None
    keys: list[str] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    captions: list[tuple[str, ...]] = field(default_factory=list)
    skipped: SkipCounter = field(default_factory=SkipCounter)
    uncaptioned: SkipCounter = field(default_factory=SkipCounter)

    def rows(self) -> Iterator[tuple[str, tuple[str, ...], int, Origin]]:
        """Of each image the fields of a `Row` but its id."""
        return zip(self.keys, self.captions, self.places, self.origins, strict=True)


class Batches(Dataset[Loaded]):
    """Batches of images by number, as a worker process reads them.

    Args:
        source: The images.
        model: For its preprocessing.
        places: Those of each batch.
    """

    def __init__(self, source: ImageSource, model: Encoder, places: Sequence[Sequence[int]]) -> None:
        self.source, self.places = source, places
        # `preprocessor` stays on the host, where a worker may use it; `preprocess` moves to the device.
        self.preprocess = getattr(model, "preprocessor", model.preprocess)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Loaded:
        loaded, images = Loaded(), []
        for place in self.places[number]:
            # Before the image is read: if the file changes meanwhile, the next call embeds it again.
            origin = self.source.origin(place)
            try:
                found = self.source[place]
            except BrokenPair as broken:
                loaded.skipped.add(broken)
                continue
            if found.uncaptioned is not None:
                loaded.uncaptioned.add(found.uncaptioned)
            images.append(found.image)
            loaded.places.append(place)
            loaded.keys.append(self.source.key(place))
            loaded.origins.append(origin)
            loaded.captions.append(found.captions)
        if images:
            loaded.pixels = self.preprocess(images)
        return loaded


def image_vectors(model: Encoder, pixels: Tensor, precision: str) -> Tensor:
    """Encode pictures.

    Args:
        model: The model.
        pixels: (n, 3, S, S) normalized.
        precision: "bf16" runs the tower in autocast; "fp32".

    Returns:
        (n, d) float32 on the CPU, L2-normalized.
    """
    with measuring(model) as device, _precision(device, precision):
        return normalize(model.encode_image(pixels.to(device)).float(), dim=-1).cpu()


def _precision(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def caption_vectors(model: Encoder, captions: Sequence[tuple[str, ...]], width: int, precision: str) -> Tensor:
    """Encode the captions of images, one vector for each image: the mean of its captions' vectors.

    Args:
        model: The model.
        captions: Of n images, none or more each.
        width: d.
        precision: As for `image_vectors`.

    Returns:
        (n, d) float32 on the CPU, L2-normalized, zeros where there is no caption.
    """
    words = [caption for own in captions for caption in own]
    means = torch.zeros(len(captions), width)
    if words:
        owners = torch.repeat_interleave(torch.tensor([len(own) for own in captions]))
        with measuring(model) as device, _precision(device, precision):
            means.index_add_(0, owners, text_features(model, words))
    return normalize(means, dim=-1)


def caption_encoder(model: Encoder) -> Callable[[list[str]], Tensor] | None:
    """Captions to (m, d) float32 on the CPU, L2-normalized; None for an image tower alone."""
    try:
        model.tokenize([PROBE])
    except UserError:
        return None
    return lambda words: text_features(model, words)


def query_vector(
    model: Encoder,
    text: str | None,
    image: str | Path | Image.Image | None,
    weights: tuple[float, float] = (1.0, 1.0),
    template: str | None = None,
) -> Tensor:
    """Make a query of a text, a picture, or both.

    Args:
        model: The model.
        text: Words, or None.
        image: A picture or its file, or None.
        weights: Of the text and of the picture, where both are given: the query is the normalized sum
            w_text · text + w_image · image of vectors of length 1. A negative weight searches for what is unlike.
        template: A sentence with ``{}`` for the text, or a shipped template set's name: then the mean over it.

    Returns:
        (d,) float32 of length 1.

    Raises:
        UserError: nothing or an empty text is given, the picture cannot be read, or the sum is nothing.
    """
    parts = []
    if text is not None:
        if not text.strip():
            raise UserError("The text to search for is empty. Give some words, or a picture with --image.")
        templates = ["{}"] if template is None else read_templates(template)[1]
        parts.append(class_features(model, [text.strip()], templates)[0])
    if image is not None:
        picture = image if isinstance(image, Image.Image) else _read(Path(image))
        with measuring(model):
            pixels = model.preprocess([picture.convert("RGB")])
        parts.append(image_vectors(model, pixels, "fp32")[0])
    if not parts:
        raise UserError("There is nothing to search for. Give a text, a picture (--image FILE), or both.")
    if len(parts) == 1:
        return parts[0]
    if len(weights) != 2 or not all(map(math.isfinite, weights)):
        raise UserError(f"weights is {weights}; give two numbers, the text's and the picture's, such as 0.7,0.3.")
    both = weights[0] * parts[0] + weights[1] * parts[1]
    if both.norm() < SHORTEST:
        raise UserError(f"With weights {weights[0]:g} and {weights[1]:g} nothing is left of the query. Give others.")
    return normalize(both, dim=-1)


def _read(path: Path) -> Image.Image:
    try:
        return decode(path.expanduser(), str(path))
    except BrokenPair as broken:
        raise UserError(f"The picture to search for cannot be used: {broken}.") from broken
