"""Low-rank adapters (LoRA; Hu et al. 2022, arXiv 2106.09685), made by the library peft."""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from declip.errors import UserError
from declip.models.dual_encoder import DualEncoder
from declip.models.layers import IMAGE, TEXT, depths
from declip.recipe.schema import LoRA

MARK = ".lora_"
"""In the names of the adapters' tensors."""

FUSED = "in_proj_weight"
"""The text tower's map to query, key and value is a parameter, not a linear layer."""

PROJECTIONS = ("proj", "text_projection")
"""The towers' last layers, which are not adapted."""


class Adapters:
    """Adapters on towers of a model; no other parameter of these towers learns.

    Every linear layer and ungrouped convolution between stem and projection gets one, and the text tower's fused
    attention map. At first they change nothing: B is 0.

    Args:
        model: Changed in place.
        lora: Rank, scale and dropout.
        towers: `declip.models.layers.IMAGE`, `TEXT` or both.

    Raises:
        UserError: peft is not installed.
    """

    def __init__(self, model: DualEncoder, lora: LoRA, towers: Iterable[str] = (IMAGE, TEXT)) -> None:
        self._model = model
        found = depths(model)
        self._tuners = []
        for tower in towers:
            own = {name.removeprefix(tower): depth for name, depth in found.items() if name.startswith(tower)}
            self._tuners.append(_adapt(getattr(model, tower[:-1]), {n for n, depth in own.items() if depth == 0}, lora))

    def merge(self) -> DualEncoder:
        """Add the adapters to the weights and take them off: the model is of the usual form again."""
        for tuner in self._tuners:
            tuner.merge_and_unload()
            tuner.merge_and_unload()  # once more for what lay inside an adapted module
        return self._model.requires_grad_(True)


def adapted(names: Iterable[str]) -> list[str]:
    """The towers that have adapters, by the names of a model's tensors."""
    found = {f"{name.split('.')[0]}." for name in names if MARK in name}
    return [tower for tower in (IMAGE, TEXT) if tower in found]


def _adapt(tower: nn.Module, stem: set[str], lora: LoRA) -> Any:
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        raise UserError('finetune.lora needs peft: pip install "declip[lora]".') from error
    layers, fused = _places(tower, stem)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft says int and divides
        lora_dropout=lora.dropout,
        target_modules=layers,
        target_parameters=fused or None,
    )
    return LoraModel(tower, {"default": config}, "default")


def _places(tower: nn.Module, stem: set[str]) -> tuple[str, list[str]]:
    """A pattern for the full names of the layers to adapt, and the names of the parameters."""
    layers = [
        name
        for name, module in tower.named_modules()
        if name not in PROJECTIONS and f"{name}.weight" not in stem and _adaptable(module)
    ]
    fused = [name for name, _ in tower.named_parameters() if name.endswith(FUSED)]
    return "|".join(map(re.escape, layers)), fused


def _adaptable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
