"""Color jitter, grayscale and blur of all images in a few passes, for a GPU: the same values as `views.apply`.

`views.apply` groups images by their operations, which suits a CPU's cache. On a GPU that is thousands of small kernels
for a batch. Here every image takes four steps, each with its own operation and factor, in two kernels once compiled:
one reads the pixels for the gray level that contrast needs, one reads them again and writes the result. The blur is two
matrix products for each blurred image.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from declip.data.batch import unpack_photometric
from declip.data.images.views import BLUR_RADIUS, JITTER, LUMA, Finish

# Numbers of the operations in `Photometric.order`
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(len(JITTER))


def compiled(backend: str = "inductor") -> Finish:
    """Return `apply` with its pixel operations compiled, for batches of any number of images."""
    colors = torch.compile(change_colors, dynamic=False, fullgraph=True, backend=backend)

    def run(images: Tensor, photometric: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return apply(images, photometric, mean, std, colors)

    return run


def apply(
    images: Tensor,
    photometric: Tensor,
    mean: Tensor,
    std: Tensor,
    colors: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Apply the sampled parameters, then normalize: (n, 3, H, W) uint8 to float32, on the images' device.

    The images are square, as views are. `colors` is `change_colors` or a compiled version of it.
    """
    params = unpack_photometric(photometric)
    neutral = torch.tensor([1.0, 1.0, 1.0, 0.0])
    factors = torch.where(params.jitter[:, None], params.factors, neutral)  # (n, 4)
    # Copies that do not wait for the device; all parameters are on the host.
    host = (factors, params.order, params.gray)
    tensors = [tensor.to(images.device, non_blocking=True) for tensor in host]
    for tensor in (images, *tensors):
        # Batches lack broken pairs: one graph for any number of images
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    out = (colors or change_colors)(images, *tensors)
    rows = params.sigma.nonzero().flatten()
    if len(rows):
        taps = blur_matrices(params.sigma[rows], images.shape[-1], images.device)
        rows = rows.to(images.device, non_blocking=True)
        # (k, 1, H, H) @ (k, 3, H, W) @ (k, 1, W, W)
        blurred = taps @ out.index_select(0, rows) @ taps.mT
        out.index_copy_(0, rows, blurred)
    return out.sub_(_each(mean)).div_(_each(std))


def change_colors(images: Tensor, factors: Tensor, order: Tensor, gray: Tensor) -> Tensor:
    """Apply jitter and grayscale to images (n, 3, H, W) uint8: float32 in [0, 1].

    Each image has its factors (n, 4) by number of operation, the order (n, 4) of the operations, and whether it becomes
    gray (n,). Equals the functions of `views.JITTER`, one after the other.
    """
    # Channels are separate (n, H, W), so that a compiler sees arithmetic alone and makes one kernel of it.
    scaled = images.float() / 255
    pixels = _Colors(*scaled.unbind(dim=1))
    # --- the mean gray level before contrast; the pixels themselves are computed again below, not stored
    early = pixels
    before = torch.ones_like(gray)
    for step in range(len(JITTER) - 1):
        operation = order[:, step]
        before = before & (operation != CONTRAST)
        changed = _change(early, operation, factors, None)
        is_before = _each(before)
        both = zip(changed, early, strict=True)
        early = _Colors(*[torch.where(is_before, new, old) for new, old in both])
    level = _luma(early).mean(dim=(1, 2))
    # --- all operations
    for step in range(len(JITTER)):
        pixels = _change(pixels, order[:, step], factors, level)
    luma = _luma(pixels)
    is_gray = _each(gray)
    channels = [torch.where(is_gray, luma, channel) for channel in pixels]
    return torch.stack(channels, dim=1)


class _Colors(NamedTuple):
    """The channels of n images, (n, H, W) each."""

    red: Tensor
    green: Tensor
    blue: Tensor


def _change(pixels: _Colors, operation: Tensor, factors: Tensor, level: Tensor | None) -> _Colors:
    """Apply to each image the operation (n,) with its factor; contrast requires the gray level (n,)."""
    factor = factors.gather(1, operation[:, None]).squeeze(1)
    # Brightness, contrast and saturation move a pixel away from, or towards, 0, the image's level or its own gray.
    is_saturation = _each(operation == SATURATION)
    anchor = torch.where(is_saturation, _luma(pixels), 0.0)
    if level is not None:
        is_contrast = _each(operation == CONTRAST)
        anchor = torch.where(is_contrast, _each(level), anchor)
    anchor = anchor * _each(1 - factor)
    scale = _each(factor)
    is_hue = _each(operation == HUE)
    channels = []
    for old, new in zip(pixels, _turn(pixels, factor), strict=True):
        moved = (old * scale + anchor).clamp(0, 1)
        new = torch.where(scale != 0, new, old)
        channels.append(torch.where(is_hue, new, moved))
    return _Colors(*channels)


def _turn(pixels: _Colors, shift: Tensor) -> _Colors:
    """Turn the color circle by shift (n,), in turns; for the formula see `views.hue`."""
    red, green, blue = pixels
    low = torch.minimum(torch.minimum(red, green), blue)
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - low
    angle = (green + blue - red - low) / chroma.clamp_min(1e-12) + 1
    angle = angle.copysign(green - blue)
    channels = []
    for color in (0.0, 2.0, 4.0):
        peak = color - 6 * shift
        peak = peak - 6 * torch.round(peak / 6)
        distance = ((angle - _each(peak)).abs() - 3).abs() - 1
        channels.append(distance.clamp(0, 1) * chroma + low)
    return _Colors(*channels)


def blur_matrices(sigma: Tensor, size: int, device: torch.device) -> Tensor:
    """Build the blur along one axis as matrices (k, 1, size, size), for sigma (k,) on the host; see `views.blur`."""
    offsets = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1)
    taps = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    taps /= taps.sum(dim=1, keepdim=True)
    # The border is mirrored without repeating the outermost pixel.
    # Made on the device: a copy of megabytes in each step might wait.
    positions = torch.arange(size, device=device)
    sources = positions[:, None] + torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=device)
    last = size - 1
    sources = last - (sources.abs() - last).abs()  # (size, taps)
    hits = (sources.unsqueeze(2) == positions).float()  # (size, taps, size)
    taps = taps.to(device, non_blocking=True)
    # einsum, not a scatter, whose order of additions a GPU does not fix
    return torch.einsum("kt,ots->kos", taps, hits).unsqueeze(1)


def _luma(pixels: _Colors) -> Tensor:
    red, green, blue = LUMA
    return pixels.red * red + pixels.green * green + pixels.blue * blue


def _each(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)
