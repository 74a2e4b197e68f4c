"""Text self-supervision: predicting the masked words of a caption (BERT's masked language modelling)."""

import torch.nn.functional as F
from torch import Tensor

from declip.data.batch import IGNORED
from declip.supervision.contrastive import to_float32


def chosen_rows(words: Tensor, labels: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Pick the token states whose word is to be predicted, so that the head runs on these alone.

    Equals the plain loop
        rows = [words[b, l] for b, l in order if labels[b, l] != -100]

    Args:
        words: (B, L, w) token states after the text tower's final norm.
        labels: (B, L) ids to predict, -100 elsewhere.
        places: (M,) where they are among the B * L, if that is known already: to find them waits for the device.

    Returns:
        Rows (M, w) and their targets (M,).
    """
    if places is None:
        places = (labels != IGNORED).flatten().nonzero().squeeze(1)
    return words.flatten(0, 1)[places], labels.flatten()[places]


def cross_entropy(logits: Tensor, targets: Tensor, count: Tensor | float | None = None) -> Tensor:
    """Mean cross-entropy over the words to predict (BERT, arXiv 1810.04805): L_TSS of DeCLIP, arXiv 2110.05208.

    Equals the plain loop, over the rows m whose target is not -100
        Σₘ [ log Σᵥ exp(logits[m, v]) - logits[m, targets[m]] ] / max(count, 1)

    Args:
        logits: (M, V) of the head, run on the chosen rows alone.
        targets: (M,) int64 ids; rows with -100 do not count.
        count: What to divide the sum by; by default the number of rows that count. When W ranks hold M rows
            together, M / W makes the mean of the ranks' losses the mean over all rows.

    Returns:
        The loss, a scalar; 0, still part of the graph, when there is no word to predict.
    """
    if count is None:
        count = (targets != IGNORED).sum().clamp(min=1)
    total = F.cross_entropy(to_float32(logits), targets, ignore_index=IGNORED, reduction="sum")
    return total / count
