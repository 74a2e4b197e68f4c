"""Settings of fine-tuning by the number of pairs and the kind of weights: the table of docs/finetuning.md."""

from collections.abc import Mapping
from typing import Any, Literal

from declip.errors import UserError, unknown
from declip.recipe.load import flat, load_recipe
from declip.recipe.resolve import steps_of
from declip.recipe.schema import FineTuning

FREEZE = {"both": ("all", "all"), "image": ("all", 0), "text": (0, "all"), "none": (0, 0)}
"""--freeze → finetune.freeze_image_blocks and freeze_text_blocks."""

ARGUMENTS = {"data.source": "PAIRS", "finetune.pretrained": "--from"}
ARGUMENTS |= dict.fromkeys(
    ("evaluation.val", "evaluation.retrieval", "evaluation.zero_shot"), "--val"
)
"""Recipe keys that arguments of `declip.finetune` set."""

UNUSED = ("train", "loss_weights", "contrastive", "views")
USED = ("train.device", "train.precision")
"""Sections that heads in closed form do not read, and the keys of these that they do."""

EVALUATIONS = 10  # of a run, at most

StartKind = Literal["heads", "image", "whole"]
"""What the weights lack: projections into a shared space, the text tower, or nothing."""


def fits_closed_form(tune: FineTuning) -> bool:
    """Whether a fine-tuning fits projections alone: both towers are frozen, without adapters."""
    return tune.freeze_image_blocks == tune.freeze_text_blocks == "all" and tune.lora is None


def read_overrides(
    overrides: Mapping[str, Any] | None, freeze: str | None = None
) -> dict[str, Any]:
    """Check recipe keys of a fine-tuning: dotted keys and values of the schema's types."""
    if freeze is not None and freeze not in FREEZE:
        raise unknown("value of --freeze", freeze, FREEZE)
    given = dict[str, Any]()
    for key, value in (overrides or {}).items():
        is_section = key in ("train", "finetune") and isinstance(value, dict)
        given |= flat({key: value}) if is_section else {key: value}
    for key in ARGUMENTS.keys() & given:
        raise UserError(f"{key}={given[key]} cannot be set here: use {ARGUMENTS[key]}.")
    # What the weights are is not known yet: keys that depend on them are set so that they allow the others.
    named = given.get("finetune.class_names") is not None
    others = {
        **_frozen(freeze or ("both" if named else "none")),
        "finetune.layer_decay": 1.0,
        "train.warmup_lr": 0,
        "train.evaluate_every": 1,
        "evaluation.val": ["validation"],
    }
    checked = flat(load_recipe("finetune", {**others, **given}).model_dump())
    # Sections, and parts of values that are null, stay as they were given.
    return {key: checked.get(key, value) for key, value in given.items()}


def _frozen(freeze: str) -> dict[str, Any]:
    """The keys of --freeze."""
    image, text = FREEZE[freeze]
    return {"finetune.freeze_image_blocks": image, "finetune.freeze_text_blocks": text}


def settings(
    pairs: int,
    start: StartKind,
    on_cpu: bool,
    freeze: str | None = None,
    given: Mapping[str, Any] | None = None,
    validated: bool = True,
) -> dict[str, Any]:
    """Choose recipe keys by the number of pairs; none of the user's, as `read_overrides` returns them, is changed."""
    given = dict(given or {})
    if given.get("train.epochs", 1) is None:
        del given["train.epochs"]
    of_lora = [given[key] for key in given if key.startswith("finetune.lora")]
    lora = any(value is not None for value in of_lora)
    if freeze is None:
        freeze = "both" if start == "heads" and on_cpu and not lora else "none"
    if freeze == "both":
        return _closed_form(given)
    keys = _frozen(freeze)
    # --- batch size and rates
    eighth = 1 << max(1, pairs // 8).bit_length() - 1  # a power of 2
    keys |= {
        "train.batch_size": min(max(pairs, 2), 128 if on_cpu else 256, max(8, eighth)),
        "train.lr": 1e-5 if start == "whole" else 1e-3,
        "train.patience": 5 if validated else None,
        "finetune.lr_scale": 1.0 if start == "whole" or lora else 0.3,
    }
    if lora:  # adapters are new: they learn like heads
        keys |= {"train.lr": 2e-4 if start == "whole" else 1e-3, "finetune.layer_decay": 1.0}
    # --- length
    if "train.steps" not in given:
        keys["train.epochs"] = 20 if pairs < 10_000 else 10
    keys |= given
    # --- what follows from these, unless it is given
    per_epoch = max(1, pairs // keys["train.batch_size"])
    steps = keys.get("train.steps") or steps_of(keys["train.epochs"], per_epoch)
    every = max(per_epoch, -(-steps // EVALUATIONS))
    rest = {
        "train.warmup_lr": keys["train.lr"] / 100,
        "train.warmup_steps": max(1, min(100, steps // 10)),
        "train.evaluate_every": max(1, min(steps, every)) if validated else 0,
    }
    return rest | keys


def _closed_form(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of heads in closed form; those of training are refused, as they would change nothing."""
    for key, value in given.items():
        if key.split(".")[0] in UNUSED and key not in USED:
            raise UserError(
                f"{key}={value} has no effect: with both towers frozen the projections are computed in closed form, "
                "without steps or batches. Leave it out, or train the towers too with --freeze none."
            )
    return {**_frozen("both"), "train.steps": 1, "train.warmup_steps": 0, **given}
