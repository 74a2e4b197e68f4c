"""The recipe: one typed tree that describes a whole experiment, with every range check."""

import os
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)


def _expand_user(given: str) -> str:
    """Expand a leading `~`, also after the name of a set, as in `pets:~/data`."""
    kind, colon, path = given.rpartition(":")
    return kind + colon + os.path.expanduser(path) if path.startswith("~") else given


Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(ge=1e-6, allow_inf_nan=False)]
Portion = Annotated[float, Field(gt=0, le=1)]
Strength = Annotated[float, Field(ge=0, allow_inf_nan=False)]
RGB = tuple[float, float, float]
Place = Annotated[str, AfterValidator(_expand_user)]
OneOrMore = BeforeValidator(lambda given: (given,) if isinstance(given, str) else given)
Places = Annotated[tuple[Place, ...], OneOrMore]
Trackers = Annotated[tuple[Literal["auto", "tensorboard", "wandb", "mlflow", "trackio"], ...], OneOrMore]


class Section(BaseModel):
    """Base class of the recipe's sections; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True)


class WeightedSource(Section):
    """One source of a mixture and its weight."""

    source: Place = Field(description="table, folder, shards or built-in set, as in data.source")
    weight: float = Field(1.0, gt=0, le=1000, description="how often an epoch shows each pair of this source")


class Data(Section):
    """The training pairs and how they are read."""

    source: Place | tuple[WeightedSource, ...] = Field(
        "builtin:emoji", description="table, folder, shards, built-in set, or a list of sources with weights"
    )
    image_column: str = Field("image", description="column of a table with image paths or image bytes")
    caption_column: str = Field("caption", description="column of a table with captions")
    keyword_column: str = Field("keywords", description="column of a table with keywords; ignored if missing")
    group_column: str | None = Field(
        None, description="column of a table whose equal cells mean the same thing; see contrastive.duplicates"
    )
    image_root: Place | None = Field(None, description="folder of a table's image paths; default: the table's folder")
    max_pairs: int | None = Field(None, ge=2, description="train on this many pairs only, chosen by the seed")
    shuffle_buffer: int | None = Field(
        None, ge=1, description="number of pairs shuffled together, shard by shard; default: all, or 50,000 if remote"
    )
    resample: bool = Field(
        False, description="sample each step's pairs with replacement instead of showing each once per epoch"
    )
    workers: Count | Literal["auto"] = Field(
        "auto", description="number of loader processes; auto: one for each free core, at most 8"
    )
    max_broken_fraction: Fraction = Field(0.05, description="fraction of broken pairs above which a run stops")

    @field_validator("source", mode="before")
    @classmethod
    def _one_or_weighted(cls, given: Any) -> Any:
        # Read here: pydantic's own message would name both kinds that a source may be.
        if isinstance(given, str):
            return given
        known = ", ".join(WeightedSource.model_fields)
        if not isinstance(given, list | tuple) or not given:
            raise ValueError(f"data.source is {given!r}; give one source, or a list of them, each with {known}")
        sources = []
        for number, entry in enumerate(given):
            try:
                sources.append(WeightedSource.model_validate({"source": entry} if isinstance(entry, str) else entry))
            except ValidationError as error:
                problem = error.errors()[0]
                place = ".".join(["data.source", str(number), *map(str, problem["loc"])])
                raise ValueError(f"{place}={problem['input']!r}: {problem['msg']}; keys: {known}") from error
        return tuple(sources)

    @property
    def label(self) -> str:
        """The source, or the sources with their weights, in one line."""
        if isinstance(self.source, str):
            return self.source
        return " + ".join(e.source if e.weight == 1 else f"{e.weight:g} × {e.source}" for e in self.source)


class ImageTowerConfig(Section):
    """The image tower: a timm model by name, or one of `declip.models.image_tower.SMALL_TOWERS`."""

    model: str = Field("declip_vit_small", description="name of a timm model or of a small tower of declip")
    size: int = Field(32, ge=16, le=4096, description="image height and width in pixels")
    mean: RGB = Field((0.48145466, 0.4578275, 0.40821073), description="mean of red, green and blue in 0 to 1")
    std: tuple[Positive, Positive, Positive] = Field(
        (0.26862954, 0.26130258, 0.27577711), description="standard deviation of red, green and blue"
    )
    model_kwargs: dict[str, Any] = Field(default_factory=dict, description="arguments of timm.create_model")
    freeze_patch_embed: bool = Field(False, description="keep a ViT's patch embedding at its random start (MoCo v3)")
    shared_bn_views: bool = Field(False, description="compute batch-norm statistics over all views of a step together")


class TextTowerConfig(Section):
    """The text tower: CLIP's causal transformer, or a Hugging Face encoder with its own sizes and vocabulary."""

    width: int = Field(512, ge=8, description="width of the transformer")
    layers: int = Field(12, ge=1, description="number of transformer blocks")
    heads: int = Field(8, ge=1, description="number of attention heads; divides the width")
    context_length: int = Field(77, ge=4, description="longest caption in tokens, start and end included")
    bpe_merges: int | None = Field(None, ge=0, description="number of CLIP's BPE merges to use; default: all")
    projection_bias: bool = Field(False, description="bias of the projection, as in the official implementation")
    activation: Literal["quick_gelu", "gelu"] = Field("quick_gelu", description="activation of the MLPs")
    hf_model: Place | None = Field(None, description="Hugging Face encoder instead: its folder, or huggingface:NAME")
    pooling: Literal["auto", "cls", "mean", "eos"] = Field("auto", description="pooling of a Hugging Face encoder")
    pretrained: bool = Field(True, description="start a Hugging Face encoder from its own weights")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.hf_model is None and self.pooling != "auto":
            raise ValueError(
                f"text.pooling={self.pooling} goes with text.hf_model; CLIP's text tower pools at its end token. "
                "Leave text.pooling out, or give an encoder"
            )
        if self.width % self.heads:
            raise ValueError(f"text.width {self.width} is not a multiple of text.heads {self.heads}")
        return self


class ImageView(Section):
    """MoCo v2's augmentation (Chen et al. 2020, arXiv 2003.04297), as DeCLIP uses it."""

    scale: tuple[Portion, Portion] = Field((0.2, 1.0), description="smallest and largest fraction of the image's area")
    ratio: tuple[Positive, Positive] = Field((3 / 4, 4 / 3), description="smallest and largest aspect ratio of a crop")
    color_jitter: tuple[Strength, Strength, Strength, Annotated[Strength, Field(le=0.5)]] = Field(
        (0.4, 0.4, 0.4, 0.1), description="strength of brightness, contrast, saturation and hue"
    )
    color_jitter_prob: Fraction = Field(0.8, description="probability of color jitter")
    grayscale_prob: Fraction = Field(0.2, description="probability of grayscale")
    blur_prob: Fraction = Field(0.5, description="probability of Gaussian blur")
    blur_sigma: tuple[Positive, Positive] = Field(
        (0.1, 2.0), description="smallest and largest sigma of the blur, in pixels"
    )
    hflip_prob: Fraction = Field(0.5, description="probability of a horizontal flip")

    @field_validator("scale", "ratio", "blur_sigma")
    @classmethod
    def _rising(cls, given: tuple[float, float]) -> tuple[float, float]:
        if given[0] > given[1]:
            raise ValueError(f"{list(given)} falls; give the smaller number first")
        return given


class SecondView(ImageView):
    """The second image view: its size and start; augmentation keys left out are those of `views.image`."""

    size: int | None = Field(None, ge=16, le=4096, description="height and width in pixels; default: image.size")
    start: float = Field(0.0, ge=0, lt=1, description="fraction of the steps that are trained on one view before")


class TextView(Section):
    """EDA (Wei and Zou 2019) and the words that make up a caption."""

    eda_alpha: Fraction = Field(0.1, description="fraction of the words that one EDA operation changes")
    keyword_append_prob: Fraction = Field(0.0, description="probability of appending keywords to the caption")
    keyword_only_prob: Fraction = Field(0.0, description="probability of replacing the caption by keywords")
    second_view: Literal["eda", "caption", "keywords", "same"] = Field(
        "eda", description="second text view: EDA of the first, another caption, keywords, or the first again"
    )


class Views(Section):
    """The views of a pair that the model is trained on."""

    image: ImageView = ImageView()
    image_second: SecondView | None = Field(
        None, description="second image view of its own: size, start (fraction of the steps), keys of views.image"
    )
    text: TextView = TextView()
    contrastive_view: ImageView | None = Field(
        None, description="milder first view for the contrastive loss; the others stay (SLIP)"
    )
    image_count: Literal[1, 2] = Field(
        2, description="number of image views of losses that compare views; 1: one image meets both captions"
    )

    @model_validator(mode="before")
    @classmethod
    def _second_like_first(cls, given: Any) -> Any:
        first, second = (given.get(n) if isinstance(given, dict) else None for n in ("image", "image_second"))
        if not (isinstance(first, dict | ImageView) and isinstance(second, dict | ImageView)):
            return given
        return {**given, "image_second": {**dict(first), **dict(second)}}


class ContrastiveConfig(Section):
    """Targets of contrastive, multi_view and nearest_neighbor."""

    duplicates: Literal["negatives", "mask", "positives"] = Field(
        "negatives", description="pairs of a batch with equal captions or one group: negatives, left out, or positives"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="part of the target spread evenly over all keys")
    self_distillation: float = Field(
        0.0, ge=0, lt=1, description="part of the target from the model's own prediction, at the end of a cosine rise"
    )


class SimSiamConfig(Section):
    """Widths of the projector and the predictor (Chen and He 2021; DeCLIP's constants)."""

    hidden: int = Field(1024, ge=1, description="inner width of the projector")
    out: int = Field(1024, ge=1, description="output width of the projector")
    predictor_hidden: int = Field(512, ge=1, description="inner width of the predictor")


class SimCLRConfig(Section):
    """SLIP's head (Mu et al. 2022) and NT-Xent's temperature."""

    hidden: int = Field(4096, ge=1, description="inner width of the head")
    out: int = Field(256, ge=1, description="output width of the head")
    temperature: float = Field(0.1, gt=0, description="temperature of NT-Xent")


class MaskedLanguageConfig(Section):
    """BERT's corruption of the caption."""

    probability: Fraction = Field(0.15, description="probability of choosing a token")
    mask_contrastive_text: bool = Field(
        True, description="the contrastive loss sees the masked caption too: one pass, as the official implementation"
    )
    mask_input_only: bool = Field(False, description="mask the caption although the loss has no weight (FILIP)")


class NearestNeighborConfig(Section):
    """The queue of text features."""

    queue_size: int = Field(65536, ge=1, description="number of text features in the queue")
    symmetric: bool = Field(False, description="both directions, as in the paper; false: as the official code")


class LateInteractionConfig(Section):
    """FILIP's token-wise similarity (Yao et al. 2022)."""

    width: int = Field(256, ge=1, description="width of the compared tokens")
    top_k: int | None = Field(None, ge=1, description="number of tokens kept on the gathered side; default: all")
    include_padding: bool = Field(False, description="padding counts as tokens, as in the official implementation")


class EmaDistillationConfig(Section):
    """The teacher, an exponential moving average of the learner."""

    decay: float = Field(0.99, gt=0, lt=1, description="decay of the teacher's weights per step")


class LogitScale(Section):
    """The logarithm of the inverse temperature, and its limits after each step."""

    init: float = Field(2.6592600369327783, description="initial value; the default is ln(1 / 0.07)")
    min: float | None = Field(None, description="lower limit; default: none")
    max: float = Field(4.605170185988092, description="upper limit; the default is ln(100)")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min is not None and self.min > self.max:
            raise ValueError(f"logit_scale.min {self.min} is above logit_scale.max {self.max}")
        return self


class LoRA(Section):
    """Low-rank adapters (Hu et al. 2022) on the blocks' linear layers; all pretrained weights stay frozen."""

    rank: int = Field(8, ge=1, description="rank of the adapters")
    alpha: float = Field(16.0, gt=0, description="scale of the adapters; they are multiplied by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the adapters")


class FineTuning(Section):
    """The pretrained weights, and how freely they may change."""

    pretrained: Place | None = Field(
        None, description="weights that declip.load takes, or timm:NAME for the image tower"
    )
    image_size: int | None = Field(None, ge=16, description="image size other than the weights', in pixels")
    image_lr_scale: float = Field(1.0, gt=0, description="factor on the learning rate for the image tower")
    text_lr_scale: float = Field(1.0, gt=0, description="factor on the learning rate for the text tower")
    layer_decay: float = Field(1.0, gt=0, le=1, description="factor on the learning rate per layer below the last")
    freeze_image_blocks: Count | Literal["all"] = Field(
        0, description="number of lowest image blocks to freeze, stem included; all: the whole tower (LiT)"
    )
    freeze_text_blocks: Count | Literal["all"] = Field(0, description="number of lowest text blocks to freeze, or all")
    head_warmup_steps: int = Field(
        0, ge=0, description="number of first steps that train only new parameters; at most a quarter"
    )
    cached_views: int = Field(
        0, ge=0, description="views of each pair whose features frozen towers compute once; 0: computed at every step"
    )
    head: Literal["linear", "mlp"] = Field(
        "linear", description="projections of both towers; mlp: linear plus an MLP with dropout"
    )
    head_init: Literal["random", "cca"] = Field(
        "random", description="start of the projections; cca: canonical correlation of the cached features (CSA)"
    )
    mixup: float = Field(
        0.0, ge=0, description="alpha of the mixup of cached features, equal for image and text (FuseMix); 0: off"
    )
    lora: LoRA | None = Field(None, description="train low-rank adapters instead: rank, alpha, dropout")

    def changed(self) -> list[str]:
        """Names of the keys, other than `pretrained`, that are not at their defaults."""
        given = sorted(self.model_fields_set - {"pretrained"})
        return [name for name in given if getattr(self, name) != type(self).model_fields[name].default]

    @model_validator(mode="after")
    def _cached(self) -> Self:
        for name, off in (("head_init", "random"), ("mixup", 0)):
            if getattr(self, name) != off and not self.cached_views:
                raise ValueError(
                    f"finetune.{name} reads cached features; set finetune.cached_views too, or leave it out"
                )
        return self

    @model_validator(mode="after")
    def _lora_freezes_blocks(self) -> Self:
        for name in ("freeze_image_blocks", "freeze_text_blocks"):
            if self.lora is not None and getattr(self, name) not in (0, "all"):
                raise ValueError(f"finetune.lora freezes all blocks; finetune.{name} is 0 or all then")
        if self.lora is not None and self.layer_decay != 1:
            raise ValueError("finetune.lora has one learning rate per tower; leave finetune.layer_decay out")
        return self


class Train(Section):
    """Optimization and the bookkeeping of a run."""

    steps: int = Field(1000, ge=1, description="number of optimizer steps")
    epochs: float | None = Field(None, gt=0, description="number of passes over the pairs, instead of steps")
    batch_size: int = Field(128, ge=2, description="number of pairs per step over all processes")
    optimizer: str = Field("adamw", description="adamw, muon, or the name of any optimizer of timm")
    lr: float = Field(1e-3, gt=0, description="learning rate after the warm-up")
    lr_schedule: Literal["cosine", "constant", "wsd"] = Field(
        "cosine", description="learning rate after the warm-up; wsd: constant, then falling in the last fifth"
    )
    warmup_lr: float = Field(1e-4, ge=0, description="learning rate of the first step")
    min_lr: float = Field(0.0, ge=0, description="learning rate of the last step")
    warmup_steps: int = Field(100, ge=0, description="number of steps with a linearly rising learning rate")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay; not on biases, norms and scales")
    grad_clip_norm: float | None = Field(None, gt=0, description="largest norm of the gradient; default: no clipping")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "fp32", description="precision of the towers; auto: bf16 where the device computes in it"
    )
    channels_last: bool = Field(False, description="channels-last memory format, for convolutions")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="decay of averaged weights, which are evaluated then")
    log_every: int = Field(10, ge=1, description="number of steps between logged rows")
    report_to: Trackers = Field(
        ("auto",), description="trackers: tensorboard, wandb, mlflow, trackio; auto: tensorboard if installed; []: none"
    )
    evaluate_every: int = Field(0, ge=0, description="number of steps between evaluations; 0: only at the end")
    patience: int | None = Field(
        None, ge=1, description="number of evaluations without a new best one that end a run, with its best weights"
    )
    checkpoint_every: int = Field(200, ge=1, description="number of steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="number of checkpoints to keep")
    device: str = Field("auto", description="device: auto, cpu, cuda, cuda:1, mps")
    strategy: Literal["ddp", "fsdp"] = Field("ddp", description="distributed training; fsdp shards the towers")
    sync_batch_norm: bool = Field(True, description="batch-norm statistics over all processes")
    grad_cache_chunk: int | None = Field(None, ge=1, description="pairs per GradCache chunk and process; default: off")
    allow_batchnorm_chunking: bool = Field(
        False, description="allow chunks for towers with batch norm, which then see each chunk alone"
    )
    grad_checkpointing: bool = Field(False, description="recompute activations: less memory, a third more time")
    rank_timeout: float = Field(600, gt=0, description="seconds a process waits for the others before it gives up")
    length_buckets: int = Field(1, ge=1, description="number of length-sorted groups that captions are encoded in")
    compile: bool = Field(False, description="torch.compile for the towers")
    max_nonfinite_steps: int = Field(0, ge=0, description="number of steps with a non-finite loss that may be skipped")

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_lr > self.lr:
            raise ValueError(f"train.warmup_lr {self.warmup_lr} is above train.lr {self.lr}")
        return self


class Evaluation(Section):
    """The evaluation sets during training and at its end."""

    zero_shot: Places = Field((), description="sets for zero-shot classification")
    retrieval: Places = Field((), description="sets for retrieval in both directions")
    final_zero_shot: Places = Field((), description="test sets for zero-shot, used only at the end")
    final_retrieval: Places = Field((), description="test sets for retrieval, used only at the end")


class Recipe(Section):
    """A whole experiment.

    Raises:
        UserError: from `declip.recipe.load.load_recipe`, when a key or a value is not allowed.
    """

    name: str = Field("unnamed", description="name for tables and reports")
    seed: int = Field(0, ge=0, description="seed of weights, views, order and choice of pairs")
    data: Data = Data()
    image: ImageTowerConfig = ImageTowerConfig()
    text: TextTowerConfig = TextTowerConfig()
    embed_dim: int = Field(512, ge=1, description="width of the shared embedding space")
    views: Views = Views()
    loss_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {"contrastive": 1.0}, description="weight of each loss by name; see declip.supervision.objective.TERMS"
    )
    contrastive: ContrastiveConfig = ContrastiveConfig()
    simsiam: SimSiamConfig = SimSiamConfig()
    simclr: SimCLRConfig = SimCLRConfig()
    masked_language: MaskedLanguageConfig = MaskedLanguageConfig()
    nearest_neighbor: NearestNeighborConfig = NearestNeighborConfig()
    late_interaction: LateInteractionConfig = LateInteractionConfig()
    ema_distillation: EmaDistillationConfig = EmaDistillationConfig()
    logit_scale: LogitScale = LogitScale()
    logit_bias: float | None = Field(
        None, description="initial value of a bias of the logits; default: none, and -10 with the sigmoid loss"
    )
    finetune: FineTuning = FineTuning()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    _given: frozenset[str] = PrivateAttr(frozenset())

    def __eq__(self, other: object) -> bool:
        """Whether both describe the same experiment, whoever gave their keys."""
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    @property
    def given(self) -> frozenset[str]:
        """Dotted keys of the user's own files and overrides, as `declip.recipe.load.load_recipe` read them."""
        return self._given

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        train = self.train
        if not self.active_losses:
            raise ValueError("every weight in loss_weights is 0; at least one must be above 0")
        if train.length_buckets > 1 and self.late_interaction.include_padding:
            raise ValueError(
                "train.length_buckets above 1 leaves padding out, and late_interaction.include_padding wants it; "
                "set one of them back"
            )
        if self.data.group_column is not None and self.contrastive.duplicates == "negatives":
            raise ValueError(
                f"data.group_column={self.data.group_column} says which pairs are duplicates; set "
                "contrastive.duplicates to mask or positives too, or leave it out"
            )
        tunes_text = self.text.hf_model is not None and self.text.pretrained
        of_text = {"text_lr_scale", "freeze_text_blocks", "layer_decay", "head_warmup_steps", "lora"}
        wrong = [name for name in self.finetune.changed() if not (tunes_text and name in of_text)]
        if self.finetune.pretrained is None and wrong:
            also = ", or a pretrained text.hf_model" if wrong[0] in ("text_lr_scale", "freeze_text_blocks") else ""
            raise ValueError(
                f"finetune.{wrong[0]} needs pretrained weights; give finetune.pretrained too{also}, or leave it out"
            )
        clashes = {"ema_decay": train.ema_decay, "compile": train.compile, "strategy": train.strategy == "fsdp"}
        clash = next((name for name, value in clashes.items() if value), None)
        if self.finetune.lora is not None and clash is not None:
            raise ValueError(f"finetune.lora does not work with train.{clash}={getattr(train, clash)}; leave one out")
        measured = self.evaluation.retrieval or self.evaluation.zero_shot
        if train.patience is not None and not (train.evaluate_every and measured):
            raise ValueError(
                "train.patience needs train.evaluate_every and a set in evaluation.retrieval or evaluation.zero_shot; "
                "give both, or leave it out"
            )
        if self.views.image_count == 1 and self.views.contrastive_view:
            raise ValueError("views.contrastive_view needs two other views; set views.image_count to 2")
        if self.views.image_count == 1 and self.views.image_second:
            raise ValueError("views.image_second is a second view; set views.image_count to 2, or leave it out")
        return self

    @property
    def initial_bias(self) -> float | None:
        """The initial bias of the logits, SigLIP's for the sigmoid loss; None for a model without one."""
        return -10.0 if self.logit_bias is None and "sigmoid" in self.active_losses else self.logit_bias

    @property
    def image_sizes(self) -> dict[str, int]:
        """Sizes of the images that the tower takes in training, by their keys."""
        second = self.views.image_second
        return {"image.size": self.image.size} | (
            {"views.image_second.size": second.size} if second is not None and second.size is not None else {}
        )

    @property
    def head_warmup(self) -> int:
        """Number of steps that train only the new parameters: a quarter of `train.steps` at most."""
        return min(self.finetune.head_warmup_steps, self.train.steps // 4)

    @property
    def active_losses(self) -> dict[str, float]:
        """Losses with a weight above 0, by name, in the order of the file."""
        return {name: weight for name, weight in self.loss_weights.items() if weight > 0}

    def to_yaml(self) -> str:
        """The resolved recipe, with every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
