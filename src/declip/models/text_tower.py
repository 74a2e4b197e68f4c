"""CLIP's text transformer, for sequences of any length up to the context."""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import QuickGELU
from torch import Tensor, nn


@dataclass(frozen=True)
class TextFeatures:
    """Output of a text tower for a batch.

    Attributes:
        pooled: (B, d) projected embedding, not normalized.
        text_tokens: (B, L, width) token states after the final norm.
        lengths: (B,) number of tokens up to and with the end-of-text token.
    """

    pooled: Tensor
    text_tokens: Tensor
    lengths: Tensor


def row_at(states: Tensor, positions: Tensor) -> Tensor:
    """Take one of each text's token states: (B, L, width) at (B,) → (B, width)."""
    # Not states[torch.arange(len(states)), positions], with which torch.export fixes the batch size.
    return states.gather(1, positions[:, None, None].expand(-1, 1, states.shape[2])).squeeze(1)


def already_pooled(pooled: Tensor, projection: nn.Module) -> TextFeatures:
    """Project (B, width) features that a text tower pooled before."""
    return TextFeatures(projection(pooled), pooled.unsqueeze(1), torch.ones(len(pooled), dtype=torch.int64))


class CausalSelfAttention(nn.Module):
    """Attention (B, L, width) → (B, L, width) to no later token; parameters are named as in `nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.in_proj: nn.Linear | None = None  # holds weight and bias as a layer while that has an adapter

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias) if self.in_proj is None else self.in_proj(x)
        query, key, value = qkv.view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        dtype = query.dtype
        # On a CPU torch's bfloat16 kernel takes 9 times as long backwards as float32 at 16 tokens (torch 2.13).
        in_float = dtype == torch.bfloat16 and query.device.type == "cpu"
        with torch.autocast(query.device.type, enabled=torch.is_autocast_enabled(query.device.type) and not in_float):
            if in_float:
                query, key, value = query.float(), key.float(), value.float()
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out_proj(mixed.to(dtype).transpose(1, 2).reshape(batch, length, width))


class TextBlock(nn.Module):
    """Pre-norm residual block; parameters are named as in CLIP."""

    def __init__(self, width: int, heads: int, activation: nn.Module) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = CausalSelfAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": activation, "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A sequence of blocks; parameters are named as in CLIP."""

    def __init__(self, blocks: Iterable[TextBlock]) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class TextTower(nn.Module):
    """CLIP's text encoder (Radford et al. 2021, section 2.4); weights map one to one onto CLIP's.

    A causal transformer pooled at the end-of-text token does not depend on the padding behind it, so a batch may be
    truncated to its longest caption: the features are the same as at the full context.

    Args:
        vocabulary: Number of token ids, ``<|mask|>`` included.
        end: Id of the end-of-text token.
        projection_bias: Whether the projection has a bias (CLIP: no; DeCLIP's official weights: yes).
        activation: "quick_gelu" (CLIP) or "gelu".
    """

    padding = 0

    def __init__(
        self,
        vocabulary: int,
        end: int,
        embed_dim: int,
        width: int = 512,
        layers: int = 12,
        heads: int = 8,
        context: int = 77,
        projection_bias: bool = False,
        activation: str = "quick_gelu",
    ) -> None:
        super().__init__()
        self.end = end
        self.width = width
        self.context = context
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(context, width))
        gelu = QuickGELU() if activation == "quick_gelu" else nn.GELU()
        self.transformer = Transformer(TextBlock(width, heads, gelu) for _ in range(layers))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Linear(width, embed_dim, bias=projection_bias)
        self._initialize(layers)

    def forward(self, tokens: Tensor) -> TextFeatures:
        """Encode token ids (B, L), every row with an end-of-text token; or (B, width), what `pool` gave before."""
        if tokens.is_floating_point():
            return already_pooled(tokens, self.text_projection)
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        text_tokens = self.ln_final(self.transformer(x))
        ends = (tokens == self.end).to(torch.uint8).argmax(dim=1)
        return TextFeatures(self.text_projection(row_at(text_tokens, ends)), text_tokens, ends + 1)

    def pool(self, tokens: Tensor) -> Tensor:
        """Encode token ids up to the projection, (B, width)."""
        found = self(tokens)
        return row_at(found.text_tokens, found.lengths - 1)

    def language_head(self) -> nn.Module:
        """Build a masked-language head with random weights."""
        return nn.Linear(self.width, self.token_embedding.num_embeddings)

    def _initialize(self, layers: int) -> None:
        """Draw the weights with CLIP's standard deviations."""
        scale = self.width**-0.5
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        blocks: Any = self.transformer.resblocks
        for block in blocks:
            nn.init.normal_(block.attn.in_proj_weight, std=scale)
            nn.init.normal_(block.attn.out_proj.weight, std=scale * (2 * layers) ** -0.5)
            nn.init.zeros_(block.attn.out_proj.bias)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * self.width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=scale * (2 * layers) ** -0.5)
        nn.init.normal_(self.text_projection.weight, std=self.width**-0.5)
        if self.text_projection.bias is not None:
            nn.init.zeros_(self.text_projection.bias)
