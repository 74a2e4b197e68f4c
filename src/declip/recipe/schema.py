"""The recipe: one typed tree that describes a whole experiment.

`Recipe` is what every part of the package is built from, and what a run folder and a checkpoint keep;
`declip.recipe.load` reads it.
"""

from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from declip.recipe.schema_pairs import Data, Section, Views

TERMS = (
    "contrastive",
    "multi_view",
    "simsiam",
    "masked_language",
    "nearest_neighbor",
    "simclr",
    "late_interaction",
)


class ImageTower(Section):
    """A timm model by name, or one of the small towers of `declip.models.image_tower.SMALL_TOWERS`."""

    name: str = Field("declip_vit_small", description="a timm model, or a small tower of declip")
    size: int = Field(32, ge=16, description="pixels, height and width")
    mean: tuple[float, float, float] = Field(
        (0.48145466, 0.4578275, 0.40821073), description="of red, green and blue, subtracted from pixels of 0 to 1"
    )
    std: tuple[float, float, float] = Field(
        (0.26862954, 0.26130258, 0.27577711), description="what they are then divided by"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="passed to timm.create_model")
    freeze_patch_embed: bool = Field(False, description="a ViT's first layer stays random (MoCo v3)")
    shared_bn_views: bool = Field(False, description="batch norm sees all views of a step together, in one pass")


class TextTower(Section):
    """CLIP's causal transformer (Radford et al. 2021, section 2.4), or a Hugging Face encoder.

    An encoder says its own sizes and vocabulary: width, layers, heads, merges and activation are not read then.
    """

    width: int = Field(512, ge=8, description="of the transformer")
    layers: int = Field(12, ge=1, description="blocks")
    heads: int = Field(8, ge=1, description="of attention; divides the width")
    context: int = Field(77, ge=4, description="most tokens of a caption, its two ends among them")
    merges: int | None = Field(None, ge=0, description="None: CLIP's whole vocabulary; n: its first n merges")
    projection_bias: bool = Field(False, description="as the authors' text tower has it")
    activation: Literal["quick_gelu", "gelu"] = Field("quick_gelu", description="of the MLPs")
    encoder: str | None = Field(None, description="a Hugging Face encoder instead: its folder, or huggingface:NAME")
    pooling: Literal["auto", "first", "mean", "end"] = Field("auto", description="which of an encoder's token states")
    pretrained: bool = Field(True, description="an encoder starts from its own weights, not from random ones")

    @model_validator(mode="after")
    def _pooling_is_the_encoders(self) -> Self:
        if self.encoder is None and self.pooling != "auto":
            raise ValueError(
                f"text.pooling={self.pooling} goes with text.hf_model; CLIP's text tower pools at its end token. "
                "Leave text.pooling out, or give an encoder"
            )
        return self

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"text.width {self.width} is not a multiple of text.heads {self.heads}")
        return self


class Weights(Section):
    """The weight of each term in the total; 0 leaves the term, its head and its views out."""

    contrastive: float = Field(0.0, ge=0, description="CLIP's InfoNCE of the first views")
    multi_view: float = Field(0.0, ge=0, description="InfoNCE of all other pairings of views")
    simsiam: float = Field(0.0, ge=0, description="SimSiam between both image views")
    masked_language: float = Field(0.0, ge=0, description="predicting masked words")
    nearest_neighbor: float = Field(0.0, ge=0, description="InfoNCE with the queue's nearest caption")
    simclr: float = Field(0.0, ge=0, description="NT-Xent between both image views (SLIP)")
    late_interaction: float = Field(0.0, ge=0, description="token-wise contrast (FILIP)")

    @model_validator(mode="after")
    def _something_teaches(self) -> Self:
        if not any(weight > 0 for _, weight in self):
            raise ValueError(f"every weight is 0: at least one of {', '.join(TERMS)} must be above 0")
        return self

    def active(self) -> tuple[str, ...]:
        """The names of the terms with a weight above 0, in the order of `TERMS`."""
        return tuple(name for name in TERMS if getattr(self, name) > 0)


class SimSiam(Section):
    """Widths of the projector and the predictor (Chen and He 2021; DeCLIP's constants)."""

    hidden: int = Field(1024, ge=1, description="the projector's inner width")
    out: int = Field(1024, ge=1, description="the projector's last width")
    predictor_hidden: int = Field(512, ge=1, description="the predictor's inner width")


class SimCLR(Section):
    """SLIP's head (Mu et al. 2022) and NT-Xent's temperature."""

    hidden: int = Field(4096, ge=1, description="the head's inner width")
    out: int = Field(256, ge=1, description="the head's last width")
    temperature: float = Field(0.1, gt=0, description="of NT-Xent")


class MaskedLanguage(Section):
    """BERT's corruption of the caption; `mask_contrastive_text` lets one pass serve this term and the contrast."""

    probability: float = Field(0.15, ge=0, le=1, description="of a word to be chosen")
    mask_contrastive_text: bool = Field(
        True, description="the contrast too sees the masked caption: one pass for both, as the authors"
    )
    mask_input_only: bool = Field(False, description="mask the caption although the term has no weight (FILIP)")


class NearestNeighbor(Section):
    """The queue of text features."""

    queue_size: int = Field(65536, ge=1, description="captions remembered")
    symmetric: bool = Field(False, description="True: the paper's formula; False: the authors' code")
    lookup: Literal["fp32", "bf16"] = Field("fp32", description="precision of the similarities to the queue")


class LateInteraction(Section):
    """FILIP's token-wise similarity (Yao et al. 2022)."""

    width: int = Field(256, ge=1, description="of the tokens that are compared")
    top_k: int | None = Field(None, ge=1, description="tokens kept on the gathered side; None keeps all")
    include_padding: bool = Field(False, description="padding counts as tokens, as in the authors' code")


class LogitScale(Section):
    """The logarithm of the inverse temperature, and its limits after each step."""

    start: float = Field(2.6592600369327783, description="ln(1 / 0.07)")
    min: float | None = Field(None, description="None: no limit")
    max: float = Field(4.605170185988092, description="ln(100)")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min is not None and self.min > self.max:
            raise ValueError(f"logit_scale.min {self.min} is above logit_scale.max {self.max}")
        return self


class Train(Section):
    """Optimization and the bookkeeping of a run."""

    steps: int = Field(1000, ge=1, description="in all")
    batch: int = Field(128, ge=2, description="pairs a step, over all processes")
    warmup_lr: float = Field(1e-4, ge=0, description="the rate of the first step")
    lr: float = Field(1e-3, gt=0, description="the rate after the warm-up")
    min_lr: float = Field(0.0, ge=0, description="the rate of the last step, after a cosine")
    warmup_steps: int = Field(100, ge=0, description="in which the rate rises linearly")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's; biases, norms, scales and positions have none")
    betas: tuple[float, float] = Field((0.9, 0.98), description="AdamW's")
    eps: float = Field(1e-8, gt=0, description="AdamW's")
    grad_clip_norm: float | None = Field(None, gt=0, description="longest gradient; None: not clipped")
    precision: Literal["auto", "fp32", "bf16"] = Field("fp32", description="auto: bf16 where the device computes it")
    channels_last: bool = Field(False, description="memory order of images, for convolutions")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of the averaged weights; they are evaluated")
    log_every: int = Field(10, ge=1, description="steps")
    evaluate_every: int = Field(0, ge=0, description="0: only at the end")
    checkpoint_every: int = Field(200, ge=1, description="steps")
    keep: int = Field(2, ge=1, description="how many checkpoints stay")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 …")
    threads: int | None = Field(None, ge=1, description="of torch; None: its own number")
    parallel: Literal["ddp", "fsdp"] = Field("ddp", description="several processes: whole copies, or sharded towers")
    sync_batch_norm: bool = Field(True, description="batch norm over all processes' pairs, as on one")
    chunk: int | None = Field(None, ge=1, description="pairs of a process's part that the towers see at a time")
    allow_batchnorm_chunking: bool = Field(
        False, description="allow chunks for a tower with batch norm, which sees each alone"
    )
    grad_checkpointing: bool = Field(False, description="less memory for a third more time")
    max_logits_mb: float = Field(
        256, gt=0, description="10^6 bytes; larger loss matrices are made in blocks, twice, instead of being kept"
    )
    patience: float = Field(600, gt=0, description="seconds a process waits for another at a step before it gives up")
    length_buckets: int = Field(1, ge=1, description="encode captions sorted by length, in so many groups")
    compile: bool = Field(False, description="torch.compile for the towers")
    freeze_garbage: bool = Field(True, description="leave what was there at the start out of garbage collection")
    keep_memory: bool = Field(True, description="on a CPU: keep what a step freed for the next one (glibc)")
    bad_steps: int = Field(0, ge=0, description="steps that may be left out because their loss is not finite")

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_lr > self.lr:
            raise ValueError(f"train.warmup_lr {self.warmup_lr} is above train.lr {self.lr}")
        return self


class LoRA(Section):
    """Low-rank adapters (Hu et al. 2022) on the blocks' linear maps; all that came with the weights stays."""

    rank: int = Field(8, ge=1, description="of the product")
    alpha: float = Field(16.0, gt=0, description="the adapter's part is alpha / rank times its product")
    dropout: float = Field(0.0, ge=0, lt=1, description="before the adapters")


class FineTuning(Section):
    """Where training starts, and how freely what came with the weights may change."""

    weights: str | None = Field(None, description="what `declip.load` takes, or timm:NAME for the image tower alone")
    image_size: int | None = Field(None, ge=16, description="pixels; other than the weights': positions are resized")
    image_lr_scale: float = Field(1.0, gt=0, description="the image tower's rate, as a factor on the recipe's")
    text_lr_scale: float = Field(1.0, gt=0, description="the text tower's")
    layer_decay: float = Field(1.0, gt=0, le=1, description="factor on the rate from each layer to the one below it")
    freeze_image_blocks: Annotated[int, Field(ge=0)] | Literal["all"] = Field(
        0, description="the stem and that many blocks stay as they are; all: the whole tower (LiT)"
    )
    freeze_text_blocks: Annotated[int, Field(ge=0)] | Literal["all"] = Field(0, description="the text tower's likewise")
    head_warmup_steps: int = Field(0, ge=0, description="first steps, in which only what is new learns")
    lora: LoRA | None = Field(None, description="adapters instead: rank, alpha, dropout")

    @model_validator(mode="after")
    def _has_weights(self) -> Self:
        given = sorted(self.model_fields_set - {"weights"})
        changed = [name for name in given if getattr(self, name) != type(self).model_fields[name].default]
        if self.weights is None and changed:
            raise ValueError(f"finetune.{changed[0]} is for weights to start from; give finetune.pretrained too")
        for name in ("freeze_image_blocks", "freeze_text_blocks"):
            if self.lora is not None and getattr(self, name) not in (0, "all"):
                raise ValueError(f"finetune.lora leaves all blocks as they are; finetune.{name} is 0 or all then")
        if self.lora is not None and self.layer_decay != 1:
            raise ValueError("finetune.lora has one rate for a tower; leave finetune.layer_decay out")
        return self


class Evaluation(Section):
    """What is measured during training and at its end."""

    zero_shot: tuple[str, ...] = Field((), description="sets to classify")
    retrieval: tuple[str, ...] = Field((), description="sets to search in, both ways")
    final_zero_shot: tuple[str, ...] = Field((), description="only at the end: the test sets")
    final_retrieval: tuple[str, ...] = Field((), description="only at the end")


class Recipe(Section):
    """A whole experiment.

    Raises:
        UserError: from `declip.recipe.load.load_recipe`, when a key or a value is not allowed.
    """

    name: str = Field("unnamed", description="for tables and reports")
    seed: int = Field(0, ge=0, description="of weights, views, order and choice of pairs")
    data: Data = Data()
    image: ImageTower = ImageTower()
    text: TextTower = TextTower()
    embed_dim: int = Field(512, ge=1, description="width of the shared space")
    views: Views = Views()
    weights: Weights = Weights(contrastive=1.0)
    simsiam: SimSiam = SimSiam()
    simclr: SimCLR = SimCLR()
    masked_language: MaskedLanguage = MaskedLanguage()
    nearest_neighbor: NearestNeighbor = NearestNeighbor()
    late_interaction: LateInteraction = LateInteraction()
    logit_scale: LogitScale = LogitScale()
    finetune: FineTuning = FineTuning()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _padding_is_encoded(self) -> Self:
        if self.train.length_buckets > 1 and self.late_interaction.include_padding:
            raise ValueError(
                "train.length_buckets above 1 leaves padding out, and late_interaction.include_padding wants it; "
                "set one of them back"
            )
        return self

    @model_validator(mode="after")
    def _adapters_are_trained_plainly(self) -> Self:
        train = self.train
        clashes = {
            "train.ema_decay": train.ema_decay,
            "train.compile": train.compile,
            "train.strategy": train.strategy == "fsdp",
        }
        found = [name for name, clash in clashes.items() if clash]
        if self.finetune.lora is not None and found:
            raise ValueError(f"finetune.lora goes without {found[0]}={getattr(train, found[0][6:])}; leave one out")
        return self

    @model_validator(mode="after")
    def _one_image_view_is_enough(self) -> Self:
        pairs_of_images = [name for name in ("simsiam", "simclr") if getattr(self.weights, name) > 0]
        if self.views.image_count == 1 and pairs_of_images:
            raise ValueError(
                f"{pairs_of_images[0]} compares two views of an image, and views.image_count is 1; "
                f"set it to 2, or weights.{pairs_of_images[0]} to 0"
            )
        if self.views.image_count == 1 and self.views.contrastive_view:
            raise ValueError(
                "views.contrastive_view is a view beside two others; leave it out, or set views.image_count to 2"
            )
        return self

    @property
    def image_view_count(self) -> int:
        """`views.image_count` when a term compares views, else 1; one more with a base view."""
        compared = {"multi_view", "simsiam", "simclr", "nearest_neighbor"} & set(self.weights.active())
        return (self.views.image_count if compared else 0) + (1 if self.views.contrastive_view else 0) or 1

    @property
    def text_view_count(self) -> int:
        """2 when a term uses the second text view, else 1."""
        return 2 if {"multi_view", "nearest_neighbor"} & set(self.weights.active()) else 1

    @property
    def masks(self) -> bool:
        """Whether the caption is corrupted for masked language modelling."""
        return self.loss_weights.masked_language > 0 or self.masked_language.mask_input_only

    def to_yaml(self) -> str:
        """The resolved recipe, with every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
