"""Towers around modules of open_clip and transformers, whose parameters keep the names that they have there."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from declip.data.text.wrapped_tokenizer import WrappedTokenizer
from declip.errors import UserError
from declip.models.image_tower import ImageFeatures, ImageTower
from declip.models.text_tower import TextFeatures, already_pooled
from declip.models.wrapped import WrappedModel


class WrappedImageTower(ImageTower):
    """An image module of open_clip (timm, ViT, ResNet) or transformers (SigLIP), with its last linear map as `proj`.

    Without such a map, as in SigLIP, `proj` is the identity and the features before it are the embedding.

    Attributes:
        gives_tokens: Whether `ImageFeatures.tokens` are those of patches.
        projection: Name of `proj` in the module, to write it there again.
    """

    def __init__(self, module: Any, embed_dim: int) -> None:
        nn.Module.__init__(self)
        kind = type(module).__name__
        self.trunk, self._timm, self._patches = module, kind == "TimmModel", kind == "Siglip2VisionModel"
        self.gives_tokens = kind != "ModifiedResNet"
        classifier = module.trunk.get_classifier() if self._timm else None
        if self._timm and len(module.head) and not hasattr(module.head, "pool"):
            name = "head"
        elif isinstance(classifier, nn.Linear) and not hasattr(module.head, "pool"):
            name = next(name for name, part in module.named_modules() if part is classifier)
        else:
            name = "proj"
        self.proj, self.projection = _taken(module, name)  # type: ignore[assignment]  # no linear map in every module
        self.pre_logits_width = _width(self.proj, embed_dim)
        if self._timm:
            self.token_width = int(module.trunk.num_features)
        elif kind == "VisionTransformer":
            self.token_width = int(module.ln_post.normalized_shape[0])
        else:
            self.token_width = self.pre_logits_width
        self.has_batch_norm = any(isinstance(m, _BatchNorm) for m in self.modules())

    def forward(self, images: Tensor) -> ImageFeatures:
        """Encode images (B, 3, H, W), normalized; or (B, width), what `pool` gave for them before."""
        if images.ndim == 2:
            return ImageFeatures(self.proj(images), images, images.unsqueeze(1))
        pooled, tokens = self._pooled(images)
        return ImageFeatures(self.proj(pooled), pooled, pooled.unsqueeze(1) if tokens is None else tokens)

    def pool(self, images: Tensor) -> Tensor:
        """Encode images up to the projection, (B, width)."""
        return self._pooled(images)[0]

    def _pooled(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        module: Any = self.trunk
        if self._timm:
            features = module.trunk.forward_features(images)
            return module.head(module.trunk.forward_head(features)), self._tokens(features, module.trunk)
        if self._patches:  # (B, 3, H, W) → (B, P, p·p·3), as transformers' image processor cuts them
            size = module.config.patch_size
            count, _, height, width = images.shape
            grid = images.new_tensor([height // size, width // size]).long().expand(count, 2)
            cut = images.unflatten(2, (-1, size)).unflatten(4, (-1, size)).permute(0, 2, 4, 3, 5, 1)
            patches = cut.flatten(3).flatten(1, 2)
            given = {"pixel_attention_mask": patches.new_ones(patches.shape[:2]).long(), "spatial_shapes": grid}
            out = module(pixel_values=patches, **given)
            return out.pooler_output, out.last_hidden_state
        out = module(images)
        if isinstance(out, tuple):
            return out
        return (out.pooler_output, out.last_hidden_state) if self.gives_tokens else (out, None)


class WrappedTextTower(nn.Module):
    """A text module of open_clip or transformers, with what follows its pooling as `text_projection`.

    Attributes:
        gives_tokens: Whether `TextFeatures.text_tokens` are those of tokens.
    """

    def __init__(self, module: Any, tokenizer: WrappedTokenizer, stored: WrappedModel) -> None:
        super().__init__()
        kind = type(module).__name__
        self.trunk, self._stored = module, stored.to_tensor()
        self.padding, self.end, self.context = tokenizer.padding, tokenizer.end, tokenizer.context
        self._masks_padding, self._siglip = kind == "HFTextEncoder", kind.startswith("Siglip")
        # This pooler makes open_clip leave the first token state out.
        self.gives_tokens = not (self._masks_padding and type(module.pooler).__name__ == "ClsPooler")
        name = "proj" if self._masks_padding else "head" if self._siglip else "text_projection"
        self.text_projection, self.projection = _taken(module, name)
        if self._masks_padding or self._siglip:
            config = module.config
            self.width = int(getattr(config, "hidden_size", None) or config.d_model)
            if self._masks_padding and config.pad_token_id != self.padding:
                raise UserError(f"The tokenizer pads with {self.padding}, the text encoder with {config.pad_token_id}.")
        else:
            self.width = int(module.width)

    def forward(self, tokens: Tensor) -> TextFeatures:
        """Encode token ids (B, L), padded on the right; or (B, width), what `pool` gave before."""
        if tokens.is_floating_point():
            return already_pooled(tokens, self.text_projection)
        pooled, states = self._pooled(tokens)
        lengths = (tokens == self.end).long().argmax(dim=1) + 1
        return TextFeatures(self.text_projection(pooled), states[:, : tokens.shape[1]], lengths)

    def pool(self, tokens: Tensor) -> Tensor:
        """Encode token ids up to the projection, (B, width)."""
        return self._pooled(tokens)[0]

    def _pooled(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        module: Any = self.trunk
        if not self._masks_padding:  # these modules see padding, or have a mask of one size
            tokens = F.pad(tokens, (0, self.context - tokens.shape[1]), value=self.padding)
        if self._siglip:
            out = module(input_ids=tokens)
            return out.pooler_output, out.last_hidden_state
        pooled, states = module(tokens)
        return pooled, states

    def language_head(self) -> nn.Module:
        """Refuse a masked-language head: the vocabulary has no mask that the tower knows."""
        raise UserError(
            "masked_language needs a text tower with a mask token, and this one comes from open_clip or transformers "
            "without. Set loss_weights.masked_language to 0."
        )

    def get_extra_state(self) -> Tensor:
        """The model's configuration and tokenizer, so that the weights need no other file."""
        return self._stored

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse weights that belong to another configuration or tokenizer."""
        if not state.is_meta and not bytes(state.cpu().numpy()) == bytes(self._stored.numpy()):
            raise UserError("These weights belong to a model with another configuration or tokenizer.")


def build_towers(stored: WrappedModel, size: int, embed_dim: int) -> tuple[WrappedImageTower, WrappedTextTower]:
    """Build both towers with random weights."""
    visual, text = stored.build(size)
    return WrappedImageTower(visual, embed_dim), WrappedTextTower(text, stored.build_tokenizer(), stored)


def library_state(tower: WrappedImageTower | WrappedTextTower, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name a tower's tensors as the library does: of the projection too, where that is a bare matrix transposed."""
    projection, bare = tower.projection
    named = {name.removeprefix("trunk."): tensor for name, tensor in state.items() if name.startswith("trunk.")}
    for name, tensor in state.items():
        head, _, rest = name.partition(".")
        if head in ("proj", "text_projection"):
            named[projection if bare else f"{projection}.{rest}"] = tensor.mT if bare else tensor
    return named


def _taken(module: Any, name: str) -> tuple[nn.Module, tuple[str, bool]]:
    """Take a projection out of a module: the projection, its name, and whether it was a bare matrix."""
    parent, _, last = name.rpartition(".")
    owner = module.get_submodule(parent)
    projection = getattr(owner, last, None)
    if isinstance(projection, nn.Parameter):
        linear = nn.Linear(projection.shape[0], projection.shape[1], bias=False, device="meta")
        linear.weight = nn.Parameter(projection.detach().mT.contiguous())
        setattr(owner, last, None)
        return linear, (name, True)
    if projection is None or not any(True for _ in projection.parameters()):
        return nn.Identity(), (name, False)
    setattr(owner, last, None if last == "text_projection" else nn.Identity())  # open_clip multiplies by what is there
    return projection, (name, False)


def _width(projection: nn.Module, embed_dim: int) -> int:
    """Input width of a projection."""
    layers = [part for part in projection.modules() if isinstance(part, nn.Linear)]
    return layers[0].in_features if layers else embed_dim
