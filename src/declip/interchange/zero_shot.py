"""Complete models without any image-text pair: projections from the classes of the image tower's classifier.

Weight recycling (arXiv 2605.22484): the rows of a classifier and the features of its classes' names and definitions are
the pairs that `declip.models.closed_form` is fitted to.
"""

import hashlib
import json
import logging
import math
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from declip.errors import UserError
from declip.interchange.classes import Classes
from declip.interchange.weights import Weights
from declip.io.atomic import atomic_write, cache_folder, save_tensors
from declip.io.cache import HEADS
from declip.models.closed_form import DEFAULT_FORM, ClassPairs, Heads, Pairs, fit_heads
from declip.models.dual_encoder import DualEncoder
from declip.models.layers import PROJECTIONS, TEXT

log = logging.getLogger("declip")

LOGIT_SCALE = 20.0
"""Of candidates from 3 to 40, the one with the smallest cross-entropy both of classes that are held out from the fit
(five folds of ImageNet's) and of the images and captions of builtin:stamps, at each size from 128 to 224 pixels."""

VERSION = 2  # of the computation: raise it when the projections change
BATCH = 64  # texts
GRID = 2.0**-24  # of the projections; their numbers are about 0.04, and differ by 1e-14 between numbers of threads


def complete(weights: Weights) -> Weights:
    """Add projections to two towers that have none, if the image tower has a classifier with names.

    Computed once for a text tower, a classifier and its names, and kept in the cache folder. Other weights are returned
    unchanged.
    """
    classes = weights.named_classes()
    if classes is None or not weights.whole or weights.projected:
        return weights
    return _with_heads(weights, _cached_heads(weights, classes), classes.size)


def complete_text(weights: Weights, size: int) -> Weights | None:
    """Add the projections to a published text tower alone; None if they are not in the cache folder yet.

    Args:
        size: Of the images, as the classes have it.
    """
    heads = _read_heads(_path(_key(weights)))
    return None if heads is None else _with_heads(weights, heads, size).text


def _with_heads(weights: Weights, heads: Heads, size: int | None) -> Weights:
    recipe = weights.recipe
    changes = {
        "image": recipe.image.model_copy(update={"size": size or recipe.image.size}),
        "embed_dim": len(heads.image),
        "logit_scale": recipe.logit_scale.model_copy(update={"init": math.log(LOGIT_SCALE)}),
    }
    new = {f"{prefix}weight": head for prefix, head in zip(PROJECTIONS, heads, strict=True)}
    new |= {"logit_scale": torch.tensor(math.log(LOGIT_SCALE))}
    published = weights.published and f"{weights.published} {VERSION}"
    tensors = {**weights.tensors, **new}
    return replace(weights, recipe=recipe.model_copy(update=changes), tensors=tensors, published=published)


def _cached_heads(weights: Weights, classes: Classes) -> Heads:
    path = _path(_key(weights, classes))
    if heads := _read_heads(path):
        return heads
    log.info("Computing the projections of '%s' from the names of its classes, once.", weights.origin)
    texts = encode_texts(weights, classes.texts()[0]) if classes.features is None else classes.features
    heads = class_heads(classes, texts)
    try:
        with atomic_write(path) as partial:
            save_tensors(heads._asdict(), partial)
    except UserError as error:  # the model is the same without a cache
        log.warning("%s", error)
    return heads


def _path(key: str) -> Path:
    return cache_folder() / HEADS / f"{key}.safetensors"


def _read_heads(path: Path) -> Heads | None:
    with suppress(Exception):  # a missing or damaged file is computed again
        return Heads(**load_file(path))
    return None


def class_heads(classes: Classes, texts: Tensor) -> Heads:
    """Fit projections (w, v) and (w, w) to classes and the features (t, w) of their texts.

    The shared space has the axes of the text features, which makes the projections unique: those of a singular value
    decomposition would change with the signs of its vectors, which rounding can flip. They are rounded to a grid, so
    that the number of threads changes no bit of them: an index knows its model by its bits.
    """
    pairs = ClassPairs(classes.rows.double(), texts.double(), classes.texts()[1], classes.mean.double())
    # The classes are the only pairs.
    nothing = Pairs(torch.empty(0, classes.rows.shape[1]), torch.empty(0, texts.shape[1]), torch.empty(0).long())
    (heads,) = fit_heads(nothing, torch.empty(0, dtype=torch.bool), pairs, 1.0, (DEFAULT_FORM,))
    axes = normalize(heads.text, dim=1).mT  # (w, k)
    rotated = (axes @ head for head in heads)
    # Lengths do not change a cosine; these are the ones of a projection's random start.
    scaled = (head * (len(head) ** 0.5 / head.norm()) for head in rotated)
    return Heads(*(((head / GRID).round() * GRID).float().contiguous() for head in scaled))


@torch.inference_mode()
def encode_texts(weights: Weights, texts: list[str]) -> Tensor:
    """Pooled features (t, w) of texts by the text tower of weights without projections."""
    with torch.random.fork_rng(devices=[]):
        model = DualEncoder.from_recipe(weights.recipe, weights.encoder).eval()
    model.load_state_dict(model.state_dict() | dict(weights.tensors))
    tokens = model.tokenize(texts)
    lengths = (tokens != model.tokenizer.padding).sum(dim=1)
    features = torch.empty(len(texts), model.text_tower.width)
    for rows in lengths.argsort(stable=True).split(BATCH):  # by length: little padding
        features[rows] = model.text_tower.pool(tokens[rows, : int(lengths[rows].max())]).float()
    return features


def _key(weights: Weights, classes: Classes | None = None) -> str:
    """Hash everything that the projections depend on."""
    known = [VERSION, torch.__version__, weights.recipe.text.model_dump(mode="json")]
    tensors: dict[str, Tensor] = {}
    if weights.published:  # the names of the classes are timm's
        known += [weights.published, version("timm")]
    elif classes is not None:
        known += [classes.names, classes.definitions]
        tensors = {name: tensor for name, tensor in sorted(weights.tensors.items()) if name.startswith(TEXT)}
        tensors |= {"rows": classes.rows, "mean": classes.mean}
    digest = hashlib.blake2b(json.dumps(known).encode(), digest_size=12)
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
