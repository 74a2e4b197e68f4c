"""A Hugging Face text encoder, such as BERT or RoBERTa, as a text tower."""

from typing import Any

from torch import Tensor, nn

from declip.data.text.hf_tokenizer import HuggingfaceTokenizer
from declip.errors import UserError, unknown
from declip.models.hf_encoder import CONFIG, KINDS, POOLING, POOLINGS, TextEncoder, check_context
from declip.models.text_tower import AnyTextTower, SelfContained, row_at


class HuggingfaceTextTower(SelfContained, AnyTextTower):
    """transformers' encoder with a projection into the shared space.

    Attention is bidirectional and masks padding, so a batch may be truncated to its longest caption. The encoder's
    pooler is left out: every parameter of the tower gets a gradient.

    Args:
        pooling: Token states that are projected: "cls", "mean" over the caption, "eos", or "auto": as the encoder was
            trained as a sentence encoder, else "cls".
    """

    def __init__(
        self,
        encoder: TextEncoder,
        tokenizer: HuggingfaceTokenizer,
        embed_dim: int,
        pooling: str = "auto",
        projection_bias: bool = False,
    ) -> None:
        super().__init__()
        _check(encoder, tokenizer)
        self.encoder = encoder.build()
        self.stored = encoder.to_tensor()
        self.padding, self.context = tokenizer.padding, tokenizer.context
        self.pooling = encoder.pooling or "cls" if pooling == "auto" else pooling
        if self.pooling not in POOLINGS.values():
            raise UserError(
                f"{POOLING} of the text encoder has the pooling {encoder.pooling}; known are cls, mean and lasttoken. "
                "Set text.pooling=mean, cls or eos."
            )
        self.width = int(encoder.config.get("hidden_size") or encoder.config["dim"])  # DistilBERT's is "dim"
        self.text_projection: nn.Linear = nn.Linear(self.width, embed_dim, bias=projection_bias)
        nn.init.normal_(self.text_projection.weight, std=self.width**-0.5)
        if projection_bias:
            nn.init.zeros_(self.text_projection.bias)

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode token ids (B, L), padded on the right."""
        real = tokens != self.padding
        # A (B, 1, 1, L) mask is used as it is; given (B, L), transformers waits for the device to ask if all is real.
        states = self.encoder(input_ids=tokens, attention_mask=real[:, None, None, :]).last_hidden_state
        # (B,)
        lengths = real.sum(dim=1)
        if self.pooling == "cls":
            pooled = states[:, 0]
        elif self.pooling == "eos":
            pooled = row_at(states, (lengths - 1).clamp(min=0))
        else:
            pooled = (states * real.unsqueeze(-1)).sum(dim=1) / lengths.unsqueeze(-1)
        return pooled, states, lengths

    def language_head(self) -> nn.Module:
        """Build a masked-language head that starts as the word embeddings, as in BERT."""
        embeddings: Any = self.encoder.embeddings
        words: Tensor = embeddings.word_embeddings.weight  # (vocabulary, width)
        head = nn.Linear(*words.mT.shape)
        head.weight.data.copy_(words)
        nn.init.zeros_(head.bias)
        return head


def _check(encoder: TextEncoder, tokenizer: HuggingfaceTokenizer) -> None:
    """Check a configuration and a tokenizer, which may be a stranger's, against each other."""
    config = encoder.config
    kind = str(config.get("model_type"))
    if kind not in KINDS:
        raise unknown("text encoder", kind, KINDS)
    if tokenizer.vocabulary > config["vocab_size"] or tokenizer.padding != config["pad_token_id"]:
        raise UserError(
            f"The text encoder's tokenizer has {tokenizer.vocabulary:,} ids and pads with id {tokenizer.padding}; "
            f"{CONFIG} says vocab_size {config['vocab_size']:,}, pad_token_id {config['pad_token_id']}. Save both of "
            "one model."
        )
    check_context(config, tokenizer.context)
