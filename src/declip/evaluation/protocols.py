"""Measuring a model on a source by one protocol, or by several that share the features."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from declip.data.pairs import PairSource
from declip.errors import UserError, unknown
from declip.evaluation.datasets import open_dataset, templates_of, with_classes
from declip.evaluation.features import Encoder, SourceFeatures, encode_source
from declip.evaluation.results import Result, RetrievalResult, ZeroShotResult
from declip.evaluation.retrieval import SameCaption, retrieve
from declip.evaluation.zero_shot import class_features, classify, read_templates


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        templates: Zero-shot: name of a shipped set, a template, or several; None takes the source's own set.
        same_caption: Retrieval: see `declip.evaluation.retrieval.retrieve`.
        batch: Images and texts a pass.
        workers: Processes that read images; 0 reads in this one.
        progress: Show a bar for what takes long.
    """

    templates: str | Sequence[str] | None = None
    same_caption: SameCaption = "wrong"
    batch: int = 256
    workers: int = 0
    progress: bool = True


def _zero_shot(model: Encoder, source: PairSource, features: SourceFeatures, options: Options) -> ZeroShotResult:
    classes = with_classes(source)
    name, templates = read_templates(options.templates or templates_of(source))
    texts = class_features(model, classes.class_names, templates, batch=options.batch, progress=options.progress)
    return classify(features, classes.labels[features.indices], texts, templates=name)


def _retrieval(model: Encoder, source: PairSource, features: SourceFeatures, options: Options) -> RetrievalResult:
    return retrieve(features, same_caption=options.same_caption)


PROTOCOLS: Mapping[str, Callable[[Encoder, PairSource, SourceFeatures, Options], Result]] = {
    "zero-shot": _zero_shot,
    "retrieval": _retrieval,
}


def evaluate(
    model: Encoder,
    on: str | PairSource,
    protocol: str = "zero-shot",
    *,
    templates: str | Sequence[str] | None = None,
    same_caption: SameCaption = "wrong",
    batch: int = 256,
    workers: int = 0,
    progress: bool = True,
) -> Result:
    """Measure a model on held-out pairs.

    Pairs that cannot be read are left out, counted by reason, and named in the result.

    Args:
        model: Anything with `encode_image`, `encode_text`, `preprocess` and `tokenize`.
        on: A source, or what `declip.data.sources.open_source` opens.
        protocol: "zero-shot" or "retrieval".
        templates: Zero-shot: name of a shipped set, a template, or several; None takes the source's own set.
        same_caption: Retrieval: whether a caption that another image carries too counts for that image,
            "right", or only for its own, "wrong" (the usual practice).
        batch: Images and texts a pass.
        workers: Processes that read images; 0 reads in this one.
        progress: Show a bar for what takes long.

    Returns:
        The numbers with n and chance: a `ZeroShotResult` or a `RetrievalResult`.

    Raises:
        UserError: unknown protocol, source or templates, a source without what the protocol needs, or one of
            which nothing can be read.
    """
    options = Options(templates, same_caption, batch, workers, progress)
    return evaluate_all(model, on, (protocol,), options)[0]


def evaluate_all(
    model: Encoder, on: str | PairSource, protocols: Sequence[str], options: Options | None = None
) -> list[Result]:
    """Measure by several protocols; the images are read and encoded once.

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
    options = options or Options()
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            raise unknown("protocol", protocol, PROTOCOLS)
    if not protocols:
        raise UserError(f"No protocol was given. Known: {', '.join(sorted(PROTOCOLS))}.")
    source = open_dataset(on)
    if "zero-shot" in protocols:
        with_classes(source)
        read_templates(options.templates or templates_of(source))
    features = encode_source(
        model,
        source,
        texts="retrieval" in protocols,
        batch=options.batch,
        workers=options.workers,
        progress=options.progress,
    )
    return [PROTOCOLS[protocol](model, source, features, options) for protocol in protocols]
