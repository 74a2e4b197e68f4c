"""Towers around modules of open_clip and transformers, whose parameters keep the names that they have there."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from declip.data.text.wrapped_tokenizer import WrappedTokenizer
from declip.errors import UserError
from declip.models.hf_encoder import check_context
from declip.models.image_tower import ImageTower, grid_tokens
from declip.models.text_tower import AnyTextTower, SelfContained
from declip.models.wrapped import WrappedModel


class WrappedImageTower(ImageTower):
    """An image module of open_clip (timm, ViT, ResNet) or transformers (SigLIP), with its last linear map as `proj`.

    Without such a map, as in SigLIP, `proj` is the identity and the features before it are the embedding.
    """

    def __init__(self, module: Any, kind: str, embed_dim: int) -> None:
        nn.Module.__init__(self)
        name, self.trunk = "proj", module
        self._timm = kind == "timm"
        self.gives_tokens = kind != "resnet"  # one token per patch
        if self._timm and not hasattr(module.head, "pool"):
            classifier = module.trunk.get_classifier()
            if len(module.head):
                name = "head"
            elif isinstance(classifier, nn.Linear):
                name = next(name for name, part in module.named_modules() if part is classifier)
        self.proj, self.projection = _taken(module, name)  # type: ignore[assignment]  # no linear map in every module
        linear = [part for part in self.proj.modules() if isinstance(part, nn.Linear)]
        self.pre_logits_width = linear[0].in_features if linear else embed_dim
        self.token_width = self.pre_logits_width
        if self._timm or kind == "vit":
            self.token_width = int(module.trunk.num_features if self._timm else module.ln_post.normalized_shape[0])
        self.has_batch_norm = any(isinstance(m, _BatchNorm) for m in self.modules())

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images (B, 3, H, W) as pooled features (B, width) and tokens (B, P, width)."""
        module: Any = self.trunk
        if self._timm:
            features = module.trunk.forward_features(images)
            return module.head(module.trunk.forward_head(features)), grid_tokens(module.trunk, features)
        out = module(images)
        if not self.gives_tokens:
            return out, out.unsqueeze(1)
        return out if isinstance(out, tuple) else (out.pooler_output, out.last_hidden_state)


class WrappedTextTower(SelfContained, AnyTextTower):
    """A text module of open_clip or transformers, with what follows its pooling as `text_projection`."""

    def __init__(self, module: Any, tokenizer: WrappedTokenizer, stored: WrappedModel) -> None:
        super().__init__()
        kind = stored.kinds[1]
        self.trunk, self.stored = module, stored.to_tensor()
        self.padding, self.end, self.context = tokenizer.padding, tokenizer.end, tokenizer.context
        self._masks_padding, self._siglip = kind == "hf", kind == "siglip"
        # With the pooler output of the encoder open_clip omits the first token state.
        self.gives_tokens = not (self._masks_padding and hasattr(module.pooler, "use_pooler_output"))
        name = "proj" if self._masks_padding else "head" if self._siglip else "text_projection"
        self.text_projection, self.projection = _taken(module, name)
        config = module.config if self._masks_padding or self._siglip else None
        self.width = int(module.width if config is None else getattr(config, "hidden_size", None) or config.d_model)
        if config is not None and self._masks_padding:
            if config.pad_token_id != self.padding:
                raise UserError(f"The tokenizer pads with {self.padding}, the text encoder with {config.pad_token_id}.")
            check_context(config.to_dict(), self.context)

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode token ids (B, L), padded on the right."""
        module: Any = self.trunk
        length, end = tokens.shape[1], (tokens == self.end).long().argmax(dim=1)
        if not self._masks_padding:  # these modules see padding, or have a mask of one size
            tokens = F.pad(tokens, (0, self.context - length), value=self.padding)
        if self._siglip:
            out = module(input_ids=tokens)
            pooled, states = out.pooler_output, out.last_hidden_state
        else:
            pooled, states = module(tokens)
        return pooled, states[:, :length], end + 1

    def language_head(self) -> nn.Module:
        """Refuse a masked-language head: the vocabulary has no mask that the tower knows."""
        raise UserError(
            "This text tower has no mask token. Leave out losses that predict masked words, and views.text.mask."
        )


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
