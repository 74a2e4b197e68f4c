"""Zero-shot scores by patches and words, for models that compare tokens and train no embeddings."""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip.models.image_tower import ImageTower
from declip.models.text_tower import AnyTextTower

SCORES_AT_ONCE = 2**26  # of tokens and tokens: 256 MiB in float32, whatever the batch


def token_similarity(
    tokens: Tensor, keys: Tensor, mask: Tensor | None = None, key_mask: Tensor | None = None
) -> Tensor:
    """Late-interaction similarity of samples to key samples of the other modality (FILIP, arXiv 2111.07783).

    Equals the plain loop
        similarity[b, n] = mean over t in mask[b] of max over u in key_mask[n] of tokens[b, t]·keys[n, u]
    Returns (B, N) of tokens (B, t, d) and keys (N, u, d), L2-normalized; masks are true where a token counts, at least
    one in each row. Costs 2·B·t·N·u·d operations; for the backward pass only the B·t·N positions of the maxima are
    kept, 8 bytes each.
    """
    tokens = _to_float32(tokens)
    keys = _to_float32(keys)
    counted = tokens.new_ones(tokens.shape[:2]) if mask is None else mask.to(tokens)
    weight = (counted / counted.sum(dim=1, keepdim=True)).unsqueeze(-1)
    block = max(1, SCORES_AT_ONCE // (counted.numel() * keys.shape[1]))
    columns = []
    with torch.autocast(tokens.device.type, enabled=False):
        for start in range(0, len(keys), block):
            some = keys[start : start + block]
            # (B, t, d) and (n, u, d) → (B·t, n, u)
            score = tokens.flatten(0, 1) @ some.flatten(0, 1).mT
            score = score.unflatten(1, some.shape[:2])
            if key_mask is not None:
                score.masked_fill_(~key_mask[start : start + block], float("-inf"))
            best = score.max(dim=-1).values
            best = best.unflatten(0, tokens.shape[:2])
            columns.append((best * weight).sum(dim=1))
    return torch.cat(columns, dim=1)


class TokenHead(nn.Module):
    """Projections of patches and words into a space in which they are compared."""

    def __init__(self, patch_width: int, word_width: int, width: int) -> None:
        super().__init__()
        self.patch_projection = nn.Linear(patch_width, width)
        self.word_projection = nn.Linear(word_width, width)
        self.logit_scale = nn.Parameter(torch.zeros(()))  # of the loss; scores are cosines


class TwoTowers(Protocol):
    """A model whose towers return tokens."""

    image_tower: ImageTower
    text_tower: AnyTextTower


class TokenScorer:
    """Zero-shot classification by patches and words, as the official FILIP is evaluated.

    Args:
        prefix: Beginning of the names of the head's tensors in files.
        head: A `TokenHead`, or a module with its members.
        count_padding: Whether padding counts like words.
    """

    def __init__(
        self,
        prefix: str,
        head: Any,
        model: TwoTowers,
        count_padding: bool,
    ) -> None:
        self.prefix = prefix
        self.head = head
        self.model = model
        self.count_padding = count_padding

    @property
    def heads(self) -> dict[str, Tensor]:
        """Tensors of the head by their names in files, float32 on the CPU."""
        state = self.head.state_dict()
        return {
            f"{self.prefix}{name}": tensor.detach().float().cpu() for name, tensor in state.items()
        }

    def words(self, tokens: Tensor) -> Tensor:
        """Encode token ids (n, L) as (n, context, d) of length 1; 0 at padding that does not count."""
        tower = self.model.text_tower
        missing = tower.context - tokens.shape[1]
        texts = tower(F.pad(tokens, (0, missing), value=tower.padding))
        self.head.to(tokens.device)  # a loaded model was moved without it
        words = self.head.word_projection(_to_float32(texts.text_tokens))
        words = F.normalize(words, dim=-1)
        if self.count_padding:
            return words
        positions = torch.arange(tower.context, device=words.device)
        return words * (positions < texts.lengths[:, None]).unsqueeze(-1)

    def scores(self, pixels: Tensor, classes: Tensor) -> Tensor:
        """Similarity (n, C) of images (n, 3, S, S) to classes (C, L, d), whose positions of zeros do not count."""
        tower = self.model.image_tower
        dtype = next(tower.parameters()).dtype
        tokens = tower(pixels.to(dtype)).tokens
        self.head.to(tokens.device)
        patches = self.head.patch_projection(_to_float32(tokens))
        patches = F.normalize(patches, dim=-1)
        counted = None
        if not self.count_padding:
            counted = classes.any(dim=2)
        return token_similarity(patches, classes, key_mask=counted)


def _to_float32(tensor: Tensor) -> Tensor:
    """Convert to float32; float64 stays."""
    if tensor.dtype == torch.float64:
        return tensor
    return tensor.float()
