"""The dual encoder: an image tower and a text tower with a shared embedding space."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip.data.images.decode import Picture, read_picture
from declip.data.images.preprocess import Preprocess
from declip.data.text.tokenizer import (
    CaptionTokenizer,
    HuggingfaceTokenizer,
    Tokenizer,
    WrappedTokenizer,
)
from declip.errors import UserError
from declip.models.encoder import Complete
from declip.models.hf_encoder import HuggingfaceTextTower, TextEncoder, read_encoder
from declip.models.image_tower import ImageFeatures, ImageTower
from declip.models.text_tower import AnyTextTower, TextTower
from declip.models.token_scorer import TokenScorer
from declip.models.wrapped import WrappedModel
from declip.recipe.schema import Recipe
from declip.recipe.starts import NAMED

Towers = Literal["both", "image", "text"]


@dataclass(frozen=True)
class PublishedHeads:
    """Projections that were computed from published files, whose last digits differ between machines."""

    files: str  # digests of the files, and the version of the computation
    projections: Mapping[str, Tensor]  # by the names of `DualEncoder`


class DualEncoder(nn.Module, Complete):
    """Image tower, text tower and logit scale (logarithm of the inverse temperature), with preprocessing and tokenizer.

    A model of a sigmoid loss has a logit bias too, others None.

    Examples:
        >>> model, image = declip.load("runs/demo"), Image.open("photos/red.png")
        >>> image_features = model.encode_image(model.preprocess(image))
        >>> (image_features @ model.encode_text(model.tokenize(["a red square", "a cat"])).T).shape
        torch.Size([1, 2])
    """

    class_name = "DualEncoder"
    source_features = None
    has_image: bool  # whether there is an `image_tower`
    has_text: bool  # whether there are a `text_tower` and a `tokenizer`
    image_tower: ImageTower
    text_tower: AnyTextTower
    tokenizer: CaptionTokenizer
    published: PublishedHeads | None
    float32_fingerprint: str | None  # of the weights before a conversion to another precision
    token_scorer: TokenScorer | None  # of a model whose embeddings are not trained

    def __init__(
        self,
        recipe: Recipe,
        encoder: TextEncoder | WrappedModel | None = None,
        towers: Towers = "both",
    ) -> None:
        """Build both towers of a recipe, or one, with random weights from torch's current seed.

        Encoding without its tower raises a `UserError`.

        The encoder of ``text.hf_model`` starts from its own weights unless ``text.pretrained`` is false; `encoder` is
        used instead where the weights will be loaded anyway. A `WrappedModel` always gives both towers.
        """
        super().__init__()
        self.recipe = recipe
        image = recipe.image
        self.published = None
        self.float32_fingerprint = None
        self.token_scorer = None
        wrapped = isinstance(encoder, WrappedModel)
        self.has_image = wrapped or towers != "text"
        self.has_text = wrapped or towers != "image"
        prepared: dict[str, Any] = {"interpolation": image.interpolation, "resize": image.resize}
        if isinstance(encoder, WrappedModel):
            prepared |= encoder.image
            self._wrap(encoder.with_context(recipe.text.context_length))
        else:
            if self.has_image:
                self.image_tower = _image_tower(recipe)
            if self.has_text:
                self.tokenizer, self.text_tower = _text_parts(recipe, encoder)
        self.logit_scale = nn.Parameter(torch.tensor(recipe.logit_scale.init))
        bias = recipe.initial_bias
        self.logit_bias = None
        if bias is not None:
            self.logit_bias = nn.Parameter(torch.tensor(bias))
        self.preprocessor = Preprocess(image.size, image.mean, image.std, **prepared)

    def _wrap(self, model: WrappedModel) -> None:
        """Build the towers of a model of another library."""
        modules = model.build(self.recipe.image.size)
        tokenizer = WrappedTokenizer(**model.tokenizer)
        self.tokenizer = tokenizer
        self.image_tower, self.text_tower = model.towers(modules, tokenizer)
        if self.recipe.views.text.mask:
            self.text_tower.language_head()  # raises

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all modules, except those that `declip.models.layers` keeps in evaluation mode."""
        super().train(mode)
        for module in self.modules():
            module.training = mode and not getattr(module, "always_eval", False)
        return self

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.logit_scale.device

    def preprocess(self, images: Picture | Iterable[Picture]) -> Tensor:
        """PIL images, files or arrays (H, W, 3) of uint8 → (n, 3, S, S) float32, normalized, on the model's device."""
        several: Any = [images] if _is_one(images) else images
        return self.preprocessor([read_picture(image) for image in several]).to(self.device)

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Captions → (n, L) int64 on the model's device."""
        self._check_text()
        return self.tokenizer(texts).to(self.device)

    def encode_image(self, images: Tensor | Picture | Iterable[Picture]) -> Tensor:
        """Encode images, or the (n, 3, S, S) that `preprocess` made of them, as (n, d) float32 of length 1.

        The features of `encode_image`, `encode_backbone` and `encode_text` have gradients in training mode only.
        """
        pooled = self._encode(images).pooled
        return F.normalize(pooled.float(), dim=-1)

    def encode_backbone(self, images: Tensor | Picture | Iterable[Picture]) -> Tensor:
        """Encode images as (n, width) float32, the pooled feature before the projection: for probes."""
        return self._encode(images).pre_logits.float()

    def encode_text(self, texts: Tensor | str | Sequence[str]) -> Tensor:
        """Encode captions, or the (n, L) ids that `tokenize` made of them, as (n, d) float32 of length 1."""
        self._check_text()
        tokens = texts if isinstance(texts, Tensor) else self.tokenize(texts)
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise _unsuitable(tokens, "token ids (n, L), as `tokenize` returns them, or texts")
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            pooled = self.text_tower(tokens).pooled
            return F.normalize(pooled.float(), dim=-1)

    def _encode(self, images: Tensor | Picture | Iterable[Picture]) -> ImageFeatures:
        if not self.has_image:
            raise UserError(
                "This is a text tower alone, without images. Use weights of both towers."
            )
        pixels = images if isinstance(images, Tensor) else self.preprocess(images)
        if pixels.ndim != 4 or not pixels.is_floating_point():
            raise _unsuitable(
                pixels, "pixels (n, 3, S, S), as `preprocess` returns them, or images"
            )
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            # A model that was converted, as by model.bfloat16(), takes the preprocessing's float32 images too.
            dtype = next(self.image_tower.parameters()).dtype
            return self.image_tower(pixels.to(dtype))

    def _check_text(self) -> None:
        if not self.has_text:
            raise UserError(
                "This is an image tower alone, without texts. Use --task linear, or weights of both towers."
            )


def _is_one(images: Any) -> bool:
    """Whether this is one picture: a path, a PIL image or an array (H, W, 3); not several of them."""
    if isinstance(images, str) or not isinstance(images, Iterable):
        return True
    return getattr(images, "ndim", 4) != 4


def _unsuitable(given: Tensor, wanted: str) -> UserError:
    return UserError(
        f"A tensor {tuple(given.shape)} of {given.dtype} cannot be encoded. Pass {wanted}."
    )


def _image_tower(recipe: Recipe) -> ImageTower:
    image = recipe.image
    if image.model.startswith(NAMED):
        raise UserError(
            f"image.model={image.model} comes with weights: give them as finetune.pretrained."
        )
    return ImageTower(
        image.model, image.size, recipe.embed_dim, image.model_kwargs, image.freeze_patch_embed
    )


def _text_parts(
    recipe: Recipe, encoder: TextEncoder | None
) -> tuple[CaptionTokenizer, AnyTextTower]:
    text = recipe.text
    dim = recipe.embed_dim
    if text.hf_model is not None:
        encoder = encoder or read_encoder(text.hf_model, text.pretrained)
        hf_tokenizer = HuggingfaceTokenizer(
            encoder.tokenizer, encoder.specials, text.context_length
        )
        return hf_tokenizer, HuggingfaceTextTower(encoder, hf_tokenizer, text, dim)
    tokenizer = Tokenizer(context=text.context_length, merges=text.bpe_merges)
    return tokenizer, TextTower(tokenizer.vocabulary, tokenizer.end, text, dim)
