"""Layers of a tower, by depth: the units of learning rates, freezing, sharding and activation checkpointing."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from declip.models.dual_encoder import DualEncoder
from declip.models.wrapped import WrappedImageTower

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
NEARLY_ALL = 0.9  # blocks hold at least this fraction of the parameters of the largest repeated class
STAGES = 4  # A class with at most this many instances is a stage made of blocks, if blocks can be found in it


def blocks_of(tower: nn.Module) -> list[nn.Module]:
    """Find the repeated blocks of a tower, in order: a transformer's blocks, a ResNet's bottlenecks.

    Of the classes that occur at least twice and are made of several modules, those that hold nearly all parameters are
    kept: stages, blocks, perhaps the layers in them. The outermost of these that are not stages are the blocks.
    """
    instances: dict[type[nn.Module], list[nn.Module]] = defaultdict(list)
    for module in tower.modules():
        if module is not tower and not isinstance(module, CONTAINERS) and any(True for _ in module.children()):
            instances[type(module)].append(module)
    # Classes that occur at least twice, then those that hold nearly all parameters
    groups = [modules for modules in instances.values() if len(modules) > 1]
    sizes = [sum(p.numel() for p in nn.ModuleList(modules).parameters()) for modules in groups]
    large = [modules for modules, size in zip(groups, sizes, strict=True) if size >= NEARLY_ALL * max(sizes)]
    many = [modules for modules in large if len(modules) > STAGES] or large
    return next((group for group in many if not any(_lie_in(group, other) for other in many)), [])


def _lie_in(inner: list[nn.Module], outer: list[nn.Module]) -> bool:
    """Whether most of some modules lie inside others."""
    inside = {id(part) for module in outer for part in module.modules() if part is not module}
    return sum(id(module) in inside for module in inner) > len(inner) / 2


def grad_checkpointing(tower: nn.Module) -> int:
    """Keep only each block's input for the backward pass and recompute the block there: less memory, more time.

    The recomputation leaves running statistics of batch norm alone, so the numbers stay those of one pass. Returns the
    number of blocks.
    """
    # Imported late: only memory-saving runs need it. It is the one checkpointing of torch that works by forward hooks,
    # so that parameters keep their names; the wrapper of torch.distributed.algorithms renames them.
    from torch.distributed._composable import checkpoint

    blocks = blocks_of(tower)
    for block in blocks:  # the contexts are of the first pass and of the recomputation
        checkpoint(block, context_fn=lambda block=block: (nullcontext(), frozen_batch_norm_stats(block)))
    return len(blocks)


@contextmanager
def frozen_batch_norm_stats(block: nn.Module) -> Iterator[None]:
    """Restore batch norm's running statistics when the context ends."""
    buffers = [buffer for module in block.modules() if isinstance(module, _BatchNorm) for buffer in module.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.data.copy_(value)  # by .data: autograd holds the buffer, but does not read it


IMAGE, TEXT = "image_tower.", "text_tower."  # prefixes of the towers' parameter names in a `DualEncoder`
PROJECTIONS = ("image_tower.proj.", "text_tower.text_projection.")  # prefixes of the projections into the shared space
STEM = re.compile(
    r"(?:trunk\.)?(?:transformer\.|encoder\.)?"
    r"(?:conv\d|bn\d|ln_pre|\w+_embedding|cls_emb|embeddings|embed_\w+|layernorm_embedding)"
)
BLOCK = re.compile(r"(?:\w+\.)*?(?:resblocks|layers|layer\d?|blocks?)\.\d+\.")
"""Beginnings of the names of parameters in the stem and in blocks, except of timm's towers."""


def depths(model: DualEncoder) -> dict[str, int]:
    """Layer index of every parameter of both towers, by its name in the model.

    The stem (patch or word embedding, positions) has index 0, block after block has 1, 2, …, and the last norm and
    projection one more than the last block. In networks with stages, blocks count through all of them.
    """
    tower, trunk = model.image_tower, model.image_tower.trunk
    if not isinstance(tower, WrappedImageTower):
        image = _timm(tower, trunk, "trunk.")
    elif type(trunk).__name__ == "TimmModel":
        image = _timm(tower, trunk.trunk, "trunk.trunk.")
    else:
        image = _counted(tower)
    text = _counted(model.text_tower)
    return {IMAGE + n: depth for n, depth in image.items()} | {TEXT + n: depth for n, depth in text.items()}


def blocks(depth_of: Mapping[str, int], tower: str) -> int:
    """Number of blocks of a tower, `IMAGE` or `TEXT`, from `depths`."""
    return max((depth for name, depth in depth_of.items() if name.startswith(tower)), default=1) - 1


def _timm(tower: nn.Module, trunk: Any, prefix: str) -> dict[str, int]:
    from timm.models import group_parameters

    groups: dict[str, int] = group_parameters(trunk, trunk.group_matcher(coarse=False), reverse=True)
    inside = {name for name in groups if not name.startswith("head.")}  # CLIP's attention pool comes after the blocks
    last = 1 + max(groups[name] for name in inside)
    depth_of = {f"{prefix}{name}": groups[name] if name in inside else last for name in groups}
    return depth_of | {name: last for name, _ in tower.named_parameters() if name not in depth_of}


def _counted(tower: nn.Module) -> dict[str, int]:
    """Count the blocks in the order of the names of their parameters."""
    names = [name for name, _ in tower.named_parameters()]
    block_of = {name: match[0] for name in names if (match := BLOCK.match(name))}
    numbers = {prefix: number for number, prefix in enumerate(dict.fromkeys(block_of.values()), start=1)}
    others = {name: 0 if STEM.match(name) else 1 + len(numbers) for name in names}
    return {name: numbers[block_of[name]] if name in block_of else others[name] for name in names}


STEM_DROPOUTS = ("pos_drop", "patch_drop")  # dropouts of timm's towers behind the patch embedding; they belong to it


def freeze(model: DualEncoder, names: Iterable[str]) -> None:
    """Take parameters out of training, and keep fully frozen modules in evaluation mode whatever `train()` says.

    Such a module drops nothing out, and its batch norms keep their running statistics. A tower whose batch norms are
    all frozen counts as one without: its views are encoded together, and chunks are exact.
    """
    frozen = set(names)
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    for tower in (model.image_tower, model.text_tower):
        parts = [part for part in tower.modules() if part is not tower and _fully_frozen(part)]
        stem: Any = getattr(getattr(tower, "trunk", None), "patch_embed", None)
        if stem in parts:
            parts += [getattr(tower.trunk, name) for name in STEM_DROPOUTS if hasattr(tower.trunk, name)]
        keep_in_evaluation(model, [module for part in parts for module in part.modules()])


def keep_in_evaluation(model: DualEncoder, modules: Iterable[nn.Module]) -> None:
    """Keep modules of a model in evaluation mode whatever `train()` says; their parameters may learn."""
    for module in modules:
        module.always_eval = True  # type: ignore[assignment]  # `DualEncoder.train` looks for it
    model.train(model.training)
    tower = model.image_tower
    tower.has_batch_norm = any(isinstance(m, _BatchNorm) and not is_frozen(m) for m in tower.modules())


def is_frozen(module: nn.Module) -> bool:
    """Whether a module is kept in evaluation mode."""
    return getattr(module, "always_eval", False)


def _fully_frozen(module: nn.Module) -> bool:
    trainable = [parameter.requires_grad for parameter in module.parameters()]
    return bool(trainable) and not any(trainable)
