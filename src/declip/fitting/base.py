"""The base of a fit: an encoder that stays as it is, whose pooled features are cached."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property, partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from declip.data.pair import PairSource
from declip.errors import UserError
from declip.evaluation.encode import (
    Batching,
    SourceFeatures,
    encode_images,
    eval_mode,
    image_features,
    text_features,
)
from declip.models.dual_encoder import DualEncoder
from declip.models.encoder import Encoder, as_encoder
from declip.models.fingerprint import hash_tensors
from declip.models.inference import chunked, normalized
from declip.models.layers import IMAGE, PROJECTIONS, TEXT
from declip.models.neighbors import NeighborProjection
from declip.models.posteriors import PosteriorProjection
from declip.models.precision import TYPES, pooling_tower
from declip.search.vectors import VectorCache, content_key, text_key

BATCH = 64  # images or captions that a tower sees at a time
LINEAR = (nn.Linear, nn.Identity, PosteriorProjection, NeighborProjection)
"""Projections that heads can be multiplied with, or replace."""
FEATURES = 5  # raise it when preprocessing, tokenizers or towers compute others of the same input


class EncoderBase:
    """An encoder whose embeddings heads are fitted to; it stays as it is.

    Args:
        name: What `declip.load` opened, for messages and for the saved heads.
    """

    def __init__(self, model: Encoder, name: str = "") -> None:
        self.model = model
        self.name = name
        self.projected = True  # features are embeddings in one space
        self._sources: dict[PairSource, SourceFeatures] = {}

    @property
    def device(self) -> torch.device:
        """Device of the encoder."""
        return self.model.device

    @property
    def projections(self) -> tuple[Any, Any]:
        """The projections of images and texts that heads replace; None where heads follow an encoder."""
        return None, None

    def pool_images(self, pixels: Tensor) -> Tensor:
        """Pixels as the model's preprocessing makes them → (n, v) float32, to fit heads to."""
        return self.pool_exact(pixels)

    def pool_exact(self, pixels: Tensor) -> Tensor:
        """(n, 3, S, S) normalized → (n, v) float32, to embed with heads."""
        return image_features(self.model, pixels, self.model.encode_image)

    def pool_text(self, tokens: Tensor) -> Tensor:
        """(m, L) token ids → (m, w) float32."""
        with eval_mode(self.model) as device:
            features = self.model.encode_text(tokens.to(device))
            return normalize(features.float().cpu(), dim=-1)

    def pool_captions(self, captions: Sequence[str], progress: bool = False) -> Tensor:
        """(m, w) float32; rows of equal captions are equal bit for bit."""
        return text_features(self.model, captions, Batching(BATCH, progress=progress))

    def pool_source(self, source: PairSource, how: Batching) -> SourceFeatures:
        """Pooled features of the images of a source, which is read once for several heads."""
        if source not in self._sources:
            encode = self.pool_exact
            self._sources[source] = encode_images(self.model, source, how, encode=encode)
        return self._sources[source]


class Base(EncoderBase):
    """Two towers, whose features heads are fitted to: before the projections, or their embeddings.

    Images that heads are fitted to are computed in a `precision`, "fp32" or "bf16", as a search
    computes them; images of an evaluation in float32, of exact pixels.

    Args:
        projected: Whether the model has projections into a shared space, as a CLIP has. The
            features are then its embeddings.
        name: What `declip.load` opened, for messages and for the saved heads.
    """

    model: DualEncoder

    def __init__(
        self, model: DualEncoder, projected: bool = False, name: str = "", precision: str = "fp32"
    ) -> None:
        super().__init__(model, name)
        self.projected = projected
        images = tower_digest(model, IMAGE)
        texts = tower_digest(model, TEXT)
        self._exact = VectorCache(f"{images}-fp32")
        self._images = self._exact
        if precision != "fp32":
            self._images = VectorCache(f"{images}-{precision}")
        self._texts = VectorCache(texts)
        self._pool_exact = image_pool(model, "fp32")
        self._pool = image_pool(model, precision)

    @property
    def projections(self) -> tuple[Any, Any]:
        """The last layers of the towers."""
        return self.model.image_tower.proj, self.model.text_tower.text_projection

    def pool_images(self, pixels: Tensor) -> Tensor:
        """(n, 3, S, S) uint8 → (n, v) float32, to fit heads to."""
        pooled = _from_cache(self._images, pixels, self._pool)
        return self._embed(self.model.image_tower.proj, pooled)

    def pool_exact(self, pixels: Tensor) -> Tensor:
        """(n, 3, S, S) normalized → (n, v) float32, to embed with heads."""
        pooled = _from_cache(self._exact, pixels, self._pool_exact)
        return self._embed(self.model.image_tower.proj, pooled)

    def pool_text(self, tokens: Tensor) -> Tensor:
        """(m, L) token ids → (m, w) float32."""
        pooled = self._pool_text(tokens)
        return self._embed(self.model.text_tower.text_projection, pooled)

    def pool_captions(self, captions: Sequence[str], progress: bool = False) -> Tensor:
        """(m, w) float32; rows of equal captions are equal bit for bit."""
        how = Batching(BATCH, progress=progress)
        pooled = text_features(self.model, captions, how, encode=self._pool_text)
        return self._embed(self.model.text_tower.text_projection, pooled)

    def _pool_text(self, tokens: Tensor) -> Tensor:
        padding = self.model.tokenizer.padding
        keys = [text_key(row, padding) for row in tokens.cpu()]

        def compute(missing: list[int]) -> Tensor:
            return self.model.text_tower.pool(tokens[missing])

        return self._texts.of(keys, compute)

    @torch.no_grad()
    def _embed(self, projection: Any, pooled: Tensor) -> Tensor:
        if not self.projected:
            return pooled
        device = self.model.logit_scale.device
        embedded = projection(pooled.to(device))
        return normalize(embedded.float(), dim=-1).cpu()


def base_of(model: object) -> EncoderBase:
    """The base that heads are fitted to: the embeddings of a model."""
    encoder = as_encoder(model)
    if isinstance(encoder, DualEncoder):
        return Base(encoder, projected=True)
    return EncoderBase(encoder)


def _from_cache(cache: VectorCache, pixels: Tensor, pool: Any) -> Tensor:
    keys = [content_key(row.numpy()) for row in pixels.cpu()]
    return cache.of(keys, lambda missing: pool(pixels[missing]))


class _LazyPool:
    """The image tower of a model in a precision, built at its first use: all features may be known."""

    def __init__(self, model: DualEncoder, precision: str) -> None:
        self.model = model
        self.precision = precision

    @cached_property
    def tower(self) -> Any:
        return pooling_tower(self.model, TYPES[self.precision])

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        images = normalized(self.model, pixels.to(self.model.device))
        dtype = next(self.tower.parameters()).dtype
        return self.tower.pool(images.to(dtype))


def image_pool(model: DualEncoder, precision: str) -> Any:
    """A function of pixels (n, 3, S, S), uint8 or normalized, → pooled features (n, v)."""
    return partial(chunked, _LazyPool(model, precision))


def tower_digest(model: DualEncoder, tower: str) -> str:
    """Hash a tower's weights but for its projection, its recipe section, and the versions of the code."""
    # Equal weights may compute other features: with another pooling or number of heads, or in
    # other code.
    section = model.recipe.image if tower == IMAGE else model.recipe.text
    libraries = [version(name) for name in ("torch", "timm", "pillow")]
    known = [section.model_dump(mode="json"), FEATURES, libraries]
    digest = hashlib.sha256(json.dumps(known).encode())
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(tower) and not name.startswith(PROJECTIONS):
            tensors[name] = tensor
    hash_tensors(digest, tensors)
    return digest.hexdigest()[:24]


def linear_name(projection: nn.Module) -> str | None:
    """Prefix of the tensors of a projection's one linear map: "" for itself; None if it is not linear."""
    if not isinstance(projection, nn.Sequential):
        return "" if isinstance(projection, LINEAR) else None
    learned = [name for name, part in projection.named_children() if [*part.parameters()]]
    if len(learned) == 1 and isinstance(projection.get_submodule(learned[0]), nn.Linear):
        return f"{learned[0]}."
    return None


def check_linear(model: DualEncoder, name: str) -> None:
    """Refuse towers whose projections are not linear, in whose place heads could be saved."""
    for projection in (model.image_tower.proj, model.text_tower.text_projection):
        if linear_name(projection) is None:
            raise UserError(
                f"--freeze both fits linear projections, and a tower of '{name}' ends with a "
                f"{type(projection).__name__} that is not linear. Give --freeze none with "
                "finetune.lora={rank: 8}, or --freeze image or text."
            )
