"""Low-rank adapters (LoRA; Hu et al. 2022, arXiv 2106.09685) of the library peft."""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from declip.errors import check_installed
from declip.models.dual_encoder import DualEncoder
from declip.models.layers import IMAGE, TEXT, depths
from declip.models.text_tower import CausalSelfAttention
from declip.recipe.schema import LoRA

MARK = ".lora_"  # in the names of the adapters' tensors
PROJECTIONS = ("proj", "text_projection")  # the towers' last layers, which are not adapted


class Adapters:
    """Adapters on towers of a model, in place; no other parameter of these towers learns.

    Every linear layer and ungrouped convolution between stem and projection gets one, the text tower's fused attention
    map too. At first they change nothing: B is 0.
    """

    def __init__(self, model: DualEncoder, lora: LoRA, towers: Iterable[str] = (IMAGE, TEXT)) -> None:
        self._model = model
        # The stem is not adapted.
        layers = depths(model)
        self._tuners = []
        for tower in towers:
            stem = {n.removeprefix(tower) for n, depth in layers.items() if n.startswith(tower) and depth == 0}
            self._tuners.append(_adapt(getattr(model, tower[:-1]), stem, lora))

    def merge(self) -> DualEncoder:
        """Add the adapters to the weights and remove them."""
        for tuner in self._tuners:
            _fuse_attention(tuner.merge_and_unload())
        return self._model.requires_grad_(True)


def adapted(names: Iterable[str]) -> list[str]:
    """List the towers that have adapters, by the names of a model's tensors."""
    towers = {f"{name.split('.')[0]}." for name in names if MARK in name}
    return [tower for tower in (IMAGE, TEXT) if tower in towers]


def _adapt(tower: nn.Module, stem: set[str], lora: LoRA) -> Any:
    check_installed("peft", "lora", "finetune.lora")
    from peft import LoraConfig, LoraModel

    _split_attention(tower)
    # Its layers' weights are read without calling them, so peft adapts the whole; not where keys have another width.
    fused = {name: module for name, module in tower.named_modules() if isinstance(module, nn.MultiheadAttention)}
    layers = [name for name, module in fused.items() if module._qkv_same_embed_dim]
    layers += [
        name
        for name, module in tower.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        if name.split(".")[0] not in PROJECTIONS and f"{name}.weight" not in stem
        if name.rpartition(".")[0] not in fused
    ]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft says int and divides
        lora_dropout=lora.dropout,
        target_modules="|".join(map(re.escape, layers)),
    )
    return LoraModel(tower, {"default": config}, "default")


def _split_attention(tower: nn.Module) -> None:
    """Make the parameters of fused attention maps layers: peft adapts bare parameters too, but without dropout."""
    for module in list(tower.modules()):
        if isinstance(module, CausalSelfAttention):
            out, width = module.in_proj_weight.shape
            layer = nn.Linear(width, out, device="meta")
            layer.weight, layer.bias = module.in_proj_weight, module.in_proj_bias
            del module.in_proj_weight, module.in_proj_bias
            module.in_proj = layer


def _fuse_attention(tower: nn.Module) -> None:
    """Undo `_split_attention`."""
    for module in tower.modules():
        if isinstance(module, CausalSelfAttention) and module.in_proj is not None:
            layer, module.in_proj = module.in_proj, None
            module.in_proj_weight, module.in_proj_bias = nn.Parameter(layer.weight), nn.Parameter(layer.bias)
