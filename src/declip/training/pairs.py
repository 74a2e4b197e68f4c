"""The pairs of a run: training pairs and held-out sets are opened, and a sample is checked before the first step."""

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from declip.data.columns import Columns
from declip.data.pair import BrokenPair, PairSource
from declip.data.sources.checks import evenly_spaced
from declip.data.sources.names import absolute
from declip.data.sources.open import NO_SOURCES, Sources, open_source
from declip.data.sources.pair_list import LIST_KIND, read_pair_list
from declip.data.sources.splits import splits_of, training_part
from declip.data.sources.subset import Joined, take
from declip.errors import UserError
from declip.evaluation.datasets import Dataset, with_classes
from declip.evaluation.held_out import HeldOutSets
from declip.interchange.fitted import read_heads
from declip.recipe.schema import Data, Recipe
from declip.runs.fitted import FittedRun, fit_folder, is_fitted
from declip.runs.folder import RECIPE, Run, log, read_recipe

TRAINING = "training pairs"
MODEL_FOLDERS = ("checkpoints", "exported")  # of a run, with a folder of each model


def open_training_source(data: Data, seed: int, sources: Sources = NO_SOURCES) -> PairSource:
    """Open the training pairs, of a source with splits those of "train", limited to `data.max_pairs` by the seed."""
    names = [data.source] if isinstance(data.source, str) else data.source
    parts = [training_part(open_source(name, Columns.of(data), sources)) for name in names]
    source = parts[0] if isinstance(data.source, str) else Joined(parts)
    if data.columns.get("group") is not None and "group" not in source.columns:
        raise UserError(
            f"data.columns.group names a column of a table, which '{source.name}' is not. Leave it out."
        )
    if data.max_pairs is None:
        return source
    return take(source, data.max_pairs, seed)


def sample_hashes(
    source: PairSource, held_out: HeldOutSets, tasks: Mapping[str, list[str]]
) -> dict[str, list[str]]:
    """Open every held-out set, to find an unusable one before training, and hash it and the training pairs."""
    sets = {TRAINING: source}
    for name, protocols in tasks.items():
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
            pair = source[index]
            text = "\n".join((pair.key, *pair.captions()))
            digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        hashes.append(digest)
    return hashes


def run_of(weights: str | Path) -> Path | None:
    """Return the folder of the run that weights on this machine belong to, if they belong to one.

    Weights are the run folder itself, a folder in one of `MODEL_FOLDERS`, or a file there.
    """
    path = fit_folder(weights)
    if not path.exists():
        return None  # a name such as builtin:NAME or open_clip:MODEL/TAG
    path = path.absolute()
    folders = [path]
    for parent in (path.parent, path.parent.parent):
        if parent.name in MODEL_FOLDERS:
            folders.append(parent.parent)
    for folder in folders:
        if (folder / RECIPE).is_file() or is_fitted(folder):
            return folder
    return None


def recipe_of(folder: Path) -> Recipe:
    """The recipe of a run, or the settings of a fit, by its folder."""
    if is_fitted(folder):
        return read_heads(str(folder)).recipe
    return read_recipe(folder)


def pair_names(given: str | tuple[str, ...]) -> list[str]:
    """Return the names of sources; of a list of pairs, the source that it refers to. Opens no source."""
    if isinstance(given, str):
        given = (given,)
    names = []
    for name in given:
        path = Path(name).expanduser()
        if path.suffix == LIST_KIND and path.is_file():
            name = read_pair_list(path).source
        names.append(absolute(name))
    return names


def warn_of_training_pairs(model: object, datasets: Iterable[Dataset]) -> None:
    """Warn of datasets that a run, given by its folder or a checkpoint, was trained on; those with splits are not."""
    if isinstance(model, Run | FittedRun):
        model = model.folder
    folder = run_of(model) if isinstance(model, str | Path) else None
    if folder is None:
        return
    try:
        names = pair_names(recipe_of(folder).data.source)
    except UserError:  # not the recipe of a run: nothing is known of its pairs
        return
    for dataset in datasets:
        has_splits = len(dataset.openers) > 1 or splits_of(dataset.split("test"))
        if absolute(dataset.name) in names and not has_splits:
            log.warning(
                f"'{folder}' was trained on pairs of '{dataset.name}': the results are too high. Give others."
            )
