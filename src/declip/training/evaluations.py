"""The evaluations of a run: which sets, by which protocols."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace

from declip.data.columns import DEFAULT, Columns, MissingColumns
from declip.data.pair import BrokenPair, PairSource
from declip.data.sources.open import NO_SOURCES, Sources
from declip.evaluation.datasets import Dataset, open_dataset
from declip.evaluation.encode import Encoder
from declip.evaluation.protocols import Options, evaluate_all
from declip.evaluation.results import Result
from declip.recipe.schema import Recipe

FIRST = 64  # pairs that are asked for a caption


def evaluation_tasks(recipe: Recipe, final: bool, sources: Sources = NO_SOURCES) -> dict[str, list[str]]:
    """Map each dataset that a recipe evaluates on, at the end or during training, to its protocols."""
    wanted, tasks = recipe.evaluation, tasks_to_keep(recipe, sources) if final else {}
    ends = (("zero-shot", wanted.final_zero_shot), ("retrieval", wanted.final_retrieval)) if final else ()
    for protocol, names in (("zero-shot", wanted.zero_shot), ("retrieval", wanted.retrieval), *ends):
        for name in names:
            if protocol not in tasks.setdefault(name, []):
                tasks[name].append(protocol)
    return tasks


def open_held_out(name: str, recipe: Recipe, sources: Sources = NO_SOURCES) -> Dataset:
    """Open a held-out set by the columns of a recipe's pairs or, where it lacks one, the usual names."""
    pairs = Columns.of(recipe.data)
    # The folder of the images applies if their column was named.
    given = replace(pairs, group=None, root=None if pairs.image == DEFAULT.image else pairs.root)
    try:
        return open_dataset(name, columns=given, sources=sources)
    except MissingColumns as error:
        usual = replace(given, **{what: getattr(DEFAULT, what) for what in error.missing.values()})
        usual = usual if usual.image == given.image else replace(usual, root=None)
        with suppress(MissingColumns):
            return open_dataset(name, columns=usual, sources=sources)
        raise


def measure(
    model: Encoder, recipe: Recipe, tasks: Mapping[str, list[str]], progress: bool, sources: Sources = NO_SOURCES
) -> Iterator[Result]:
    """Evaluate a model on datasets of a recipe by their protocols, see `evaluation_tasks`."""
    for name, protocols in tasks.items():
        dataset = open_held_out(name, recipe, sources)
        yield from evaluate_all(model, dataset, protocols, Options(progress=progress))


def has_captions(source: PairSource) -> bool:
    """Whether any of the first pairs has a caption other than the name of its class, for retrieval."""
    for index in range(min(FIRST, len(source))):
        with suppress(BrokenPair):
            captions, names = source.captions(index), source.class_names
            if source.labels is None or names is None or captions != (names[source.labels[index]],):
                return True
    return False


def tasks_to_keep(recipe: Recipe, sources: Sources = NO_SOURCES) -> dict[str, list[str]]:
    """Map the sets of `evaluation.keep` to their protocols: retrieval with captions, else zero-shot."""
    sets = {name: open_held_out(name, recipe, sources).split("test") for name in recipe.evaluation.keep}
    return {name: ["retrieval" if has_captions(source) else "zero-shot"] for name, source in sets.items()}
