"""Image self-supervision: SimSiam's negative cosine between two views of an image."""

import torch.nn.functional as F
from torch import Tensor

from declip.supervision.contrastive import to_float32


def negative_cosine(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """SimSiam's symmetric loss with stopped targets (arXiv 2011.10566, equation 4): L_ISS of DeCLIP.

    Equals the plain loop
        -½ mean over b of [ cos(p1[b], z2[b]) + cos(p2[b], z1[b]) ],  no gradient into z

    Args:
        p1: (B, d) predictions from view 1, any length.
        p2: (B, d) predictions from view 2.
        z1: (B, d) projections of view 1, any length; the gradient is stopped here.
        z2: (B, d) projections of view 2; the gradient is stopped here.

    Returns:
        The loss, a scalar between -1 and 1; -1 is perfect agreement.
    """
    p1, p2, z1, z2 = (to_float32(x) for x in (p1, p2, z1.detach(), z2.detach()))
    first = F.cosine_similarity(p1, z2, dim=-1).mean()
    second = F.cosine_similarity(p2, z1, dim=-1).mean()
    return -(first + second) / 2
