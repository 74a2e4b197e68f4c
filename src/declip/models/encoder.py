"""What evaluation, search and fitting ask of a model, and an adapter for models that have less."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, cast

import torch
from PIL import Image
from torch import Tensor, nn

from declip.data.images.preprocess import Preprocess
from declip.data.text.tokenizer import CaptionTokenizer
from declip.errors import UserError
from declip.models.token_scorer import TokenScorer
from declip.recipe.schema import Recipe

# Without texts a model has images to search and classify by
REQUIRED = ("encode_image", "preprocess")
Preprocessing = Callable[[list[Image.Image]], Tensor]


class NoTexts(UserError):
    """A model of images alone was asked for texts."""


class Encoder(Protocol):
    """A model of images and texts.

    Yours needs the first four methods, or without texts `encode_image` and `preprocess`: `as_encoder` adds the rest.
    """

    def encode_image(self, images: Tensor, /) -> Tensor:
        """(n, 3, S, S) normalized pixels → (n, d)."""

    def encode_text(self, tokens: Tensor, /) -> Tensor:
        """(m, L) token ids → (m, d)."""

    def preprocess(self, images: list[Image.Image], /) -> Tensor:
        """PIL images → (n, 3, S, S) normalized pixels."""

    def tokenize(self, texts: list[str], /) -> Tensor:
        """Texts → (m, L) token ids."""

    def modules(self) -> Iterator[nn.Module]:
        """Modules that are put into evaluation mode."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters, to count them."""

    def state_dict(self) -> Mapping[str, Any]:
        """Tensors that distinguish this model from others of its class."""

    @property
    def class_name(self) -> str:
        """The class, for messages, indices and fingerprints."""

    @property
    def recipe(self) -> Recipe | None:
        """The architecture, of a model of declip."""

    @property
    def device(self) -> torch.device:
        """Where pixels and token ids are wanted."""

    @property
    def preprocessor(self) -> Preprocessing:
        """`preprocess` on the host, for worker processes."""

    @property
    def tokenizer(self) -> CaptionTokenizer | None:
        """The tokenizer, if it is one that tells whether it truncates a text."""

    @property
    def logit_scale(self) -> Tensor | None:
        """Logarithm of the factor of cosines before a softmax, if it was trained."""

    @property
    def token_scorer(self) -> TokenScorer | None:
        """Zero-shot scores by patches and words, of a model whose embeddings are not trained."""

    @property
    def encode_backbone(self) -> Callable[[Tensor], Tensor] | None:
        """(n, 3, S, S) → (n, v) before the projection, for probes; None if there is none."""

    @property
    def source_features(self) -> Callable[..., Any] | None:
        """`encode_images` of a model that reads a source once for several heads."""


class Complete:
    """Base of the classes that have all of `Encoder`."""


class PlainEncoder(Complete):
    """An `Encoder` made of an object with its first four methods; what the object has besides is used too.

    A method that returns something else than `Encoder` says raises `UserError`.
    """

    recipe = None
    token_scorer = None
    source_features = None

    def __init__(self, model: Any) -> None:
        self.model = model
        self.class_name = type(model).__qualname__
        own: Preprocessing = getattr(model, "preprocessor", model.preprocess)
        if isinstance(own, Preprocess):  # whose uint8 pixels only models of declip take
            own = own.__call__
        self.own_preprocessor = own
        self.encode_backbone = getattr(model, "encode_backbone", None)
        tokenizer = getattr(model, "tokenizer", None)
        self.tokenizer = None
        if isinstance(tokenizer, CaptionTokenizer):
            self.tokenizer = tokenizer

    def encode_image(self, images: Tensor) -> Tensor:
        """(n, 3, S, S) normalized pixels → (n, d)."""
        result = self.model.encode_image(images)
        return self._embeddings("encode_image", result, len(images))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(m, L) token ids → (m, d)."""
        encode = getattr(self.model, "encode_text", self._refuse_text)
        return self._embeddings("encode_text", encode(tokens), len(tokens))

    def preprocess(self, images: list[Image.Image]) -> Tensor:
        """PIL images → (n, 3, S, S) normalized pixels."""
        result = self.model.preprocess(images)
        return self._rows("preprocess", result, len(images))

    def preprocessor(self, images: list[Image.Image]) -> Tensor:
        """`preprocess` on the host, for worker processes."""
        result = self.own_preprocessor(images)
        return self._rows("preprocess", result, len(images))

    def tokenize(self, texts: list[str]) -> Tensor:
        """Texts → (m, L) token ids."""
        tokenize = getattr(self.model, "tokenize", self._refuse_text)
        return self._rows("tokenize", tokenize(texts), len(texts))

    def _rows(self, method: str, result: Any, rows: int) -> Tensor:
        """The result of one of the object's methods, if it is a tensor of a row for each input."""
        if isinstance(result, Tensor) and result.ndim >= 2 and len(result) == rows:
            return result
        wanted = f"a torch.Tensor of {rows} rows, one for each of its inputs, of the same length"
        raise self._returned(method, result, wanted)

    def _embeddings(self, method: str, result: Any, rows: int) -> Tensor:
        """The result of one of the object's encoders, if it is (rows, d) of floating point."""
        found = isinstance(result, Tensor) and result.is_floating_point() and result.ndim == 2
        if found and len(result) == rows:
            return cast(Tensor, result)
        wanted = f"a torch.Tensor of floats of shape ({rows}, d), one row for each of its inputs"
        raise self._returned(method, result, wanted)

    def _returned(self, method: str, result: Any, wanted: str) -> UserError:
        """The error for what one of the object's methods returned."""
        given = f"{type(result).__module__}.{type(result).__qualname__}".removeprefix("builtins.")
        if isinstance(result, Tensor):
            given = f"a tensor of {str(result.dtype).removeprefix('torch.')}"
        if hasattr(result, "shape"):
            given += f" of shape {tuple(result.shape)}"
        return UserError(
            f"`{method}` of {self.class_name} returned {given}. It must return {wanted}."
        )

    def modules(self) -> Iterator[nn.Module]:
        """Modules of the object, if it is made of modules."""
        return iter(getattr(self.model, "modules", tuple)())

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the object, if it has some."""
        return iter(getattr(self.model, "parameters", tuple)())

    def state_dict(self) -> Mapping[str, Any]:
        """Tensors of the object; raises `UserError` for one that has no such method."""
        if not hasattr(self.model, "state_dict"):
            raise UserError(
                f"{self.class_name} has no `state_dict`, so it cannot be distinguished from other models. "
                "Give it one, which returns its tensors by name."
            )
        return dict(self.model.state_dict())

    @property
    def device(self) -> torch.device:
        """Device of the first parameter, else the CPU."""
        weight = next(self.parameters(), None)
        if weight is None:
            return torch.device("cpu")
        return weight.device

    def _refuse_text(self, texts: Any) -> Tensor:
        raise NoTexts(
            f"{self.class_name} has no `encode_text` and `tokenize`, so it cannot compare images with texts."
        )

    @property
    def logit_scale(self) -> Tensor | None:
        """The object's, as it is now."""
        scale = getattr(self.model, "logit_scale", None)
        if scale is None:
            return None
        return torch.as_tensor(scale)


def as_encoder(model: object) -> Encoder:
    """Complete an object that has the first four methods of `Encoder`; raises `UserError` for others."""
    if isinstance(model, Complete):
        return cast(Encoder, model)
    missing = [f"`{name}`" for name in REQUIRED if not hasattr(model, name)]
    if missing:
        raise UserError(
            f"A model is what `declip.load` takes, a run folder, a file, a name, or an object with "
            f"{' and '.join(REQUIRED)}; {type(model).__name__} has no {' and no '.join(missing)}."
        )
    return PlainEncoder(model)
