"""A Hugging Face text encoder, such as BERT or RoBERTa, as a text tower."""

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from declip.data.text.hf_tokenizer import HuggingfaceTokenizer
from declip.errors import UserError, unknown
from declip.models.hf_encoder import HEADS, OFFSET, POOLING, POOLINGS, TextEncoder
from declip.models.text_tower import TextFeatures, already_pooled, row_at

Pooling = Literal["auto", "cls", "mean", "eos"]


class HuggingfaceTextTower(nn.Module):
    """transformers' encoder with a projection into the shared space.

    Attention is bidirectional and masks padding, so a batch may be truncated to its longest caption. The encoder's
    pooler is left out: every parameter of the tower gets a gradient.

    Args:
        pooling: Token states that are projected: "cls", "mean" over the caption, "eos", or "auto": as the encoder was
            trained as a sentence encoder, else "cls".
        language: Keep the encoder's masked-language head for `language_head`.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        tokenizer: HuggingfaceTokenizer,
        embed_dim: int,
        pooling: Pooling = "auto",
        projection_bias: bool = False,
        language: bool = False,
    ) -> None:
        super().__init__()
        _check(encoder, tokenizer)
        model: Any = encoder.build()
        self.encoder = model.base_model
        # In a list, so that it is no submodule: its output weights are the word embeddings.
        self._language: list[nn.Module] = [HEADS[encoder.config["model_type"]](model)] if language else []
        self._stored = encoder.to_tensor()
        self.padding, self.context = tokenizer.padding, tokenizer.context
        self.pooling = encoder.pooling or "cls" if pooling == "auto" else pooling
        if self.pooling not in POOLINGS.values():
            raise UserError(
                f"{POOLING} of the text encoder has the pooling {encoder.pooling}; known are cls, mean and lasttoken. "
                "Set text.pooling=mean, cls or eos."
            )
        self.width = int(model.config.hidden_size)
        self.text_projection = nn.Linear(self.width, embed_dim, bias=projection_bias)
        nn.init.normal_(self.text_projection.weight, std=self.width**-0.5)
        if projection_bias:
            nn.init.zeros_(self.text_projection.bias)

    def forward(self, tokens: Tensor) -> TextFeatures:
        """Encode token ids (B, L), padded on the right; or (B, width), what `pool` gave before."""
        if tokens.is_floating_point():
            return already_pooled(tokens, self.text_projection)
        text_tokens, real, lengths = self._encode(tokens)
        return TextFeatures(self.text_projection(self._pool(text_tokens, real, lengths)), text_tokens, lengths)

    def pool(self, tokens: Tensor) -> Tensor:
        """Encode token ids up to the projection, (B, width)."""
        return self._pool(*self._encode(tokens))

    def _encode(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        real = tokens != self.padding
        # A (B, 1, 1, L) mask is used as it is; given (B, L), transformers waits for the device to ask if all is real.
        text_tokens = self.encoder(input_ids=tokens, attention_mask=real[:, None, None, :]).last_hidden_state
        return text_tokens, real, real.sum(dim=1)

    def language_head(self) -> nn.Module:
        """Hand over the encoder's masked-language head, untied: its output weights start as the word embeddings."""
        assert self._language, "built without language=True, or handed over already"
        return copy.deepcopy(self._language.pop())

    def get_extra_state(self) -> Tensor:
        """The encoder's configuration and tokenizer, so that the weights need no other file."""
        return self._stored

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse weights that belong to another configuration or tokenizer."""
        if not state.is_meta and not torch.equal(state.cpu(), self._stored):
            raise UserError("These weights belong to a text encoder with another configuration or tokenizer.")

    def _pool(self, text_tokens: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
        if self.pooling == "cls":
            return text_tokens[:, 0]
        if self.pooling == "eos":
            return row_at(text_tokens, (lengths - 1).clamp(min=0))
        return (text_tokens * real.unsqueeze(-1)).sum(dim=1) / lengths.unsqueeze(-1)


def _check(encoder: TextEncoder, tokenizer: HuggingfaceTokenizer) -> None:
    """Check a configuration and a tokenizer, which may be a stranger's, against each other."""
    config = encoder.config
    if config.get("model_type") not in HEADS:
        raise unknown("text encoder", str(config.get("model_type")), HEADS)
    if tokenizer.vocabulary > config["vocab_size"] or tokenizer.padding != config["pad_token_id"]:
        raise UserError(
            f"The text encoder's tokenizer has {tokenizer.vocabulary:,} ids and pads with id {tokenizer.padding}, but "
            f"its configuration has vocab_size {config['vocab_size']:,} and pad_token_id {config['pad_token_id']}. "
            "Save both of one model."
        )
    longest = int(config["max_position_embeddings"]) - (
        config["pad_token_id"] + 1 if config["model_type"] in OFFSET else 0
    )
    if tokenizer.context > longest:
        raise UserError(
            f"text.context_length is {tokenizer.context}, but the encoder has positions for {longest} ids. Set "
            f"text.context_length to {longest} or less."
        )
