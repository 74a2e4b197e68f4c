"""A batch of pairs as tensors, every random choice already made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from declip.errors import UserError

if TYPE_CHECKING:
    from declip.data.pair import BrokenPair

IGNORED = -100
"""Label of a token that is not to be predicted, the default of torch's cross-entropy."""


class PhotometricParams(NamedTuple):
    """The photometric parameters of one view of one sample."""

    brightness: float  # factor, 1 leaves the image as it is
    contrast: float  # factor
    saturation: float  # factor
    hue: float  # shift in turns of the color circle, -0.5 to 0.5
    order: tuple[int, ...]  # the four operations by number (0 brightness ... 3 hue), first to last
    jitter: bool  # whether the four are applied at all
    gray: bool
    sigma: float  # of the blur, in pixels; 0 is no blur
    radius: int  # of the blur's kernel in pixels, less than the view's size


@dataclass(eq=False)
class Photometric:
    """The photometric parameters of n images.

    They stay on the host wherever the images go: work is planned from them, and reading them back from an accelerator
    would make it wait.

    Attributes:
        brightness, contrast, saturation: (n,) float32, factors.
        hue: (n,) float32, shift in turns, -0.5 to 0.5.
        order: (n, 4) int64, the operations by number (0 brightness, 1 contrast, 2 saturation, 3 hue).
        jitter, gray: (n,) bool, whether the four, and grayscale, are applied.
        sigma: (n,) float32, standard deviation of the blur in pixels, 0 for no blur.
        radius: (n,) int64, radius of the blur's kernel in pixels; views may have different ones.
    """

    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    order: Tensor
    jitter: Tensor
    gray: Tensor
    sigma: Tensor
    radius: Tensor

    def __post_init__(self) -> None:
        count = tuple(self.jitter.shape)
        for part in fields(self):
            given = tuple(getattr(self, part.name).shape)
            allowed = (*count, 4) if part.name == "order" else count
            if len(count) != 1 or given != allowed:
                raise UserError(
                    f"Photometric parameters have shape (n,) each and `order` (n, 4); "
                    f"`jitter` has {count} and `{part.name}` has {given}."
                )

    def __len__(self) -> int:
        return len(self.jitter)

    def rows(self, start: int, stop: int) -> Photometric:
        """Parameters of samples start to stop - 1."""
        return replace(self, **{part.name: getattr(self, part.name)[start:stop] for part in fields(self)})

    @classmethod
    def cat(cls, parts: Sequence[Photometric]) -> Photometric:
        """Parameters of several groups of images, one after the other."""
        return cls(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)})

    @classmethod
    def stack(cls, params: Sequence[PhotometricParams]) -> Photometric:
        """Tensors from one `PhotometricParams` per image."""

        def column(name: str, kind: type) -> Tensor:
            shape = (len(params), 4) if name == "order" else (len(params),)
            return torch.from_numpy(np.array([getattr(row, name) for row in params], kind).reshape(shape))

        kinds = {"order": np.int64, "jitter": np.bool_, "gray": np.bool_, "radius": np.int64}
        return cls(**{f.name: column(f.name, kinds.get(f.name, np.float32)) for f in fields(cls)})


@dataclass(eq=False)
class View:
    """One image view of B pairs.

    Attributes:
        pixels: (B, 3, S, S): float, normalized; or uint8 together with `photometric`, to be finished by
            `declip.data.images.crops.apply_photometric` on the device.
        photometric: The operations still to be applied to uint8 pixels.

    Raises:
        UserError: A shape or type does not fit the above.
    """

    pixels: Tensor
    photometric: Photometric | None = None

    def __post_init__(self) -> None:
        pixels, photometric = self.pixels, self.photometric
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise UserError(
                f"A view has shape {tuple(pixels.shape)}; it must be (B, 3, H, W): pairs, channels, height, width."
            )
        if pixels.dtype == torch.uint8:
            if photometric is None:
                raise UserError(
                    "A view is uint8 and its `photometric` is missing; give both, or pixels that are float and "
                    "normalized (`Preprocess` makes them)."
                )
            if len(photometric) != len(pixels):
                raise UserError(f"`photometric` is for {len(photometric)} images; the view has {len(pixels)}.")
        elif not pixels.is_floating_point():
            raise UserError(f"A view is {pixels.dtype}; it must be float, normalized, or uint8 with `photometric`.")
        elif photometric is not None:
            raise UserError(f"`photometric` goes with uint8 pixels; these are {pixels.dtype}, already finished.")

    def __len__(self) -> int:
        return len(self.pixels)

    def rows(self, start: int, stop: int) -> View:
        """Samples start to stop - 1, as views of the same memory."""
        return View(self.pixels[start:stop], self.photometric and self.photometric.rows(start, stop))


@dataclass(eq=False)
class PairBatch:
    """B pairs in named image views and T text views.

    Attributes:
        views: "first", "second", "contrastive" … → `View`; a tensor (B, 3, S, S) is taken as a finished view.
        texts: (T, B, L) int64 token ids, T 1 or 2: [0] the caption, [1] its augmentation.
        masked: (B, L) int64, texts[0] after the corruption for masked-language modeling.
        labels: (B, L) int64, the ids to predict there, -100 elsewhere.
        sample_ids: (B,) int64, epoch * len(source) + index.
        lengths: (T, B) int64, number of ids of each text, its end included; stays on the host, where work is planned.
        mask_positions: (M,) int64, positions to predict among the B * L of `labels`; `to` finds them on the host, since
            finding them on a device would make the host wait for it.
        skipped: The broken pairs of this batch.

    Raises:
        UserError: A shape or type does not fit the above.
    """

    views: Mapping[str, View]
    texts: Tensor
    masked: Tensor | None = None
    labels: Tensor | None = None
    sample_ids: Tensor | None = None
    lengths: Tensor | None = None
    mask_positions: Tensor | None = None
    skipped: list[BrokenPair] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.views = {n: View(view) if isinstance(view, Tensor) else view for n, view in self.views.items()}
        if not self.views:
            raise UserError("A batch needs at least one image view, such as {'first': pixels}; none was given.")
        if self.texts.ndim != 3 or self.texts.shape[0] not in (1, 2):
            raise UserError(
                f"`texts` has shape {tuple(self.texts.shape)}; it must be (T, B, L) with T 1 or 2: "
                "the caption and, if there are two, its augmentation."
            )
        for name, view in self.views.items():
            if len(view) != self.texts.shape[1]:
                raise UserError(
                    f"View '{name}' holds {len(view)} pairs, and `texts` {self.texts.shape[1]}, shape "
                    f"{tuple(self.texts.shape)}; both need the same number."
                )
        if (self.masked is None) != (self.labels is None):
            given, missing = ("labels", "masked") if self.masked is None else ("masked", "labels")
            raise UserError(f"`{given}` was given without `{missing}`; give both or neither.")
        row = (len(self), self.texts.shape[2])
        _check_ids("texts", self.texts, tuple(self.texts.shape))
        _check_ids("masked", self.masked, row)
        _check_ids("labels", self.labels, row)
        _check_ids("sample_ids", self.sample_ids, row[:1])
        _check_ids("lengths", self.lengths, tuple(self.texts.shape[:2]))

    def __len__(self) -> int:
        """The number of pairs, B."""
        return self.texts.shape[1]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PairBatch:
        """Copy the tensors to a device; lengths and photometric parameters stay on the host.

        With `non_blocking` and pinned memory the host does not wait for the copy.
        """
        tensors = self._tensors()
        if self.labels is not None and self.labels.device.type == "cpu":
            tensors["mask_positions"] = (self.labels.flatten() != IGNORED).nonzero().squeeze(1)
        tensors.pop("lengths", None)

        def move(tensor: Tensor) -> Tensor:
            return tensor if tensor.is_meta else tensor.to(device, non_blocking=non_blocking)

        return self._with({n: move(tensor) for n, tensor in tensors.items()}, move)

    def rows(self, start: int, stop: int) -> PairBatch:
        """Pairs start to stop - 1, as views of the same memory; texts keep their length, `skipped` is dropped."""
        tensors = self._tensors()
        tensors.pop("mask_positions", None)
        sliced = {n: t[:, start:stop] if n in ("texts", "lengths") else t[start:stop] for n, t in tensors.items()}
        views = {name: view.rows(start, stop) for name, view in self.views.items()}
        return replace(self, views=views, **sliced, mask_positions=None, skipped=[])

    def without_images(self) -> PairBatch:
        """The same batch with views of the same shape on torch's "meta" device, which hold nothing."""
        return replace(self, views={n: View(torch.empty(v.pixels.shape, device="meta")) for n, v in self.views.items()})

    def pin_memory(self) -> PairBatch:
        """Copy the tensors to page-locked memory, from which copies to an accelerator need no wait."""
        return self._with({n: tensor.pin_memory() for n, tensor in self._tensors().items()}, Tensor.pin_memory)

    def _tensors(self) -> dict[str, Tensor]:
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def _with(self, tensors: dict[str, Tensor], pixels: Callable[[Tensor], Tensor]) -> PairBatch:
        views = {name: replace(view, pixels=pixels(view.pixels)) for name, view in self.views.items()}
        return replace(self, views=views, **tensors)  # type: ignore[arg-type]  # the names are those of tensor fields


def _check_ids(name: str, ids: Tensor | None, shape: tuple[int, ...]) -> None:
    """Check that `ids`, if given, is int64 and of this shape."""
    if ids is None:
        return
    if tuple(ids.shape) != shape:
        raise UserError(f"`{name}` has shape {tuple(ids.shape)}; to fit `views` and `texts` it must be {shape}.")
    if ids.dtype != torch.int64:
        raise UserError(f"`{name}` is {ids.dtype}; it must be int64 (`.long()`).")
