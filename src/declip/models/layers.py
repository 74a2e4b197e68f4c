"""Layers of a tower, by depth: the units of learning rates, freezing, sharding, checkpointing and adapters."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from declip.errors import check_installed
from declip.models.dual_encoder import DualEncoder
from declip.models.image_tower import BatchNorm
from declip.models.text_tower import CausalSelfAttention
from declip.recipe.schema import LoRA

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Blocks hold at least this fraction of the parameters of the largest repeated class
NEARLY_ALL = 0.9
STAGES = 4  # A class with at most this many instances is a stage made of blocks, if blocks can be found in it


def blocks_of(tower: nn.Module) -> list[nn.Module]:
    """Find the repeated blocks of a tower, in order: a transformer's blocks, a ResNet's bottlenecks.

    Of the classes that occur at least twice and are made of several modules, those that hold nearly all parameters are
    kept: stages, blocks, perhaps the layers in them. The outermost of these that are not stages are the blocks.
    """
    instances: dict[type[nn.Module], list[nn.Module]] = defaultdict(list)
    for module in tower.modules():
        has_children = any(True for _ in module.children())
        if module is not tower and has_children and not isinstance(module, CONTAINERS):
            instances[type(module)].append(module)
    # Classes that occur at least twice, then those that hold nearly all parameters
    groups = [modules for modules in instances.values() if len(modules) > 1]
    sizes = [_parameters(modules) for modules in groups]
    large = []
    for modules, size in zip(groups, sizes, strict=True):
        if size >= NEARLY_ALL * max(sizes):
            large.append(modules)
    many = [modules for modules in large if len(modules) > STAGES] or large
    # The outermost: most of them lie in no other
    inner = [_inner(group) for group in many]
    for group in many:
        ids = {id(module) for module in group}
        inside = [len(ids & of_others) for of_others in inner]
        if max(inside) <= len(group) / 2:
            return group
    return []


def _parameters(modules: Iterable[nn.Module]) -> int:
    """Number of parameters in modules, shared ones once."""
    return sum(parameter.numel() for parameter in nn.ModuleList(modules).parameters())


def _inner(group: Iterable[nn.Module]) -> set[int]:
    """Ids of the modules that lie inside the modules of a group."""
    return {id(part) for module in group for part in module.modules() if part is not module}


def grad_checkpointing(tower: nn.Module) -> int:
    """Keep only each block's input for the backward pass and recompute the block there: less memory, more time.

    The recomputation leaves running statistics of batch norm alone, so the numbers stay those of one pass. Returns the
    number of blocks.
    """
    blocks = blocks_of(tower)
    for block in blocks:
        forward = partial(checkpoint, block.forward, use_reentrant=False)
        if any(isinstance(module, BatchNorm) for module in block.modules()):
            forward = partial(forward, context_fn=partial(_contexts, block))
        # Not a wrapper around the block, so that parameters keep their names
        vars(block)["forward"] = forward
    return len(blocks)


def _contexts(
    block: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a block's first pass and of its recomputation."""
    return nullcontext(), frozen_batch_norm_stats(block)


@contextmanager
def frozen_batch_norm_stats(block: nn.Module) -> Iterator[None]:
    """Restore batch norm's running statistics when the context ends."""
    buffers = [
        buffer
        for module in block.modules()
        if isinstance(module, BatchNorm)
        for buffer in module.buffers()
    ]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.data.copy_(value)  # by .data: autograd holds the buffer, but does not read it


# prefixes of the towers' parameter names in a `DualEncoder`
IMAGE = "image_tower."
TEXT = "text_tower."
# Prefixes of the projections into the shared space
PROJECTIONS = ("image_tower.proj.", "text_tower.text_projection.")
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
    tower = model.image_tower
    image = _timm(tower, tower.timm_prefix) if tower.timm_prefix else _counted(tower)
    text = _counted(model.text_tower)
    return {IMAGE + n: depth for n, depth in image.items()} | {
        TEXT + n: depth for n, depth in text.items()
    }


def blocks(depth_of: Mapping[str, int], tower: str) -> int:
    """Number of blocks of a tower, `IMAGE` or `TEXT`, from `depths`."""
    of_tower = [depth for name, depth in depth_of.items() if name.startswith(tower)]
    return max(of_tower, default=1) - 1


def _timm(tower: nn.Module, prefix: str) -> dict[str, int]:
    from timm.models import group_parameters

    trunk: Any = tower.get_submodule(prefix.removesuffix("."))
    groups: dict[str, int] = group_parameters(
        trunk, trunk.group_matcher(coarse=False), reverse=True
    )
    inside = {
        name for name in groups if not name.startswith("head.")
    }  # CLIP's attention pool comes after the blocks
    last = 1 + max(groups[name] for name in inside)
    depth_of = {f"{prefix}{name}": groups[name] if name in inside else last for name in groups}
    return depth_of | {name: last for name, _ in tower.named_parameters() if name not in depth_of}


def _counted(tower: nn.Module) -> dict[str, int]:
    """Count the blocks in the order of the names of their parameters."""
    names = [name for name, _ in tower.named_parameters()]
    block_of: dict[str, str] = {}  # by parameter
    for name in names:
        match = BLOCK.match(name)
        if match:
            block_of[name] = match[0]
    numbers = {
        block: number for number, block in enumerate(dict.fromkeys(block_of.values()), start=1)
    }
    last = 1 + len(numbers)
    depth_of = {}
    for name in names:
        if name in block_of:
            depth_of[name] = numbers[block_of[name]]
        else:
            depth_of[name] = 0 if STEM.match(name) else last
    return depth_of


# Dropouts of timm's towers behind the patch embedding; they belong to it
STEM_DROPOUTS = ("pos_drop", "patch_drop")


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
        parts = []
        for part in tower.modules():
            learns = [parameter.requires_grad for parameter in part.parameters()]
            if part is not tower and learns and not any(learns):
                parts.append(part)
        stem: Any = getattr(getattr(tower, "trunk", None), "patch_embed", None)
        if stem in parts:
            parts += [
                getattr(tower.trunk, name) for name in STEM_DROPOUTS if hasattr(tower.trunk, name)
            ]
        keep_in_evaluation(model, [module for part in parts for module in part.modules()])


def keep_in_evaluation(model: DualEncoder, modules: Iterable[nn.Module]) -> None:
    """Keep modules of a model in evaluation mode whatever `train()` says; their parameters may learn."""
    for module in modules:
        module.always_eval = True  # type: ignore[assignment]  # `DualEncoder.train` looks for it
    model.train(model.training)
    tower = model.image_tower
    tower.has_batch_norm = any(
        isinstance(m, BatchNorm) and not is_frozen(m) for m in tower.modules()
    )


def is_frozen(module: nn.Module) -> bool:
    """Whether a module is kept in evaluation mode."""
    return getattr(module, "always_eval", False)


MARK = ".lora_"  # in the names of the adapters' tensors
UNADAPTED = ("proj", "text_projection")  # the towers' last layers


def add_adapters(model: DualEncoder, lora: LoRA, towers: Iterable[str]) -> list[Any]:
    """Add low-rank adapters of the library peft (LoRA; Hu et al. 2022, arXiv 2106.09685) to towers of a model.

    Every linear layer and ungrouped convolution between stem and projection gets one, the text tower's fused attention
    map too; no other parameter of these towers learns. At first they change nothing: B is 0. Returns peft's tuners.
    """
    stem = {name for name, depth in depths(model).items() if depth == 0}
    tuners = []
    for tower in towers:
        names = {name.removeprefix(tower) for name in stem}
        tuners.append(_adapt(getattr(model, tower[:-1]), names, lora))
    return tuners


def merge_adapters(tuners: Iterable[Any]) -> None:
    """Add adapters to the weights of their tower and remove them."""
    for tuner in tuners:
        tower = tuner.merge_and_unload().requires_grad_(True)
        for module in tower.modules():
            # See `_split_attention`
            if isinstance(module, CausalSelfAttention) and module.in_proj is not None:
                layer = module.in_proj
                module.in_proj = None
                module.in_proj_weight = nn.Parameter(layer.weight)
                module.in_proj_bias = nn.Parameter(layer.bias)


def adapted(names: Iterable[str]) -> list[str]:
    """List the towers that have adapters, by the names of a model's tensors."""
    towers = {f"{name.split('.')[0]}." for name in names if MARK in name}
    return [tower for tower in (IMAGE, TEXT) if tower in towers]


def _adapt(tower: nn.Module, stem: set[str], lora: LoRA) -> Any:
    check_installed("peft", "lora", "finetune.lora")
    from peft import LoraConfig, LoraModel

    _split_attention(tower)
    # Its layers' weights are read without calling them, so peft adapts the whole; not where keys have another width,
    # which have a weight each.
    fused = {
        name: module
        for name, module in tower.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    layers = [name for name, module in fused.items() if module.in_proj_weight is not None]
    for name, module in tower.named_modules():
        first = name.split(".")[0]
        parent = name.rpartition(".")[0]
        skipped = first in UNADAPTED or f"{name}.weight" in stem or parent in fused
        if not skipped and _adaptable(module):
            layers.append(name)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft says int and divides
        lora_dropout=lora.dropout,
        target_modules="|".join(map(re.escape, layers)),
    )
    return LoraModel(tower, {"default": config}, "default")


def _adaptable(module: nn.Module) -> bool:
    """Whether a module is a linear layer or an ungrouped convolution."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1
    return isinstance(module, nn.Linear)


def _split_attention(tower: nn.Module) -> None:
    """Make the parameters of fused attention maps layers: peft adapts bare parameters too, but without dropout."""
    for module in list(tower.modules()):
        if isinstance(module, CausalSelfAttention):
            out, width = module.in_proj_weight.shape
            layer = nn.Linear(width, out, device="meta")
            layer.weight = module.in_proj_weight
            layer.bias = module.in_proj_bias
            del module.in_proj_weight, module.in_proj_bias
            module.in_proj = layer
