"""The pairs of a run: training pairs and held-out sets are opened, and a sample is checked before the first step."""

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from declip.data.columns import Columns
from declip.data.pair import BrokenPair, PairSource, SkipCounter
from declip.data.sources.names import absolute
from declip.data.sources.open import NO_SOURCES, Sources, open_source
from declip.data.sources.subset import LIST_KIND, Joined, read_pair_list, take, training_part
from declip.errors import UserError
from declip.evaluation.datasets import Dataset, with_classes
from declip.io.text import plural
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe
from declip.runs.folder import RECIPE, Run, log
from declip.training.evaluations import HeldOutSets

TRAINING = "training pairs"
FEW = 1_000  # pairs up to which all are opened before training, in about a second: one broken pair in a few matters
SAMPLE = 64  # pairs, evenly spaced, that stand for all where reading all would take too long


def open_training_source(recipe: Recipe, sources: Sources = NO_SOURCES) -> PairSource:
    """Open the training pairs, of a source with splits those of "train", limited to `data.max_pairs` by the seed."""
    data = recipe.data
    names = [data.source] if isinstance(data.source, str) else data.source
    parts = [training_part(open_source(name, Columns.of(data), sources)) for name in names]
    source = parts[0] if isinstance(data.source, str) else Joined(parts)
    if data.columns.get("group") is not None and source.group_column is None:
        raise UserError(f"data.columns.group names a column of a table, which '{source.name}' is not. Leave it out.")
    return source if data.max_pairs is None else take(source, data.max_pairs, recipe.seed)


def described(source: PairSource) -> str:
    """Format the number of pairs, their source and its columns of captions: "24 pairs of a.csv (captions: title)"."""
    captions = f" (captions: {source.captions_from})" if source.captions_from else ""
    return f"{plural(len(source), 'pair')} of {source.name}{captions}"


def refuse_broken(source: PairSource, allowed: float) -> None:
    """Raise an error if more than a fraction of a few pairs cannot be used; images are opened, not decoded."""
    broken = SkipCounter()
    for index in range(0 if source.remote or len(source) > FEW else len(source)):
        try:
            source.read_lazy(index)
        except BrokenPair as error:
            broken.add(error)
    broken.refuse(len(source), allowed, source.name)


def sample_hashes(recipe: Recipe, source: PairSource, held_out: HeldOutSets) -> dict[str, list[str]]:
    """Open every held-out set, to find an unusable one before training, and hash it and the training pairs."""
    sets = {TRAINING: source}
    for name, protocols in held_out.tasks(recipe, final=True).items():
        sets[name] = held_out.test(name)
        if "zero-shot" in protocols:
            with_classes(sets[name])
    return {name: _hashes(pairs) for name, pairs in sets.items()}


def _hashes(source: PairSource) -> list[str]:
    """Number of pairs, and hashes of key and captions of some; empty for a pair that is broken or not at hand."""
    hashes = [str(len(source))]
    for index in evenly_spaced(source):
        digest = ""
        with suppress(BrokenPair):
            text = "\n".join((source.key(index), *source.captions(index)))
            digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        hashes.append(digest)
    return hashes


def evenly_spaced(source: PairSource, size: int = SAMPLE) -> list[int]:
    """Indices of evenly spaced pairs; none of a remote source."""
    count = 0 if source.remote else min(size, len(source))
    indices: list[int] = np.linspace(0, len(source) - 1, count).astype(int).tolist()
    return indices


def warn_of_training_pairs(model: object, datasets: Iterable[Dataset]) -> None:
    """Warn of datasets that a run, given by its folder or a checkpoint, was trained on; those with splits are not."""
    path = (
        model.folder if isinstance(model, Run) else Path(model).expanduser() if isinstance(model, str | Path) else None
    )
    folder = path and next((path for path in (path, path.parent.parent) if (path / RECIPE).is_file()), None)
    if folder is None:
        return
    given = load_recipe(folder / RECIPE).data.source
    files = [Path(name) for name in ([given] if isinstance(given, str) else given)]
    names = [read_pair_list(f).source if f.suffix == LIST_KIND and f.is_file() else absolute(str(f)) for f in files]
    for dataset in datasets:
        if absolute(dataset.name) in names and len(dataset.openers) == 1 and not dataset.split("test").splits():
            log.warning(f"'{folder}' was trained on pairs of '{dataset.name}': the results are too high. Give others.")
