"""Zero-shot classification: an image gets the class whose prompts are nearest."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from declip.evaluation.encode import USUAL, Batching, SourceFeatures, text_features
from declip.evaluation.results import ZeroShotResult, score
from declip.evaluation.retrieval import ranks
from declip.io.pool import pairs_bar
from declip.models.encoder import Encoder


def class_features(
    model: Encoder,
    class_names: Sequence[str],
    templates: Sequence[str],
    how: Batching = USUAL,
) -> Tensor:
    """CLIP's prompt ensemble (section 3.1.4): the normalized mean of each class's normalized templates, (C, d)."""
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    features = text_features(model, prompts, how)
    # (C · T, d) → (C, T, d) → (C, d)
    by_class = features.view(len(class_names), len(templates), -1)
    return normalize(by_class.mean(1), dim=-1)


def class_tokens(
    model: Encoder,
    scorer: Any,
    class_names: Sequence[str],
    templates: Sequence[str],
    how: Batching = USUAL,
) -> Tensor:
    """FILIP's prompt ensemble, (C, L, d): the mean of a class's words by position, divided by its Frobenius norm.

    At each position the mean is that of the prompts with a word there, as counted by `scorer.words`; otherwise 0.
    """
    alone = Batching(how.batch_size)
    at_once = max(1, how.batch_size // len(templates))
    starts = range(0, len(class_names), at_once)

    def encode_own() -> list[Tensor]:
        parts = []
        with pairs_bar(how.progress) as bar:
            for start in bar.track(how.share.own(starts), description="Texts"):
                some = class_names[start : start + at_once]
                prompts = [template.replace("{}", name) for name in some for template in templates]
                words = text_features(model, prompts, alone, encode=scorer.words)
                # (c · T, L, d) → (c, T, L, d)
                words = words.unflatten(0, (len(some), len(templates)))
                counts = words.any(dim=3, keepdim=True).sum(dim=1)
                mean = words.sum(dim=1) / counts.clamp(min=1)
                parts.append(mean / mean.norm(dim=(1, 2), keepdim=True))
        return parts

    parts = how.share.gather_parts(encode_own)
    return torch.cat(list(chain(*parts)))


def classify(
    features: SourceFeatures,
    labels: np.ndarray,
    classes: Tensor | Sequence[str],
    *,
    templates: str = "plain",
) -> ZeroShotResult:
    """Compute top-1, top-5 and mean per class of rows with `labels` (n,), by the text features of the classes (C, d).

    For the names of the classes, the features are scores by tokens, (n, D), of the D distinct names in their order.
    Ties count against the model, as in `declip.evaluation.retrieval.ranks`.
    """
    labels = np.asarray(labels, dtype=np.int64)
    # Classes with the same name, such as the two "missile" in CLIP's list for ImageNet, have the same feature and are
    # one candidate: it is correct for the first of them, as with `argmax` over all classes, and never for the others.
    if isinstance(classes, Tensor):
        distinct, inverse = torch.unique(classes, dim=0, return_inverse=True)
        candidate = inverse.numpy()
    else:
        names = dict.fromkeys(classes)
        column = {name: number for number, name in enumerate(names)}
        distinct = None
        candidate = np.array([column[name] for name in classes])
    namesakes_before = np.array(
        [(candidate[:label] == own).sum() for label, own in enumerate(candidate)]
    )
    correct = candidate[labels][:, None]
    rank = ranks(features.images, distinct, correct)
    rank += namesakes_before[labels]
    return ZeroShotResult(
        dataset=features.name,
        n=len(labels),
        classes=len(classes),
        top1=float((rank <= 1).mean()),
        top5=float((rank <= 5).mean()),
        mean_per_class=score(rank <= 1, labels, "mean_per_class"),
        templates=templates,
        majority=float(np.bincount(labels).max() / len(labels)),
        by_tokens=distinct is None,
        skipped=dict(features.skipped.counts),
    )


def logit_scale(model: Encoder) -> float:
    """The factor of cosines before the softmax, exp(logit_scale); CLIP's final 100 for a model without one."""
    scale = model.logit_scale
    if scale is None:
        return 100.0
    return float(scale.detach().exp())
