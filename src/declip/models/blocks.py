"""The repeated blocks of a tower: the units of sharding and of activation checkpointing."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
NEARLY_ALL = 0.9
"""Blocks hold at least this fraction of the parameters of the largest repeated class."""

STAGES = 4
"""A class with at most this many instances is a stage made of blocks, if blocks can be found in it."""


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

    def contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), frozen_batch_norm_stats(block)  # of the first pass and of the recomputation

    blocks = blocks_of(tower)
    for block in blocks:
        checkpoint(block, context_fn=partial(contexts, block))
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
