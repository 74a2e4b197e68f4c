"""The nearest-neighbor probe: the nearest training images vote, and nothing is fitted."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from declip.evaluation.per_class import score
from declip.evaluation.probes.data import ProbeData
from declip.evaluation.results import KNNResult, Votes

NEIGHBORS = (1, 10, 20, 100, 200)
TEMPERATURE = 0.07  # Wu et al. 2018's, and DINO's
BLOCK = 1 << 25  # cosines held at a time, about: 128 MB


def knn_probe(data: ProbeData, neighbors: Sequence[int] = NEIGHBORS, *, block: int = BLOCK) -> KNNResult:
    """Let the k nearest of the training and validation images vote on each test image.

    A neighbor with cosine s adds exp(s / temperature) to its class (Wu et al. 2018, "Unsupervised Feature Learning via
    Non-Parametric Instance Discrimination", and DINO). Every k is reported and none chosen; one beyond the number of
    training images becomes it. Classes with equal votes count against the model.
    """
    bank = data.train.join(data.validation)
    wanted = sorted({min(k, len(bank)) for k in neighbors})
    features, voters = normalize(bank.features.to(data.device), dim=1), bank.labels.to(data.device)
    ranks: dict[int, list[Tensor]] = {k: [] for k in wanted}
    rows, labels = max(1, block // max(len(bank), data.classes)), data.test.labels
    for queries, right in zip(data.test.features.split(rows), labels.to(data.device).split(rows), strict=True):
        near, places = (normalize(queries.to(data.device), dim=1) @ features.T).topk(wanted[-1], dim=1)
        # Relative to the nearest, which changes no order and cannot overflow.
        weights = ((near - near[:, :1]) / TEMPERATURE).exp()
        for k in wanted:
            ranks[k].append(vote_ranks(weights[:, :k], voters[places[:, :k]], right, data.classes).cpu())
    votes = []
    for k, parts in ranks.items():
        rank = torch.cat(parts).numpy()
        mean_per_class = score(rank <= 1, labels.numpy(), "mean_per_class")
        votes.append(Votes(k, float((rank <= 1).mean()), float((rank <= 5).mean()), mean_per_class))
    return KNNResult(**data.about, temperature=TEMPERATURE, votes=tuple(votes))


def vote_ranks(weights: Tensor, voters: Tensor, right: Tensor, classes: int) -> Tensor:
    """Rank of each row's right class (n,) by its neighbors' votes, 1 being the first; ties and NaN count against it.

    `weights` (n, k) are those of the votes for the classes `voters` (n, k).
    """
    votes = weights.new_zeros(len(weights), classes).scatter_add_(1, voters, weights)
    return (~(votes < votes.gather(1, right.unsqueeze(1)))).sum(1)
