"""The nearest-neighbor probe: the nearest training images vote, and nothing is fitted."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from declip.errors import UserError
from declip.evaluation.probes.data import ProbeData, score
from declip.evaluation.probes.results import KNNResult, Votes

NEIGHBOURS = (1, 10, 20, 100, 200)
TEMPERATURE = 0.07
"""Wu et al. 2018's, and DINO's."""
BLOCK = 1 << 25
"""Cosines held at a time: 128 MB."""


def knn_probe(
    data: ProbeData,
    neighbors: Sequence[int] = NEIGHBOURS,
    *,
    temperature: float = TEMPERATURE,
    block: int = BLOCK,
) -> KNNResult:
    """Let the k nearest of the training and validation images vote on each test image.

    The vote is Wu et al. 2018's ("Unsupervised Feature Learning via Non-Parametric Instance Discrimination"), as in
    DINO: a neighbor with cosine s adds exp(s / temperature) to its class. With k = 1 it is the nearest image's
    class. Every k is reported and none chosen. Classes with equal votes count against the model, so top-5 needs the
    class to be among the neighbors.

    Args:
        data: The splits of a set, encoded.
        neighbors: Values of k; those beyond the number of training images become it.
        temperature: Of the weights.
        block: At most about this many cosines are held at a time.

    Raises:
        UserError: a k below 1, or a temperature that is not above 0.
    """
    if not neighbors or min(neighbors) < 1 or temperature <= 0:
        raise UserError(
            f"k is {list(neighbors)} with temperature {temperature}; give one k or more, each 1 or more, and a "
            "temperature above 0."
        )
    bank = data.train.join(data.validation)
    wanted = sorted({min(k, len(bank)) for k in neighbors})
    features, labels = normalize(bank.features.to(data.device), dim=1), bank.labels.to(data.device)
    ranks: dict[int, list[Tensor]] = {k: [] for k in wanted}
    rows = max(1, block // max(len(bank), data.classes))
    for queries, own in zip(data.test.features.split(rows), data.test.labels.split(rows), strict=True):
        cosines = normalize(queries.to(data.device), dim=1) @ features.T
        near, places = cosines.topk(wanted[-1], dim=1)
        weights, voters = ((near - near[:, :1]) / temperature).exp(), labels[places]
        for k in wanted:
            ranks[k].append(vote_ranks(weights[:, :k], voters[:, :k], own.to(data.device), data.classes).cpu())
    own_labels = data.test.labels.numpy()
    votes = []
    for k in wanted:
        rank = torch.cat(ranks[k]).numpy()
        votes.append(
            Votes(
                k=k,
                top1=score(rank <= 1, own_labels),
                top5=score(rank <= 5, own_labels),
                mean_per_class=score(rank <= 1, own_labels, "mean_per_class"),
            )
        )
    return KNNResult(**data.about, temperature=temperature, votes=tuple(votes))  # type: ignore[arg-type]  # see about


def vote_ranks(weights: Tensor, voters: Tensor, own: Tensor, classes: int) -> Tensor:
    """Rank of each row's own class by its votes, 1 being the first; equal votes and NaN count against it.

    Args:
        weights: (n, k) what each neighbor's vote weighs.
        voters: (n, k) int64, the neighbors' classes.
        own: (n,) int64, the rows' classes.
        classes: How many there are.

    Returns:
        (n,) int64.
    """
    votes = weights.new_zeros(len(weights), classes).scatter_add_(1, voters, weights)
    mine = votes.gather(1, own.unsqueeze(1))
    return (~(votes < mine)).sum(1)
