"""Training steps of other libraries, on the same batch and as their own users take them."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

LEARNING_RATE = 1e-4
"""Of every side; it says nothing about time, but a step that diverges would."""


@dataclass
class Side:
    """One of those that are compared.

    Attributes:
        step: Forward, loss, backward, update; gradients are set to none at its beginning.
        update: The optimizer's part alone, with the last step's gradients.
        parameters: How many numbers, by part; "learned" is those with a gradient.
        text_length: Tokens a caption.
        views: Finishing the image views on the device alone, where the step does it.
        muon: Muon's update with the last step's gradients, where it is measured.
        around: What its trainer does around its steps. Only where each side is alone: it holds for the process.
    """

    step: Callable[[], object]
    update: Callable[[], object]
    parameters: dict[str, int]
    text_length: int
    views: Callable[[], object] | None = None
    muon: Callable[[], object] | None = None
    around: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass
class Shape:
    """The two towers, in open_clip's words."""

    config: dict[str, Any]
    tiny: bool
    device: torch.device
    precision: str
    compiled: bool = False
    autocast: Callable[[], Any] = field(init=False)

    def __post_init__(self) -> None:
        bf16 = self.precision == "bf16"
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=bf16)


def count(*modules: nn.Module, learned: bool = False) -> int:
    """Parameters, all or those that learn."""
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad or not learned)


def open_clip_side(name: str, shape: Shape, images: Tensor, captions: list[str]) -> Side:
    """open_clip's step as its trainer takes it without accumulation: 77 tokens, images normalized by its loader.

    Args:
        name: open_clip's name of the model.
        shape: Sizes, device and precision.
        images: (B, 3, H, W) float, normalized.
        captions: B texts; its own tokenizer makes the ids.
    """
    import open_clip
    from open_clip_train.params import get_default_params

    if shape.tiny:
        model = open_clip.CLIP(**shape.config, output_dict=True).to(shape.device)
    else:
        model = open_clip.create_model(name, device=shape.device, output_dict=True)
    model.train()
    if shape.compiled:
        model.compile()
    texts = open_clip.get_tokenizer(name)(captions).to(shape.device)
    loss = open_clip.ClipLoss(cache_labels=True)
    defaults = get_default_params(name)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    plain = {n for n, p in named if p.ndim < 2 or any(word in n for word in ("bn", "ln", "bias", "logit_scale"))}
    groups = [
        {"params": [p for n, p in named if n in plain], "weight_decay": 0.0},
        {"params": [p for n, p in named if n not in plain], "weight_decay": 0.2},
    ]
    betas = (defaults["beta1"], defaults["beta2"])
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=betas, eps=defaults["eps"])

    def step(images: Tensor = images, texts: Tensor = texts) -> None:
        optimizer.zero_grad()
        with shape.autocast():
            losses = loss(**model(images, texts), output_dict=True)
            total = sum(losses.values())
        total.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))

    parameters = {"model": count(model), "learned": count(model, learned=True)}
    return Side(step, optimizer.step, parameters, texts.shape[1])


def x_clip_side(shape: Shape, images: Tensor, texts: Tensor, special: dict[str, int]) -> Side:
    """x-clip's nearest to DeCLIP: two views of both, SimSiam, masked language, no queue; its own defaults otherwise.

    Its feed-forward layers are gated, half as large again as CLIP's, and no option makes them smaller. Its SimSiam
    encodes two more views that it draws itself, each once more without gradient. It is never compiled: what it draws
    with Python's `random` is traced anew and anew.

    Args:
        shape: Sizes, device and precision; a vision transformer.
        images: (2, B, 3, H, W) float in [0, 1].
        texts: (2, B, L) ids.
        special: Ids "start", "end", "mask" and the size "vocabulary".
    """
    from x_clip import CLIP

    text, vision = shape.config["text_cfg"], shape.config["vision_cfg"]
    model = CLIP(
        dim_text=text["width"], text_enc_depth=text["layers"], text_heads=text["heads"], text_seq_len=77,
        dim_image=vision["width"], visual_enc_depth=vision["layers"], visual_heads=vision["width"] // 64,
        visual_image_size=vision["image_size"], visual_patch_size=vision["patch_size"], visual_patch_dropout=0.0,
        dim_latent=shape.config["embed_dim"], num_text_tokens=special["vocabulary"],
        use_mlm=True, text_ssl_loss_weight=0.2, mlm_mask_token_id=special["mask"],
        mlm_mask_ignore_token_ids=[special["start"], special["end"]],
        use_visual_ssl=True, visual_ssl_type="simsiam", image_ssl_loss_weight=0.2, multiview_loss_weight=0.3,
    ).to(shape.device)  # fmt: skip
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        with shape.autocast():
            loss = model(texts[0], images[0], return_loss=True, aug_text=texts[1], aug_image=images[1])
        loss.backward()
        optimizer.step()

    parameters = {"model": count(model), "learned": count(model, learned=True)}
    return Side(step, optimizer.step, parameters, texts.shape[2])
