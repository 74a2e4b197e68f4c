"""CLIP's text transformer, for sequences of any length up to the context."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip.data.text.tokenizer import padded_length
from declip.errors import UserError
from declip.models.neighbors import matching_projection
from declip.models.tensor_names import named_below
from declip.recipe.schema import TextTowerConfig


@dataclass(frozen=True)
class TextFeatures:
    """Output of a text tower for a batch."""

    pooled: Tensor  # (B, d) projected embedding, not normalized
    text_tokens: Tensor  # (B, L, width) token states after the final norm
    lengths: Tensor  # (B,) number of tokens up to and with the end-of-text token


def row_at(states: Tensor, positions: Tensor) -> Tensor:
    """Take one of each text's token states: (B, L, width) at (B,) → (B, width)."""
    # Not states[torch.arange(len(states)), positions], with which torch.export fixes the batch size.
    index = positions[:, None, None].expand(-1, 1, states.shape[2])  # (B, 1, width)
    return states.gather(1, index).squeeze(1)


class AnyTextTower(nn.Module, ABC):
    """A text tower: an encoder, pooling and a projection into the shared space."""

    text_projection: nn.Module  # (B, width) → (B, d)
    width: int  # of the token states
    padding: int  # id behind the end of a caption
    context: int  # largest number of ids of a caption
    gives_tokens = True  # one state for each id

    def match_projection(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the projection by the kind that can hold tensors that will be loaded, by name."""
        own = named_below("text_tower.text_projection.", tensors)
        projection = matching_projection(self.text_projection, own, self.width)
        self.text_projection = projection.to(next(self.parameters()).device)

    @abstractmethod
    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode token ids (B, L) as pooled features (B, width), token states (B, L, width) and lengths (B,)."""

    @abstractmethod
    def language_head(self) -> nn.Module:
        """Give a masked-language head, (M, width) → (M, vocabulary)."""

    def forward(self, tokens: Tensor) -> TextFeatures:
        """Encode token ids (B, L), padded on the right."""
        pooled, text_tokens, lengths = self.encode(tokens)
        return TextFeatures(self.text_projection(pooled), text_tokens, lengths)

    def pool(self, tokens: Tensor) -> Tensor:
        """Encode token ids up to the projection, (B, width)."""
        return self.encode(tokens)[0]


class SelfContained(nn.Module):
    """A tower whose state includes its configuration and tokenizer, so that the weights need no other file."""

    stored: Tensor

    def get_extra_state(self) -> Tensor:
        """Return the configuration and tokenizer as bytes."""
        return self.stored

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse weights that belong to another configuration or tokenizer."""
        if not state.is_meta and not torch.equal(state.cpu(), self.stored):
            raise UserError(
                "These weights belong to a text tower with another configuration or tokenizer."
            )


class QuickGELU(nn.Module):
    """CLIP's approximation of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class CausalSelfAttention(nn.Module):
    """Attention (B, L, width) → (B, L, width) to no later token; parameters are named as in `nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        # Holds weight and bias as a layer while that has an adapter
        self.in_proj: nn.Linear | None = None

    def _qkv(self, x: Tensor) -> Tensor:
        """(B, L, width) → (B, L, 3·width)."""
        if self.in_proj is not None:
            return self.in_proj(x)
        return F.linear(x, self.in_proj_weight, self.in_proj_bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self._qkv(x)
        # (B, L, 3·width) → 3 × (B, heads, L, width / heads)
        split = qkv.view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        dtype = query.dtype
        device = query.device.type
        # On a CPU torch's bfloat16 kernel takes 9 times as long backwards as float32 at 16 tokens.
        in_float = dtype == torch.bfloat16 and device == "cpu"
        autocast = torch.is_autocast_enabled(device) and not in_float
        with torch.autocast(device, enabled=autocast):
            if in_float:
                query = query.float()
                key = key.float()
                value = value.float()
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        joined = mixed.to(dtype).transpose(1, 2).reshape(batch, length, width)
        return self.out_proj(joined)


class TextBlock(nn.Module):
    """Pre-norm residual block; parameters are named as in CLIP."""

    def __init__(self, width: int, heads: int, activation: nn.Module) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = CausalSelfAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        layers = {
            "c_fc": nn.Linear(width, 4 * width),
            "gelu": activation,
            "c_proj": nn.Linear(4 * width, width),
        }
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TextTower(AnyTextTower):
    """CLIP's text encoder (Radford et al. 2021, section 2.4); weights map one to one onto CLIP's.

    A causal transformer pooled at the end-of-text token does not depend on the padding behind it, so a batch may be
    truncated to its longest caption.

    Args:
        vocabulary: Number of token ids, ``<|mask|>`` included.
    """

    padding = 0

    def __init__(self, vocabulary: int, end: int, text: TextTowerConfig, embed_dim: int) -> None:
        super().__init__()
        self.end = end
        self.context = text.context_length
        width = text.width
        self.width = width
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(self.context, width))
        gelu = QuickGELU() if text.activation == "quick_gelu" else nn.GELU()
        blocks: Any = nn.Sequential(
            *(TextBlock(width, text.heads, gelu) for _ in range(text.layers))
        )
        self.transformer = nn.Sequential(OrderedDict(resblocks=blocks))  # named as in CLIP
        self.ln_final = nn.LayerNorm(width)
        self.text_projection: nn.Linear = nn.Linear(width, embed_dim, bias=text.projection_bias)
        # CLIP's standard deviations
        scale = width**-0.5
        depth = (2 * text.layers) ** -0.5
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in blocks:
            nn.init.normal_(block.attn.in_proj_weight, std=scale)
            nn.init.normal_(block.attn.out_proj.weight, std=scale * depth)
            nn.init.zeros_(block.attn.out_proj.bias)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=scale * depth)
        nn.init.normal_(self.text_projection.weight, std=scale)

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode token ids (B, L), every row with an end-of-text token; pooled is the state there."""
        # (B, L) → (B, L, width)
        positions = self.positional_embedding[: tokens.shape[1]]
        x = self.token_embedding(tokens) + positions
        text_tokens = self.ln_final(self.transformer(x))
        ends = (tokens == self.end).to(torch.uint8).argmax(dim=1)
        return row_at(text_tokens, ends), text_tokens, ends + 1

    def language_head(self) -> nn.Module:
        """Build a masked-language head with random weights."""
        return nn.Linear(self.width, self.token_embedding.num_embeddings)


def encode_by_length(
    tower: Callable[[Tensor], TextFeatures],
    tokens: Tensor,
    lengths: Tensor | None,
    buckets: int,
    step: int = 8,
) -> TextFeatures:
    """Encode captions sorted by length, in buckets of equal size; the features are those of one pass over all.

    Equals the plain loop, but for rounding and for the token states behind a caption's end, which are 0
        features[b] = tower(tokens[b, : lengths[b]])
    The lengths, (n,) int64 on the host, count ids up to and with each end; None is one bucket. Buckets are padded to a
    multiple of `step`.
    """
    if lengths is None or buckets == 1 or len(tokens) < 2:
        return tower(tokens)
    order = lengths.argsort(stable=True)
    # From the host's lengths, so that no shape waits for the device.
    longest = [int(lengths[part].max()) for part in order.tensor_split(buckets) if len(part)]
    rows = order.to(tokens.device, non_blocking=True)
    context = tokens.shape[1]
    parts = []
    for part, most in zip(rows.tensor_split(buckets), longest, strict=False):
        captions = tokens.index_select(0, part)
        parts.append(tower(captions[:, : padded_length(most, context, step)]))
    # Back to the order of the batch
    inverse = torch.empty_like(rows)
    inverse[rows] = torch.arange(len(rows), device=rows.device)
    pooled = torch.cat([part.pooled for part in parts])
    text_tokens = torch.cat([_lengthened(part.text_tokens, context) for part in parts])
    ends = torch.cat([part.lengths for part in parts])
    return TextFeatures(pooled[inverse], text_tokens[inverse], ends[inverse])


def _lengthened(text_tokens: Tensor, length: int) -> Tensor:
    """Append zeros to token states: (B, L, width) → (B, length, width)."""
    return F.pad(text_tokens, (0, 0, 0, length - text_tokens.shape[1]))
