"""The pair with the most similar caption, for losses that compare an image with it."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from declip.data.pair import BrokenPair, PairSource
from declip.errors import UserError
from declip.evaluation.encode import text_features
from declip.interchange.read import load
from declip.io.text import plural
from declip.runs.folder import log

COSINES_AT_ONCE = 2**26  # 256 MiB


def similar_captions(encoder: str, source: PairSource, quiet: bool) -> Tensor:
    """The pair with the most similar other captions for each pair, (n,) int64, on the CPU; see `nearest_captions`."""
    if source.remote:
        raise UserError(
            f"A loss of the recipe reads all captions before the first step, and '{source.name}' is remote. Copy the "
            "files to this machine."
        )
    log.info("Finding the nearest captions of %s by '%s'.", plural(len(source), "pair"), encoder)
    model = load(encoder)
    if not model.has_text:
        raise UserError(f"The encoder of captions '{encoder}' has no text tower. Give weights with one.")
    captions = list[tuple[str, ...]]()
    for index in range(len(source)):
        try:
            captions.append(source.captions(index))
        except BrokenPair:  # which no step has
            captions.append(())
    rows = text_features(model, [text for texts in captions for text in texts], progress=not quiet)
    owners = torch.repeat_interleave(torch.tensor([len(texts) for texts in captions]))
    means = normalize(rows.new_zeros(len(source), rows.shape[1]).index_add(0, owners, rows), dim=1)
    numbers = {texts: number for number, texts in enumerate(dict.fromkeys(captions))}
    same = torch.tensor([numbers[texts] for texts in captions])
    return nearest_captions(means.to(model.device), same.to(model.device)).cpu()


def nearest_captions(features: Tensor, same: Tensor) -> Tensor:
    """For each of n pairs the one with the most similar other caption, (n,) int64; its own index without any.

    Equals the plain loop
        neighbors[i] = argmax over j with same[j] != same[i] of features[i]·features[j]
    Features (n, d) are of captions, of length 1; `same` (n,) is equal for pairs with equal captions.
    """
    own, found = torch.arange(len(features), device=features.device), list[Tensor]()
    for rows in own.split(max(1, COSINES_AT_ONCE // max(1, len(features)))):
        cosines = (features[rows] @ features.mT).masked_fill_(same[rows, None] == same, -torch.inf)
        largest, nearest = cosines.max(dim=1)
        found.append(torch.where(largest.isfinite(), nearest, rows))
    return torch.cat(found)
