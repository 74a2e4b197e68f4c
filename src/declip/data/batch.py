"""A batch of pairs as tensors, every random choice already made, and what losses read of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from declip.errors import UserError

if TYPE_CHECKING:
    from declip.data.pair import BrokenPair

IGNORED = -100  # label of a token that is not to be predicted, the default of torch's cross-entropy
PHOTOMETRIC_WIDTH = 11  # numbers of one image: 4 factors, 4 operations, jitter, gray, sigma


class Photometric(NamedTuple):
    """The photometric parameters of n images by their meaning, on the host."""

    # (n, 4) float32: of brightness, contrast and saturation, where 1 leaves an image as it is, and the shift of the hue
    # in turns of the color circle, -0.5 to 0.5
    factors: Tensor
    order: Tensor  # (n, 4) int64, the operations by number (0 brightness ... 3 hue)
    jitter: Tensor  # (n,) bool, whether the four are applied at all
    gray: Tensor  # (n,) bool
    sigma: Tensor  # (n,) float32, of the blur, in pixels; 0 is no blur


def unpack_photometric(packed: Tensor) -> Photometric:
    """The parameters of n images by their rows of numbers (n, PHOTOMETRIC_WIDTH), see `ViewTransform.sample_params`.

    Between processes they are one tensor, since each that a loader process sends holds a file descriptor.
    """
    return Photometric(
        factors=packed[:, :4],
        order=packed[:, 4:8].long(),
        jitter=packed[:, 8].bool(),
        gray=packed[:, 9].bool(),
        sigma=packed[:, 10],
    )


@dataclass(eq=False)
class View:
    """One image view of B pairs.

    Attributes:
        pixels: (B, 3, S, S): float, normalized; or uint8 together with `photometric`, to be
            finished by `declip.data.images.views.apply_photometric` on the device.
        photometric: (B, PHOTOMETRIC_WIDTH) float32, the operations still to be applied to uint8
            pixels, see `unpack_photometric`; it stays on the host, where work is planned.
    """

    pixels: Tensor
    photometric: Tensor | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def rows(self, start: int, stop: int) -> View:
        """Samples start to stop - 1, as views of the same memory."""
        params = self.photometric
        if params is not None:
            params = params[start:stop]
        return View(self.pixels[start:stop], params)


@dataclass(eq=False)
class PairBatch:
    """A batch of B pairs: named image views, T text views, and their masked words.

    Attributes:
        views: "first", "second", "contrastive" … → `View`; a tensor (B, 3, S, S) is a finished view.
        texts: (T, B, L) int64 token ids, T 1 or 2: [0] the caption, [1] its augmentation.
        masked: (B, L) int64, texts[0] after masking for masked-language modeling.
        labels: (B, L) int64, the ids to predict there, -100 elsewhere.
        sample_ids: (B,) int64, epoch * len(source) + index.
        lengths: (T, B) int64, number of ids of each text, its end included; stays on the host, where work is planned.
        mask_positions: (M,) int64, positions to predict among the B * L of `labels`; `to` finds them on the host.
        duplicate_ids: (B, 2) int64, hashes of caption and group, 0 for none; only for ``contrastive.duplicates=mask``.
        skipped: The broken pairs of this batch.
    """

    views: Mapping[str, View]
    texts: Tensor
    masked: Tensor | None = None
    labels: Tensor | None = None
    sample_ids: Tensor | None = None
    lengths: Tensor | None = None
    mask_positions: Tensor | None = None
    duplicate_ids: Tensor | None = None
    skipped: list[BrokenPair] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.views = {
            name: View(view) if isinstance(view, Tensor) else view
            for name, view in self.views.items()
        }
        sizes = {name: len(view) for name, view in self.views.items()}
        if self.texts.ndim != 3 or set(sizes.values()) != {len(self)}:
            raise UserError(
                f"A batch needs `texts` (T, B, L) and views of B images: {self.texts.shape}, {sizes}."
            )
        texts, pairs, length = self.texts.shape
        shapes = {
            "texts": (texts, pairs, length),
            "lengths": (texts, pairs),
            "masked": (pairs, length),
            "labels": (pairs, length),
            "sample_ids": (pairs,),
            "duplicate_ids": (pairs, 2),
        }
        for name, shape in shapes.items():
            ids = getattr(self, name)
            if ids is not None and (tuple(ids.shape) != shape or ids.dtype != torch.int64):
                raise UserError(
                    f"`{name}` is {tuple(ids.shape)} {ids.dtype}; it must be {shape} torch.int64."
                )

    def __len__(self) -> int:
        """The number of pairs, B."""
        return self.texts.shape[1]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PairBatch:
        """Copy the tensors to a device; lengths and photometric parameters stay on the host."""
        batch = replace(self, lengths=None)
        if self.labels is not None and self.labels.device.type == "cpu":
            # `nonzero` waits for an accelerator, so it runs here, before the copy.
            batch.mask_positions = (self.labels.flatten() != IGNORED).nonzero().squeeze(1)
        moved = batch._map(
            lambda tensor: (
                tensor if tensor.is_meta else tensor.to(device, non_blocking=non_blocking)
            )
        )
        return replace(moved, lengths=self.lengths)

    def rows(self, start: int, stop: int) -> PairBatch:
        """Pairs start to stop - 1, as views of the same memory; texts keep their length, `skipped` is dropped."""
        tensors = self._tensors()
        # Their positions change with the number of rows; `to` finds them again.
        tensors.pop("mask_positions", None)
        for name, tensor in tensors.items():
            by_text = name in ("texts", "lengths")  # (T, B, …)
            tensors[name] = tensor[:, start:stop] if by_text else tensor[start:stop]
        views = {name: view.rows(start, stop) for name, view in self.views.items()}
        return replace(self, views=views, **tensors, mask_positions=None, skipped=[])

    def without_images(self) -> PairBatch:
        """The same batch with views of the same shape on torch's "meta" device, which hold nothing."""
        views = {
            name: View(torch.empty(view.pixels.shape, device="meta"))
            for name, view in self.views.items()
        }
        return replace(self, views=views)

    def pin_memory(self) -> PairBatch:
        """Copy the tensors to page-locked memory, from which copies to an accelerator need no wait."""
        pinned = self._map(Tensor.pin_memory)
        for view in pinned.views.values():
            # A copy: memory of a loader process would keep its file descriptor open.
            if view.photometric is not None:
                view.photometric = view.photometric.pin_memory()
        return pinned

    def _map(self, function: Callable[[Tensor], Tensor]) -> PairBatch:
        views = {
            name: replace(view, pixels=function(view.pixels)) for name, view in self.views.items()
        }
        tensors: dict[str, Any] = {
            name: function(tensor) for name, tensor in self._tensors().items()
        }
        return replace(self, views=views, **tensors)

    def _tensors(self) -> dict[str, Any]:
        """The tensors but those of the views, by their names."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Needs:
    """The parts of a batch that a loss reads."""

    views: frozenset[str] = frozenset({"first"})  # image views that it cannot do without
    # Image views that it also uses if the recipe has them
    optional_views: frozenset[str] = frozenset()
    texts: int = 1  # number of text views
    masked: bool = False  # whether it predicts masked tokens
    tokens: bool = False  # whether it reads token states of both towers
    pre_logits: bool = False  # whether it reads the pooled image feature before the projection
    # Whether padding counts, so that captions are padded to the longest possible one
    whole_context: bool = False
