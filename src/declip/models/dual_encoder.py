"""The dual encoder: an image tower and a text tower with a shared embedding space."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip.data.images.decode import Picture, read_picture
from declip.data.images.preprocess import Preprocess
from declip.data.text.tokenizer import CaptionTokenizer, HuggingfaceTokenizer, Tokenizer, WrappedTokenizer
from declip.errors import UserError
from declip.models.hf_encoder import HuggingfaceTextTower, TextEncoder, read_encoder
from declip.models.image_tower import ImageFeatures, ImageTower, NoImageTower
from declip.models.text_tower import AnyTextTower, NoTextTower, NoTokenizer, TextTower
from declip.models.wrapped import WrappedImageTower, WrappedModel, WrappedTextTower
from declip.recipe.schema import Recipe
from declip.recipe.starts import NAMED

Towers = Literal["both", "image", "text"]


class DualEncoder(nn.Module):
    """Image tower, text tower and logit scale (logarithm of the inverse temperature), with preprocessing and tokenizer.

    A model of a sigmoid loss has a logit bias too, others None.

    Examples:
        >>> model, image = declip.load("runs/demo"), Image.open("photos/red.png")
        >>> image_features = model.encode_image(model.preprocess(image))
        >>> (image_features @ model.encode_text(model.tokenize(["a red square", "a cat"])).T).shape
        torch.Size([1, 2])
    """

    computed: tuple[str, dict[str, Tensor]] = ("", {})  # `Weights.published`, and the projections computed from it
    fingerprint = ""  # of the float32 weights, if the towers were converted since
    token_scorer: Any = None  # `TokenScorer` of a model whose embeddings are not trained

    def __init__(
        self, recipe: Recipe, encoder: TextEncoder | WrappedModel | None = None, towers: Towers = "both"
    ) -> None:
        """Build both towers, or one; encoding captions without a text tower raises a `UserError`.

        The encoder of ``text.hf_model`` starts from its own weights unless ``text.pretrained`` is false; `encoder` is
        used instead where the weights will be loaded anyway. A `WrappedModel` always gives both towers.
        """
        super().__init__()
        self.recipe, given = recipe, recipe.image
        self.image_tower: ImageTower
        self.text_tower: AnyTextTower
        self.tokenizer: CaptionTokenizer
        options: Mapping[str, Any] = {}
        if isinstance(encoder, WrappedModel):
            encoder, options = encoder.with_context(recipe.text.context_length), encoder.image
            visual, words = encoder.build(given.size)
            self.image_tower = WrappedImageTower(visual, recipe.embed_dim)
            self.tokenizer = tokenizer = WrappedTokenizer(**encoder.tokenizer)
            self.text_tower = WrappedTextTower(words, tokenizer, encoder)
            if recipe.views.text.mask:
                self.text_tower.language_head()  # raises
        else:
            # Towers of declip, either of which may be missing
            self.image_tower, self.tokenizer, self.text_tower = NoImageTower(), NoTokenizer(), NoTextTower()
            if towers != "text":
                if given.model.startswith(NAMED):
                    raise UserError(f"image.model={given.model} comes with weights: give them as finetune.pretrained.")
                sizes = (given.model, given.size, recipe.embed_dim, given.model_kwargs, given.freeze_patch_embed)
                self.image_tower = ImageTower(*sizes)
            if towers != "image":
                self.tokenizer, self.text_tower = _text_parts(recipe, encoder)
        self.logit_scale = nn.Parameter(torch.tensor(recipe.logit_scale.init))
        bias = recipe.initial_bias
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias))
        options = {"interpolation": given.interpolation, "resize": given.resize, **options}
        self.preprocessor = Preprocess(given.size, given.mean, given.std, **options)

    @classmethod
    def from_recipe(cls, recipe: Recipe, encoder: TextEncoder | WrappedModel | None = None) -> "DualEncoder":
        """Build the model that a recipe describes, with random weights from torch's current seed."""
        return cls(recipe, encoder)

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
        one = isinstance(images, str) or not isinstance(images, Iterable) or getattr(images, "ndim", 4) != 4
        several: Any = [images] if one else images
        return self.preprocessor([read_picture(image) for image in several]).to(self.device)

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Captions → (n, L) int64 on the model's device."""
        return self.tokenizer(texts).to(self.device)

    def encode_image(self, images: Tensor | Picture | Iterable[Picture]) -> Tensor:
        """Encode images, or the (n, 3, S, S) that `preprocess` made of them, as (n, d) float32 of length 1.

        The features of `encode_image`, `encode_backbone` and `encode_text` have gradients in training mode only.
        """
        return F.normalize(self._encode(images).pooled.float(), dim=-1)

    def encode_backbone(self, images: Tensor | Picture | Iterable[Picture]) -> Tensor:
        """Encode images as (n, width) float32, the pooled feature before the projection: for probes."""
        return self._encode(images).pre_logits.float()

    def encode_text(self, texts: Tensor | str | Sequence[str]) -> Tensor:
        """Encode captions, or the (n, L) ids that `tokenize` made of them, as (n, d) float32 of length 1."""
        tokens = texts if isinstance(texts, Tensor) else self.tokenize(texts)
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise _unsuitable(tokens, "token ids (n, L), as `tokenize` returns them, or texts")
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            return F.normalize(self.text_tower(tokens).pooled.float(), dim=-1)

    def _encode(self, images: Tensor | Picture | Iterable[Picture]) -> ImageFeatures:
        pixels = images if isinstance(images, Tensor) else self.preprocess(images)
        if pixels.ndim != 4 or not pixels.is_floating_point():
            raise _unsuitable(pixels, "pixels (n, 3, S, S), as `preprocess` returns them, or images")
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            # A model that was converted, as by model.bfloat16(), takes the preprocessing's float32 images too.
            return self.image_tower(pixels.to(next(self.image_tower.parameters()).dtype))


def _unsuitable(given: Tensor, wanted: str) -> UserError:
    return UserError(f"A tensor {tuple(given.shape)} of {given.dtype} cannot be encoded. Pass {wanted}.")


def has_text(model: DualEncoder) -> bool:
    """Whether the model can encode captions."""
    return not isinstance(model.text_tower, NoTextTower)


def _text_parts(recipe: Recipe, encoder: TextEncoder | None) -> tuple[CaptionTokenizer, AnyTextTower]:
    text, dim = recipe.text, recipe.embed_dim
    if text.hf_model is not None:
        encoder = encoder or read_encoder(text.hf_model, text.pretrained)
        hf_tokenizer = HuggingfaceTokenizer(encoder.tokenizer, encoder.specials, text.context_length)
        return hf_tokenizer, HuggingfaceTextTower(encoder, hf_tokenizer, text, dim)
    tokenizer = Tokenizer(context=text.context_length, merges=text.bpe_merges)
    return tokenizer, TextTower(tokenizer.vocabulary, tokenizer.end, text, dim)
