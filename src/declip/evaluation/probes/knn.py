"""The nearest-neighbor probe: the nearest training images vote, and nothing is fitted."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from declip.errors import UserError
from declip.evaluation.probes.data import ProbeData, score
from declip.evaluation.results import KNNResult, Votes

NEIGHBORS = (1, 10, 20, 100, 200)
TEMPERATURE = 0.07
"""Wu et al. 2018's, and DINO's."""
BLOCK = 1 << 25
"""Number of cosines held at a time: 128 MB."""


def knn_probe(
    data: ProbeData,
    neighbors: Sequence[int] = NEIGHBORS,
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
        neighbors: Values of k; those beyond the number of training images become it.
        block: Largest number of cosines held at a time, about.
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
    for queries, right in zip(data.test.features.split(rows), data.test.labels.split(rows), strict=True):
        cosines = normalize(queries.to(data.device), dim=1) @ features.T
        near, places = cosines.topk(wanted[-1], dim=1)
        # Relative to the nearest, which changes no order and cannot overflow.
        weights, voters = ((near - near[:, :1]) / temperature).exp(), labels[places]
        for k in wanted:
            ranks[k].append(vote_ranks(weights[:, :k], voters[:, :k], right.to(data.device), data.classes).cpu())
    classes, votes = data.test.labels.numpy(), []
    for k in wanted:
        rank = torch.cat(ranks[k]).numpy()
        first, mean = score(rank <= 1, classes), score(rank <= 1, classes, "mean_per_class")
        votes.append(Votes(k=k, top1=first, top5=score(rank <= 5, classes), mean_per_class=mean))
    return KNNResult(**data.about, temperature=temperature, votes=tuple(votes))


def vote_ranks(weights: Tensor, voters: Tensor, right: Tensor, classes: int) -> Tensor:
    """Rank of each row's right class by its votes, 1 being the first: (n,) int64; ties and NaN count against it.

    Args:
        weights: (n, k) weight of each neighbor's vote.
        voters: (n, k) int64, the neighbors' classes.
        right: (n,) int64, the rows' classes.
    """
    votes = weights.new_zeros(len(weights), classes).scatter_add_(1, voters, weights)
    return (~(votes < votes.gather(1, right.unsqueeze(1)))).sum(1)
