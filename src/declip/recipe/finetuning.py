"""Settings of fine-tuning by the number of pairs and the kind of weights: the table of docs/finetuning.md."""

from collections.abc import Mapping
from typing import Any, Literal

from declip.errors import unknown

FREEZE = {"both": ("all", "all"), "image": ("all", 0), "text": (0, "all"), "none": (0, 0)}
"""--freeze → finetune.freeze_image_blocks and freeze_text_blocks."""

EVALUATIONS = 10  # of a run, at most: an epoch of cached features takes less time than an evaluation
CPU_SIZE = 128  # image size of the built-in start on a CPU: a third of the work of its 224 pixels

Start = Literal["heads", "image", "whole"]
"""What the weights lack: projections into a shared space, the text tower, or nothing."""


def settings(
    pairs: int, start: Start, on_cpu: bool, freeze: str | None = None, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Choose recipe keys by the number of pairs; the user's `given` ones hold in any case, `freeze` is of `FREEZE`."""
    given = dict(given or {})
    if freeze is not None and freeze not in FREEZE:
        raise unknown("value of --freeze", freeze, FREEZE)
    lora = any(value is not None for key, value in given.items() if key.startswith("finetune.lora"))
    if freeze is None:
        freeze = "both" if start == "heads" and on_cpu and not lora else "none"
    blocks = dict(zip(("finetune.freeze_image_blocks", "finetune.freeze_text_blocks"), FREEZE[freeze], strict=True))
    heads = freeze == "both" and start == "heads"
    closed = heads and given.get("finetune.head_init", "cca") == "cca"
    mixes = given.get("contrastive.duplicates") not in ("mask", "positives")  # mixed captions are never equal
    batch_size = min(128 if on_cpu else 256, max(8, 1 << max(1, pairs // 8).bit_length() - 1))
    keys: dict[str, Any] = {
        **blocks,
        "finetune.cached_views": 4 if heads else 0,
        **({"finetune.head_init": "cca", "finetune.mixup": float(mixes)} if heads else {}),
        # The mean of all steps stays nearer to the closed-form start, which serves captions that training does not see.
        **({"train.ema_decay": 1.0} if closed else {}),
        "finetune.head_warmup_steps": 0 if heads else 200,
        "train.batch_size": batch_size,
        "train.lr": 1e-5 if start == "whole" else 1e-3,
        "train.patience": 5,
    }
    scale = 1.0 if start == "whole" else 0.3
    if lora:  # adapters are new: they learn like heads
        keys |= {"train.lr": 2e-4 if start == "whole" else 1e-3, "finetune.layer_decay": 1.0}
        scale = 1.0
    keys |= {"finetune.image_lr_scale": scale, "finetune.text_lr_scale": scale}
    if "train.steps" not in given:
        keys["train.epochs"] = 60 if heads else 20 if pairs < 10_000 else 10
    keys |= given
    per_epoch = max(1, pairs // keys["train.batch_size"])
    steps = keys["train.steps"] if "train.steps" in keys else max(1, round(keys["train.epochs"] * per_epoch))
    rest = {
        "train.warmup_lr": keys["train.lr"] / 100,
        "train.warmup_steps": max(1, min(100, steps // 10)),
        "train.evaluate_every": max(1, min(steps, max(per_epoch, -(-steps // EVALUATIONS)))),
    }
    return {**rest, **keys}
