"""The dual encoder: an image tower and a text tower with a shared embedding space."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from declip.data.images.preprocess import Preprocess
from declip.data.text.caption_tokenizer import CaptionTokenizer
from declip.data.text.hf_tokenizer import HuggingfaceTokenizer
from declip.data.text.tokenizer import Tokenizer
from declip.models.hf_encoder import TextEncoder, read_encoder
from declip.models.hf_text_tower import HuggingfaceTextTower
from declip.models.image_tower import ImageFeatures, ImageTower
from declip.models.text_tower import TextTower
from declip.recipe.schema import Recipe

AnyTextTower = TextTower | HuggingfaceTextTower


class DualEncoder(nn.Module):
    """Image tower, text tower and logit scale (logarithm of the inverse temperature), with preprocessing and tokenizer.

    Attributes:
        recipe: The recipe that `from_recipe` built the model from, else None.
    """

    recipe: Recipe | None = None

    def __init__(
        self,
        image_tower: ImageTower,
        text_tower: AnyTextTower,
        preprocess: Preprocess,
        tokenizer: CaptionTokenizer,
        logit_scale: float,
    ) -> None:
        super().__init__()
        self.image_tower = image_tower
        self.text_tower = text_tower
        self.logit_scale = nn.Parameter(torch.tensor(logit_scale))
        self.preprocessor = preprocess
        self.tokenizer = tokenizer

    @classmethod
    def from_recipe(cls, recipe: Recipe, encoder: TextEncoder | None = None) -> "DualEncoder":
        """Build the model that a recipe describes, with random weights from torch's current seed.

        The encoder of ``text.hf_model`` starts from its own weights unless ``text.pretrained`` is false; `encoder` is
        used instead of reading it, where the model's weights will be loaded anyway.
        """
        image = recipe.image
        image_tower = ImageTower(
            image.model, image.size, recipe.embed_dim, image.model_kwargs, image.freeze_patch_embed
        )
        tokenizer, text_tower = _text_side(recipe, encoder)
        preprocess = Preprocess(image.size, image.mean, image.std)
        model = cls(image_tower, text_tower, preprocess, tokenizer, recipe.logit_scale.init)
        model.recipe = recipe
        return model

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.logit_scale.device

    def preprocess(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """PIL images → (n, 3, S, S) float32, normalized, on the model's device."""
        images = [images] if isinstance(images, Image.Image) else list(images)
        return self.preprocessor(images).to(self.device)

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Captions → (n, L) int64 on the model's device."""
        return self.tokenizer(texts).to(self.device)

    def encode_image(self, images: Tensor) -> Tensor:
        """(n, 3, S, S) normalized → (n, d) float32 of length 1."""
        return F.normalize(self._encode(images).pooled.float(), dim=-1)

    def encode_backbone(self, images: Tensor) -> Tensor:
        """(n, 3, S, S) normalized → (n, width) float32, the pooled feature before the projection: for probes."""
        return self._encode(images).pre_logits.float()

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(n, L) ids → (n, d) float32 of length 1."""
        return F.normalize(self.text_tower(tokens).pooled.float(), dim=-1)

    def _encode(self, images: Tensor) -> ImageFeatures:
        # A model that was converted, as by model.bfloat16(), takes the preprocessing's float32 images too.
        return self.image_tower(images.to(self.image_tower.proj.weight.dtype))


def _text_side(recipe: Recipe, encoder: TextEncoder | None) -> tuple[CaptionTokenizer, AnyTextTower]:
    text = recipe.text
    if text.hf_model is not None:
        encoder = encoder or read_encoder(text.hf_model, text.pretrained)
        hf_tokenizer = HuggingfaceTokenizer(encoder.tokenizer, encoder.specials, text.context_length)
        language = "masked_language" in recipe.active_losses
        return hf_tokenizer, HuggingfaceTextTower(
            encoder, hf_tokenizer, recipe.embed_dim, text.pooling, text.projection_bias, language
        )
    tokenizer = Tokenizer(context=text.context_length, merges=text.bpe_merges)
    return tokenizer, TextTower(
        vocabulary=tokenizer.vocabulary,
        end=tokenizer.end,
        embed_dim=recipe.embed_dim,
        width=text.width,
        layers=text.layers,
        heads=text.heads,
        context=text.context_length,
        projection_bias=text.projection_bias,
        activation=text.activation,
    )
