"""Models whose towers are another library's own modules, with their configuration kept with the weights.

Parameters keep the names that they have there. No code from a configuration is run, and no file or address in it is
opened.
"""

import json
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip.data.text.tokenizer import WrappedTokenizer
from declip.errors import UserError, check_installed
from declip.models.hf_encoder import check_context
from declip.models.image_tower import BatchNorm, ImageTower, grid_tokens
from declip.models.tensor_names import named_below
from declip.models.text_tower import AnyTextTower, SelfContained


@dataclass(frozen=True)
class WrappedModel(ABC):
    """A model of another library without its weights."""

    config: Mapping[str, Any]  # of the library; open_clip's "model_cfg"
    image: Mapping[str, Any]  # "squash": arguments of `Preprocess`
    tokenizer: Mapping[str, Any]  # arguments of `WrappedTokenizer`
    # Configuration of a Hugging Face text encoder inside open_clip's model
    encoder: Mapping[str, Any] | None = None

    def to_tensor(self) -> Tensor:
        """All of it as bytes of JSON, (n,) uint8."""
        content = json.dumps(asdict(self)).encode()
        return torch.frombuffer(bytearray(content), dtype=torch.uint8)

    def with_context(self, length: int) -> Self:
        """Give the same model for captions of another length in tokens."""
        if length == self.tokenizer["context"]:
            return self
        tokenizer = {**self.tokenizer, "context": length}
        return replace(self, config=self._config_for(length), tokenizer=tokenizer)

    @abstractmethod
    def _config_for(self, length: int) -> dict[str, Any]:
        """The configuration for captions of another length in tokens."""

    @abstractmethod
    def build(self, size: int) -> tuple[nn.Module, nn.Module]:
        """Build the library's image and text modules for an image size, with random weights."""

    @abstractmethod
    def towers(
        self, modules: tuple[nn.Module, nn.Module], tokenizer: WrappedTokenizer
    ) -> tuple[ImageTower, AnyTextTower]:
        """Make towers of the modules, which are changed."""


class WrappedOpenClip(WrappedModel):
    """A model of open_clip without its weights."""

    def _config_for(self, length: int) -> dict[str, Any]:
        return {**self.config, "text_cfg": {**self.config["text_cfg"], "context_length": length}}

    def build(self, size: int) -> tuple[nn.Module, nn.Module]:
        """Build open_clip's image and text modules for an image size, with random weights."""
        check_installed("open_clip", "open_clip", "This model")
        import timm
        from open_clip import CustomTextCLIP

        config = deepcopy(dict(self.config))
        vision = config["vision_cfg"]
        text = config["text_cfg"]
        name = vision.get("timm_model_name")
        if name is not None and (":" in name or not timm.is_model(name)):
            raise UserError(
                f"The configuration names '{name}', which is not a model of timm {timm.__version__}."
            )
        native = vision.get("image_size")
        text.pop("hf_model_name", None)  # it would be looked up, here or on the Hub
        if name:
            vision["timm_model_pretrained"] = False
        else:
            vision["image_size"] = size
        with tempfile.TemporaryDirectory() as folder:
            if self.encoder is not None:
                (Path(folder) / "config.json").write_text(
                    json.dumps(plain(self.encoder)), encoding="utf-8"
                )
                text |= {"hf_model_name": folder, "hf_model_pretrained": False}
            model: Any = CustomTextCLIP(
                config["embed_dim"], vision, text, bool(config.get("quick_gelu"))
            )
        if name and size != native:
            model.visual.set_input_size(size)
        for tower in (model.visual, model.text):
            if hasattr(tower, "output_tokens"):
                tower.output_tokens = True
        return model.visual, model.text

    def towers(
        self, modules: tuple[nn.Module, nn.Module], tokenizer: WrappedTokenizer
    ) -> "tuple[WrappedImageTower, WrappedTextTower]":
        """Make towers of the modules, which are changed."""
        image, text = modules
        return (
            WrappedImageTower(image, self.config["embed_dim"]),
            WrappedTextTower(text, tokenizer, self),
        )


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers, texts and sections of a configuration, without the keys by which transformers reads files or code."""
    kept = bool | int | float | str | list | Mapping | None
    left_out = "_|auto_map|quantization_config|.*attn_implementation"
    return {
        name: plain(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if isinstance(name, str) and isinstance(value, kept) and not re.match(left_out, name)
    }


class WrappedImageTower(ImageTower):
    """An image module of open_clip (timm, ViT, ResNet) with its last linear map as `proj`.

    Without such a map, as in SigLIP, `proj` is the identity, unless a fit put a linear map in its place, and the
    features before it are the embedding.
    """

    def __init__(self, module: Any, embed_dim: int) -> None:
        nn.Module.__init__(self)
        name = "proj"
        self.trunk = module
        self.is_timm = hasattr(module, "trunk")
        self.timm_prefix = None
        if self.is_timm:
            self.timm_prefix = "trunk.trunk."
        self.gives_tokens = not hasattr(module, "attnpool")  # one token per patch, unlike a ResNet
        if self.is_timm and not hasattr(module.head, "pool"):
            classifier = module.trunk.get_classifier()
            if len(module.head):
                name = "head"
            elif isinstance(classifier, nn.Linear):
                name = next(name for name, part in module.named_modules() if part is classifier)
            else:
                name = "head.proj"  # where open_clip has the map of timm_proj=linear
        self.proj, self.projection = _detach_projection(module, name)
        linear = [part for part in self.proj.modules() if isinstance(part, nn.Linear)]
        self.pre_logits_width = linear[0].in_features if linear else embed_dim
        self.token_width = self.pre_logits_width
        if self.gives_tokens:
            self.token_width = int(
                module.trunk.num_features if self.is_timm else module.ln_post.normalized_shape[0]
            )
        self.has_batch_norm = any(isinstance(m, BatchNorm) for m in self.modules())

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images (B, 3, H, W) as pooled features (B, width) and tokens (B, P, width)."""
        if self.is_timm:
            trunk = self.trunk.trunk
            features = trunk.forward_features(images)
            pooled = self.trunk.head(trunk.forward_head(features))
            return pooled, grid_tokens(trunk, features)
        out: Any = self.trunk(images)
        if self.gives_tokens:
            return out
        return out, out.unsqueeze(1)


class LibraryTextTower(SelfContained, AnyTextTower):
    """A text module of another library."""

    def language_head(self) -> nn.Module:
        """Refuse a masked-language head: the vocabulary has no mask that the tower knows."""
        raise UserError(
            "This text tower has no mask token. Leave out masked_language and views.text.mask."
        )


class WrappedTextTower(LibraryTextTower):
    """A text module of open_clip, with what follows its pooling as `text_projection`."""

    def __init__(self, module: Any, tokenizer: WrappedTokenizer, stored: WrappedOpenClip) -> None:
        super().__init__()
        self.trunk = module
        self.wrapped = stored
        self.stored = stored.to_tensor()
        self.padding = tokenizer.padding
        self.end = tokenizer.end
        self.context = tokenizer.context
        self._masks_padding = hasattr(module, "pooler")  # an encoder of Hugging Face
        # With the pooler output of the encoder open_clip omits the first token state.
        self.gives_tokens = not (
            self._masks_padding and hasattr(module.pooler, "use_pooler_output")
        )
        self.text_projection, self.projection = _detach_projection(
            module, "proj" if self._masks_padding else "text_projection"
        )
        config = None
        if self._masks_padding:
            config = module.config
        if config is None:
            self.width = int(module.width)
        else:
            self.width = int(getattr(config, "hidden_size", None) or config.d_model)
            if config.pad_token_id != self.padding:
                raise UserError(
                    f"The tokenizer pads with {self.padding}, the text encoder with {config.pad_token_id}."
                )
            check_context(config.to_dict(), self.context)

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode token ids (B, L), padded on the right."""
        length = tokens.shape[1]
        end = (tokens == self.end).long().argmax(dim=1)
        if not self._masks_padding:  # these modules see padding, or have a mask of one size
            tokens = F.pad(tokens, (0, self.context - length), value=self.padding)
        pooled, states = self.trunk(tokens)
        return pooled, states[:, :length], end + 1


def library_state(
    tower: WrappedImageTower | WrappedTextTower, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Name a tower's tensors as the library does: of the projection too, where that is a bare matrix transposed."""
    projection, bare = tower.projection
    named = named_below("trunk.", state)
    for name, tensor in state.items():
        head, _, rest = name.partition(".")
        if head not in ("proj", "text_projection"):
            continue
        if bare:
            named[projection] = tensor.mT
        else:
            named[f"{projection}.{rest}"] = tensor
    return named


def _detach_projection(module: Any, name: str) -> tuple[nn.Module, tuple[str, bool]]:
    """Take a projection out of a module: the projection, its name, and whether it was a bare matrix."""
    parent, _, last = name.rpartition(".")
    owner = module.get_submodule(parent)
    projection = getattr(owner, last, None)
    if isinstance(projection, nn.Parameter):
        inputs, outputs = projection.shape
        linear = nn.Linear(inputs, outputs, bias=False, device="meta")
        linear.weight = nn.Parameter(projection.detach().mT.contiguous())
        setattr(owner, last, None)
        return linear, (name, True)
    if projection is None or not any(True for _ in projection.parameters()):
        return nn.Identity(), (name, False)
    # open_clip multiplies by what is there
    setattr(owner, last, None if last == "text_projection" else nn.Identity())
    return projection, (name, False)
