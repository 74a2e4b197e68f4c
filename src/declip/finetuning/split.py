"""The training and validation parts of a fine-tuning's pairs."""

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from declip.data.columns import Columns
from declip.data.pair import BrokenPair, PairSource
from declip.data.sources.names import is_url
from declip.data.sources.open import Sources, open_source
from declip.data.sources.pair_list import NO_LISTS, Lists, list_of
from declip.data.sources.splits import splits_of, training_part
from declip.data.sources.subset import Subset
from declip.errors import UserError
from declip.evaluation.datasets import Dataset
from declip.evaluation.held_out import HeldOutSets
from declip.finetuning.request import Request
from declip.inspection.split import FEWEST, check_copies, split_pairs
from declip.io.text import plural
from declip.recipe.schema import Recipe
from declip.runs.folder import SPLIT, log
from declip.training.pairs import open_training_source, pair_names, recipe_of, run_of

MOST_SEEN = 200_000  # training pairs of the start that are compared with new ones: 1,000 a second


class Split(NamedTuple):
    """Training pairs and validation sets of a fine-tuning."""

    train: PairSource
    name: str  # of the training pairs in the recipe
    val: tuple[str, ...]
    sources: Sources  # that are open, by the names in the recipe
    held_out: HeldOutSets
    lists: Lists = NO_LISTS  # both parts, if the pairs were split


def choose_pairs(
    request: Request, recipe: Recipe, folder: Path, progress: bool, sources: Sources
) -> Split:
    """Choose the training pairs and validation sets; a split has the names of its lists in the run folder.

    Pairs that the weights of the recipe were trained on are not validated on. Cross-validation measures heads in
    closed form, so nothing is split off for them.
    """
    pairs = request.pairs
    columns = Columns.of(recipe.data)
    seen = pairs_of(str(recipe.finetune.pretrained))
    source = open_source(pairs, columns, sources)
    train = training_part(source)
    held_out = HeldOutSets(recipe.data, sources)
    unsplit = Split(train, pairs, request.val, {**sources, pairs: source}, held_out)
    if request.val:
        validated = list(map(held_out.test, request.val))
        check_copies(train, validated, progress)
        if seen is not None:
            check_copies(seen, validated, progress)
        return unsplit
    if "validation" not in splits_of(source) and len(train) < FEWEST:
        _check_few(train)
        return unsplit
    parts = split_pairs(source, progress=progress, seen=seen)
    own, val = names = [str(folder / name) for name in SPLIT]
    lists = {}
    opened = {}
    for name, part in zip(names, parts, strict=True):
        lists[name] = list_of(pairs, columns, source, part)
        opened[name] = Subset(source, part)
    held_out.opened[val] = Dataset(val, {"test": lambda: opened[val]})
    return Split(opened[own], own, (val,), {**sources, **opened}, held_out, lists)


def open_lists(lists: Lists, sources: Sources) -> Sources:
    """Add the pairs of lists, which rank 0 may not have written yet, to sources by their paths."""
    if not lists:
        return sources
    first = next(iter(lists.values()))
    whole = open_source(first.source, first.columns, sources)
    opened = {path: listed.of(whole, Path(path)) for path, listed in lists.items()}
    return {**sources, **opened}


def pairs_of(weights: str) -> PairSource | None:
    """The training pairs of a run that is the start, if they can be compared with new ones.

    The run may be a stranger's: pairs at an address are not opened, which would tell who tries it.
    """
    folder = run_of(weights)
    if folder is None:
        return None
    try:
        recipe = recipe_of(folder)
        if any(is_url(name) for name in pair_names(recipe.data.source)):
            return None
        source = open_training_source(recipe.data, recipe.seed)
    except UserError as error:
        log.warning(
            f"The pairs that '{weights}' was trained on cannot be compared with yours: {error}"
        )
        return None
    if source.remote or len(source) > MOST_SEEN:
        return None
    return source


def _check_few(source: PairSource) -> None:
    """Refuse pairs that teach nothing, and warn that there is no validation part."""
    captions = set[str]()
    for index in range(len(source)):
        with suppress(BrokenPair):  # refused later
            captions.update(source[index].captions())
    if len(captions) == 1 < len(source):
        raise UserError(f"All pairs of '{source.name}' have the same caption. Describe each image.")
    log.warning(
        f"'{source.name}' has {plural(len(source), 'pair')}: too few for a validation part ({FEWEST}), so all are "
        "trained on and nothing is measured. Give other pairs with --val to measure."
    )
