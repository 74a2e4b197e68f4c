"""The base class of losses: a term owns its head, declares its needs, and computes its loss from features."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from declip.data.batch import Needs, PairBatch
from declip.data.pair import PairSource
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe


@dataclass(frozen=True)
class TowerOutputs:
    """Outputs of the towers for B pairs; fields that no term needs are None."""

    views: tuple[str, ...]  # names of the image views
    images: Tensor  # (V, B, d) projected embedding of each view, not normalized
    texts: Tensor  # (T, B, d) projected embedding of each text view, not normalized
    pre_logits: Tensor | None  # (V, B, h) pooled feature of each image view before the projection
    patches: Tensor | None  # (B, P, w) token features of the first image view
    text_tokens: Tensor | None  # (B, L, w) token features of the first text view
    masked_tokens: Tensor | None  # (M, w) token features of the masked tokens, pair after pair
    targets: Tensor | None  # (M,) int64, the ids to predict there
    lengths: Tensor  # (B,) int64, number of tokens of the first text view

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are present, by field name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


def join_outputs(parts: Sequence[TowerOutputs]) -> TowerOutputs:
    """Join the outputs of consecutive parts of a batch."""
    # Of pairs; others count pairs or masked tokens first
    axes = dict.fromkeys(("images", "texts", "pre_logits"), 1)
    whole = {}
    for name in parts[0].tensors():
        tensors = [getattr(part, name) for part in parts]
        whole[name] = torch.cat(tensors, dim=axes.get(name, 0))
    return replace(parts[0], **whole)  # type: ignore[arg-type]  # the names are those of tensor fields


T = TypeVar("T")
MAX_LOGIT_BYTES = 256e6  # largest loss matrix kept for the backward pass; a larger one is computed in blocks, twice


@dataclass(frozen=True)
class Similarity:
    """Scale and bias of the logits: scale · cosine + bias."""

    scale: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Encodings:
    """A batch after the towers.

    `images` (V, B, d), in the order of `outputs.views`, and `texts` (T, B, d) are L2-normalized float32. The views of
    the batch may be on the "meta" device.
    """

    images: Tensor
    texts: Tensor
    outputs: TowerOutputs
    batch: PairBatch


@dataclass(frozen=True)
class Rows:
    """The features that a loss compares: of this rank's pairs, or of all ranks' pairs."""

    views: tuple[str, ...]
    images: Tensor  # (V, n, d), in the order of `views`: the contrastive one first, if there is one
    texts: Tensor  # (T, n, d)
    extra: dict[str, Tensor]  # the term's own features, see `Term.features` and `Term.keys`

    def __len__(self) -> int:
        return self.texts.shape[1]

    @property
    def augmented(self) -> Tensor:
        """(A, n, d) features of all views but the milder one of the contrastive loss."""
        return self.images[augmented_views(self.views)]


class Term(nn.Module):
    """Base class of a loss with its head. Its arguments are the recipe and the model, whose tower sizes it reads."""

    needs: ClassVar[Needs] = Needs()
    reaches_all: ClassVar[bool] = False
    """Whether every parameter of both towers and the logit scale gets a gradient from this loss alone."""
    compares_pairs: ClassVar[bool] = False
    """Whether it compares images with captions: at chance level after many steps means that nothing was learned."""
    uses_bias: ClassVar[bool] = False
    """Whether it trains the bias of the logits."""
    over_vocabulary: ClassVar[tuple[str, ...]] = ()
    """Its layers whose outputs are words: the optimizer "muon" trains them with AdamW."""
    run_state: ClassVar[tuple[str, ...]] = ()
    """Beginnings of the names of its tensors that another run cannot use, such as a queue of features."""
    process_state: tuple[str, ...] = ()
    """Beginnings of the names of its tensors that differ between processes; a checkpoint has those of each."""
    title: ClassVar[str]
    """Name for charts."""
    explanation: ClassVar[str] = ""
    """One sentence for reports."""
    reads_pixels = False
    """Whether `features` reads the images, which GradCache otherwise drops after the towers."""

    def __init__(self, recipe: Recipe, model: DualEncoder) -> None:
        super().__init__()
        self.max_logit_bytes: float = MAX_LOGIT_BYTES

    @classmethod
    def needs_in(cls, recipe: Recipe) -> Needs:
        """Return the needs, where they depend on the recipe."""
        return cls.needs

    def attach(self, model: DualEncoder) -> None:
        """Change the model where this loss alone trains it; a constructor changes nothing but its object."""

    def prepare(self, source: PairSource, model: DualEncoder) -> None:
        """Build what depends on the training pairs or on the weights that a run starts from, equal on every rank."""

    def features(self, encoded: Encodings) -> dict[str, Tensor]:
        """Compute the term's own features with its head, (B, …) each."""
        return {}

    def keys(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Select the features that all ranks must see; they are gathered in the single collective."""
        return features

    def pad_keys(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Pad keys whose shape may differ between ranks to one shape, before they are gathered."""
        return features

    def loss(self, own: Rows, keys: Rows, similarity: Similarity, offset: int) -> Tensor:
        """Compute the loss of this rank's rows against the keys of all ranks, in rank order.

        Args:
            offset: Row of the keys that belongs to this rank's first pair.

        Returns:
            A scalar; its mean over ranks is the loss of the whole batch.
        """
        raise NotImplementedError

    def chance(self, batch_size: int) -> float | None:
        """Compute the loss of a model that guesses; None where there is no such level."""
        return None

    @torch.no_grad()
    def after_step(self, model: DualEncoder) -> None:
        """Update the term's own state, such as a queue, after the optimizer's step."""


def augmented_views(views: tuple[str, ...]) -> slice:
    """Index of the augmented views among all: "contrastive", the milder one, comes first."""
    return slice("contrastive" in views, None)


def require(value: T | None) -> T:
    """Return a value that is present because the term's `needs` name it."""
    assert value is not None, "the term's needs name it"
    return value
