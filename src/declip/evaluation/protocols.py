"""Measuring a model on a set by one protocol, or by several that share the features."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

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
    """How to measure.

    Attributes:
        templates: Zero-shot: name of a shipped set, a template, or several; None takes the set's own.
        same_caption: Retrieval: see `declip.evaluation.retrieval.retrieve`.
        batch: Images and texts a pass.
        workers: Processes that read images; 0 reads in this one.
        progress: Show a bar for what takes long.
        features: Probes: "backbone", before the projection, or "embedding", after it.
        shots: Few-shot: numbers of images a class.
        seeds: Few-shot: how many draws.
        cache: Probes: keep the features on the disk and find them there again; see `FeatureCache`.
    """

    templates: str | Sequence[str] | None = None
    same_caption: SameCaption = "wrong"
    batch: int = 256
    workers: int = 0
    progress: bool = True
    features: FeatureKind = "backbone"
    shots: Sequence[int] = SHOTS
    seeds: int = SEEDS
    cache: bool = True


@dataclass(frozen=True)
class Room:
    """A model and a set, and what several protocols share of them, made when the first one asks.

    Attributes:
        model: What is measured.
        dataset: What it is measured on.
        options: How.
        texts: Whether the test split's captions are encoded too.
    """

    model: Encoder
    dataset: Dataset
    options: Options
    texts: bool

    @cached_property
    def test(self) -> SourceFeatures:
        """The test split, projected and normalized."""
        options = self.options
        features = encode_source(
            self.model,
            self.dataset.split("test"),
            texts=self.texts,
            batch=options.batch,
            workers=options.workers,
            progress=options.progress,
        )
        # A source knows its file's name only, which another set may have too.
        return replace(features, name=self.dataset.name)

    @cached_property
    def splits(self) -> ProbeData:
        """All splits with their labels, for probes."""
        options = self.options
        cache = FeatureCache(
            self.model,
            options.features,
            enabled=options.cache,
            batch=options.batch,
            workers=options.workers,
            progress=options.progress,
        )
        with measuring(self.model) as device:
            # Apple's devices have no float64, which the solver sums in.
            return read_probe_data(self.dataset, cache, "cpu" if device.type == "mps" else device)


@dataclass(frozen=True)
class Protocol:
    """A way to measure.

    Attributes:
        check: Raises a `UserError` where it cannot be done, before anything is encoded.
        measure: Does it.
    """

    check: Callable[[Room], None]
    measure: Callable[[Room], Result]


def _check_zero_shot(room: Room) -> None:
    with_classes(room.dataset.split("test"))
    read_templates(room.options.templates or room.dataset.templates)


def _zero_shot(room: Room) -> ZeroShotResult:
    classes, options = with_classes(room.dataset.split("test")), room.options
    name, templates = read_templates(options.templates or room.dataset.templates)
    texts = class_features(room.model, classes.class_names, templates, batch=options.batch, progress=options.progress)
    return classify(room.test, classes.labels[room.test.indices], texts, templates=name)


def _retrieval(room: Room) -> RetrievalResult:
    return retrieve(room.test, same_caption=room.options.same_caption)


def _check_probe(room: Room, *, protocol: str, chooses: bool) -> None:
    encoder_of(room.model, room.options.features)
    check_probe(room.dataset, protocol, chooses=chooses)


PROTOCOLS: Mapping[str, Protocol] = {
    "zero-shot": Protocol(_check_zero_shot, _zero_shot),
    "retrieval": Protocol(lambda room: None, _retrieval),
    "linear": Protocol(
        partial(_check_probe, protocol="a linear probe", chooses=True), lambda room: linear_probe(room.splits)
    ),
    "knn": Protocol(
        partial(_check_probe, protocol="a nearest-neighbor probe", chooses=False), lambda room: knn_probe(room.splits)
    ),
    "few-shot": Protocol(
        partial(_check_probe, protocol="a few-shot probe", chooses=True),
        lambda room: few_shot_probe(room.splits, room.options.shots, room.options.seeds),
    ),
}


def evaluate(
    model: Encoder,
    on: str | PairSource | Dataset,
    protocol: str = "zero-shot",
    *,
    templates: str | Sequence[str] | None = None,
    same_caption: SameCaption = "wrong",
    batch: int = 256,
    workers: int = 0,
    progress: bool = True,
    features: FeatureKind = "backbone",
    shots: Sequence[int] = SHOTS,
    seeds: int = SEEDS,
    cache: bool = True,
    label_column: str | None = None,
) -> Result:
    """Measure a model on held-out images.

    The number is that of the test split; probes learn from the train and validation splits. Images that cannot be
    read are left out, counted by reason, and named in the result.

    Args:
        model: Anything with `encode_image`, `encode_text`, `preprocess` and `tokenize`; for probes of the backbone
            also `encode_backbone`.
        on: A set, a source, or what `declip.evaluation.datasets.open_dataset` opens.
        protocol: "zero-shot", "retrieval", "linear", "knn" or "few-shot".
        templates: Zero-shot: name of a shipped set, a template, or several; None takes the set's own.
        same_caption: Retrieval: whether a caption that another image carries too counts for that image,
            "right", or only for its own, "wrong" (the usual practice).
        batch: Images and texts a pass.
        workers: Processes that read images; 0 reads in this one.
        progress: Show a bar for what takes long.
        features: Probes: "backbone", before the projection, or "embedding", after it.
        shots: Few-shot: numbers of images a class.
        seeds: Few-shot: how many draws.
        cache: Probes: keep the features on the disk, in the cache folder, and find them there again.
        label_column: A table's column that holds the classes; None takes the one that is named as such.

    Returns:
        The numbers with n and chance, of the protocol's own type in `declip.evaluation.results` or
        `declip.evaluation.probes.results`.

    Raises:
        UserError: unknown protocol, set or templates, a set without what the protocol needs, or one of which
            nothing can be read.
    """
    options = Options(templates, same_caption, batch, workers, progress, features, shots, seeds, cache)
    opened = open_dataset(on, label_column=label_column)
    return evaluate_all(model, opened, (protocol,), options)[0]


def evaluate_all(
    model: Encoder,
    on: str | PairSource | Dataset,
    protocols: Sequence[str],
    options: Options | None = None,
) -> list[Result]:
    """Measure by several protocols; what they share is read and encoded once.

    Args:
        model: As for `evaluate`.
        on: As for `evaluate`.
        protocols: Names of `PROTOCOLS`.
        options: How to measure.

    Returns:
        A result for each protocol, in the order given.

    Raises:
        UserError: as `evaluate`, before anything is encoded where that is possible.
    """
    return evaluate_sets(model, (on,), protocols, options)


def evaluate_sets(
    model: Encoder,
    sets: Sequence[str | PairSource | Dataset],
    protocols: Sequence[str],
    options: Options | None = None,
) -> list[Result]:
    """Measure on several sets by several protocols; all sets are checked before the first is encoded.

    Args:
        model: As for `evaluate`.
        sets: Each as `on` of `evaluate`.
        protocols: Names of `PROTOCOLS`.
        options: How to measure.

    Returns:
        The results of the first set in the order of the protocols, then those of the next.

    Raises:
        UserError: as `evaluate`, or a set is given twice.
    """
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            raise unknown("protocol", protocol, PROTOCOLS)
    if not protocols:
        raise UserError(f"No protocol was given. Known: {', '.join(sorted(PROTOCOLS))}.")
    rooms: dict[str, Room] = {}
    for on in sets:
        room = Room(model, open_dataset(on), options or Options(), texts="retrieval" in protocols)
        if room.dataset.name in rooms:
            raise UserError(f"'{room.dataset.name}' is given twice to measure on. Name each set once.")
        for protocol in protocols:
            PROTOCOLS[protocol].check(room)
        rooms[room.dataset.name] = room
    results = []
    for room in rooms.values():
        own = replace(room)  # so that a set's features go when it is done
        results += [PROTOCOLS[protocol].measure(own) for protocol in protocols]
    return results
