"""Patches that a vision transformer leaves out in training, chosen by the edges in them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SOBEL = ((1.0, 0.0, -1.0), (2.0, 0.0, -2.0), (1.0, 0.0, -1.0))
FLOOR = 0.1
"""Added to the weight of every patch, as a fraction of the image's mean: a plain one stays at times."""


class EdgePatchDropout(nn.Module):
    """Keeps patches with edges more often than plain ones, the idea of CLIP-PGS (arXiv 2503.17080).

    In training (1 - rate) of the patches of each image are sampled without replacement, with weights proportional to
    the mean magnitude of Sobel's gradient in them, `FLOOR` added. Like timm's `PatchDropout` it comes after the
    position embedding, does nothing in evaluation, and keeps the tokens in front.
    """

    weights: Tensor  # (B, P) of the images that come next

    def __init__(self, rate: float, prefix_tokens: int) -> None:
        super().__init__()
        self.rate, self.prefix_tokens = rate, prefix_tokens

    @torch.no_grad()
    def look(self, images: Tensor, patch_size: tuple[int, int]) -> None:
        """Weigh the patches of the images (B, 3, H, W) whose tokens come next."""
        if not self.training:
            return
        across = torch.tensor(SOBEL, dtype=images.dtype, device=images.device)
        gray = F.pad(images.mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        edges = F.conv2d(gray, torch.stack([across, across.mT]).unsqueeze(1)).float().norm(dim=1, keepdim=True)
        grid = images.shape[2] // patch_size[0], images.shape[3] // patch_size[1]
        mean = F.adaptive_avg_pool2d(edges, grid).flatten(1)
        self.weights = mean / mean.mean(dim=1, keepdim=True).clamp_min(1e-6) + FLOOR

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, prefix + P, width) → (B, prefix + kept, width)."""
        if not self.training:
            return tokens
        prefix, patches = tokens[:, : self.prefix_tokens], tokens[:, self.prefix_tokens :]
        kept = max(1, int(patches.shape[1] * (1 - self.rate)))
        # The k largest weights times exponential noise to the power -1 are k samples without replacement.
        chosen = (self.weights / torch.empty_like(self.weights).exponential_()).topk(kept, dim=1).indices
        return torch.cat([prefix, patches.take_along_dim(chosen.unsqueeze(-1), dim=1)], dim=1)
