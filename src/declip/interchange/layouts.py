"""Other libraries' names and shapes of tensors, one table per library for both directions."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from declip.errors import UserError
from declip.interchange.format import Refusal
from declip.interchange.weights import Weights, empty, first_difference
from declip.io.progress import quiet
from declip.models.dual_encoder import DualEncoder, Towers
from declip.models.image_tower import ImageTower
from declip.models.text_tower import TextTower
from declip.recipe.schema import Recipe

TO_CLIP_VIT = "train with image.model=vit_base_patch32_clip_quickgelu_224"

CLIP_MERGES, NO_MERGES = 48_894, 514
"""Number of merges in CLIP's complete vocabulary, and of other ids: bytes in and at the end of words, start, end."""

EMBEDDING = "text_tower.token_embedding.weight"
CLASS_TOKEN, GRID = "visual.class_embedding", "visual.attnpool.positional_embedding"
"""One of these distinguishes CLIP's ViT and CLIP's ResNet from any other image network."""

Names = tuple[tuple[str, str], ...]
"""Pairs of our name or prefix and that of another library; the first match counts. # is a number; ? stands for q, k and
v, which are three tensors there and one here."""


def refuse_one_tower(model: DualEncoder) -> None:
    """Raise a `Refusal` of an image tower alone."""
    if not model.has_text:
        raise Refusal("it has no text tower; export a model with both towers")


def clip_text_tower(model: DualEncoder) -> TextTower:
    """Return the text tower if it is CLIP's, or raise a `Refusal`."""
    refuse_one_tower(model)
    if not isinstance(model.text_tower, TextTower):
        kind = type(model.text_tower).__name__
        raise Refusal(
            f"its text tower is a {kind}, not CLIP's, which is the one of a recipe without text.hf_model"
        )
    return model.text_tower


@dataclass(frozen=True)
class TensorLayout:
    """Layout of a `DualEncoder` in another library; layouts of two towers can be added."""

    names: Names
    # Our name → change from ours
    shapes: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    # Whether their vocabulary has <|mask|>, our last row; if not, the mean row is read
    mask: bool = False

    def __add__(self, other: "TensorLayout") -> "TensorLayout":
        return TensorLayout(
            self.names + other.names, {**self.shapes, **other.shapes}, self.mask or other.mask
        )

    def write(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert a model's tensors to the layout."""
        written: dict[str, Tensor] = {}
        for name, tensor in state.items():
            if name in self.shapes:
                tensor = self.shapes[name](tensor)
            if name == EMBEDDING and not self.mask:
                tensor = tensor[:-1]
            theirs = self._theirs(name)
            parts = tensor.chunk(len(theirs)) if len(theirs) > 1 else (tensor,)
            written |= zip(theirs, parts, strict=True)
        return written

    def read(
        self, tensors: Mapping[str, Tensor], outline: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Convert tensors from the layout; `outline` has our names and shapes."""
        if difference := first_difference(self.write(outline), tensors):
            raise UserError(f"its weights do not match its configuration: {difference}")
        ours = {}
        for name, expected in outline.items():
            # q, k and v are one tensor here.
            parts = [tensors[their].to(expected.dtype) for their in self._theirs(name)]
            if name == EMBEDDING and not self.mask:
                parts.append(parts[0].mean(dim=0, keepdim=True))
            tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
            is_transposed = self.shapes.get(name) is torch.t
            ours[name] = tensor.T if is_transposed else tensor.reshape(expected.shape)
        return ours

    def _theirs(self, name: str) -> list[str]:
        """Names of a tensor, or of its parts for q, k and v."""
        renamed = rename(name, self.names)
        if "?" in renamed:
            return [renamed.replace("?", part) for part in "qkv"]
        return [renamed]


def rename(name: str, table: Names, back: bool = False) -> str:
    """Translate a tensor's name by a table, from right to left with `back`; unknown names are unchanged."""
    for left, right in table:
        old, new = (right, left) if back else (left, right)
        pattern = re.escape(old).replace(r"\#", r"(\d+)")
        if old[-1] not in "._":
            pattern += "$"
        match = re.match(pattern, name)
        if match is None:
            continue
        number = match[1] if match.groups() else ""
        return new.replace("#", number) + name[match.end() :]
    return name


def from_layout(
    recipe: Recipe,
    layout: TensorLayout,
    tensors: Mapping[str, Tensor],
    origin: str,
    towers: Towers = "both",
) -> Weights:
    """Convert another library's tensors to weights of a recipe."""
    # The sizes may be a stranger's: they are compared before memory is allocated
    with torch.device("meta"):
        outline = empty(recipe, towers=towers).state_dict()
    return Weights(recipe, layout.read(tensors, outline), origin)


BLOCK = (
    ("norm1.", "ln_1.", "layer_norm1."),
    ("norm2.", "ln_2.", "layer_norm2."),
    ("attn.qkv.", "attn.in_proj_", "self_attn.?_proj."),
    ("attn.proj.", "attn.out_proj.", "self_attn.out_proj."),
    ("mlp.fc1.", "mlp.c_fc.", "mlp.fc1."),
    ("mlp.fc2.", "mlp.c_proj.", "mlp.fc2."),
)
"""Names within a transformer block of timm, CLIP and transformers."""

RESNET_BLOCK = (
    ("shortcut.conv.conv", "downsample.0"),
    ("shortcut.conv.bn", "downsample.1"),
    ("conv1_1x1.conv", "conv1"),
    ("conv1_1x1.bn", "bn1"),
    ("conv2_kxk.conv", "conv2"),
    ("conv2_kxk.bn", "bn2"),
    ("conv3_1x1.conv", "conv3"),
    ("conv3_1x1.bn", "bn3"),
)
"""Names within a bottleneck of timm and CLIP."""


def _blocks(ours: str, theirs: str, our_column: int, column: int) -> Names:
    """Names in the blocks of two libraries, by their columns in `BLOCK`."""
    return tuple((f"{ours}.#.{row[our_column]}", f"{theirs}.#.{row[column]}") for row in BLOCK)


def _resnet_blocks() -> Names:
    """Names in the stem and the stages of a ResNet of timm and of CLIP."""
    names = []
    for number in "123":
        for part in ("conv", "bn"):
            names.append((f"stem.conv{number}.{part}.", f"visual.{part}{number}."))
    for stage in range(4):
        for ours, theirs in RESNET_BLOCK:
            names.append((f"stages.{stage}.#.{ours}.", f"visual.layer{stage + 1}.#.{theirs}."))
    return tuple((f"image_tower.trunk.{ours}", theirs) for ours, theirs in names)


_VIT_SHAPES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "image_tower.trunk.cls_token": torch.flatten,
    "image_tower.trunk.pos_embed": lambda embedding: embedding[0],
}
CLIP_VIT = TensorLayout(
    (
        ("image_tower.trunk.cls_token", "visual.class_embedding"),
        ("image_tower.trunk.pos_embed", "visual.positional_embedding"),
        ("image_tower.trunk.patch_embed.proj.weight", "visual.conv1.weight"),
        ("image_tower.trunk.norm_pre.", "visual.ln_pre."),
        ("image_tower.norm.", "visual.ln_post."),
        ("image_tower.proj.weight", "visual.proj"),
        *_blocks("image_tower.trunk.blocks", "visual.transformer.resblocks", 0, 1),
    ),
    {**_VIT_SHAPES, "image_tower.proj.weight": torch.t},
)
CLIP_RESNET = TensorLayout(
    (
        ("image_tower.proj.", "visual.attnpool.c_proj."),
        ("image_tower.trunk.head.pos_embed", "visual.attnpool.positional_embedding"),
        *((f"image_tower.trunk.head.{part}.", f"visual.attnpool.{part}_proj.") for part in "qkv"),
        *_resnet_blocks(),
    )
)
TIMM = TensorLayout(
    (
        ("image_tower.proj.", "visual.head.proj."),
        ("image_tower.norm.", "visual.trunk.norm."),
        ("image_tower.trunk.", "visual.trunk."),
    )
)
"""Image towers of OpenAI's code and open_clip; open_clip wraps other timm models."""

CLIP_TEXT = TensorLayout(
    (("text_tower.text_projection.weight", "text_projection"), ("text_tower.", "")),
    {"text_tower.text_projection.weight": torch.t},
)
CLIP_TEXT_WITH_BIAS = TensorLayout((("text_tower.", ""),))
TRANSFORMERS_TEXT = TensorLayout(
    (("text_tower.encoder.", "text.transformer."), ("text_tower.text_projection.", "text.proj."))
)
"""Text towers of open_clip."""

TRANSFORMERS = TensorLayout(
    (
        ("image_tower.proj.", "visual_projection."),
        ("image_tower.trunk.cls_token", "vision_model.embeddings.class_embedding"),
        ("image_tower.trunk.pos_embed", "vision_model.embeddings.position_embedding.weight"),
        ("image_tower.trunk.patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
        ("image_tower.trunk.norm_pre.", "vision_model.pre_layrnorm."),  # sic
        ("image_tower.norm.", "vision_model.post_layernorm."),
        *_blocks("image_tower.trunk.blocks", "vision_model.encoder.layers", 0, 2),
        ("text_tower.text_projection.", "text_projection."),
        ("text_tower.token_embedding.", "text_model.embeddings.token_embedding."),
        ("text_tower.positional_embedding", "text_model.embeddings.position_embedding.weight"),
        ("text_tower.ln_final.", "text_model.final_layer_norm."),
        *_blocks("text_tower.transformer.resblocks", "text_model.encoder.layers", 1, 2),
    ),
    _VIT_SHAPES,
)
"""transformers' `CLIPModel`."""

SIGLIP = TensorLayout(
    (
        ("image_tower.trunk.", "vision_model."),
        ("text_tower.text_projection.", "text_model.head."),
        ("text_tower.trunk.", "text_model."),
    ),
    {name: lambda number: number.reshape(1) for name in ("logit_scale", "logit_bias")},
)
"""transformers' `SiglipModel`."""

OFFICIAL_TEXT = TensorLayout((("text_tower.", "encode_text."),), mask=True)
"""The text tower of DeCLIP's official code, with `<|mask|>` moved to the end of its vocabulary."""


def vit_keys(
    width: int, layers: int, heads: int, patch: int, hidden: int, activation: str
) -> dict[str, Any]:
    """Recipe keys of CLIP's vision transformer; `hidden` is the width of the MLP in a block."""
    ratio = hidden / width
    if int(width * ratio) != hidden:  # timm rounds down
        ratio = (hidden + 0.5) / width
    quick = "quickgelu_" if activation == "quick_gelu" else ""
    options = {
        "patch_size": patch,
        "embed_dim": width,
        "depth": layers,
        "num_heads": heads,
        "mlp_ratio": ratio,
    }
    return {"image.model": f"vit_base_patch32_clip_{quick}224", "image.model_kwargs": options}


def activation_of(keys: Mapping[str, Any]) -> str:
    """Activation of an image tower by its recipe keys."""
    return "quick_gelu" if "quickgelu" in keys["image.model"] else "gelu"


ANOTHER_ARCHITECTURE = (
    UserError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    ArithmeticError,
)
"""What asking a tower for the parts of CLIP's raises if it has others."""


def clip_keys(tower: ImageTower) -> dict[str, Any] | None:
    """Recipe keys that build the same tower, if it is a ViT or ResNet of CLIP; otherwise None."""
    try:
        keys = _keys_by_shapes(tower)
        name = keys["image.model"]
        size = keys["image.size"]
        options = keys["image.model_kwargs"]
        with torch.device("meta"), torch.random.fork_rng(devices=[]), quiet("declip"):
            twin = ImageTower(name, size, keys["embed_dim"], options)
    except ANOTHER_ARCHITECTURE:
        return None
    same_modules = _modules(twin) == _modules(tower)
    same_tensors = not first_difference(twin.state_dict(), tower.state_dict())
    return keys if same_modules and same_tensors else None


def _keys_by_shapes(tower: ImageTower) -> dict[str, Any]:
    """Recipe keys of a ViT or ResNet of CLIP; raises if it is something else, or returns keys of another tower."""
    import timm

    trunk = tower.trunk
    state = {f"image_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
    if isinstance(trunk.head, timm.layers.AttentionPool2d):
        return image_keys(CLIP_RESNET.write(state), trunk.head.num_heads, "quick_gelu")
    block = trunk.blocks[0]
    activation = "quick_gelu" if isinstance(block.mlp.act, timm.layers.QuickGELU) else "gelu"
    return image_keys(CLIP_VIT.write(state), block.attn.num_heads, activation)


def _modules(tower: ImageTower) -> list[str]:
    """The modules of a tower as text, without dropout."""
    return [line for line in repr(tower).splitlines() if "drop" not in line]


def merges_key(vocabulary: int) -> int | None:
    """`text.bpe_merges` for a vocabulary size without the mask; None for CLIP's complete vocabulary."""
    merges = vocabulary - NO_MERGES
    return None if merges == CLIP_MERGES else merges


def image_layout(state: Mapping[str, Any]) -> TensorLayout:
    """Layout of CLIP's image tower: a ViT or a ResNet."""
    return CLIP_VIT if CLASS_TOKEN in state else CLIP_RESNET


def image_keys(
    state: Mapping[str, Tensor], heads: int | None = None, activation: str = "quick_gelu"
) -> dict[str, Any]:
    """Recipe keys of CLIP's image tower, by the shapes of its tensors.

    By default a ViT has one attention head per 64 channels, as CLIP's ResNets always have.
    """
    if CLASS_TOKEN not in state:
        return _resnet_keys(state)
    # (width, 3, patch, patch)
    width, _, _, patch = state["visual.conv1.weight"].shape
    layers = _count(state, r"visual\.transformer\.resblocks\.(\d+)\.")
    hidden = len(state["visual.transformer.resblocks.0.mlp.c_fc.weight"])
    cells = len(state["visual.positional_embedding"]) - 1
    return {
        **vit_keys(width, layers, heads or _usual_heads(width), patch, hidden, activation),
        "image.size": patch * math.isqrt(cells),
        "embed_dim": state["visual.proj"].shape[1],
    }


def _usual_heads(width: int) -> int:
    """Number of attention heads of CLIP's transformers."""
    return max(width // 64, 1)


def _resnet_keys(state: Mapping[str, Tensor]) -> dict[str, Any]:
    # (1 + cells, width)
    positions, width = state[GRID].shape
    depths = [_count(state, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)]
    return {
        "image.model": "resnet50_clip",
        "image.model_kwargs": {"depths": depths, "width_factor": width / 2048},
        "image.size": 32 * math.isqrt(positions - 1),
        "image.freeze_patch_embed": False,
        "embed_dim": len(state["visual.attnpool.c_proj.weight"]),
    }


def text_keys(
    state: Mapping[str, Tensor], start: str, heads: int | None = None, masks: int = 0
) -> dict[str, Any]:
    """Recipe keys of CLIP's text tower, by the shapes of the tensors whose names begin with `start`.

    `masks` is the number of <|mask|> ids in the vocabulary.
    """
    # (vocabulary, width)
    vocabulary, width = state[f"{start}token_embedding.weight"].shape
    return {
        "text.width": width,
        "text.layers": _count(state, rf"{re.escape(start)}transformer\.resblocks\.(\d+)\."),
        "text.heads": heads or _usual_heads(width),
        "text.context_length": len(state[f"{start}positional_embedding"]),
        "text.bpe_merges": merges_key(vocabulary - masks),
        "text.projection_bias": f"{start}text_projection.bias" in state,
    }


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Count distinct numbers that a pattern matches at the start of the names."""
    matches = [re.match(pattern, name) for name in state]
    return len({match[1] for match in matches if match})


def preprocess_config(model: DualEncoder) -> dict[str, Any]:
    """Preprocessing of images in the words of open_clip, and "resize", which it does not know, if not "size"."""
    image, prepared = model.recipe.image, model.preprocessor
    config = {
        "size": image.size,
        "mode": "RGB",
        "mean": list(image.mean),
        "std": list(image.std),
        "interpolation": prepared.filter.name.lower(),
        "resize_mode": "squash" if prepared.squash else "shortest",
    }
    if prepared.resize != prepared.size and not prepared.squash:
        config["resize"] = prepared.resize
    return config
