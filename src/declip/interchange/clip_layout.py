"""CLIP's towers as OpenAI's code and open_clip name and size them: what of ours has that form, under what names.

Names are of tensors of a `DualEncoder`. The tables are read in both directions.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from timm.layers import AttentionPool2d, QuickGELU
from timm.models.byobnet import ByobNet
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from declip.models import text_tower as ours
from declip.models.image_tower import ImageTower
from declip.models.text_tower import TextTower


def _table(*pairs: tuple[str, str]) -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


VIT_NAMES = _table(
    (r"^trunk\.cls_token$", "class_embedding"),
    (r"^trunk\.pos_embed$", "positional_embedding"),
    (r"^trunk\.patch_embed\.proj\.weight$", "conv1.weight"),
    (r"^trunk\.norm_pre\.", "ln_pre."),
    (r"^norm\.", "ln_post."),
    (r"^proj\.weight$", "proj"),
    (r"^trunk\.blocks\.", "transformer.resblocks."),
    (r"(resblocks\.\d+)\.norm([12])\.", r"\1.ln_\2."),
    (r"(resblocks\.\d+\.attn)\.qkv\.", r"\1.in_proj_"),
    (r"(resblocks\.\d+\.attn)\.proj\.", r"\1.out_proj."),
    (r"(resblocks\.\d+\.mlp)\.fc1\.", r"\1.c_fc."),
    (r"(resblocks\.\d+\.mlp)\.fc2\.", r"\1.c_proj."),
)
RESNET_NAMES = _table(
    (r"^proj\.", "attnpool.c_proj."),
    (r"^trunk\.head\.([qkv])\.", r"attnpool.\1_proj."),
    (r"^trunk\.head\.pos_embed$", "attnpool.positional_embedding"),
    (r"^trunk\.stem\.conv(\d)\.conv\.", r"conv\1."),
    (r"^trunk\.stem\.conv(\d)\.bn\.", r"bn\1."),
    *((rf"^trunk\.stages\.{stage}\.", f"layer{stage + 1}.") for stage in range(4)),
    (r"(layer\d\.\d+)\.shortcut\.conv\.conv\.", r"\1.downsample.0."),
    (r"(layer\d\.\d+)\.shortcut\.conv\.bn\.", r"\1.downsample.1."),
    (r"(layer\d\.\d+)\.conv([13])_1x1\.(conv|bn)\.", r"\1.\3\2."),
    (r"(layer\d\.\d+)\.conv2_kxk\.(conv|bn)\.", r"\1.\g<2>2."),
)


@dataclass(frozen=True)
class VitSizes:
    """CLIP's vision transformer: a class token, norms before and after the blocks, a projection without bias.

    Attributes:
        width, layers, heads, patch: As in CLIP; patch in pixels.
        hidden: Width between the two layers of a block's feed-forward part.
        activation: "quick_gelu" or "gelu".
        eps: Of every layer norm.
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
    """CLIP's ResNet: a stem of three convolutions, bottlenecks, a pool by attention.

    Attributes:
        width: Channels of the stem; the pooled feature has 32 times as many.
        layers: Bottlenecks of each of the four stages.
        heads: Of the attention pool.
    """

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
    renamed = {clip_name(name, VIT_NAMES) for name in tower.state_dict()}
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
    state = {clip_name(name, RESNET_NAMES): tensor for name, tensor in tower.state_dict().items()}
    if left := sorted(name for name in state if name.startswith("trunk.")):
        return f"it has other tensors than CLIP's: {left[0]}"
    if len(layers) != 4 or len(state["conv3.weight"]) != width or len(state["layer1.0.conv1.weight"]) != width:
        return "its stages have other widths than CLIP's"
    return ResnetSizes(width, layers, trunk.head.num_heads)


def clip_name(name: str, table: Iterable[tuple[re.Pattern[str], str]]) -> str:
    """CLIP's name of a tensor of an image tower, without "visual."; a name that is not CLIP's stays as it is."""
    for pattern, replacement in table:
        name = pattern.sub(replacement, name)
    return name


def text_activation(tower: TextTower) -> str:
    """ "quick_gelu" or "gelu"."""
    block = tower.transformer.resblocks[0]
    assert isinstance(block, ours.Block)
    return "quick_gelu" if isinstance(block.mlp.gelu, ours.QuickGELU) else "gelu"


def text_sizes(tower: TextTower) -> Mapping[str, Any]:
    """Its width, layers, heads and context, by these names."""
    block = tower.transformer.resblocks[0]
    assert isinstance(block, ours.Block)
    return {
        "width": tower.width,
        "layers": len(tower.transformer.resblocks),
        "heads": block.attn.heads,
        "context": tower.context,
    }


def without_mask(tower: TextTower) -> Tensor:
    """The token embeddings (vocabulary - 1, width) without the last row: `<|mask|>`, which only training reads."""
    return tower.token_embedding.weight.detach()[:-1]


def _vit_names(layers: int) -> set[str]:
    norms = [f"{norm}.{part}" for norm in ("ln_pre", "ln_post") for part in ("weight", "bias")]
    parts = ("ln_1.", "ln_2.", "attn.in_proj_", "attn.out_proj.", "mlp.c_fc.", "mlp.c_proj.")
    blocks = [
        f"transformer.resblocks.{layer}.{name}{part}"
        for layer in range(layers)
        for name in parts
        for part in ("weight", "bias")
    ]
    return {"class_embedding", "positional_embedding", "conv1.weight", "proj", *norms, *blocks}


def _activation(module: nn.Module) -> str | None:
    if isinstance(module, QuickGELU):
        return "quick_gelu"
    exact = isinstance(module, nn.GELU) and getattr(module, "approximate", "none") == "none"
    return "gelu" if exact else None
