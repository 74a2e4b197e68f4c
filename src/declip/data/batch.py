"""What one training step sees: a batch of pairs as tensors, every random choice already made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from declip.errors import UserError

IGNORED = -100
"""The label of a token that is not to be predicted, as torch's cross-entropy has it."""

if TYPE_CHECKING:
    from declip.data.pair import BrokenPair


class Draw(NamedTuple):
    """The photometric parameters of one view of one sample, as `ImageViews.draw` draws them."""

    brightness: float  # factor, 1 leaves the image as it is
    contrast: float  # factor
    saturation: float  # factor
    hue: float  # shift in turns of the color circle, -0.5 to 0.5
    order: tuple[int, ...]  # the four operations by number (0 brightness ... 3 hue), first to last
    jitter: bool  # whether the four are applied at all
    gray: bool
    sigma: float  # of the blur, in pixels; 0 is no blur


@dataclass(eq=False)
class Photometric:
    """The photometric parameters of V views of B samples.

    They stay on the host wherever the images go: `ImageViews.finish` plans its work from them, and
    reading them back from an accelerator would make it wait.

    Attributes:
        brightness: (V, B) float32, factor.
        contrast: (V, B) float32, factor.
        saturation: (V, B) float32, factor.
        hue: (V, B) float32, shift in turns, -0.5 to 0.5.
        order: (V, B, 4) int64, the operations by number (0 brightness, 1 contrast, 2 saturation, 3 hue).
        jitter: (V, B) bool, whether the four are applied.
        gray: (V, B) bool.
        sigma: (V, B) float32, standard deviation of the blur in pixels, 0 for no blur.
    """

    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    order: Tensor
    jitter: Tensor
    gray: Tensor
    sigma: Tensor

    def __post_init__(self) -> None:
        leading = tuple(self.jitter.shape)
        for part in fields(self):
            given = tuple(getattr(self, part.name).shape)
            allowed = (*leading, 4) if part.name == "order" else leading
            if len(leading) != 2 or given != allowed:
                raise UserError(
                    f"Photometric parameters have (views, samples) each and `order` (views, samples, 4); "
                    f"`jitter` has {leading} and `{part.name}` has {given}."
                )

    def rows(self, start: int, stop: int) -> Photometric:
        """Those of samples start to stop - 1."""
        return replace(self, **{part.name: getattr(self, part.name)[:, start:stop] for part in fields(self)})

    @classmethod
    def stack(cls, draws: Sequence[Sequence[Draw]]) -> Photometric:
        """Make the tensors from V sequences of B draws each."""
        views, samples = len(draws), len(draws[0])
        rows = [draw for view in draws for draw in view]

        def column(name: str, kind: type, shape: tuple[int, ...] = (views, samples)) -> Tensor:
            return torch.from_numpy(np.array([getattr(row, name) for row in rows], kind).reshape(shape))

        return cls(
            brightness=column("brightness", np.float32),
            contrast=column("contrast", np.float32),
            saturation=column("saturation", np.float32),
            hue=column("hue", np.float32),
            order=column("order", np.int64, (views, samples, 4)),
            jitter=column("jitter", np.bool_),
            gray=column("gray", np.bool_),
            sigma=column("sigma", np.float32),
        )


@dataclass(eq=False)
class PairBatch:
    """B pairs in V image views and T text views.

    Attributes:
        images: (V, B, 3, H, W): float, normalized; or uint8 together with `photometric`, to be finished
            by `ImageViews.finish` on the device.
        texts: (T, B, L) int64 token ids, T 1 or 2: [0] the caption, [1] its EDA augmentation.
        masked: (B, L) int64, texts[0] after the corruption for masked-language modelling.
        labels: (B, L) int64, the ids to predict there, -100 elsewhere.
        tags: (B,) int64, epoch * len(source) + index: which pair was seen when.
        lengths: (T, B) int64, ids of each text up to and with its end; stays on the host, where work is planned by it.
        places: (M,) int64, where a word is to be predicted among the B * L of `labels`; `to` finds them on the host, so
            that a device need not be waited for.
        photometric: What is still to be done to uint8 images.
        skipped: The pairs of this batch that could not be used.

    Raises:
        UserError: For a shape or type that does not fit the above.
    """

    images: Tensor
    texts: Tensor
    masked: Tensor | None = None
    labels: Tensor | None = None
    tags: Tensor | None = None
    lengths: Tensor | None = None
    places: Tensor | None = None
    photometric: Photometric | None = None
    skipped: list[BrokenPair] = field(default_factory=list)

    def __post_init__(self) -> None:
        _check_images(self.images, self.photometric)
        if self.texts.ndim != 3 or self.texts.shape[0] not in (1, 2):
            raise UserError(
                f"`texts` has shape {tuple(self.texts.shape)}; it must be (T, B, L) with T 1 or 2: "
                "the caption and, if there are two, its augmentation."
            )
        if self.texts.shape[1] != len(self):
            raise UserError(
                f"`images` holds {len(self)} pairs, shape {tuple(self.images.shape)}, and `texts` "
                f"{self.texts.shape[1]}, shape {tuple(self.texts.shape)}; both need the same number."
            )
        if (self.masked is None) != (self.labels is None):
            given, missing = ("labels", "masked") if self.masked is None else ("masked", "labels")
            raise UserError(f"`{given}` was given without `{missing}`; give both or neither.")
        row = (len(self), self.texts.shape[2])
        _check_ids("texts", self.texts, tuple(self.texts.shape))
        _check_ids("masked", self.masked, row)
        _check_ids("labels", self.labels, row)
        _check_ids("tags", self.tags, row[:1])
        _check_ids("lengths", self.lengths, tuple(self.texts.shape[:2]))

    def __len__(self) -> int:
        """The number of pairs, B."""
        return self.images.shape[1]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PairBatch:
        """Copy the tensors to a device; lengths and photometric parameters stay on the host.

        Args:
            device: Where to.
            non_blocking: Do not wait for the copy; needs pinned memory to make a difference.
        """
        tensors = self._tensors()
        if self.labels is not None and self.labels.device.type == "cpu":
            tensors["places"] = (self.labels.flatten() != IGNORED).nonzero().squeeze(1)
        real = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta and name != "lengths"}
        return self._with({name: tensor.to(device, non_blocking=non_blocking) for name, tensor in real.items()})

    def rows(self, start: int, stop: int) -> PairBatch:
        """Pairs start to stop - 1, as views of the same memory; texts keep their length, `skipped` goes."""
        by_view, by_row = ("images", "texts", "lengths"), ("masked", "labels", "tags")
        tensors = self._tensors()
        cut = {name: tensors[name][:, start:stop] for name in by_view if name in tensors}
        cut |= {name: tensors[name][start:stop] for name in by_row if name in tensors}
        photometric = None if self.photometric is None else self.photometric.rows(start, stop)
        return replace(self, **cut, places=None, photometric=photometric, skipped=[])

    def without_images(self) -> PairBatch:
        """The same batch with images of the same shape that hold nothing (on torch's "meta" device)."""
        empty = torch.empty(self.images.shape, device="meta")
        return replace(self, images=empty, photometric=None)

    def pin_memory(self) -> PairBatch:
        """Copy the tensors to page-locked memory, from which copies to an accelerator need no wait."""
        return self._with({name: tensor.pin_memory() for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def _with(self, tensors: dict[str, Tensor]) -> PairBatch:
        return replace(self, **tensors)  # type: ignore[arg-type]  # the names are those of tensor fields


def _check_images(images: Tensor, photometric: Photometric | None) -> None:
    """Check shape and type of the images, and that uint8 comes with its photometric parameters."""
    if images.ndim != 5 or images.shape[0] < 1 or images.shape[2] != 3:
        raise UserError(
            f"`images` has shape {tuple(images.shape)}; it must be (V, B, 3, H, W): views, pairs, "
            "channels, height, width."
        )
    if images.dtype == torch.uint8:
        if photometric is None:
            raise UserError(
                "`images` is uint8 and `photometric` is missing; give both, or images that are "
                "float and normalized (`Preprocess` makes them)."
            )
        if tuple(photometric.jitter.shape) != tuple(images.shape[:2]):
            raise UserError(
                f"`photometric` is for (views, pairs) = {tuple(photometric.jitter.shape)}; "
                f"`images` has {tuple(images.shape[:2])}."
            )
    elif not images.is_floating_point():
        raise UserError(f"`images` is {images.dtype}; it must be float, normalized, or uint8 with `photometric`.")
    elif photometric is not None:
        raise UserError(f"`photometric` goes with uint8 images; these are {images.dtype}, already finished.")


def _check_ids(name: str, ids: Tensor | None, shape: tuple[int, ...]) -> None:
    """Check that `ids`, if given, is int64 and of this shape."""
    if ids is None:
        return
    if tuple(ids.shape) != shape:
        raise UserError(f"`{name}` has shape {tuple(ids.shape)}; to fit `images` and `texts` it must be {shape}.")
    if ids.dtype != torch.int64:
        raise UserError(f"`{name}` is {ids.dtype}; it must be int64 (`.long()`).")
