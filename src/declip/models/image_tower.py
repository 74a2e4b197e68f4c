"""Image towers: any timm model, through one adapter that gives pooled and token features.

timm is imported when a tower is built, because importing it, with torchvision, takes as long as importing torch. A text
search builds no image tower.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from declip.errors import UserError, unknown
from declip.models.neighbors import matching_projection
from declip.models.tensor_names import named_below

if TYPE_CHECKING:
    from timm.models.byobnet import ByoBlockCfg

# Once per process, however often the tower is built
warn_once = cache(logging.getLogger("declip").warning)

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
"""All batch norms; those of timm are derived from them, and `SharedBatchNorm` is."""

OTHER_FILES = {
    "checkpoint_path",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "cache_dir",
}
"""Arguments of `timm.create_model` by which a recipe, perhaps a stranger's, would name files or addresses."""


@dataclass(frozen=True)
class ImageFeatures:
    """Output of an image tower for a batch."""

    pooled: Tensor  # (B, d) projected embedding, not normalized
    pre_logits: Tensor  # (B, width) pooled feature before the projection, which linear probes and SLIP's head take
    tokens: Tensor  # (B, P, width) features of the patches or grid cells before the last norm and projection


def _blocks(
    kind: str, depths: Sequence[int], width: int, ratio: float
) -> "tuple[ByoBlockCfg, ...]":
    """Stages of a residual network, each but the first twice as wide as the one before, with stride 2."""
    from timm.models.byobnet import ByoBlockCfg

    stages = []
    for stage, depth in enumerate(depths):
        stride = 1 if stage == 0 else 2
        stages.append(ByoBlockCfg(type=kind, d=depth, c=width * 2**stage, s=stride, br=ratio))
    return tuple(stages)


TimmModel = tuple[str, dict[str, Any]]
"""A timm model's name, and arguments of `timm.create_model`."""


def _conv(width: int) -> TimmModel:
    """A residual network for small images: stem of stride 2 without a pool; "blocks" are arguments of `_blocks`."""
    options = {
        "blocks": ("basic", (1, 1, 1), width, 1.0),
        "stem_chs": width // 2,
        "num_features": 0,
        "act_layer": "relu",
        "stem_type": "3x3",
        "stem_pool": "",
    }
    return "resnet51q", options


def _vit(patch: int, width: int, depth: int) -> TimmModel:
    options = {"patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": width // 64}
    return "vit_base_patch32_clip_quickgelu_224", options


SMALL_TOWERS: dict[str, TimmModel] = {
    "declip_conv_tiny": _conv(32),
    "declip_conv_small": _conv(48),
    "declip_conv_base": _conv(64),
    "declip_vit_tiny": _vit(4, 128, 4),
    "declip_vit_small": _vit(4, 192, 6),
    "declip_vit_base": _vit(8, 256, 8),
}
"""Named sizes for images of 32 to 64 pixels: name → (timm model, arguments of `timm.create_model`)."""


class ImageTower(nn.Module):
    """A timm model with a projection into the shared space.

    The projection is CLIP's (Radford et al. 2021, section 2.4): the output map of the attention pool, with a bias, for
    its modified ResNets, a linear map without bias for every other model. The last norm of a ViT that pools at its
    class token is a part of this module, so that `tokens` can be returned before it.

    Of timm's interface, the trunk needs a constructor that accepts `in_chans` and `num_classes`, an entry of its
    module's ``default_cfgs``, `num_features`, `head_hidden_size`, `forward_features`, which returns tokens or a feature
    map, `forward_head`, `forward`, `group_matcher` for fine-tuning, and `num_prefix_tokens` unless that is 0. A trunk
    for one size has `fixed_input_size` in its ``default_cfgs`` and takes `img_size`, a number or a pair.

    Args:
        name: A timm model's name or a key of `SMALL_TOWERS`. Nothing is downloaded.
        options: Arguments of `timm.create_model`; ``depths`` sets the stages of CLIP's ResNets.
        freeze_patch_embed: Leave a ViT's patch projection at its random start, as DeCLIP's official code does.
        weights: State of the trunk, as timm publishes it, for any image size; None for random weights.
    """

    has_batch_norm: bool  # whether features depend on the other images of a batch in training
    proj: Any  # a linear map, or one with class posteriors or neighbors
    gives_tokens = True  # beside the pooled feature, one for each patch or cell
    timm_prefix: str | None = "trunk."  # of the parameters of a timm model; None for another's

    def __init__(
        self,
        name: str,
        size: int,
        embed_dim: int,
        options: dict[str, Any] | None = None,
        freeze_patch_embed: bool = False,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        import timm

        self.trunk = _create(name, size, options or {}, weights)
        self.norm: nn.Module = nn.Identity()
        # The norm is per token, so where one token is pooled it may as well come after the pool.
        if _pools_a_token(self.trunk) and isinstance(
            getattr(self.trunk, "norm", None), nn.LayerNorm
        ):
            self.norm = self.trunk.norm
            self.trunk.norm = nn.Identity()
        # The projection, with CLIP's initialization
        self.pre_logits_width = int(self.trunk.head_hidden_size)
        pools_by_attention = isinstance(
            getattr(self.trunk, "head", None), timm.layers.AttentionPool2d
        )
        self.proj = nn.Linear(self.pre_logits_width, embed_dim, bias=pools_by_attention)
        nn.init.normal_(self.proj.weight, std=self.pre_logits_width**-0.5)
        self.token_width = int(self.trunk.num_features)
        self.has_batch_norm = any(isinstance(module, BatchNorm) for module in self.modules())
        if freeze_patch_embed:
            # MoCo v3's fixed random patch projection
            patches = getattr(getattr(self.trunk, "patch_embed", None), "proj", None)
            if patches is None:
                raise UserError(
                    f"'{name}' has no patch embedding to freeze: set image.freeze_patch_embed=false."
                )
            patches.requires_grad_(False)

    def match_projection(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the projection by the kind that can hold tensors that will be loaded, by name."""
        own = named_below("image_tower.proj.", tensors)
        projection = matching_projection(self.proj, own, self.pre_logits_width)
        self.proj = projection.to(next(self.trunk.parameters()).device)

    def forward(self, images: Tensor) -> ImageFeatures:
        """Encode images (B, 3, H, W), normalized."""
        pooled, tokens = self.encode(images)
        return ImageFeatures(self.proj(pooled), pooled, tokens)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images (B, 3, H, W) as pooled features (B, width) and tokens (B, P, width)."""
        features = self.trunk.forward_features(images)
        pooled = self.trunk.forward_head(features, pre_logits=True)
        return self.norm(pooled), grid_tokens(self.trunk, features)

    def pool(self, images: Tensor) -> Tensor:
        """Encode images up to the projection, (B, width)."""
        return self.encode(images)[0]

    def refuse_size(self, name: str, size: int) -> None:
        """Try one image of a size: many towers can be built for sizes that their forward pass cannot take."""
        training = self.training
        device = next(self.parameters()).device
        self.eval()  # so that no random number is consumed and no running statistic changes
        try:
            with torch.no_grad():
                self(torch.zeros(1, 3, size, size, device=device))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UserError(
                f"The image tower '{name}' does not take images of {size} × {size} pixels: "
                f"{str(error).splitlines()[0]}. Give another image.size (multiples of 32 suit most) or image.model."
            ) from error
        finally:
            self.train(training)


def grid_tokens(trunk: Any, features: Tensor) -> Tensor:
    """Take (B, P, width) patches or grid cells from the features of a timm trunk."""
    if features.ndim == 3:  # (B, prefix tokens + P, width)
        return features[:, getattr(trunk, "num_prefix_tokens", 0) :]
    width = trunk.num_features
    if features.shape[-1] == width and features.shape[1] != width:  # (B, h, w, width)
        return features.flatten(1, 2)
    return features.flatten(2).transpose(1, 2)  # of (B, width, h, w)


def _pools_a_token(trunk: Any) -> bool:
    """Whether a timm trunk is a transformer that pools at its class token."""
    if hasattr(trunk, "head_dist"):  # distilled DeiT's takes the mean of two
        return False
    return getattr(trunk, "global_pool", None) == "token" and hasattr(trunk, "blocks")


def _create(
    name: str, size: int, options: dict[str, Any], weights: Mapping[str, Tensor] | None
) -> Any:
    """Build the timm model of a tower without its classifier."""
    import timm

    base, preset = SMALL_TOWERS.get(name, (name, {}))
    if "blocks" in preset:
        preset = preset | {"blocks": _blocks(*preset["blocks"])}
    if not timm.is_model(base):
        error = unknown("image tower", name, [*SMALL_TOWERS, *timm.list_models()])
        raise UserError(
            f"{error} A tower of your own must be registered with timm in this process: see CONTRIBUTING."
        )
    refused = OTHER_FILES & options.keys()
    if refused:
        raise UserError(
            f"image.model_kwargs has {', '.join(sorted(refused))}, which would read a file. Leave it out."
        )
    # Options of the named size, then the recipe's
    options = {**preset, **options}
    known = timm.get_pretrained_cfg(base)
    is_vit = base.startswith("vit")
    is_clip_resnet = base.startswith("resnet") and "_clip" in base
    if is_clip_resnet and "depths" in options:
        options["blocks"] = _blocks("bottle", options.pop("depths"), 256, 0.25)
    if is_clip_resnet or is_vit or (known is not None and known.fixed_input_size):
        options.setdefault("img_size", size)  # one size per model; timm's own unless given
    if name not in SMALL_TOWERS and known is not None:
        _warn_of_few_patches(name, size, known.input_size[-1])
    source: dict[str, Any] = {"pretrained": False}
    if weights is not None:
        # Without a classifier to leave out timm loads weights strictly.
        overlay = {"state_dict": dict(weights), "classifier": None}
        source = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    try:
        with torch.no_grad():
            trunk = timm.create_model(base, num_classes=0, **source, **options)
    except (TypeError, AssertionError, ValueError, ArithmeticError, RuntimeError) as error:
        given = f"'{name}' at {size} px, image.model_kwargs={options}"
        raise UserError(f"timm cannot build the image tower {given}: {error}") from error
    if weights is None and name not in SMALL_TOWERS:
        if is_clip_resnet:
            _start_resnet(trunk)
        elif is_vit and "_clip" in base:
            _start_vit(trunk)
    return trunk


def _warn_of_few_patches(name: str, size: int, usual: int) -> None:
    if 2 * size <= usual:
        warn_once(
            f"The image tower '{name}' was made for images of {usual} pixels; at image.size={size} it "
            f"sees few patches. Give a larger image.size, or a tower for small images: {', '.join(SMALL_TOWERS)}."
        )


@torch.no_grad()
def _start_vit(trunk: Any) -> None:
    """Draw the starting weights of DeCLIP's official ViT; timm's have 0.02 everywhere and biases of 0."""
    scale = trunk.embed_dim**-0.5
    depth = (2 * len(trunk.blocks)) ** -0.5
    for parameter, std in ((trunk.cls_token, scale), (trunk.pos_embed, 0.01)):
        if parameter is not None:
            nn.init.normal_(parameter, std=std)
    for block in trunk.blocks:
        block.mlp.fc1.reset_parameters()  # for the biases
        block.mlp.fc2.reset_parameters()
        nn.init.normal_(block.attn.qkv.weight, std=scale)
        nn.init.normal_(block.attn.proj.weight, std=scale * depth)
        nn.init.normal_(block.mlp.fc1.weight, std=(2 * trunk.embed_dim) ** -0.5)
        nn.init.normal_(block.mlp.fc2.weight, std=scale * depth)


@torch.no_grad()
def _start_resnet(trunk: Any) -> None:
    """Draw the starting weights of CLIP's ResNet: PyTorch's own, where timm's are larger, or 0."""
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    for layer in trunk.head.children():  # an attention pool's
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
