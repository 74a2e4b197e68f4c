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
from declip.runs.folder import RECIPE, Run, log, moved_lists
from declip.training.evaluations import HeldOutSets

TRAINING = "training pairs"
MODEL_FOLDERS = ("checkpoints", "exported")  # of a run, with a folder of each model
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
    """Raise an error if more than a fraction of a few pairs cannot be used.

    Images are opened, not decoded: one that is damaged behind its header is found when it is read.
    """
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


def run_of(weights: str | Path) -> Path | None:
    """Return the folder of the run that weights on this machine belong to, if they belong to one.

    Weights are the run folder itself, a folder in one of `MODEL_FOLDERS`, or a file there.
    """
    path = Path(weights).expanduser()
    if not path.exists():
        return None  # a name such as builtin:NAME or open_clip:MODEL/TAG
    path = path.absolute()
    folders = [path]
    for parent in (path.parent, path.parent.parent):
        if parent.name in MODEL_FOLDERS:
            folders.append(parent.parent)
    return next((folder for folder in folders if (folder / RECIPE).is_file()), None)


def pair_names(recipe: Recipe) -> list[str]:
    """Return the names of a recipe's pairs; of a list of pairs, the source that it refers to. Opens no source."""
    given = recipe.data.source
    names = []
    for name in [given] if isinstance(given, str) else given:
        path = Path(name).expanduser()
        if path.suffix == LIST_KIND and path.is_file():
            name = read_pair_list(path).source
        names.append(absolute(name))
    return names


def warn_of_training_pairs(model: object, datasets: Iterable[Dataset]) -> None:
    """Warn of datasets that a run, given by its folder or a checkpoint, was trained on; those with splits are not."""
    if isinstance(model, Run):
        model = model.folder
    folder = run_of(model) if isinstance(model, str | Path) else None
    if folder is None:
        return
    try:
        names = pair_names(moved_lists(load_recipe(folder / RECIPE), folder))
    except UserError:  # not the recipe of a run: nothing is known of its pairs
        return
    for dataset in datasets:
        has_splits = len(dataset.openers) > 1 or dataset.split("test").splits()
        if absolute(dataset.name) in names and not has_splits:
            log.warning(f"'{folder}' was trained on pairs of '{dataset.name}': the results are too high. Give others.")
