"""The held-out sets that a recipe evaluates on."""

from declip.data.pair import PairSource
from declip.evaluation.datasets import open_dataset, with_classes
from declip.recipe.schema import Recipe


def evaluation_tasks(recipe: Recipe, final: bool) -> dict[str, list[str]]:
    """Map each dataset that a recipe evaluates on, at the end or during training, to its protocols."""
    wanted, tasks = recipe.evaluation, dict[str, list[str]]()
    ends = (("zero-shot", wanted.final_zero_shot), ("retrieval", wanted.final_retrieval)) if final else ()
    for protocol, names in (("zero-shot", wanted.zero_shot), ("retrieval", wanted.retrieval), *ends):
        for name in names:
            if protocol not in tasks.setdefault(name, []):
                tasks[name].append(protocol)
    return tasks


def open_held_out(recipe: Recipe) -> dict[str, PairSource]:
    """Open the test split of every dataset that the recipe evaluates on, to find an unusable one before training."""
    sets = {}
    for name, protocols in evaluation_tasks(recipe, final=True).items():
        sets[name] = open_dataset(name).split("test")
        if "zero-shot" in protocols:
            with_classes(sets[name])
    return sets
