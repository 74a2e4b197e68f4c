"""Zero-shot classification: the class whose name, put into sentences, is nearest to the image."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from declip.errors import UserError
from declip.evaluation.encode import Encoder, SourceFeatures, text_features
from declip.evaluation.probes.data import score
from declip.evaluation.prompt_sets import read_prompts
from declip.evaluation.results import ZeroShotResult
from declip.evaluation.retrieval import BLOCK, ranks


def read_templates(templates: str | Sequence[str]) -> tuple[str, list[str]]:
    """Look templates up by name, or take them as given.

    Args:
        templates: Name of a shipped set, one template, or several; ``{}`` stands where the class name goes.

    Returns:
        A name for the result, and the templates.
    """
    if isinstance(templates, str) and "{}" not in templates:
        return templates, list(read_prompts(templates).templates)
    given = [templates] if isinstance(templates, str) else list(templates)
    wrong = [template for template in given if "{}" not in template]
    if wrong or not given:
        problem = f"'{wrong[0]}' has none" if wrong else "there is no template"
        raise UserError(
            f"A template needs {{}} where the class name goes, but {problem}. Example: 'a drawing of {{}}'."
        )
    return " | ".join(given), given


def class_features(
    model: Encoder,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    batch_size: int = 256,
    progress: bool = False,
) -> Tensor:
    """Encode each class as the normalized mean of its normalized templates: (C, d) float32 on the CPU.

    This is CLIP's prompt ensemble (Radford et al. 2021, section 3.1.4).
    """
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    features = text_features(model, prompts, batch_size=batch_size, progress=progress)
    return normalize(features.view(len(class_names), len(templates), -1).mean(1), dim=-1)


def classify(
    features: SourceFeatures,
    labels: np.ndarray,
    classes: Tensor,
    *,
    templates: str = "plain",
    block: int = BLOCK,
) -> ZeroShotResult:
    """Measure top-1, top-5 and the mean per class.

    Ties count against the model, as in `declip.evaluation.retrieval.ranks`. Classes of the same name, such as
    ImageNet's two "missile" in CLIP's published list, have the same feature and are one candidate: it stands for the
    first of them, as `argmax` over all classes has it, and the others are never right.

    Args:
        labels: (n,) int, the class of each row of `features`.
        classes: (C, d) the classes' text features.
    """
    labels = np.asarray(labels, dtype=np.int64)
    outside = labels[(labels < 0) | (labels >= len(classes))]
    if len(outside):
        raise UserError(
            f"'{features.name}' has the label {outside[0]}, but its {len(classes)} class names are numbered "
            f"0 to {len(classes) - 1}. Fix the labels or give a name for every class."
        )
    distinct, candidate, namesakes_before = _distinct(classes)
    right = [candidate[label : label + 1] for label in labels]
    rank = ranks(features.images, distinct, right, block=block) + namesakes_before[labels]
    first = rank <= 1
    return ZeroShotResult(
        dataset=features.name,
        n=len(labels),
        classes=len(classes),
        top1=float(first.mean()),
        top5=float((rank <= 5).mean()),
        mean_per_class=score(first, labels, "mean_per_class"),
        templates=templates,
        majority=float(np.bincount(labels).max() / len(labels)),
        skipped=dict(features.skipped.counts),
    )


def _distinct(classes: Tensor) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """The distinct rows; for each class its index among them, and the number of earlier classes with the same row."""
    distinct, index = torch.unique(classes, dim=0, return_inverse=True)
    seen: Counter[int] = Counter()
    before = []
    for candidate in index.tolist():
        before.append(seen[candidate])
        seen[candidate] += 1
    return distinct, index.numpy(), np.array(before, dtype=np.int64)


def predict(images: Tensor, classes: Tensor, count: int = 1, *, block: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest classes (C, d) of each image (n, d), best first; both are L2-normalized.

    Returns:
        Class indices (n, count) int64 and cosines (n, count) float32.
    """
    rows = max(1, block // len(classes))
    best = [torch.topk(part @ classes.T, min(count, len(classes))) for part in images.split(rows)]
    return torch.cat([top.indices for top in best]).numpy(), torch.cat([top.values for top in best]).numpy()
