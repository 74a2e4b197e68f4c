"""Examples of retrieval on a held-out set, for a page."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from declip.data.images.thumbnails import thumbnails_of
from declip.data.pair import PairSource
from declip.errors import UserError
from declip.evaluation.encode import SourceFeatures, encode_source
from declip.evaluation.retrieval import carriers_of, ranks
from declip.models.encoder import Encoder

SHOWN = 5  # candidates of a query
log = logging.getLogger("declip")


def retrieval_section(
    open_source: Callable[[], PairSource] | None,
    model: Encoder,
    credit: str | None,
    limit: int = 4_000,
) -> dict[str, Any]:
    """Values of the template: examples from up to `limit` pairs of a set, if there is one, and credits of all images.

    A set that cannot be read is left out with a warning.
    """
    credits = [credit]
    encoded = retrieved = None
    try:
        if open_source is not None:
            source = open_source()
            count = min(limit, len(source))
            rows = np.linspace(0, len(source) - 1, count).round()
            features = encode_source(model, source, indices=rows.astype(np.int64))
            encoded = {"source": source, "features": features}
    except UserError as error:
        log.warning("The report shows no retrieved images: %s", error)
    if encoded is not None:
        retrieved = retrieval(source, features)
        credits.append(source.credit)
    return {
        "held_out": encoded,
        "retrieved": retrieved,
        "credits": list(dict.fromkeys(filter(None, credits))),
    }


def retrieval(
    source: PairSource, features: SourceFeatures, each: int = 4
) -> tuple[list[dict[str, Any]], float]:
    """Pick random captions, `each` of those that rank their image first and of the others, with the nearest images.

    Returns:
        The captions, each with its nearest images and the rank of the first correct one, and the fraction of all
        captions that rank their image first. An image is correct if it has the caption.
    """
    assert features.texts is not None
    rng = np.random.default_rng(0)
    thumbnails = thumbnails_of(source)
    captions = features.flat_captions
    carriers = carriers_of(features)
    correct = [carriers[caption] for caption in captions]
    rank = ranks(features.texts, features.images, correct)
    # --- random captions of distinct images, first those that rank their image first
    chosen: dict[int, int] = {}  # image → one of its captions
    for group in (np.flatnonzero(rank == 1), np.flatnonzero(rank > 1)):
        by_image = dict[int, int]()
        for row in rng.permutation(group).tolist():
            by_image[int(features.image_rows[row])] = row
        others = [image for image in by_image if image not in chosen]
        chosen |= {image: by_image[image] for image in others[:each]}
    # --- the nearest images of each
    queries = []
    for row in chosen.values():
        similarities = features.images @ features.texts[row]
        nearest = similarities.topk(min(SHOWN, len(features))).indices
        hits = []
        for i in nearest.tolist():
            image = thumbnails(int(features.indices[i]))
            caption = features.captions[i][0]
            hits.append({"caption": caption, "image": image, "correct": i in correct[row]})
        queries.append({"caption": captions[row], "hits": hits, "rank": int(rank[row])})
    return queries, float(np.mean(rank == 1))
