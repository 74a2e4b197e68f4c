"""The model: an image tower and a text tower that meet in one space."""

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
from declip.models.image_tower import ImageTower
from declip.models.text_tower import TextTower
from declip.recipe.schema import Recipe

AnyTextTower = TextTower | HuggingfaceTextTower


class DualEncoder(nn.Module):
    """Image tower, text tower and logit scale, with the preprocessing that belongs to them.

    Args:
        image_tower: Gives `ImageFeatures` with d-dimensional `pooled`.
        text_tower: Gives `TextFeatures` with d-dimensional `pooled`.
        preprocess: Turns PIL images into the (n, 3, S, S) tensor that the image tower takes.
        tokenizer: Turns captions into the (n, L) ids that the text tower takes.
        logit_scale: Start of the logarithm of the inverse temperature.

    Attributes:
        recipe: What `from_recipe` built it from, else None.
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

        Args:
            recipe: Of ``text.hf_model`` the weights are its own where ``text.pretrained`` says so.
            encoder: What is read in place of ``text.hf_model``: of a model whose weights are there already.

        Raises:
            UserError: a tower cannot be built.
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
        """Where the parameters are."""
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
        return F.normalize(self.image_tower(images).pooled.float(), dim=-1)

    def encode_backbone(self, images: Tensor) -> Tensor:
        """(n, 3, S, S) normalized → (n, width) float32, the pooled feature before the projection: for probes."""
        return self.image_tower(images).pre_logits.float()

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(n, L) ids → (n, d) float32 of length 1."""
        return F.normalize(self.text_tower(tokens).pooled.float(), dim=-1)


def _text_side(recipe: Recipe, encoder: TextEncoder | None) -> tuple[CaptionTokenizer, AnyTextTower]:
    text = recipe.text
    if text.hf_model is not None:
        encoder = encoder or read_encoder(text.hf_model, text.pretrained)
        theirs = HuggingfaceTokenizer(encoder.tokenizer, encoder.specials, text.context_length)
        language = "masked_language" in recipe.active_losses
        tower = HuggingfaceTextTower(encoder, theirs, recipe.embed_dim, text.pooling, text.projection_bias, language)
        return theirs, tower
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
