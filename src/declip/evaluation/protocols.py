"""Evaluate a model on datasets by one or more tasks, which share the features, and on the sets of a published table."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from declip.data.pair import PairSource
from declip.data.sources.subset import Subset
from declip.errors import UserError, check_range, unknown
from declip.evaluation.datasets import NAMED, Dataset, open_dataset, with_classes
from declip.evaluation.encode import (
    Batching,
    SourceFeatures,
    encode_images,
    encode_source,
    eval_mode,
)
from declip.evaluation.few_shot import Examples, fit_few_shot, joint_encoder
from declip.evaluation.linear_probe import check_probe, check_splits, linear_probe
from declip.evaluation.prompt_sets import read_templates
from declip.evaluation.readers import Classified
from declip.evaluation.results import (
    FewShotResult,
    LinearProbeResult,
    Result,
    RetrievalResult,
    ZeroShotResult,
    sample_per_class,
    score,
)
from declip.evaluation.retrieval import retrieve
from declip.evaluation.zero_shot import (
    class_features,
    class_tokens,
    classify,
    logit_scale,
)
from declip.models.encoder import Encoder, as_encoder
from declip.models.inference import chunked

DRAWS = 5  # of the images of few-shot classification

PREFIX = "paper11:"
SETS = (
    *("cifar10", "cifar100", "food101", "pets", "flowers102", "sun397"),
    *("cars", "dtd", "caltech101", "aircraft", "imagenet"),
)
"""Datasets of DeCLIP's paper. The folder has one folder per dataset, as for `NAME:PATH`: `pets` contains
`oxford-iiit-pet`, `cifar10` contains `cifar-10-batches-py`, `imagenet` contains `val`."""


@dataclass(frozen=True, kw_only=True)
class Options(Batching):
    """Settings of an evaluation."""

    progress: bool = True
    # Zero-shot: a shipped set or templates; None: those of the dataset
    templates: str | Sequence[str] | None = None
    shots: Sequence[int] = (4,)  # few-shot: numbers of images of a class

    def __post_init__(self) -> None:
        super().__post_init__()
        for number in self.shots:
            check_range("shots", number, 1)


DEFAULT = Options()


@dataclass(frozen=True)
class SharedFeatures:
    """The features of a dataset, encoded on first use and shared by all tasks."""

    model: Encoder
    dataset: Dataset
    options: Options
    texts: bool

    @cached_property
    def test(self) -> SourceFeatures:
        """Features of the test split, projected and normalized."""
        encode = encode_source if self.texts else encode_images
        features = encode(self.model, self.dataset.split("test"), self.options)
        return self._named(features)

    def linear(self) -> list[LinearProbeResult]:
        with eval_mode(self.model) as device:
            # MPS has no float64, which the solver needs.
            probing = "cpu" if device.type == "mps" else device
        backbone = self.model.encode_backbone
        assert backbone is not None, "`check_model` looked for it"
        encode = partial(chunked, backbone)
        before_projection = partial(self._images, encode=encode)
        return [linear_probe(self.dataset, before_projection, probing)]

    def zero_shot(self) -> list[ZeroShotResult]:
        source = with_classes(self.dataset.split("test"))
        options = self.options
        name, templates = read_templates(options.templates or self.dataset.templates)
        classes: Tensor | Sequence[str] = source.class_names
        scorer = self.model.token_scorer
        if scorer is None:
            classes = class_features(self.model, source.class_names, templates, options)
            features = self.test
        else:
            names = list(dict.fromkeys(source.class_names))
            tokens = class_tokens(self.model, scorer, names, templates, options)
            with eval_mode(self.model) as device:
                scores = partial(scorer.scores, classes=tokens.to(device))
            features = self._images(source, encode=partial(chunked, scores))
        labels = source.columns["label"][features.indices]
        return [classify(features, labels, classes, templates=name)]

    def retrieval(self) -> list[RetrievalResult]:
        source = self.dataset.split("test")
        features = self.test
        # retrieval also uses pairs without a class
        if isinstance(source, Classified) and source.captioned and source.broken:
            complete = Subset(source.source, source.indices)
            features = self._named(encode_source(self.model, complete, self.options))
        scale = None
        if self.model.logit_scale is not None:
            scale = logit_scale(self.model)
        return [retrieve(features, scale)]

    def few_shot(self) -> list[FewShotResult]:
        splits = check_splits(self.dataset, "few-shot")
        options = self.options
        train = splits["train"]
        test = splits["test"]
        # --- features of the images of all draws, of the test images and of the names
        labels = np.asarray(train.columns["label"], dtype=np.int64)
        draws = {
            n: [sample_per_class(labels, partial(min, n), seed) for seed in range(DRAWS)]
            for n in options.shots
        }
        encode, width = joint_encoder(self.model)
        every_draw = list(chain(*draws.values()))
        used = np.flatnonzero(np.any(every_draw, axis=0))
        seen = self._images(train, encode=encode, indices=used)
        tested = self._images(test, encode=encode)
        templates = read_templates(options.templates or self.dataset.templates)[1]
        names = class_features(self.model, test.class_names, templates, options)
        truth = test.columns["label"][tested.indices]

        def right(chosen: np.ndarray) -> np.ndarray:
            rows = np.flatnonzero(chosen[seen.indices])
            own = torch.from_numpy(labels[seen.indices[rows]])
            examples = Examples(seen.images[rows], own, names, width)
            head = fit_few_shot(examples)
            best = head.scores(tested.images).argmax(dim=1)
            return best.numpy() == truth

        # --- a classifier of the names, and one for each draw
        no_images = np.zeros(len(labels), bool)
        names_top1 = score(right(no_images), truth)
        results = list[FewShotResult]()
        for shots, several in draws.items():
            correct = [right(chosen) for chosen in several]
            top1 = [score(each, truth) for each in correct]
            per_class = [score(each, truth, "mean_per_class") for each in correct]
            result = FewShotResult(
                dataset=self.dataset.name,
                n=len(truth),
                classes=len(names),
                shots=shots,
                draws=DRAWS,
                top1=float(np.mean(top1)),
                mean_per_class=float(np.mean(per_class)),
                deviation=float(np.std(top1, ddof=1)),
                names_top1=names_top1,
                skipped=dict(Counter(seen.skipped.counts) + Counter(tested.skipped.counts)),
            )
            results.append(result)
        return results

    def _images(self, source: PairSource, **options: Any) -> SourceFeatures:
        return self._named(encode_images(self.model, source, self.options, **options))

    def _named(self, features: SourceFeatures) -> SourceFeatures:
        # A source only knows the name of its file, which another dataset may have too.
        return replace(features, name=self.dataset.name)


class Task(NamedTuple):
    """A way to evaluate."""

    run: Callable[[SharedFeatures], Sequence[Result]]
    check: Callable[[Dataset], object]  # raises `UserError` for a dataset that it cannot use
    prompted: bool = False  # whether it uses templates
    by_backbone: bool = False  # whether it needs features before the projection


TASKS: Mapping[str, Task] = {
    "zero-shot": Task(
        SharedFeatures.zero_shot, lambda dataset: with_classes(dataset.split("test")), prompted=True
    ),
    "retrieval": Task(SharedFeatures.retrieval, lambda dataset: None),
    "linear": Task(SharedFeatures.linear, check_probe, by_backbone=True),
    "few-shot": Task(
        SharedFeatures.few_shot, partial(check_splits, task="few-shot"), prompted=True
    ),
}


def check_dataset(dataset: Dataset, task: str, options: Options = DEFAULT) -> None:
    """Refuse an unknown task, a dataset that the task cannot use, or unknown templates."""
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    TASKS[task].check(dataset)
    if TASKS[task].prompted:
        read_templates(options.templates or dataset.templates)


def evaluate_all(
    model: object,
    datasets: str | PairSource | Dataset | list[Dataset],
    tasks: Sequence[str],
    options: Options = DEFAULT,
) -> list[Result]:
    """Evaluate on one or more datasets by one or more of `TASKS`.

    The model is one that `as_encoder` takes. All datasets are checked before the first one is encoded. Each image and
    text is encoded once for all tasks.
    """
    encoder = as_encoder(model)
    # --- every check first: encoding may take hours
    checked = list[SharedFeatures]()
    for dataset in datasets if isinstance(datasets, list) else [datasets]:
        shared = SharedFeatures(encoder, open_dataset(dataset), options, texts="retrieval" in tasks)
        if shared.dataset.name in {other.dataset.name for other in checked}:
            raise UserError(
                f"The dataset '{shared.dataset.name}' is given twice. Pass each dataset once."
            )
        for task in tasks:
            check_dataset(shared.dataset, task, options)
            if TASKS[task].by_backbone and encoder.encode_backbone is None:
                raise UserError(
                    f"{encoder.class_name} has no method `encode_backbone`, which the task '{task}' requires. Add it, "
                    "or choose the task 'zero-shot' or 'retrieval'."
                )
        checked.append(shared)
    # --- one dataset at a time
    results = list[Result]()
    while checked:
        shared = checked.pop(0)  # frees the features of each dataset after its evaluation
        for task in tasks:
            results += TASKS[task].run(shared)
    return results


def evaluate_suite(
    model: object, dataset: str, task: str = "zero-shot", options: Options = DEFAULT
) -> tuple[list[Result], dict[str, Any]]:
    """Evaluate a model on all datasets of ``paper11:FOLDER`` that are there, by "zero-shot" or "linear".

    Returns their results, and a row for JSON, where `values` has the usual metric of each and `missing` the others.
    """
    if task not in ("zero-shot", "linear"):
        raise unknown("task of paper11", task, ("zero-shot", "linear"))
    root = Path(dataset.removeprefix(PREFIX)).expanduser()
    results = dict[str, Result]()
    missing = dict[str, str]()
    for name in SETS:
        try:
            (results[name],) = evaluate_all(model, f"{name}:{root / name}", (task,), options)
        except UserError as error:
            missing[name] = str(error)  # not raised: earlier datasets may have taken hours
    if not results:
        raise UserError(
            f"No dataset of paper11 in '{root}' could be evaluated. " + " ".join(missing.values())
        )
    rows = dict[str, dict[str, Any]]()
    values = dict[str, float]()
    for name, result in results.items():
        metric = NAMED[name].metric
        rows[name] = {"metric": metric, **result.to_dict()}
        values[name] = rows[name][metric]
    summary = {
        "task": task,
        "average": fmean(values.values()),
        "values": values,
        "results": rows,
        "missing": missing,
    }
    return list(results.values()), summary
