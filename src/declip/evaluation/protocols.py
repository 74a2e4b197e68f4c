"""Evaluate a model on datasets by one task, or by several that share the features."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from declip.data.pair import PairSource
from declip.errors import UserError, unknown
from declip.evaluation.datasets import Dataset, open_dataset, with_classes
from declip.evaluation.encode import Encoder, SourceFeatures, encode_source, measuring
from declip.evaluation.feature_cache import FeatureCache, FeatureKind, encoder_of
from declip.evaluation.probes.data import ProbeData, check_probe, read_probe_data
from declip.evaluation.probes.few_shot import SEEDS, SHOTS, few_shot_probe
from declip.evaluation.probes.knn import knn_probe
from declip.evaluation.probes.linear import linear_probe
from declip.evaluation.results import Result, RetrievalResult, ZeroShotResult
from declip.evaluation.retrieval import SameCaption, retrieve
from declip.evaluation.zero_shot import class_features, classify, read_templates


@dataclass(frozen=True)
class Options:
    """Settings of an evaluation.

    Attributes:
        templates: Zero-shot: name of a shipped set, a template, or several; None takes the dataset's own.
        same_caption: Retrieval: whether a caption that another image carries too counts for that image, "right", or
            only for its own, "wrong" (the usual practice).
        batch_size: Images and texts per forward pass.
        workers: Processes that read images; 0 reads in this one.
        progress: Show a bar for what takes long.
        features: Probes: "backbone", before the projection, or "embedding", after it.
        shots: Few-shot: numbers of images per class.
        seeds: Few-shot: number of samples of these images.
        cache: Probes: keep the features on the disk and find them there again; see `FeatureCache`.
    """

    templates: str | Sequence[str] | None = None
    same_caption: SameCaption = "wrong"
    batch_size: int = 256
    workers: int = 0
    progress: bool = True
    features: FeatureKind = "backbone"
    shots: Sequence[int] = SHOTS
    seeds: int = SEEDS
    cache: bool = True

    @property
    def reading(self) -> dict[str, Any]:
        """The arguments of the functions that encode images."""
        return {"batch_size": self.batch_size, "workers": self.workers, "progress": self.progress}


@dataclass(frozen=True)
class SharedFeatures:
    """The features of a dataset that several tasks share, encoded when the first one asks."""

    model: Encoder
    dataset: Dataset
    options: Options
    texts: bool

    @cached_property
    def test(self) -> SourceFeatures:
        """The test split, projected and normalized."""
        features = encode_source(self.model, self.dataset.split("test"), texts=self.texts, **self.options.reading)
        # A source knows its file's name only, which another dataset may have too.
        return replace(features, name=self.dataset.name)

    @cached_property
    def splits(self) -> ProbeData:
        """All splits with their labels, for probes."""
        options = self.options
        cache = FeatureCache(self.model, options.features, enabled=options.cache, **options.reading)
        with measuring(self.model) as device:
            # Apple's devices have no float64, which the solver sums in.
            return read_probe_data(self.dataset, cache, "cpu" if device.type == "mps" else device)


@dataclass(frozen=True)
class Task:
    """A way to evaluate; `check` refuses a dataset or a model that does not suit, before anything is encoded."""

    check: Callable[[SharedFeatures], object]
    measure: Callable[[SharedFeatures], Result]


def _check_zero_shot(shared: SharedFeatures) -> None:
    with_classes(shared.dataset.split("test"))
    read_templates(shared.options.templates or shared.dataset.templates)


def _zero_shot(shared: SharedFeatures) -> ZeroShotResult:
    source, options = with_classes(shared.dataset.split("test")), shared.options
    name, templates = read_templates(options.templates or shared.dataset.templates)
    classes = class_features(
        shared.model, source.class_names, templates, batch_size=options.batch_size, progress=options.progress
    )
    return classify(shared.test, source.labels[shared.test.indices], classes, templates=name)


def _retrieval(shared: SharedFeatures) -> RetrievalResult:
    return retrieve(shared.test, same_caption=shared.options.same_caption)


def _probe(name: str, measure: Callable[[SharedFeatures], Result], chooses: bool = True) -> Task:
    def check(shared: SharedFeatures) -> None:
        encoder_of(shared.model, shared.options.features)
        check_probe(shared.dataset, name, chooses=chooses)

    return Task(check, measure)


TASKS: Mapping[str, Task] = {
    "zero-shot": Task(_check_zero_shot, _zero_shot),
    "retrieval": Task(lambda shared: None, _retrieval),
    "linear": _probe("a linear probe", lambda shared: linear_probe(shared.splits)),
    "knn": _probe("a nearest-neighbor probe", lambda shared: knn_probe(shared.splits), chooses=False),
    "few-shot": _probe(
        "a few-shot probe",
        lambda shared: few_shot_probe(shared.splits, shared.options.shots, shared.options.seeds),
    ),
}


def evaluate(
    model: Encoder,
    dataset: str | PairSource | Dataset,
    task: str = "zero-shot",
    *,
    label_column: str | None = None,
    **options: Any,
) -> Result:
    """Evaluate a model on the test split of a dataset; probes learn from its train and validation splits.

    Images that cannot be read are left out and counted by reason in the result.

    Args:
        model: Anything with `encode_image`, `encode_text`, `preprocess` and `tokenize`; for probes of the backbone
            also `encode_backbone`.
        dataset: A name or path that `declip.evaluation.datasets.open_dataset` opens, or an open dataset or source.
        task: "zero-shot", "retrieval", "linear", "knn" or "few-shot".
        label_column: A table's column with the classes; see `open_dataset`.
        options: Fields of `Options`, such as ``batch_size=64`` or ``templates="a photo of {}"``.

    Returns:
        The numbers with n and chance, in the task's own class of `declip.evaluation.results`.

    Raises:
        UserError: an unknown name, a dataset without what the task needs, or one of which nothing can be read.
    """
    opened = open_dataset(dataset, label_column=label_column)
    return evaluate_all(model, opened, (task,), Options(**options))[0]


def evaluate_all(
    model: Encoder, dataset: str | PairSource | Dataset, tasks: Sequence[str], options: Options | None = None
) -> list[Result]:
    """Evaluate by several tasks, in the order given; what they share is read and encoded once."""
    return evaluate_sets(model, (dataset,), tasks, options)


def evaluate_sets(
    model: Encoder,
    datasets: Sequence[str | PairSource | Dataset],
    tasks: Sequence[str],
    options: Options | None = None,
) -> list[Result]:
    """Evaluate on several datasets by several of `TASKS`; all are checked before the first is encoded.

    Returns:
        The results of the first dataset in the order of the tasks, then those of the next.

    Raises:
        UserError: as `evaluate`, or a dataset is given twice.
    """
    for task in tasks:
        if task not in TASKS:
            raise unknown("task", task, TASKS)
    if not tasks:
        raise UserError(f"No task was given. Known: {', '.join(sorted(TASKS))}.")
    checked: dict[str, SharedFeatures] = {}
    for dataset in datasets:
        shared = SharedFeatures(model, open_dataset(dataset), options or Options(), texts="retrieval" in tasks)
        if shared.dataset.name in checked:
            raise UserError(f"The dataset '{shared.dataset.name}' is given twice. Name each dataset once.")
        for task in tasks:
            TASKS[task].check(shared)
        checked[shared.dataset.name] = shared
    results = []
    for name in list(checked):
        shared = checked.pop(name)  # so that the features of a dataset are freed when it is done
        results += [TASKS[task].measure(shared) for task in tasks]
    return results
