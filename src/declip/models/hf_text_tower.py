"""A Hugging Face text encoder as a text tower: BERT, RoBERTa and their kin."""

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from declip.data.text.hf_tokenizer import HuggingfaceTokenizer
from declip.errors import UserError
from declip.models.hf_encoder import HEADS, POOLING, POOLINGS, TextEncoder
from declip.models.text_tower import TextFeatures

Pooling = Literal["auto", "cls", "mean", "eos"]


class HuggingfaceTextTower(nn.Module):
    """transformers' encoder with a projection into the shared space.

    The encoder sees words on both sides, and padding not at all: a batch may be cut to its longest caption. Its pooler
    is left out; every parameter that is here gets a gradient.

    Args:
        encoder: Configuration, and where its weights are.
        tokenizer: Made from the same encoder.
        embed_dim: Width d of the shared space.
        pooling: Which token states are projected: "cls", the start token's, which BERT and RoBERTa were trained to
            gather a text in, "mean" of all of a text, "eos", or "auto": as a sentence encoder was trained, else the
            first.
        projection_bias: Whether the projection has a bias.
        language: Keep the encoder's masked-language head for `language_head`.

    Raises:
        UserError: tokenizer and configuration contradict each other, the tokenizer's context is too long, or the
            encoder was trained with a pooling that is not known here and none is given.
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
        # In a list, so that it is no part of the tower: its output map is the word embeddings.
        self._language: list[nn.Module] = [HEADS[encoder.config["model_type"]](model)] if language else []
        self._kept = encoder.to_tensor()
        self.padding, self.context = tokenizer.padding, tokenizer.context
        self.pooling = _trained_pooling(encoder) if pooling == "auto" else pooling
        self.width = int(model.config.hidden_size)
        self.text_projection = nn.Linear(self.width, embed_dim, bias=projection_bias)
        nn.init.normal_(self.text_projection.weight, std=self.width**-0.5)
        if projection_bias:
            nn.init.zeros_(self.text_projection.bias)

    def forward(self, tokens: Tensor) -> TextFeatures:
        """Encode token ids (B, L), L at most the context, padded on the right."""
        real = tokens != self.padding
        # As (B, 1, 1, L) transformers takes the mask as it is; of (B, L) it asks, and waits for, whether all is real.
        words = self.encoder(input_ids=tokens, attention_mask=real[:, None, None, :]).last_hidden_state
        lengths = real.sum(dim=1)
        return TextFeatures(self.text_projection(self._pool(words, real, lengths)), words, lengths)

    def language_head(self) -> nn.Module:
        """Give the encoder's masked-language head away, untied: its output map starts as the word embeddings."""
        assert self._language, "it was kept because the tower's own recipe wants it, and can be given away once"
        return copy.deepcopy(self._language.pop())

    def get_extra_state(self) -> Tensor:
        """The encoder's configuration and tokenizer, so that the weights need no other file."""
        return self._kept

    def set_extra_state(self, state: Tensor) -> None:
        """Compare.

        Raises:
            UserError: the weights belong to another configuration or tokenizer.
        """
        if not state.is_meta and not torch.equal(state.cpu(), self._kept):
            raise UserError("These weights belong to a text encoder with another configuration or tokenizer.")

    def _pool(self, words: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
        if self.pooling == "cls":
            return words[:, 0]
        if self.pooling == "eos":
            return words[torch.arange(len(words), device=words.device), lengths - 1]
        return (words * real.unsqueeze(-1)).sum(dim=1) / lengths.unsqueeze(-1)


def _trained_pooling(encoder: TextEncoder) -> str:
    if encoder.pooling is not None and encoder.pooling not in POOLINGS.values():
        raise UserError(
            f"{POOLING} of the text encoder says that it pools by {encoder.pooling}; known are cls, mean or lasttoken. "
            "Set text.pooling=mean, first or end."
        )
    return encoder.pooling or "cls"


def _check(encoder: TextEncoder, tokenizer: HuggingfaceTokenizer) -> None:
    config = encoder.config
    if config.get("model_type") not in HEADS:
        raise UserError(f"The text encoder's kind is {config.get('model_type')!r}; known: {', '.join(HEADS)}.")
    if tokenizer.vocabulary > config["vocab_size"]:
        raise UserError(
            f"The text encoder's tokenizer has {tokenizer.vocabulary:,} ids, its configuration vocab_size "
            f"{config['vocab_size']:,}. Save both of one model."
        )
    if tokenizer.padding != config["pad_token_id"]:
        raise UserError(
            f"The text encoder's tokenizer pads with id {tokenizer.padding}, its configuration says pad_token_id "
            f"{config['pad_token_id']}. Save both of one model."
        )
    if tokenizer.context > encoder.longest:
        raise UserError(
            f"text.context_length is {tokenizer.context}, but the encoder has positions for {encoder.longest} ids. "
            f"Set text.context_length to {encoder.longest} or less."
        )
