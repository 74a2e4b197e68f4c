"""The nearest-neighbor probe: the nearest training images vote; nothing is fitted."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from declip.evaluation.per_class import score
from declip.evaluation.probes.data import ProbeData
from declip.evaluation.results import KNNResult, Votes

NEIGHBORS = (1, 10, 20, 100, 200)
TEMPERATURE = 0.07  # Wu et al. 2018's, and DINO's
SHUFFLED_VOTES, MOST_SHUFFLINGS = 20_000, 64
BLOCK = 1 << 25  # approximate number of cosines in memory at a time: 128 MB


def knn_probe(data: ProbeData, neighbors: Sequence[int] = NEIGHBORS, *, block: int = BLOCK) -> KNNResult:
    """Let the k nearest of the training and validation images vote on each test image.

    A neighbor with cosine s adds exp(s / temperature) to its class (Wu et al. 2018, "Unsupervised Feature Learning via
    Non-Parametric Instance Discrimination", and DINO). Every k is reported and none is chosen; a k above the number of
    training images is reduced to it. Classes with equal votes count against the model. The chance level is that of the
    same votes with shuffled training labels, averaged over the test images' class frequencies.
    """
    bank = data.train.join(data.validation)
    wanted = sorted({min(k, len(bank)) for k in neighbors})
    features, voters = normalize(bank.features.to(data.device), dim=1), bank.labels.to(data.device)
    labels, generator = data.test.labels, torch.Generator().manual_seed(0)
    # Few test images need several shufflings for a chance level with little noise.
    shufflings = max(1, min(MOST_SHUFFLINGS, SHUFFLED_VOTES // len(labels)))
    shuffled = [voters[torch.randperm(len(bank), generator=generator).to(voters.device)] for _ in range(shufflings)]
    frequency = labels.bincount(minlength=data.classes).double() / len(labels)  # (classes,)
    ranks: dict[int, list[Tensor]] = {k: [] for k in wanted}
    chance = {k: torch.zeros(2, dtype=torch.float64) for k in wanted}  # of top-1 and top-5, summed over the rows
    rows = max(1, block // max(len(bank), data.classes))
    for queries, right in zip(data.test.features.split(rows), labels.to(data.device).split(rows), strict=True):
        cosines, nearest = (normalize(queries.to(data.device), dim=1) @ features.T).topk(wanted[-1], dim=1)
        # Relative to the nearest, which changes no order and cannot overflow.
        weights = ((cosines - cosines[:, :1]) / TEMPERATURE).exp()
        for k in wanted:
            found = vote_ranks(weights[:, :k], voters[nearest[:, :k]], data.classes)
            ranks[k].append(found.gather(1, right.unsqueeze(1)).squeeze(1).cpu())
            for random in shuffled:
                rank = vote_ranks(weights[:, :k].nan_to_num(1.0), random[nearest[:, :k]], data.classes)
                hits = torch.stack([(rank <= first).double().sum(0) for first in (1, 5)])  # (2, classes)
                chance[k] += hits.cpu() @ frequency / (shufflings * len(labels))
    votes = []
    for k, parts in ranks.items():
        places, (chance1, chance5) = torch.cat(parts).numpy(), chance[k].tolist()
        mean_per_class = score(places <= 1, labels.numpy(), "mean_per_class")
        top1, top5 = float((places <= 1).mean()), float((places <= 5).mean())
        votes.append(Votes(k, top1, top5, mean_per_class, chance1=chance1, chance5=chance5))
    return KNNResult(**data.about, temperature=TEMPERATURE, votes=tuple(votes))


def vote_ranks(weights: Tensor, voters: Tensor, classes: int) -> Tensor:
    """Rank of every class (n, classes) by the votes of each row, 1 being the first; ties and NaN count against it.

    `weights` (n, k) are those of the votes for the classes `voters` (n, k).
    """
    votes = weights.new_zeros(len(weights), classes).scatter_add_(1, voters, weights)
    comparable = votes.masked_fill(votes.isnan(), torch.inf)
    # By sorting: a comparison of all pairs of classes would be (n, classes, classes).
    below = torch.searchsorted(comparable.sort(1).values, comparable)  # classes with strictly fewer votes
    return (classes - below).masked_fill(votes.isnan(), classes)
