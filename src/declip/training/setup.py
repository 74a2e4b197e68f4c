"""From a recipe to the parts of a run: precision, pairs, views, loader, averaged weights, generators."""

import ctypes
import os
import platform
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor

from declip.data.assembly import Assembler
from declip.data.cached import CachedFeatures, VariantAssembler
from declip.data.columns import Columns
from declip.data.loader import PairLoader
from declip.data.pair import BrokenPair, PairSource
from declip.data.plan import Plan, plan_views
from declip.data.sources.mixture import Mixture
from declip.data.sources.open import open_source
from declip.data.sources.subset import take
from declip.data.text.augment import in_other_script
from declip.errors import UserError
from declip.evaluation.datasets import open_dataset, with_classes
from declip.models.device import computes_bf16
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.runs.folder import RECIPE, log, read_recipe
from declip.supervision.objective import needs_of
from declip.training import distributed

GENERATORS = ("cuda", "mps")  # devices with a generator of their own
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of glibc's mallopt


def resolve_precision(recipe: Recipe, device: torch.device, folder: Path, resume: bool) -> Recipe:
    """Replace train.precision=auto by the device's; a resumed run keeps its own, on any device."""
    precision = recipe.train.precision
    if precision == "auto":
        precision = "bf16" if computes_bf16(device) else "fp32"
        if resume and (folder / RECIPE).is_file():
            precision = read_recipe(folder).train.precision
    if precision == "bf16" and not computes_bf16(device):
        log.warning("%s does not compute in bfloat16 itself: steps are slow. train.precision=auto avoids it.", device)
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": precision})})


def open_training_source(recipe: Recipe, given: PairSource | None = None) -> PairSource:
    """Open the training pairs, one source or a mixture, or the one given, limited to `data.max_pairs` by the seed."""
    data = recipe.data
    columns = Columns.of(data)
    source: PairSource
    if isinstance(data.source, str):
        source = given or open_source(data.source, columns)
    else:
        source = Mixture([(open_source(part.source, columns), part.weight) for part in data.source])
    if data.columns.get("group") is not None and source.group_column is None:
        raise UserError(f"data.columns.group names a column of a table, and '{source.name}' is none. Leave it out.")
    if data.max_pairs is None:
        return source
    few = source.take if isinstance(source, Mixture) else partial(take, source)
    return few(data.max_pairs, recipe.seed)


def resolve_epochs(recipe: Recipe, source: PairSource) -> Recipe:
    """Replace train.epochs by the number of steps: epochs of whole batches."""
    train = recipe.train
    if train.epochs is None:
        return recipe
    shown = sum(span.shown for span in source.spans())
    steps = max(1, round(train.epochs * max(1, shown // train.batch_size)))
    return recipe.model_copy(update={"train": train.model_copy(update={"steps": steps, "epochs": None})})


def evaluation_tasks(recipe: Recipe, final: bool) -> dict[str, list[str]]:
    """Map each dataset that a recipe evaluates on, at the end or on the way, to its protocols."""
    wanted, tasks = recipe.evaluation, dict[str, list[str]]()
    ends = (("zero-shot", wanted.final_zero_shot), ("retrieval", wanted.final_retrieval)) if final else ()
    for protocol, names in (("zero-shot", wanted.zero_shot), ("retrieval", wanted.retrieval), *ends):
        for name in names:
            if protocol not in tasks.setdefault(name, []):
                tasks[name].append(protocol)
    return tasks


def check_datasets(recipe: Recipe) -> None:
    """Open every dataset that the recipe evaluates on, to find a missing or unusable one before training."""
    for name, protocols in evaluation_tasks(recipe, final=True).items():
        dataset = open_dataset(name)
        if "zero-shot" in protocols:
            with_classes(dataset.split("test"))


def plan_of(recipe: Recipe) -> Plan:
    """Plan the views of a pair that the losses of a recipe need."""
    return plan_views(recipe, needs_of(recipe))


def unaugmented(source: PairSource, plan: Plan, sample: int = 64) -> str | None:
    """Say so where text views are augmented, but most captions are in a script that the augmentation leaves alone."""
    if plan.texts.count == 1 or plan.texts.augmentation.second_view == "same" or source.remote:
        return None
    others = list[bool]()
    for index in np.linspace(0, len(source) - 1, min(sample, len(source))).astype(int).tolist():
        with suppress(BrokenPair):
            others += map(in_other_script, source.captions(index))
    message = (
        f"{sum(others)} of {len(others)} captions are not in Latin script: English augmentation leaves them alone."
    )
    return message if 2 * sum(others) > len(others) else None


def build_loader(
    recipe: Recipe,
    source: PairSource,
    model: DualEncoder,
    start_step: int = 0,
    workers: int = 0,
    features: CachedFeatures | None = None,
) -> PairLoader:
    """Build the loader of a recipe from a step on, of cached features where they are given."""
    kind: Callable[..., Assembler] = Assembler
    if features is not None:
        kind = partial(VariantAssembler, variants=len(features.image_rows), features=features)
    assembler = kind(
        source,
        model.tokenizer,
        plan_of(recipe),
        batch_size=recipe.train.batch_size,
        seed=recipe.seed,
        shuffle_buffer=recipe.data.shuffle_buffer,
        apart=recipe.contrastive.duplicates == "apart",
        rank=distributed.rank(),
        ranks=distributed.world_size(),
    )
    return PairLoader(
        assembler,
        start_step=start_step,
        workers=workers,
        pin_memory=model.device.type == "cuda",
        max_broken_fraction=recipe.data.max_broken_fraction,
    )


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks for the next step, until the process ends; other C libraries are left alone.

    It would return each to the system and get it again page by page, zeroed: a tenth of a small step on a CPU.
    """
    library: Any = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if hasattr(library, "mallopt"):
        library.mallopt(M_TRIM_THRESHOLD, -1)
        library.mallopt(M_MMAP_MAX, 0)


def versions() -> dict[str, str]:
    """List everything outside the recipe that a result may depend on."""
    return {
        "declip": version("declip"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count()),
        "processes": str(distributed.world_size()),
    }


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Give the states of torch's generators, "cpu" and that of the device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type in GENERATORS:
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put the states of torch's generators back."""
    torch.set_rng_state(states["cpu"])
    if device.type in GENERATORS and device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type], device)


def seed_rank(seed: int, step: int) -> None:
    """Give torch's generators of this rank a stream of their own, so that no two ranks sample equal dropout masks."""
    torch.manual_seed(seed + 7919 * (distributed.rank() + 1) + step)
