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
from declip.errors import UserError
from declip.models.heads import MlpHead
from declip.models.hf_encoder import TextEncoder, read_encoder
from declip.models.hf_text_tower import HuggingfaceTextTower
from declip.models.image_tower import ImageFeatures, ImageTower
from declip.models.text_tower import TextTower
from declip.models.wrapped import WrappedModel
from declip.models.wrapped_towers import WrappedTextTower, build_towers
from declip.recipe.schema import Recipe

AnyTextTower = TextTower | HuggingfaceTextTower | WrappedTextTower


class DualEncoder(nn.Module):
    """Image tower, text tower and logit scale (logarithm of the inverse temperature), with preprocessing and tokenizer.

    Attributes:
        logit_bias: Added to the logits of the sigmoid loss; None for a model without one.
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
        logit_bias: float | None = None,
    ) -> None:
        super().__init__()
        self.image_tower = image_tower
        self.text_tower = text_tower
        self.logit_scale = nn.Parameter(torch.tensor(logit_scale))
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor(logit_bias))
        self.preprocessor = preprocess
        self.tokenizer = tokenizer

    @classmethod
    def from_recipe(cls, recipe: Recipe, encoder: TextEncoder | WrappedModel | None = None) -> "DualEncoder":
        """Build the model that a recipe describes, with random weights from torch's current seed.

        The encoder of ``text.hf_model`` starts from its own weights unless ``text.pretrained`` is false; `encoder` is
        used instead of reading it, where the model's weights will be loaded anyway. Both towers are another library's
        where it is a `WrappedModel`.
        """
        image, options = recipe.image, encoder.image if isinstance(encoder, WrappedModel) else {}
        image_tower, tokenizer, text_tower = _parts(recipe, encoder)
        if recipe.finetune.head == "mlp":
            if isinstance(encoder, WrappedModel):
                raise UserError("finetune.head=mlp needs towers of ours; those of another library keep their heads.")
            assert isinstance(image_tower.proj, nn.Linear)
            assert isinstance(text_tower.text_projection, nn.Linear)
            image_tower.proj = MlpHead(image_tower.proj)
            text_tower.text_projection = MlpHead(text_tower.text_projection)
        preprocess = Preprocess(image.size, image.mean, image.std, **options)
        model = cls(image_tower, text_tower, preprocess, tokenizer, recipe.logit_scale.init, recipe.initial_bias)
        if model.logit_bias is not None and "sigmoid" not in recipe.active_losses:
            model.logit_bias.requires_grad_(False)  # softmax does not see it
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
        return self.image_tower(images.to(next(self.image_tower.parameters()).dtype))


def _parts(
    recipe: Recipe, encoder: TextEncoder | WrappedModel | None
) -> tuple[ImageTower, CaptionTokenizer, AnyTextTower]:
    image = recipe.image
    if isinstance(encoder, WrappedModel):
        wrapped, text_tower = build_towers(encoder, image.size, recipe.embed_dim)
        if recipe.masked_language.mask_input_only:
            text_tower.language_head()  # raises
        return wrapped, encoder.build_tokenizer(), text_tower
    if image.model == recipe.text.hf_model:
        raise UserError(f"image.model={image.model} comes with weights: give them as finetune.pretrained.")
    any_size = len(set(recipe.image_sizes.values())) > 1
    tower = ImageTower(
        image.model, image.size, recipe.embed_dim, image.model_kwargs, image.freeze_patch_embed, any_size=any_size
    )
    return tower, *_text_side(recipe, encoder)


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
