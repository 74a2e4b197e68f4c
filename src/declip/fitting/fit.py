"""Fit heads between frozen towers in closed form: no steps, no batches, no validation part.

Every caption of every pair is used, on one plain view of its image; cross-validation measures and
chooses.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from declip.closed_form.choice import Choice, choose_heads
from declip.closed_form.estimates import group_mean
from declip.closed_form.growth import growth
from declip.closed_form.heads import Heads
from declip.closed_form.mixing import mixed_choices
from declip.closed_form.pairs import ClassPairs, FitData
from declip.closed_form.ranks import HeldOutRanks
from declip.closed_form.related import choose_neighbors
from declip.closed_form.solve import START
from declip.data.pair import PairSource
from declip.data.sources.open import open_source
from declip.data.sources.python_items import Items
from declip.evaluation.leakage import leaking_column
from declip.evaluation.zero_shot import logit_scale
from declip.fitting.adapted import Adapted
from declip.fitting.base import EncoderBase, base_of
from declip.fitting.pairs import PairFeatures, read_features
from declip.models.encoder import Encoder

MAX_BROKEN = 0.05  # fraction of broken pairs above which a fit is refused


@dataclass(frozen=True)
class Fitted:
    """Heads that were fitted to pairs, and what cross-validation says about them."""

    model: Adapted
    choice: Choice
    linear: Choice  # without neighbors
    features: PairFeatures
    source: PairSource
    classes: int  # of the base's classifier, which were pairs too
    seed: int

    def measures(self) -> dict[str, Any]:
        """The choice, and the measures of left-out pairs if there were enough, as JSON holds them."""
        features = self.features
        choice = self.choice
        neighbors = choice.heads.neighbors
        known: dict[str, Any] = {
            "pairs": len(features.pairs.images),
            "groups": len(np.unique(features.groups)),
            "captions": len(features.pairs.texts),
            "classes": self.classes,
            **choice.form._asdict(),  # method and ridge
            "class_weight": choice.class_weight,
            "neighbors": [0.0, 0.0] if neighbors is None else neighbors.weights.tolist(),
            "known_pairs": 0 if neighbors is None else len(neighbors.rows),
            "logit_scale": choice.logit_scale,
        }
        if choice.outcome is None:
            return known
        known |= _measure(choice, choice.outcome, features.groups)
        indices = features.image_indices
        images = features.pairs.images
        known["leaking"] = leaking_column(self.source, indices, images, features.groups)
        return known

    def curve(self) -> dict[str, Any]:
        """The measure with an eighth, a quarter, half and all of the pairs; see `growth`."""
        if self.choice.outcome is None:
            return {}
        return growth(self.linear).to_dict()

    def ranks(self) -> list[tuple[int, str, float]]:
        """The out-of-fold rank of each caption, 0 best and 1 worst, the worst first.

        Returns:
            Index of the pair in the source, caption, rank; empty if nothing was measured.
        """
        if self.choice.outcome is None:
            return []
        ranks = self.choice.outcome.fit
        rows = []
        for row in ranks.argsort(descending=True, stable=True).tolist():
            index = int(self.features.indices[row])
            rows.append((index, self.features.captions[row], float(ranks[row])))
        return rows

    def known(self) -> list[tuple[str, str]]:
        """Key and first caption of the pairs that an image is compared with, see `Neighbors`."""
        neighbors = self.choice.heads.neighbors
        if neighbors is None:
            return []
        owners = self.features.pairs.owners.numpy()
        firsts = np.searchsorted(owners, neighbors.rows)
        found = []
        for row in firsts.tolist():
            index = int(self.features.indices[row])
            key = self.source[index].key
            found.append((key, self.features.captions[row]))
        return found

    def mixtures(self, alphas: tuple[float, ...]) -> dict[float, "Fitted"]:
        """Heads of alpha · fitted + (1 - alpha) · start for each alpha, with their own ranks.

        Only 1.0 if the start stays, or if there were too few pairs to measure.
        """
        mixed = {}
        for alpha, choice in mixed_choices(self.linear, alphas).items():
            if alpha == 1:
                choice = self.choice
            model = _adapt(self.model.base, choice)
            mixed[alpha] = replace(self, model=model, choice=choice)
        return mixed

    @property
    def start(self) -> Adapted | None:
        """The model without any fitting; None if its base has neither projections nor classes."""
        base = self.model.base
        heads = self.choice.start_heads
        if base.projected:
            return _adapt(base, replace(self.choice, form=START))
        if heads is None:
            return None
        return Adapted(base, heads, self.choice.logit_scale)


def fit(
    pairs: str | Path | PairSource | Items,
    encoder: EncoderBase | Encoder,
    classes: ClassPairs | None = None,
    start: Heads | None = None,
    *,
    seed: int = 0,
    max_broken: float = MAX_BROKEN,
    progress: bool = False,
) -> Fitted:
    """Fit a model of your own to pairs in closed form: two matrices behind its embeddings.

    `finetune` does this with models that `load` reads, and writes a folder. Cross-validation
    chooses how far the matrices leave the embeddings as they are.

    Args:
        pairs: A table, a folder, or what else `open_source` opens.
        encoder: An object with `encode_image`, `encode_text`, `preprocess` and `tokenize`; or the
            towers of a model of declip, a `declip.fitting.base.Base`.
        classes: Classes of a classifier behind the towers, as pairs; not for an object.
        start: Heads of the classes alone, if they were computed before.
        seed: Of the folds of cross-validation.
        max_broken: Fraction of broken pairs above which a `UserError` is raised.

    Returns:
        Its `model` embeds, and `evaluate`, `embed` and `Index` take it; `measures()` has what
        cross-validation says about it, `ranks()` the captions that fit their images worst.

    Examples:
        >>> fitted = declip.fit("pairs.csv", declip.load("runs/demo"))
        >>> fitted.measures()["pairs"]
        8
        >>> declip.evaluate(fitted.model, "pairs.csv", "retrieval").images
        8
    """
    source = open_source(pairs)
    base = encoder if isinstance(encoder, EncoderBase) else base_of(encoder)
    features = read_features(source, base, max_broken, progress)
    known = features.pairs
    if known.images.shape[1] != known.texts.shape[1]:
        base.projected = False  # two spaces: there is no start that could be improved
    projected = base.projected
    data = FitData.of(known, features.groups, classes, one_space=projected, seed=seed)
    linear = choose_heads(data, start, keep_start=projected)
    choice = linear
    if not projected:  # trained projections lose up to 10 points with the neighbors of 31 pairs
        choice = choose_neighbors(linear, data)
    if choice.form == START:
        linear = choice
    count = 0
    if classes is not None:
        count = len(classes.rows)
    return Fitted(_adapt(base, choice), choice, linear, features, source, count, seed)


def _adapt(base: EncoderBase, choice: Choice) -> Adapted:
    """The model of a choice; projections of the base that are not improved stay as they are."""
    if base.projected and choice.form == START:
        return Adapted(base, None, logit_scale(base.model))
    return Adapted(base, choice.heads, choice.logit_scale)


def _measure(choice: Choice, outcome: HeldOutRanks, groups: np.ndarray) -> dict[str, Any]:
    """Measures of the heads, beside the same of the start or of chance."""
    own = outcome.percentiles().numpy()
    start = choice.start
    measures: dict[str, Any] = {"percentile": outcome.percentile(groups)._asdict()}
    before = np.full(len(own), 0.5)
    if start is not None:
        before = start.percentiles().numpy()
        measures["percentile_of_start"] = start.percentile(groups)._asdict()
    gain = group_mean(own - before, groups)
    measures |= {"gain": gain._asdict(), "better": gain.low > 0}
    # Recall depends on the number of candidates, and is near 1 for any heads among a few.
    candidates = round(float(outcome.images.double().mean()))
    recalls = {}
    for k in (1, 10):
        if k <= candidates / 5:
            estimate = outcome.recall(k, groups)._asdict()
            recalls[str(k)] = {**estimate, "chance": k / candidates}
    return {**measures, "candidates": candidates, "recall": recalls}
