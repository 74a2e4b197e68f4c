"""The recipe: all sections and keys, with their defaults and limits."""

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from declip.errors import unknown
from declip.io.plugins import plugins
from declip.io.yaml_dialect import write_yaml


def _expand_user(given: str) -> str:
    """Expand a leading `~`, also after the name of a set, as in `pets:~/data`."""
    kind, colon, path = given.rpartition(":")
    return kind + colon + os.path.expanduser(path) if path.startswith("~") else given


def _known_tracker(name: str) -> str:
    if name not in ("auto", *TRACKERS) and name not in plugins("trackers"):
        raise ValueError(str(unknown("tracker", name, ("auto", *TRACKERS, *plugins("trackers")))))
    return name


def known_device(name: str) -> str:
    """Refuse a name that is not one of a device, installed or not."""
    if not DEVICE.fullmatch(name):
        raise unknown("device", name, ("auto", "cpu", "cuda", "cuda:1", "mps"))
    return name


Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Blocks = Count | Literal["all"]
Workers = Count | Literal["auto"]
Width = Annotated[int, Field(ge=1)]
Spread = Annotated[float, Field(ge=1e-6, le=1)]
Spreads = tuple[Spread, Spread, Spread]
Portion = Annotated[float, Field(gt=0, le=1)]
Strength = Annotated[float, Field(ge=0)]
Jitter = tuple[Strength, Strength, Strength, Annotated[Strength, Field(le=0.5)]]
RGB = tuple[Fraction, Fraction, Fraction]
PathOrName = Annotated[str, AfterValidator(_expand_user)]
Second = Literal["eda", "caption", "none"]
OneOrMore = BeforeValidator(lambda given: (given,) if isinstance(given, str) else given)
PathsOrNames = Annotated[tuple[PathOrName, ...], OneOrMore]
Column = Literal["image", "caption", "group"]
COLUMNS: dict[Column, str | tuple[str, ...]] = {"image": "image", "caption": "caption"}
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
TRACKERS = ("tensorboard", "wandb")
Device = Annotated[str, AfterValidator(known_device)]
Tracker = Annotated[str, AfterValidator(_known_tracker)]
Trackers = Annotated[tuple[Tracker, ...], OneOrMore]

NUMBERS = (int, float, int | None, float | None, Blocks, Workers)


class Section(BaseModel):
    """Base class of the recipe's sections; unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", validate_default=True, frozen=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_yes_for_a_number(cls, given: Any, info: ValidationInfo) -> Any:
        if (
            isinstance(given, bool)
            and cls.model_fields[info.field_name or ""].annotation in NUMBERS
        ):
            raise ValueError(f"{info.field_name} is {str(given).lower()}; give a number")
        return given


class Data(Section):
    """The training pairs and how they are read."""

    source: PathOrName | tuple[PathOrName, ...] = Field(
        "builtin:emoji", description="table, folder, shards or built-in set, or a list of these"
    )
    columns: dict[Column, str | tuple[str, ...]] = Field(
        COLUMNS,
        description="columns of a table: image, group, whose equal cells show one thing, and caption, also several, or "
        "templates such as `a {color} {kind}`",
    )
    image_root: PathOrName | None = Field(
        None, description="folder of a table's image paths; default: the table's folder"
    )
    max_pairs: int | None = Field(
        None, ge=2, description="train on this many pairs only, chosen by the seed"
    )
    shuffle_buffer: int | None = Field(
        None, ge=1, description="pairs shuffled together; default: all; remote: 50,000"
    )
    workers: Workers = Field(
        "auto", description="loader processes; auto: 1 per free core, at most 32"
    )
    max_broken_fraction: Fraction = Field(
        0.05, description="fraction of broken pairs above which a run stops"
    )

    @field_validator("source", mode="before")
    @classmethod
    def _one_or_several(cls, given: Any) -> Any:
        several = (
            isinstance(given, list | tuple)
            and given
            and all(isinstance(name, str) for name in given)
        )
        # pydantic's own message would name both types that this may have
        if not (isinstance(given, str) or several):
            raise ValueError(f"data.source is {given!r}; give one source, or a list of sources")
        return given

    @field_validator("columns", mode="before")
    @classmethod
    def _with_usual_names(cls, given: Any) -> Any:
        for name, value in given.items() if isinstance(given, dict) else ():
            if name not in get_args(Column):
                raise ValueError(
                    f"data.columns: {unknown('column name', str(name), get_args(Column))}"
                )
            several = name == "caption" and isinstance(value, list | tuple) and value
            if not all(isinstance(text, str) for text in (value if several else [value])):
                also = ", a list of columns, or a template in quotes" if name == "caption" else ""
                raise ValueError(
                    f"data.columns.{name} is {value!r}; give the name of a column{also}"
                )
        return {**COLUMNS, **given} if isinstance(given, dict) else given

    @property
    def label(self) -> str:
        """The source, or the sources, in one line."""
        return self.source if isinstance(self.source, str) else " + ".join(self.source)


class ImageTowerConfig(Section):
    """The image tower: a timm model by name, or one of `declip.models.image_tower.SMALL_TOWERS`."""

    model: str = Field(
        "declip_vit_small", description="name of a timm model or of a small tower of declip"
    )
    size: int = Field(
        32, ge=16, le=4096, description="height and width in pixels; pretrained weights are resized"
    )
    mean: RGB = Field(
        (0.48145466, 0.4578275, 0.40821073), description="mean of red, green and blue in 0 to 1"
    )
    std: Spreads = Field(
        (0.26862954, 0.26130258, 0.27577711),
        description="standard deviation of red, green and blue",
    )
    interpolation: Literal["bicubic", "bilinear"] = Field(
        "bicubic",
        description="of training crops and of the resize in evaluation: bicubic or bilinear",
    )
    crop_pct: float = Field(
        1.0,
        ge=0.25,
        le=1,
        description="in evaluation, image.size divided by the resized shorter side, as in timm",
    )
    model_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="arguments of timm.create_model"
    )
    freeze_patch_embed: bool = Field(
        False, description="keep a ViT's patch embedding at its random start (MoCo v3)"
    )

    @property
    def resize(self) -> int:
        """Shorter side in pixels to which evaluation resizes an image before the center crop."""
        # Rounded down as by timm; 1e-6 is for the division's rounding
        return int(self.size / self.crop_pct + 1e-6)


class TextTowerConfig(Section):
    """The text tower: CLIP's causal transformer, or a Hugging Face encoder with its own sizes and vocabulary."""

    width: int = Field(512, ge=8, le=2**16, description="width of the transformer")
    layers: int = Field(12, ge=1, le=1_000, description="number of transformer blocks")
    heads: int = Field(8, ge=1, description="number of attention heads; divides the width")
    context_length: int = Field(
        77, ge=4, le=2**17, description="longest caption in tokens, start and end included"
    )
    bpe_merges: int | None = Field(
        None, ge=0, description="number of CLIP's BPE merges to use; default: all"
    )
    projection_bias: bool = Field(
        False, description="bias of the projection, as in the official implementation"
    )
    activation: Literal["quick_gelu", "gelu"] = Field(
        "quick_gelu", description="activation of the MLPs"
    )
    hf_model: PathOrName | None = Field(
        None, description="Hugging Face text encoder: its folder, or huggingface:NAME"
    )
    pooling: Literal["auto", "cls", "mean", "eos"] = Field(
        "auto", description="pooling of a Hugging Face encoder"
    )
    pretrained: bool = Field(True, description="start a Hugging Face encoder from its own weights")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.hf_model is None and self.pooling != "auto":
            raise ValueError(
                f"text.pooling={self.pooling} requires text.hf_model; leave it out, or set an encoder"
            )
        if self.width % self.heads:
            raise ValueError(
                f"text.width {self.width} is not a multiple of text.heads {self.heads}"
            )
        return self


class ImageView(Section):
    """MoCo v2's augmentation (Chen et al. 2020, arXiv 2003.04297), as DeCLIP uses it."""

    scale: tuple[Portion, Portion] = Field(
        (0.2, 1.0), description="smallest and largest fraction of the image's area"
    )
    color_jitter: Jitter = Field(
        (0.4, 0.4, 0.4, 0.1), description="strength of brightness, contrast, saturation and hue"
    )
    color_jitter_prob: Fraction = Field(0.8, description="probability of color jitter")
    grayscale_prob: Fraction = Field(0.2, description="probability of grayscale")
    blur_prob: Fraction = Field(0.5, description="probability of Gaussian blur")
    hflip_prob: Fraction = Field(0.5, description="probability of a horizontal flip")


class TextView(Section):
    """The second text view, such as EDA (Wei and Zou 2019)."""

    second_view: Second = Field(
        "eda",
        description="second text view: EDA of the first, another caption, or none",
    )
    mask: bool | None = Field(
        None, description="mask words for all losses; default: if masked_language has a weight"
    )


class Views(Section):
    """The views of a pair that the model is trained on."""

    image: ImageView = ImageView()
    image_second: bool = Field(
        True, description="a second image view, for the losses that take one"
    )
    text: TextView = TextView()
    contrastive_view: ImageView | None = Field(
        None, description="milder first view for the contrastive loss (SLIP)"
    )


class ContrastiveConfig(Section):
    """Targets and negatives of contrastive, multi_view and nearest_neighbor."""

    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="part of the target spread evenly over all keys"
    )
    duplicates: Literal["none", "mask"] = Field(
        "none",
        description="mask: pairs with the same caption or data.columns.group are not negatives of each other",
    )


class SimSiamConfig(Section):
    """The projector and the predictor (Chen and He 2021; DeCLIP's constants)."""

    widths: tuple[Width, Width, Width] = Field(
        (1024, 1024, 512), description="projector: inner, out; predictor: inner"
    )


class SimCLRConfig(Section):
    """SLIP's head (Mu et al. 2022)."""

    widths: tuple[Width, Width] = Field(
        (4096, 256), description="inner and output width of the head"
    )


class NearestNeighborConfig(Section):
    """The queue of text features."""

    queue_size: int = Field(65536, ge=1, description="number of text features in the queue")
    queue_per_process: bool = Field(
        False,
        description="each process keeps and searches its own captions, as in the official implementation",
    )


class LateInteractionConfig(Section):
    """FILIP's token-wise similarity (Yao et al. 2022)."""

    width: int = Field(256, ge=1, description="width of the compared tokens")
    top_k: int | None = Field(
        None, ge=1, description="number of tokens kept on the gathered side; default: all"
    )
    include_padding: bool = Field(
        False, description="padding counts as tokens, as in the official implementation"
    )


class LogitScale(Section):
    """The logarithm of the inverse temperature, and its limits after each step."""

    init: float = Field(
        2.6592600369327783, description="initial value; the default is ln(1 / 0.07)"
    )
    min: float | None = Field(None, description="lower limit; default: none")
    max: float = Field(4.605170185988092, description="upper limit; the default is ln(100)")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.init > self.max:
            raise ValueError(
                f"logit_scale.init {self.init} is above logit_scale.max {self.max}; all are logarithms"
            )
        if self.min is not None and self.min > self.max:
            raise ValueError(f"logit_scale.min {self.min} is above logit_scale.max {self.max}")
        return self


class LoRA(Section):
    """Low-rank adapters (Hu et al. 2022) on the blocks' linear layers; all pretrained weights stay frozen."""

    rank: int = Field(8, ge=1, description="rank of the adapters")
    alpha: float = Field(
        16.0, gt=0, description="scale of the adapters; they are multiplied by alpha / rank"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the adapters")


class FineTuning(Section):
    """The pretrained weights, and how they are trained."""

    pretrained: PathOrName | None = Field(
        None, description="weights that declip.load takes, or timm:NAME"
    )
    class_names: PathOrName | None = Field(
        None,
        description="file with the names of the classifier's classes: one per line, or a table name,definition",
    )
    lr_scale: float = Field(
        1.0, gt=0, description="factor on the learning rate for pretrained towers"
    )
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="factor on the learning rate per layer below the last"
    )
    freeze_image_blocks: Blocks = Field(
        0,
        description="number of lowest image blocks to freeze, stem included; all: the whole tower (LiT)",
    )
    freeze_text_blocks: Blocks = Field(
        0, description="number of lowest text blocks to freeze, or all"
    )
    head_warmup_steps: int = Field(
        0, ge=0, description="first steps that train only new parameters; at most a quarter"
    )
    class_pairs: bool = Field(
        True, description="with frozen towers, use the start's classes as pairs"
    )
    lora: LoRA | None = Field(
        None, description="train low-rank adapters instead: rank, alpha, dropout"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        frozen = self.freeze_image_blocks == self.freeze_text_blocks == "all" and self.class_pairs
        if self.class_names is not None and not frozen:
            raise ValueError(
                "finetune.class_names requires finetune.class_pairs and both towers frozen (--freeze both)"
            )
        for name in ("freeze_image_blocks", "freeze_text_blocks"):
            if self.lora is not None and getattr(self, name) not in (0, "all"):
                raise ValueError(
                    f"finetune.lora freezes all blocks; finetune.{name} is 0 or all then"
                )
        if self.lora is not None and self.layer_decay != 1:
            raise ValueError(
                "finetune.lora has one learning rate per tower; leave finetune.layer_decay out"
            )
        return self


class Train(Section):
    """Optimization, logging, evaluation and checkpoints of a run."""

    steps: int = Field(1000, ge=1, description="number of optimizer steps")
    epochs: float | None = Field(
        None, gt=0, description="number of passes over the pairs, instead of steps"
    )
    batch_size: int = Field(128, ge=2, description="number of pairs per step over all processes")
    optimizer: Literal["adamw", "muon", "sgd"] = Field(
        "adamw", description="adamw, muon, or sgd with Nesterov momentum 0.9"
    )
    lr: float = Field(
        1e-3,
        gt=0,
        description="learning rate after the warm-up, from which it falls to 0 as a cosine",
    )
    warmup_lr: float = Field(1e-4, ge=0, description="learning rate of the first step")
    warmup_steps: int = Field(
        100, ge=0, description="number of steps with a linearly rising learning rate"
    )
    weight_decay: float = Field(
        0.1, ge=0, description="decoupled weight decay (sgd: L2), not on biases and norms"
    )
    grad_clip_norm: float | None = Field(
        None, gt=0, description="largest norm of the gradient; default: no clipping"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "fp32", description="of the towers; auto: bf16 if supported"
    )
    matmul_precision: Literal["highest", "high", "medium"] = Field(
        "highest",
        description="of float32 products on a GPU, as in torch.set_float32_matmul_precision; high: TF32",
    )
    compile: bool = Field(
        False, description="torch.compile of blocks and image augmentation; no effect on a CPU"
    )
    channels_last: bool = Field(False, description="channels-last memory format, for convolutions")
    log_every: int = Field(10, ge=1, description="number of steps between logged rows")
    report_to: Trackers = Field(
        ("auto",), description=f"{', '.join(TRACKERS)}; auto: tensorboard if installed; []: none"
    )
    evaluate_every: int = Field(
        0, ge=0, description="number of steps between evaluations; 0: only at the end"
    )
    patience: int | None = Field(
        None, ge=1, description="evaluations without improvement that end a run"
    )
    checkpoint_every: int = Field(200, ge=1, description="number of steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="number of checkpoints to keep")
    device: Device = Field("auto", description="device: auto, cpu, cuda, cuda:1, mps")
    strategy: Literal["ddp", "fsdp"] = Field(
        "ddp", description="distributed training; fsdp shards the towers"
    )
    grad_cache_chunk: int | None = Field(
        None, ge=1, description="pairs per GradCache chunk and process; default: off"
    )
    grad_checkpointing: bool = Field(
        False, description="recompute activations: less memory, a third more time"
    )
    length_buckets: int = Field(
        1, ge=1, description="number of length-sorted groups that captions are encoded in"
    )

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_lr > self.lr:
            raise ValueError(f"train.warmup_lr {self.warmup_lr} is above train.lr {self.lr}")
        return self


class Evaluation(Section):
    """The evaluation sets during training and at its end."""

    val: PathsOrNames = Field(
        (), description="sets for zero-shot if they have classes, retrieval if captions (--val)"
    )
    zero_shot: PathsOrNames = Field((), description="sets for zero-shot classification")
    retrieval: PathsOrNames = Field((), description="sets for retrieval in both directions")
    final_zero_shot: PathsOrNames = Field(
        (), description="test sets for zero-shot, used only at the end"
    )
    final_retrieval: PathsOrNames = Field(
        (), description="test sets for retrieval, used only at the end"
    )
    keep: PathsOrNames = Field(
        (), description="sets on which accuracy should not fall in fine-tuning (--keep)"
    )


class Recipe(Section):
    """All settings of an experiment.

    Examples:
        >>> declip.load_recipe("slip").active_losses
        {'contrastive': 1.0, 'simclr': 1.0}
    """

    name: str = Field("unnamed", description="name for tables and reports")
    seed: int = Field(
        0, ge=0, lt=2**63, description="seed of weights, views, order and choice of pairs"
    )
    data: Data = Data()
    image: ImageTowerConfig = ImageTowerConfig()
    text: TextTowerConfig = TextTowerConfig()
    embed_dim: int = Field(512, ge=1, le=2**16, description="width of the shared embedding space")
    views: Views = Views()
    loss_weights: dict[str, Strength] = Field(
        {"contrastive": 1.0},
        description="weight of each loss by name; see declip.supervision.objective.TERMS",
    )
    contrastive: ContrastiveConfig = ContrastiveConfig()
    simsiam: SimSiamConfig = SimSiamConfig()
    simclr: SimCLRConfig = SimCLRConfig()
    nearest_neighbor: NearestNeighborConfig = NearestNeighborConfig()
    late_interaction: LateInteractionConfig = LateInteractionConfig()
    logit_scale: LogitScale = LogitScale()
    logit_bias: float | None = Field(
        None, description="initial bias of the logits; default: none; sigmoid loss: -10"
    )
    finetune: FineTuning = FineTuning()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    _given: frozenset[str] = PrivateAttr(frozenset())

    def model_post_init(self, context: Any) -> None:
        if context is not None:
            self._given = frozenset(context["given"])

    @property
    def given(self) -> frozenset[str]:
        """Dotted keys of the user's own files and overrides, which `declip.load_recipe` passes as context."""
        return self._given

    def with_keys(self, values: Mapping[str, Any]) -> Self:
        """A copy with other values by dotted key, such as ``{"train.steps": 12}``, which are not validated."""
        changed = self
        for key, value in values.items():
            section, _, inner = key.partition(".")
            if inner:
                value = getattr(changed, section).model_copy(update={inner: value})
            changed = changed.model_copy(update={section: value})
        return changed

    @model_validator(mode="after")
    def _losses_fit(self) -> Self:
        if not self.active_losses:
            raise ValueError("every weight in loss_weights is 0; at least one must be above 0")
        one_pairing = not self.views.image_second and self.views.text.second_view == "none"
        if "multi_view" in self.active_losses and one_pairing:
            raise ValueError(
                "multi_view requires a second view of the image or of the text; leave one of them on"
            )
        if self.train.length_buckets > 1 and self.late_interaction.include_padding:
            raise ValueError("late_interaction.include_padding requires train.length_buckets=1")
        if self.views.contrastive_view is not None and not self.views.image_second:
            raise ValueError(
                "views.contrastive_view requires two other views; leave views.image_second=false out"
            )
        return self

    @model_validator(mode="after")
    def _training_fits(self) -> Self:
        train, tune = self.train, self.finetune
        tunes_text = self.text.hf_model is not None and self.text.pretrained
        of_text = {"lr_scale", "freeze_text_blocks", "layer_decay", "head_warmup_steps", "lora"}
        wrong = sorted(
            tune.model_dump(exclude_defaults=True).keys() - (of_text if tunes_text else set())
        )
        if tune.pretrained is None and wrong:
            raise ValueError(f"finetune.{wrong[0]} requires finetune.pretrained")
        if tune.lora is not None and train.strategy == "fsdp":
            raise ValueError("finetune.lora cannot be combined with train.strategy=fsdp")
        sets = self.evaluation
        measured = sets.val or sets.retrieval or sets.zero_shot
        if train.patience is not None and not (train.evaluate_every and measured):
            raise ValueError(
                "train.patience requires train.evaluate_every and evaluation.retrieval or zero_shot"
            )
        return self

    @property
    def initial_bias(self) -> float | None:
        """The initial bias of the logits, SigLIP's for the sigmoid loss; None for a model without one."""
        return (
            -10.0
            if self.logit_bias is None and "sigmoid" in self.active_losses
            else self.logit_bias
        )

    @property
    def head_warmup(self) -> int:
        """Number of steps that train only the new parameters: a quarter of `train.steps` at most."""
        return min(self.finetune.head_warmup_steps, self.train.steps // 4)

    @property
    def active_losses(self) -> dict[str, float]:
        """Losses with a weight above 0, by name, in the order of the file."""
        return {name: weight for name, weight in self.loss_weights.items() if weight > 0}

    @property
    def token_scoring(self) -> LateInteractionConfig | None:
        """Settings of scores by tokens, if the only loss compares tokens and trains no embeddings."""
        alone = list(self.active_losses) == ["late_interaction"]
        return self.late_interaction if alone else None

    def to_yaml(self) -> str:
        """The resolved recipe, with every default written out."""
        return write_yaml(self.model_dump(mode="json"))
