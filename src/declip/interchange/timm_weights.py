"""Image towers with weights of timm: ``timm:NAME.TAG``, which is downloaded, or ``timm:NAME/FILE``.

``timm:NAME.TAG+ENCODER`` and ``timm:NAME/FILE+ENCODER`` have a Hugging Face text encoder too, a folder or
``huggingface:NAME``. Such a model is complete without any image-text pair: the rows of the tower's classifier and the
features of its classes' names and definitions are the pairs that projections are fitted to (weight recycling, arXiv
2605.22484).
"""

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any

import huggingface_hub
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from declip.closed_form.heads import Heads, fit_heads
from declip.closed_form.neighbors import Neighbors, Side
from declip.closed_form.pairs import ClassPairs, Pairs
from declip.closed_form.regression import PosteriorFeatures
from declip.closed_form.related import class_neighbors
from declip.closed_form.solve import DEFAULT_FORM
from declip.errors import UserError, unknown
from declip.interchange.classes import Classes
from declip.interchange.weights import Weights, read_tensors, uninitialized, unwrapped
from declip.io.atomic import atomic_write, cache_folder, save_tensors
from declip.io.cache import HEADS
from declip.io.hub import fetch
from declip.models.dual_encoder import DualEncoder
from declip.models.fingerprint import hash_tensors
from declip.models.hf_encoder import read_encoder
from declip.models.image_tower import ImageTower
from declip.models.layers import IMAGE, PROJECTIONS, TEXT
from declip.models.neighbors import INNER, neighbor_tensors
from declip.models.tensor_names import add_prefix, all_but, named_below, only
from declip.recipe.load import load_recipe

PREFIX = "timm:"
CONTEXT = 64  # tokens of a caption for a text encoder
OFFSET = 2  # RoBERTa's first position

log = logging.getLogger("declip")

LOGIT_SCALE = 12.0
"""Of candidates from 5 to 40, the one with the smallest cross-entropy of images and captions of builtin:stamps and of
its photographs, at both sizes; 10 is smallest on clip art and 8 on emoji, by 0.12 at most
(benchmarks/results/few/start-scale.jsonl)."""

VERSION = 5  # of the computation: raise it when the projections change
BATCH = 64  # texts
IMAGE_PROJECTION, TEXT_PROJECTION = PROJECTIONS
# Of the projections; their numbers are about 0.04, and differ by 1e-14 between numbers of threads
GRID = 2.0**-24


def matches(where: str) -> bool:
    """Whether this is a name of a timm model."""
    return where.startswith(PREFIX)


def read(where: str) -> Weights:
    """Read an image tower, with its image size and statistics."""
    image, plus, encoder = where.rpartition("+")
    if plus:
        return _with_text(read(image), encoder, where)
    name, _, file = where.removeprefix(PREFIX).partition("/")
    architecture = name.split(".")[0]
    config = _published_config(name, architecture)
    if not file and not config.hf_hub_id:
        raise UserError(
            f"timm publishes no weights of '{name}' on the Hub. Give a file, {PREFIX}NAME/FILE."
        )

    def get(offline: bool) -> str:
        published = "open_clip_model.safetensors" if config.hf_hub_filename else "model.safetensors"
        return huggingface_hub.hf_hub_download(
            str(config.hf_hub_id), published, local_files_only=offline
        )

    path = Path(file or fetch(where, get, f"{PREFIX}NAME/FILE")).expanduser()
    state = unwrapped(read_tensors(path), "state_dict_ema", "model_ema", "state_dict", "model")
    size = config.input_size[-1]
    tower, rest = _fill(where, architecture, size, state)
    width = tower.pre_logits_width
    keys = {
        "image.model": architecture,
        "image.size": size,
        "image.model_kwargs": {},
        "image.mean": list(config.mean),
        "image.std": list(config.std),
        "embed_dim": width,
    }
    recipe = load_recipe("few-clip", keys)
    tensors = add_prefix(IMAGE, tower.state_dict())
    # Without a text tower there is no shared space, so the projection is the identity.
    tensors[f"{IMAGE_PROJECTION}weight"] = torch.eye(width)
    if f"{IMAGE_PROJECTION}bias" in tensors:
        tensors[f"{IMAGE_PROJECTION}bias"] = torch.zeros(width)
    tensors["logit_scale"] = torch.tensor(recipe.logit_scale.init)
    return Weights(recipe, tensors, where, classes=_classes(rest, width))


def _published_config(name: str, architecture: str) -> Any:
    """timm's configuration of published weights: their address, image size and statistics."""
    import timm

    config = None
    with suppress(RuntimeError):  # an unknown tag
        config = timm.get_pretrained_cfg(name)
    if config is None:
        known = {*timm.list_models(), *timm.list_pretrained(f"{architecture}*")}
        raise unknown("timm model or tag", name, known)
    return config


def _with_text(image: Weights, name: str, where: str) -> Weights:
    encoder = read_encoder(name, pretrained=True)
    positions = encoder.config.get("max_position_embeddings", CONTEXT + OFFSET)
    keys = {
        "text.hf_model": name,
        "text.context_length": min(CONTEXT, positions - OFFSET),
        "text.pretrained": False,
    }
    recipe = image.recipe.with_keys(keys)
    with uninitialized():
        filled = DualEncoder(recipe, encoder, "text")
    tensors = all_but(PROJECTIONS, {**image.tensors, **filled.state_dict()})
    return replace(image, recipe=recipe, tensors=tensors, origin=where)


def _classes(rest: Mapping[str, Tensor], width: int) -> Classes | None:
    """Classes of the tensors that the tower lacks, if these are one linear map of its pooled features."""
    rows = [tensor for name, tensor in rest.items() if name.endswith(".weight")]
    others = [name for name in rest if not name.endswith((".weight", ".bias"))]
    if len(rows) != 1 or others or len(rest) > 2:
        return None  # two classifiers of a distilled model, or layers before the last
    row = rows[0].flatten(1)  # of a 1 × 1 convolution too
    is_classifier = row.shape[1] == width and len(row) > 1
    if not is_classifier:
        return None
    return Classes.of(row)


def _fill(
    where: str, architecture: str, size: int, weights: Mapping[str, Tensor]
) -> tuple[ImageTower, dict[str, Tensor]]:
    """Build the tower with the weights, which must be complete except for the classifier, and return the rest."""
    heads = _classifier_modules(architecture)
    with torch.device("meta"), uninitialized():
        own = ImageTower(architecture, size, embed_dim=8).trunk.state_dict()
    kept: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name in own or name.split(".")[0] not in heads:
            kept[name] = tensor
        else:
            rest[name] = tensor
    try:
        with uninitialized():
            tower = ImageTower(architecture, size, embed_dim=8, weights=kept)
    except UserError as error:
        lines = str(error.__cause__).split("\n\t")  # torch's message
        reason = shorten(lines[-1], 160)
        raise UserError(
            f"The weights of '{where}' are not those of {architecture}: {reason}"
        ) from error
    return tower, rest


def _classifier_modules(architecture: str) -> set[str]:
    """Names of timm's modules for the classifier, which the tower lacks."""
    import timm

    config = timm.get_pretrained_cfg(architecture)
    if config is None or not config.classifier:
        return set()
    names: Any = config.classifier
    if isinstance(names, str):
        names = (names,)
    return {name.split(".")[0] for name in names}


def complete(weights: Weights) -> Weights:
    """Add projections to two towers that have none, if the image tower has a classifier with names.

    Computed once for a text tower, a classifier and its names, and kept in the cache folder. Other weights are returned
    unchanged.
    """
    classes = weights.named_classes()
    if classes is None or not weights.has_text or weights.projected:
        return weights
    heads = _known_heads(weights, classes)
    return _with_heads(weights, heads, classes.size)


def class_start(weights: Weights, texts: Tensor) -> Heads:
    """The heads that `complete` adds, from the cache folder or from features (t, w) of the classes' texts."""
    classes = weights.named_classes()
    assert classes is not None, "their texts were encoded"
    known = _known_heads(weights, classes, texts)
    image = named_below(IMAGE_PROJECTION, known)
    text = named_below(TEXT_PROJECTION, known)
    of_image = Side(image["anchors"], image["mean"])
    of_text = Side(text["anchors"], text["mean"])
    neighbors = Neighbors(of_image, of_text, 0, image["weights"], image["axes"])
    image = named_below(INNER, image)
    text = named_below(INNER, text)
    posteriors = None
    if "classes" in image:
        posteriors = PosteriorFeatures(image["classes"], image["direction"])
    return Heads(image["weight"], text["weight"], posteriors, neighbors)


def _known_heads(
    weights: Weights, classes: Classes, texts: Tensor | None = None
) -> dict[str, Tensor]:
    path = _cache_file(weights, classes)
    heads = _read_heads(path)
    if heads is not None:
        return heads
    log.info(
        "Computing the projections of '%s' from the names of its classes, once.", weights.origin
    )
    if texts is None:
        texts = classes.features
    if texts is None:
        names, _ = classes.texts()
        texts = encode_texts(weights, names)
    heads = class_heads(classes, texts)
    try:
        with atomic_write(path) as partial:
            save_tensors(heads, partial)
    except UserError as error:  # the model is the same without a cache
        log.warning("%s", error)
    return heads


def complete_text(weights: Weights, size: int) -> Weights | None:
    """Add the projections to a published text tower, for images of a size; None if they are not in the cache yet."""
    heads = _read_heads(_cache_file(weights))
    if heads is None:
        return None
    return _with_heads(weights, heads, size).text


def _with_heads(weights: Weights, heads: Mapping[str, Tensor], size: int | None) -> Weights:
    scale = math.log(LOGIT_SCALE)
    keys = {
        "image.size": size or weights.recipe.image.size,
        "embed_dim": heads[f"{IMAGE_PROJECTION}axes"].shape[1],
        "logit_scale.init": scale,
    }
    recipe = weights.recipe.with_keys(keys)
    tensors = {**weights.tensors, **heads, "logit_scale": torch.tensor(scale)}
    published = weights.published and f"{weights.published} {VERSION}"
    return replace(weights, recipe=recipe, tensors=tensors, published=published)


def _read_heads(path: Path) -> dict[str, Tensor] | None:
    with suppress(Exception):  # a missing or damaged file is computed again
        return load_file(path)
    return None


def class_heads(classes: Classes, texts: Tensor) -> dict[str, Tensor]:
    """Fit both projections to classes and the features (t, w) of their texts: their tensors, by the model's names.

    The shared space has the axes of the text features, which makes the projections unique: those of a singular value
    decomposition would change with the signs of its vectors, which rounding can flip. They are rounded to a grid, so
    that the number of threads changes no bit of them: an index knows its model by its bits.
    """
    pairs = ClassPairs(
        classes.rows.double(), texts.double(), classes.texts()[1], classes.mean.double()
    )
    # The classes are the only pairs.
    no_images = torch.empty(0, classes.rows.shape[1])
    no_texts = torch.empty(0, texts.shape[1])
    nothing = Pairs(no_images, no_texts, torch.empty(0).long())
    heads = fit_heads(nothing, pairs, 1.0, DEFAULT_FORM)
    axes = normalize(heads.text, dim=1).mT  # (w, k)
    image_map = _scaled(axes @ heads.image)
    text_map = _scaled(axes @ heads.text)
    heads = heads._replace(image=image_map, text=text_map)
    image = {"weight": heads.image}
    text = {"weight": heads.text}
    if heads.classifier is not None:
        image["classes"], image["direction"] = heads.classifier
    # --- the classes that an image and a text both resemble
    known = class_neighbors(heads, pairs)
    image = neighbor_tensors(image, known.images, known)
    text = neighbor_tensors(text, known.texts, known)
    tensors = add_prefix(IMAGE_PROJECTION, image) | add_prefix(TEXT_PROJECTION, text)
    return {name: _on_grid(tensor) for name, tensor in tensors.items()}


def _scaled(head: Tensor) -> Tensor:
    """A projection in the length of a random start; lengths do not change a cosine."""
    return head * (len(head) ** 0.5 / head.norm())


def _on_grid(tensor: Tensor) -> Tensor:
    rounded = (tensor / GRID).round() * GRID
    return rounded.float().contiguous()


@torch.inference_mode()
def encode_texts(weights: Weights, texts: list[str]) -> Tensor:
    """Pooled features (t, w) of texts by the text tower of weights without projections."""
    with uninitialized():
        model = DualEncoder(weights.recipe, weights.encoder).eval()
    model.load_state_dict(model.state_dict() | dict(weights.tensors))
    tokens = model.tokenize(texts)
    lengths = (tokens != model.tokenizer.padding).sum(dim=1)
    features = torch.empty(len(texts), model.text_tower.width)
    for rows in lengths.argsort(stable=True).split(BATCH):  # by length: little padding
        longest = int(lengths[rows].max())
        features[rows] = model.text_tower.pool(tokens[rows, :longest]).float()
    return features


def _cache_file(weights: Weights, classes: Classes | None = None) -> Path:
    """Path of the projections in the cache folder, by a hash of everything that they depend on."""
    known = [VERSION, torch.__version__, weights.recipe.text.model_dump(mode="json")]
    tensors: dict[str, Tensor] = {}
    if weights.published:  # the names of the classes are timm's
        known += [weights.published, version("timm")]
    elif classes is not None:
        known += [classes.names, classes.definitions]
        tensors = dict(sorted(only(TEXT, weights.tensors).items()))
        tensors |= {"rows": classes.rows, "mean": classes.mean}
    digest = hashlib.blake2b(json.dumps(known).encode(), digest_size=12)
    hash_tensors(digest, tensors)
    return cache_folder() / HEADS / f"{digest.hexdigest()}.safetensors"
