"""From a recipe to the parts of a run: device, pairs, views, loader, averaged weights."""

import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version

import timm
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from declip.data.loader import PairLoader
from declip.data.pair import PairSource
from declip.data.plan import Plan, plan_views
from declip.data.sources.mixture import Mixture
from declip.data.sources.open import open_source
from declip.data.sources.subset import take
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.supervision.objective import needs_of
from declip.training import distributed


def open_training_source(recipe: Recipe) -> PairSource:
    """The pairs that teach, one source or a mixture, cut to `data.max_pairs` by the seed."""
    data = recipe.data

    def opened(name: str) -> PairSource:
        return open_source(
            name,
            image_column=data.image_column,
            caption_column=data.caption_column,
            image_root=data.image_root,
            shard_cache_gb=data.shard_cache_gb,
        )

    if isinstance(data.source, str):
        source = opened(data.source)
        return source if data.max_pairs is None else take(source, data.max_pairs, recipe.seed)
    mixture = Mixture([(opened(each.source), each.weight) for each in data.source])
    return mixture if data.max_pairs is None else mixture.take(data.max_pairs, recipe.seed)


def plan_of(recipe: Recipe) -> Plan:
    """The views of a pair that the losses of a recipe need."""
    return plan_views(recipe, needs_of(recipe))


def build_loader(
    recipe: Recipe, source: PairSource, model: DualEncoder, start_step: int = 0, workers: int | None = None
) -> PairLoader:
    """Build the loader of a recipe, with `data.workers` or another number of workers."""
    if workers is None:
        workers = 0 if recipe.data.workers == "auto" else recipe.data.workers
    return PairLoader(
        source,
        model.tokenizer,
        plan_of(recipe),
        batch_size=recipe.train.batch_size,
        seed=recipe.seed,
        data=recipe.data,
        workers=workers,
        start_step=start_step,
        pin_memory=model.device.type == "cuda",
        rank=distributed.rank(),
        ranks=distributed.world_size(),
    )


def versions() -> dict[str, str]:
    """What a result may depend on."""
    return {
        "declip": version("declip"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count()),
    }


def averaged(model: DualEncoder, decay: float | None) -> AveragedModel | None:
    """The averaging copy of a model, or None without a decay."""
    if decay is None:
        return None
    return AveragedModel(model, multi_avg_fn=_warm_average(decay), use_buffers=True)


def _warm_average(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """Exponential average whose decay grows as (1 + n) / (10 + n), so that the random start is soon forgotten."""

    @torch.no_grad()
    def update(averages: Sequence[Tensor], values: Sequence[Tensor], count: Tensor | int) -> None:
        n = float(count)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        for average, value in zip(averages, values, strict=True):
            if average.is_floating_point():
                average.lerp_(value, weight)
            else:
                average.copy_(value)

    return update


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states
