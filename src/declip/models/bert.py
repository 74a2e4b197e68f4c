"""BERT's encoder for weights that are already trained, without transformers, whose import takes longer than torch's."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def is_plain(config: Mapping[str, Any]) -> bool:
    """Whether `Bert` computes what transformers computes for a configuration."""
    return config["model_type"] == "bert" and config["hidden_act"] == "gelu"


class Bert(nn.Module):
    """BERT's embeddings and blocks (Devlin et al. 2019, arXiv 1810.04805).

    Parameters are named, and numbers are computed, as in transformers' `BertModel`; the initial ones have another
    distribution.

    Args:
        config: Sizes, by the names of transformers; see `declip.models.hf_encoder.SIZES`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, epsilon = config["hidden_size"], config["layer_norm_eps"]
        parts = {
            "word_embeddings": nn.Embedding(config["vocab_size"], width, padding_idx=config["pad_token_id"]),
            "position_embeddings": nn.Embedding(config["max_position_embeddings"], width),
            "token_type_embeddings": nn.Embedding(config["type_vocab_size"], width),
            "LayerNorm": nn.LayerNorm(width, epsilon),
        }
        self.embeddings = nn.ModuleDict(parts)
        blocks = [BertBlock(config) for _ in range(config["num_hidden_layers"])]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(blocks)})
        self.dropout = config["hidden_dropout_prob"]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        """Encode ids (B, L), with a mask (B, 1, 1, L) that is true where there is no padding."""
        parts: Any = self.embeddings
        encoder: Any = self.encoder
        x = parts.word_embeddings(input_ids) + parts.token_type_embeddings.weight[0]
        x = parts.LayerNorm(x + parts.position_embeddings.weight[: input_ids.shape[1]])  # (B, L, width)
        x = F.dropout(x, self.dropout, self.training)
        for block in encoder.layer:
            x = block(x, attention_mask)
        return SimpleNamespace(last_hidden_state=x)


class BertBlock(nn.Module):
    """Post-norm block: attention, then two layers."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, inner, epsilon = config["hidden_size"], config["intermediate_size"], config["layer_norm_eps"]

        def output(features: int) -> nn.ModuleDict:
            return nn.ModuleDict({"dense": nn.Linear(features, width), "LayerNorm": nn.LayerNorm(width, epsilon)})

        maps = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"self": maps, "output": output(width)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = output(inner)
        self.heads = config["num_attention_heads"]
        self.dropout, self.attention_dropout = config["hidden_dropout_prob"], config["attention_probs_dropout_prob"]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        attention: Any = self.attention
        # (B, L, width) → (B, heads, L, width / heads)
        maps = attention["self"].values()
        query, key, value = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in maps)
        dropout = self.attention_dropout if self.training else 0.0
        # (B, heads, L, width / heads), padding masked
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        x = self._add(attention["output"], mixed.transpose(1, 2).flatten(2), x)
        return self._add(self.output, F.gelu(self.intermediate["dense"](x)), x)

    def _add(self, output: Any, inner: Tensor, x: Tensor) -> Tensor:
        added: Tensor = output["LayerNorm"](F.dropout(output["dense"](inner), self.dropout, self.training) + x)
        return added
