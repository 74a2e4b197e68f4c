"""Held-out sets by their names, and the protocols that measure them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from declip.data.columns import DEFAULT, Columns, MissingColumns
from declip.data.pair import BrokenPair, PairSource
from declip.data.sources.open import NO_SOURCES, Sources
from declip.errors import UserError
from declip.evaluation.datasets import Dataset, open_dataset
from declip.evaluation.encode import ALONE, Share
from declip.evaluation.protocols import Options, evaluate_all
from declip.evaluation.results import Result
from declip.models.encoder import Encoder
from declip.recipe.schema import Data, Evaluation

FIRST = 64  # pairs that are asked for a caption


class HeldOutSets:
    """The held-out sets of a run by their names in its recipe; each is opened once, when it is first used."""

    def __init__(self, data: Data, sources: Sources = NO_SOURCES) -> None:
        self.pairs = Columns.of(data)
        self.sources = sources
        self.opened = dict[str, Dataset]()

    def dataset(self, name: str) -> Dataset:
        """Open a set by the columns of the recipe's pairs or, where it lacks one, the usual names."""
        if name not in self.opened:
            self.opened[name] = self._open(name)
        return self.opened[name]

    def test(self, name: str) -> PairSource:
        """The test split of a set."""
        return self.dataset(name).split("test")

    def tasks(self, wanted: Evaluation, final: bool) -> dict[str, list[str]]:
        """Map each dataset that a recipe evaluates on, at the end or during training, to its protocols."""
        tasks = self.tasks_to_keep(wanted) if final else {}
        listed = [("zero-shot", wanted.zero_shot), ("retrieval", wanted.retrieval)]
        if final:
            listed += [("zero-shot", wanted.final_zero_shot), ("retrieval", wanted.final_retrieval)]
        for protocol, names in listed:
            for name in names:
                if protocol not in tasks.setdefault(name, []):
                    tasks[name].append(protocol)
        return tasks

    def tasks_to_keep(self, wanted: Evaluation) -> dict[str, list[str]]:
        """Map the sets of `evaluation.keep` to their protocols: retrieval with captions, else zero-shot."""
        return {
            name: ["retrieval" if self.captioned(name) else "zero-shot"] for name in wanted.keep
        }

    def by_task(self, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Sets by the key of the task that they allow: "zero_shot" with classes, "retrieval" with captions."""
        classes = tuple(name for name in names if "label" in self.test(name).columns)
        captions = tuple(name for name in names if self.captioned(name))
        for name in names:
            if name not in {*classes, *captions}:
                raise UserError(
                    f"'{name}' has neither classes nor captions, so it can't be a held-out set."
                )
        return {"zero_shot": classes, "retrieval": captions}

    def captioned(self, name: str) -> bool:
        """Whether any of a set's first pairs has a caption other than the name of its class, for retrieval."""
        source = self.test(name)
        labels = source.columns.get("label")
        for index in range(min(FIRST, len(source))):
            with suppress(BrokenPair):
                captions = source[index].captions()
                names = source.class_names
                if labels is None or names is None or captions != (names[labels[index]],):
                    return True
        return False

    def measure(
        self,
        model: Encoder,
        tasks: Mapping[str, list[str]],
        progress: bool,
        workers: int = 0,
        share: Share = ALONE,
    ) -> Iterator[Result]:
        """Evaluate a model on sets by their protocols, see `tasks`; every process of a run gets all results.

        Args:
            workers: Processes that read the images of this process's share.
        """
        options = Options(workers=workers, progress=progress, share=share)
        for name, protocols in tasks.items():
            yield from evaluate_all(model, self.dataset(name), protocols, options)

    def _open(self, name: str) -> Dataset:
        given = replace(self.pairs, group=None)
        # The folder of the images applies only if their column was named.
        if given.image == DEFAULT.image:
            given = replace(given, root=None)
        try:
            return open_dataset(name, columns=given, sources=self.sources)
        except MissingColumns as error:
            names = {what: getattr(DEFAULT, what) for what in error.missing.values()}
            usual = replace(given, **names)
            if usual.image != given.image:
                usual = replace(usual, root=None)
            with suppress(MissingColumns):
                return open_dataset(name, columns=usual, sources=self.sources)
            raise
