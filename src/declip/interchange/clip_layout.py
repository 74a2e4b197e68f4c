"""CLIP's towers as OpenAI's code and open_clip name and size them.

Names are of tensors of a `DualEncoder`. The tables are read in both directions.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from timm.layers import AttentionPool2d, QuickGELU
from timm.models.byobnet import ByobNet
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from declip.models import text_tower as ours
from declip.models.image_tower import ImageTower
from declip.models.text_tower import TextTower

CLIP_MERGES, NO_MERGES = 48_894, 514
"""Ids of CLIP's whole vocabulary that are merges, and those that are none: bytes inside and at the end of a word,
start, end."""

Names = Sequence[tuple[str, str]]
"""Pairs of the same name in two layouts, whole or its start; # is a number."""

VIT_NAMES: Names = (
    ("trunk.cls_token", "class_embedding"),
    ("trunk.pos_embed", "positional_embedding"),
    ("trunk.patch_embed.proj.weight", "conv1.weight"),
    ("trunk.norm_pre.", "ln_pre."),
    ("norm.", "ln_post."),
    ("proj.weight", "proj"),
    ("trunk.blocks.#.norm1.", "transformer.resblocks.#.ln_1."),
    ("trunk.blocks.#.norm2.", "transformer.resblocks.#.ln_2."),
    ("trunk.blocks.#.attn.qkv.", "transformer.resblocks.#.attn.in_proj_"),
    ("trunk.blocks.#.attn.proj.", "transformer.resblocks.#.attn.out_proj."),
    ("trunk.blocks.#.mlp.fc1.", "transformer.resblocks.#.mlp.c_fc."),
    ("trunk.blocks.#.mlp.fc2.", "transformer.resblocks.#.mlp.c_proj."),
)
RESNET_NAMES: Names = (
    ("proj.", "attnpool.c_proj."),
    ("trunk.head.pos_embed", "attnpool.positional_embedding"),
    *((f"trunk.head.{part}.", f"attnpool.{part}_proj.") for part in "qkv"),
    *((f"trunk.stem.conv{layer}.{part}.", f"{part}{layer}.") for layer in "123" for part in ("conv", "bn")),
    *(
        (f"trunk.stages.{stage}.#.{ours}.", f"layer{stage + 1}.#.{theirs}.")
        for stage in range(4)
        for ours, theirs in (
            ("shortcut.conv.conv", "downsample.0"),
            ("shortcut.conv.bn", "downsample.1"),
            ("conv1_1x1.conv", "conv1"),
            ("conv1_1x1.bn", "bn1"),
            ("conv2_kxk.conv", "conv2"),
            ("conv2_kxk.bn", "bn2"),
            ("conv3_1x1.conv", "conv3"),
            ("conv3_1x1.bn", "bn3"),
        )
    ),
)
"""Our names in an image tower, and CLIP's without "visual."."""


@dataclass(frozen=True)
class VitSizes:
    """CLIP's vision transformer: a class token, norms before and after the blocks, a projection without bias.

    Attributes:
        patch: Side of a patch in pixels.
        hidden: Width between the two layers of a block's feed-forward part.
        activation: "quick_gelu" or "gelu".
        eps: Epsilon of every layer norm.
    """

    width: int
    layers: int
    heads: int
    patch: int
    hidden: int
    activation: str
    eps: float


@dataclass(frozen=True)
class ResnetSizes:
    """CLIP's ResNet: a stem of `width` channels, `layers` bottlenecks by stage, a pool by attention of 32 · width."""

    width: int
    layers: tuple[int, ...]
    heads: int


def vit_sizes(tower: ImageTower) -> VitSizes | str:
    """The sizes of a tower that is CLIP's ViT, else the reason why it is not."""
    trunk = tower.trunk
    if type(trunk) is not VisionTransformer:
        return f"it is a {type(trunk).__name__}"
    blocks: list[Any] = list(trunk.blocks)
    if any(type(block) is not Block for block in blocks):
        return f"its blocks are of the kind {type(blocks[0]).__name__}"
    if trunk.global_pool != "token" or trunk.num_prefix_tokens != 1 or trunk.no_embed_class:
        return "it does not pool at a class token"
    if not isinstance(trunk.norm_pre, nn.LayerNorm):
        return "it has no norm before its blocks"
    renamed = {rename(name, VIT_NAMES) for name in tower.state_dict()}
    if extra := renamed ^ _vit_names(len(blocks)):
        return f"it has other tensors than CLIP's: {sorted(extra)[0]}"
    activations = {_activation(block.mlp.act) for block in blocks}
    eps = {norm.eps for norm in tower.modules() if isinstance(norm, nn.LayerNorm)}
    patch = set(trunk.patch_embed.patch_size)
    if len(activations) > 1 or None in activations or len(eps) > 1 or len(patch) > 1:
        return "its activation, norms or patches are none of CLIP's"
    return VitSizes(
        width=trunk.embed_dim,
        layers=len(blocks),
        heads=blocks[0].attn.num_heads,
        patch=patch.pop(),
        hidden=blocks[0].mlp.fc1.out_features,
        activation=str(activations.pop()),
        eps=eps.pop(),
    )


def resnet_sizes(tower: ImageTower) -> ResnetSizes | str:
    """The sizes of a tower that is CLIP's ResNet, else the reason why it is not."""
    trunk = tower.trunk
    if type(trunk) is not ByobNet or not isinstance(trunk.head, AttentionPool2d):
        return f"it is a {type(trunk).__name__} without an attention pool"
    layers = tuple(len(stage) for stage in trunk.stages)
    width = trunk.head.embed_dim // 32
    state = {rename(name, RESNET_NAMES): tensor for name, tensor in tower.state_dict().items()}
    if left := sorted(name for name in state if name.startswith("trunk.")):
        return f"it has other tensors than CLIP's: {left[0]}"
    if len(layers) != 4 or len(state["conv3.weight"]) != width or len(state["layer1.0.conv1.weight"]) != width:
        return "its stages have other widths than CLIP's"
    return ResnetSizes(width, layers, trunk.head.num_heads)


def rename(name: str, table: Names, back: bool = False) -> str:
    """Translate a tensor's name by the first pair that begins like it, `back` from right to left; else leave it."""
    for left, right in table:
        old, new = (right, left) if back else (left, right)
        end = "" if old[-1] in "._" else "$"
        if match := re.match(re.escape(old).replace(r"\#", r"(\d+)") + end, name):
            return new.replace("#", match[1] if match.groups() else "") + name[match.end() :]
    return name


def merges_key(vocabulary: int) -> int | None:
    """The recipe's `text.bpe_merges` of a vocabulary with so many ids, mask not counted; None for CLIP's whole one."""
    return None if vocabulary == NO_MERGES + CLIP_MERGES else vocabulary - NO_MERGES


def vit_keys(sizes: VitSizes) -> dict[str, Any]:
    """The recipe's keys of CLIP's vision transformer, all but the image's size."""
    ratio = sizes.hidden / sizes.width
    if int(sizes.width * ratio) != sizes.hidden:  # timm rounds down
        ratio = (sizes.hidden + 0.5) / sizes.width
    quick = "quickgelu_" if sizes.activation == "quick_gelu" else ""
    options = {
        "patch_size": sizes.patch,
        "embed_dim": sizes.width,
        "depth": sizes.layers,
        "num_heads": sizes.heads,
        "mlp_ratio": ratio,
    }
    return {"image.model": f"vit_base_patch32_clip_{quick}224", "image.model_kwargs": options}


def text_sizes(tower: TextTower) -> Mapping[str, Any]:
    """A text tower's width, layers, heads, context and activation, by these names."""
    block = tower.transformer.resblocks[0]
    assert isinstance(block, ours.TextBlock)
    return {
        "width": tower.width,
        "layers": len(tower.transformer.resblocks),
        "heads": block.attn.heads,
        "context": tower.context,
        "activation": "quick_gelu" if isinstance(block.mlp.gelu, ours.QuickGELU) else "gelu",
    }


def without_mask(tower: TextTower) -> Tensor:
    """The token embeddings (vocabulary - 1, width) without the last row: `<|mask|>`, which only training reads."""
    return tower.token_embedding.weight.detach()[:-1]


def _vit_names(layers: int) -> set[str]:
    """The names of all tensors of a CLIP ViT: a name of the table that ends open stands for a weight and a bias."""
    names = [name.replace("#", str(layer)) for _, name in VIT_NAMES for layer in range(layers if "#" in name else 1)]
    return {name + part for name in names for part in (("weight", "bias") if name[-1] in "._" else ("",))}


def _activation(module: nn.Module) -> str | None:
    if isinstance(module, QuickGELU):
        return "quick_gelu"
    exact = isinstance(module, nn.GELU) and getattr(module, "approximate", "none") == "none"
    return "gelu" if exact else None
