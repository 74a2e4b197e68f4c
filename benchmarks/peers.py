"""A training step of open_clip, as its own trainer takes it or with sentence-transformers' loss for large batches."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

LEARNING_RATE = 1e-4
"""Of every side: small enough that no step diverges, which would change its time."""


@dataclass
class Side:
    """One of the compared implementations.

    Attributes:
        parts: "": forward, loss, backward, update, gradients set to none at the beginning; ": optimizer": the update
            alone, with the last step's gradients; ": views": finishing the image views on the device; ": muon": Muon's
            update.
        parameters: How many numbers, by part; "learned" is those with a gradient.
        text_length: Tokens a caption.
    """

    parts: dict[str, Callable[..., object]]
    parameters: dict[str, int]
    text_length: int


@dataclass
class Shape:
    """Sizes of the two towers as an open_clip configuration, device and precision."""

    config: dict[str, Any]
    tiny: bool
    device: torch.device
    precision: str
    autocast: Callable[[], Any] = field(init=False)

    def __post_init__(self) -> None:
        bf16 = self.precision == "bf16"
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=bf16)


def count(*modules: nn.Module, learned: bool = False) -> int:
    """Count the parameters, all or those that are trained."""
    return sum(
        p.numel()
        for module in modules
        for p in module.parameters()
        if p.requires_grad or not learned
    )


def cached_loss(model: Any, shape: Shape, chunk: int) -> nn.Module:
    """Build sentence-transformers' chunked loss (GradCache) in both directions on open_clip's towers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    class Towers(nn.Module):
        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            (kind, inputs), *_ = features.items()
            with shape.autocast():
                encoded = (
                    model.encode_image(inputs) if kind == "image" else model.encode_text(inputs)
                )
            return {"sentence_embedding": encoded.float()}

    return CachedMultipleNegativesRankingLoss(
        SentenceTransformer(modules=[Towers()], device=str(shape.device)),
        mini_batch_size=chunk,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )


def open_clip_side(
    name: str, shape: Shape, images: Tensor, captions: list[str], chunk: int | None = None
) -> Side:
    """Build open_clip's step as its trainer takes it without accumulation: 77 tokens, normalized images.

    Args:
        name: open_clip's name of the model.
        shape: Sizes, device and precision.
        images: (B, 3, H, W) float, normalized.
        captions: B texts; its own tokenizer makes the ids.
        chunk: Pairs that the towers see at a time, with `cached_loss` in place of open_clip's loss.
    """
    import open_clip
    from open_clip_train.params import get_default_params

    if shape.tiny:
        model = open_clip.CLIP(**shape.config, output_dict=True).to(shape.device)
    else:
        model = open_clip.create_model(name, device=shape.device, output_dict=True)
    model.train()
    texts = open_clip.get_tokenizer(name)(captions).to(shape.device)
    loss = open_clip.ClipLoss(cache_labels=True)
    cached = None if chunk is None else cached_loss(model, shape, chunk)
    defaults = get_default_params(name)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    plain = {
        n
        for n, p in named
        if p.ndim < 2 or any(word in n for word in ("bn", "ln", "bias", "logit_scale"))
    }
    groups = [
        {"params": [p for n, p in named if n in plain], "weight_decay": 0.0},
        {"params": [p for n, p in named if n not in plain], "weight_decay": 0.2},
    ]
    betas = (defaults["beta1"], defaults["beta2"])
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=betas, eps=defaults["eps"])

    def step(images: Tensor = images, texts: Tensor = texts) -> None:
        optimizer.zero_grad()
        if cached is not None:
            total = cached([{"image": images}, {"text": texts}], None)
        else:
            with shape.autocast():
                losses = loss(**model(images, texts), output_dict=True)
                total = sum(losses.values())
        total.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))

    parameters = {"model": count(model), "learned": count(model, learned=True)}
    return Side({"": step, ": optimizer": optimizer.step}, parameters, texts.shape[1])
