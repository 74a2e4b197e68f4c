"""SigLIP with transformers' own towers (Zhai et al. 2023, arXiv 2303.15343), and SigLIP 2 for one image size.

Parameters keep the names that they have there. Only sizes of a configuration are read, no code and no addresses.
"""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from declip.data.text.tokenizer import WrappedTokenizer
from declip.errors import UserError, check_installed
from declip.models.hf_encoder import quiet_transformers
from declip.models.image_tower import ImageTower
from declip.models.wrapped import LibraryTextTower, WrappedModel

MODEL_TYPE = "siglip"
IMPOSSIBLE = "A SigLIP of these sizes cannot be built"
TEXT_SECTION = "text_config"
IMAGE_SECTION = "vision_config"

COMMON = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("hidden_act", "layer_norm_eps", "attention_dropout"),
)
SIZES: Mapping[str, tuple[str, ...]] = {
    TEXT_SECTION: (*COMMON, "vocab_size", "max_position_embeddings", "projection_size"),
    IMAGE_SECTION: (*COMMON, "image_size", "patch_size"),
}
"""Section of a configuration → its keys that are read."""


def configuration(config: Mapping[str, Any]) -> Any:
    """transformers' `SiglipConfig`, with defaults for sizes that `config` lacks."""
    check_installed("transformers", "hf", "A SigLIP of transformers")
    sizes = {}
    for section, keys in SIZES.items():
        given = config.get(section) or {}
        sizes[section] = {key: given[key] for key in keys if key in given}
    with quiet_transformers(IMPOSSIBLE) as library:
        return library.SiglipConfig(**sizes)


class WrappedSiglip(WrappedModel):
    """A SigLIP of transformers without its weights."""

    def _config_for(self, length: int) -> dict[str, Any]:
        text = {**self.config[TEXT_SECTION], "max_position_embeddings": length}
        return {**self.config, TEXT_SECTION: text}

    def build(self, size: int) -> tuple[nn.Module, nn.Module]:
        """Build transformers' image and text modules for an image size, with random weights."""
        image = {**self.config[IMAGE_SECTION], "image_size": size}
        built = configuration({**self.config, IMAGE_SECTION: image})
        with quiet_transformers(IMPOSSIBLE) as library:
            model = library.SiglipModel(built)
        return model.vision_model, model.text_model

    def towers(
        self, modules: tuple[nn.Module, nn.Module], tokenizer: WrappedTokenizer
    ) -> "tuple[SiglipImageTower, SiglipTextTower]":
        """Make towers of the modules, which are changed."""
        image, text = modules
        return SiglipImageTower(image), SiglipTextTower(text, tokenizer, self)


class SiglipImageTower(ImageTower):
    """transformers' `SiglipVisionModel`; its pooled feature is the embedding, so `proj` is the identity."""

    timm_prefix = None

    def __init__(self, module: Any) -> None:
        nn.Module.__init__(self)
        self.trunk = module
        self.proj = nn.Identity()
        self.token_width = int(module.config.hidden_size)
        self.pre_logits_width = self.token_width
        self.has_batch_norm = False

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images (B, 3, H, W) as pooled features (B, width) and tokens (B, P, width)."""
        out = self.trunk(pixel_values=images)
        return out.pooler_output, out.last_hidden_state


class SiglipTextTower(LibraryTextTower):
    """transformers' `SiglipTextModel`, with its head as `text_projection`."""

    def __init__(self, module: Any, tokenizer: WrappedTokenizer, stored: WrappedSiglip) -> None:
        super().__init__()
        ids = tokenizer.vocabulary
        rows = module.config.vocab_size
        if ids > rows:
            raise UserError(
                f"The tokenizer has {ids:,} ids, but {TEXT_SECTION}.vocab_size is {rows:,}. Put the "
                "model's own tokenizer.json beside its weights."
            )
        self.wrapped = stored
        self.stored = stored.to_tensor()
        self.padding = tokenizer.padding
        self.end = tokenizer.end
        self.context = tokenizer.context
        self.width = int(module.config.hidden_size)
        self.text_projection = module.head
        module.head = nn.Identity()
        self.trunk = module

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode token ids (B, L), padded on the right; padding is seen, and the last state is pooled."""
        length = tokens.shape[1]
        end = (tokens == self.end).long().argmax(dim=1)
        padded = F.pad(tokens, (0, self.context - length), value=self.padding)
        out = self.trunk(input_ids=padded)
        return out.pooler_output, out.last_hidden_state[:, :length], end + 1
