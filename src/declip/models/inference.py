"""A model in use: its precision, running its towers without gradients, and its fingerprint."""

import hashlib
import logging
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from declip.errors import UserError, unknown
from declip.models.device import computes_bf16, lanes
from declip.models.dual_encoder import DualEncoder, has_text
from declip.models.image_tower import ImageTower, NoImageTower

PROBE = "a photo of two red apples, and a dog"  # its token ids are part of the fingerprint

PIXELS = 2**18
"""Pixels of a forward pass per thread. Activations of more leave the CPU's caches, and their memory is returned to the
system and requested again in every layer: EfficientNet-Lite0 takes 3 times as long with 256 images of 128 pixels."""

PATCHES = 4
"""Times as many for a tower whose only convolution makes patches. ViT-B/32 takes 0.9 to 1 times as long, and its
threads wait for each other less often."""

TOLERANCE = 1e-5
"""Largest difference of a folded tower's features, relative to the largest feature."""

log = logging.getLogger("declip")
Precision = Literal["auto", "fp32", "bf16", "fp16"]
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

LARGEST_CHANGE = 0.02
"""Largest cosine distance between a tower's features before and after. Of random pixels, EfficientNet-Lite0's is 0.001
in bfloat16, that of other towers below 0.0002."""


def fingerprint(model: Any, tensors: Mapping[str, Tensor] | None = None) -> str:
    """SHA-256, in hexadecimal, of a model: class, tensors, settings of its towers, preprocessing and tokenizer.

    A model that was converted to another precision has the one of its float32 weights. `tensors` are those of the file,
    in its types, if the model was built in part.
    """
    if converted := getattr(model, "fingerprint", ""):
        return str(converted)
    if not hasattr(model, "state_dict"):
        raise UserError(f"{type(model).__name__} has no `state_dict`, so it cannot be distinguished from other models.")
    digest = hashlib.sha256(type(model).__qualname__.encode())
    if (recipe := getattr(model, "recipe", None)) is not None:  # equal weights may be applied in several ways
        image, text = recipe.image, recipe.text
        digest.update(repr((image.model, image.model_kwargs, text.heads, text.activation, text.pooling)).encode())
    state = model.state_dict() if tensors is None else tensors
    # The last digits of computed projections differ between machines, so what they are computed from stands for them.
    published, projections = getattr(model, "computed", ("", {}))
    if published and all(torch.equal(state[name].cpu(), tensor) for name, tensor in projections.items()):
        digest.update(published.encode())
        state = {}
    floats = tensors is not None  # as models compute
    values = {name: value for name, value in sorted(state.items()) if isinstance(value, Tensor)}
    hash_tensors(digest, {n: v.float() if floats and v.is_floating_point() else v for n, v in values.items()})
    noise = np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)
    pixels = model.preprocess([Image.fromarray(noise)]).float()
    digest.update(str(tuple(pixels.shape)).encode() + pixels.cpu().numpy().tobytes())
    try:
        digest.update(repr(model.tokenize([PROBE]).tolist()).encode())
    except UserError:  # a model without a text tower
        digest.update(b"no text")
    return digest.hexdigest()


def hash_tensors(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    """Update a digest with names, types, shapes and values of tensors."""
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def chunked(encode: Callable[[Tensor], Tensor], images: Tensor, times: int = 1) -> Tensor:
    """Encode images (n, 3, H, W), on a CPU a few at a time, `times` as many as by default.

    Several threads encode different images: those that share a layer wait for each other at its end, and as they wait
    busily, ViT-B/32 takes 1.6 times as much processor time with two threads next to other processes.
    """
    if images.device.type != "cpu":
        return encode(images)
    size, threads = max(1, times * PIXELS // images[0, 0].numel()), torch.get_num_threads()
    at_once = min(lanes(), math.ceil(len(images) / size))
    if at_once == 1 or torch.is_autocast_enabled("cpu"):  # which other threads do not inherit
        return torch.cat([encode(part) for part in images.split(size * threads)])
    each, grad = threads // at_once, torch.is_grad_enabled()
    rounds = math.ceil(len(images) / (size * each * at_once))

    def start() -> None:  # threads inherit neither
        torch.set_num_threads(each)
        torch.set_grad_enabled(grad)

    try:
        # New threads for each batch: those of a pool would be missing in a forked process.
        with ThreadPoolExecutor(at_once, initializer=start) as pool:
            return torch.cat(list(pool.map(encode, images.tensor_split(rounds * at_once))))
    finally:
        torch.set_num_threads(threads)  # of threads to come, too


def image_encoder(model: Any) -> Callable[[Tensor], Tensor]:
    """Return a function like `model.encode_image` for many images, with the model's weights of now.

    For a model of declip they may also be uint8, not yet normalized.
    """
    if not isinstance(model, DualEncoder):
        return model.encode_image
    tower = inference_tower(model)

    def encode(images: Tensor) -> Tensor:
        images = normalized(model, images)
        if tower is model.image_tower:
            return model.encode_image(images)
        return normalize(tower(images).pooled.float(), dim=-1)

    convolutions = sum(isinstance(module, nn.Conv2d) for module in tower.modules())
    return partial(chunked, encode, times=PATCHES if convolutions == 1 else 1)


def normalized(model: Any, pixels: Tensor) -> Tensor:
    """Normalize pixels (n, 3, S, S), unless they are normalized."""
    return model.preprocessor.normalize(pixels) if pixels.dtype == torch.uint8 else pixels


def inference_tower(model: DualEncoder) -> ImageTower:
    """A copy of the image tower that is faster on a CPU, with batch norm folded into convolutions; or the tower itself.

    EfficientNet-Lite0 becomes 1.2 times as fast.
    """
    tower = model.image_tower
    if model.device.type != "cpu" or next(tower.parameters()).dtype != torch.float32:
        return tower  # other types would round the weights again
    return folded(model)


def folded(model: DualEncoder) -> ImageTower:
    """A copy of the float32 image tower, channels last, with batch norm folded into convolutions; or the tower itself.

    Whether a norm follows a convolution is assumed from their order in the module, so the features of two images are
    compared; where they differ, the tower itself is returned.
    """
    tower = model.image_tower
    if not tower.has_batch_norm:
        return tower
    copy = deepcopy(tower).eval().requires_grad_(False)
    _fold(copy)
    copy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    images = noise(model)
    with torch.no_grad():
        before, after = deepcopy(tower).eval()(images).pooled, copy(images).pooled
    return copy if bool((before - after).abs().max() <= TOLERANCE * before.abs().max()) else tower


def noise(model: DualEncoder) -> Tensor:
    """Two images (2, 3, S, S) to compare the features of two towers by."""
    size = model.preprocessor.size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(model.device)


def _fold(parent: nn.Module) -> None:
    previous = ""
    for name, child in list(parent.named_children()):
        convolution = getattr(parent, previous, None)
        if (
            isinstance(convolution, nn.Conv2d)
            and isinstance(child, _BatchNorm)
            and child.running_mean is not None
            and child.num_features == convolution.out_channels
        ):
            setattr(parent, previous, fuse_conv_bn_eval(convolution, child))
            setattr(parent, name, getattr(child, "act", nn.Identity()))  # timm's norms end with an activation
        else:
            _fold(child)
        previous = name


def pick_precision(precision: str, device: torch.device) -> torch.dtype:
    """The type that a precision means on a device; raises `UserError` for one that the device would emulate."""
    if precision not in get_args(Precision):
        raise unknown("precision", precision, get_args(Precision))
    bf16, gpu = computes_bf16(device), device.type in ("cuda", "mps")
    if precision == "auto":
        return torch.bfloat16 if bf16 else torch.float16 if device.type == "cuda" else torch.float32
    if (precision == "bf16" and not bf16) or (precision == "fp16" and not gpu):
        allowed = ", ".join(["auto", "fp32", *["bf16"] * bf16, *["fp16"] * gpu])
        raise UserError(f"The device '{device}' does not compute in {precision} itself. Give --precision {allowed}.")
    return TYPES[precision]


def precision_of(model: Any) -> str:
    """The precision that a model computes images in; empty without weights."""
    tower = getattr(model, "image_tower", model)
    names = {kind: name for name, kind in TYPES.items()}
    weight = next(iter(getattr(tower, "parameters", tuple)()), None)
    return "" if weight is None else names.get(weight.dtype, str(weight.dtype))


@torch.no_grad()
def convert(model: DualEncoder, precision: str) -> DualEncoder:
    """Convert the towers of a float32 model in place, batch norm folded into convolutions; for inference alone.

    The logit scale stays float32, and so does what is left of batch norm. A tower whose features change too much, or
    that cannot compute in the type, stays float32 with "auto"; otherwise this raises a `UserError`.
    """
    dtype = pick_precision(precision, model.device)
    if dtype == torch.float32:
        return model
    model.fingerprint = fingerprint(model)
    # (tower, its weights to convert, features to compare)
    towers: list[tuple[str, nn.Module, Callable[[], Tensor]]] = []
    if not isinstance(model.image_tower, NoImageTower):
        images = noise(model)
        towers.append(("image_tower", folded(model), lambda: model.encode_image(images)))
    if has_text(model):
        tokens = model.tokenize([PROBE, "a"])
        towers.append(("text_tower", model.text_tower, lambda: model.encode_text(tokens)))
    for name, tower, encode in towers:
        original, before = getattr(model, name), encode()
        try:
            setattr(model, name, _cast(_rounded(tower, dtype), dtype))
            if (smallest := float(cosine_similarity(before, encode()).min())) >= 1 - LARGEST_CHANGE:
                continue
            problem = f"its features change too much (cosine {smallest:.3f})"
        except (RuntimeError, TypeError, ValueError) as error:  # a tower of another library may fix a type
            problem = str(error).splitlines()[0]
        setattr(model, name, original)
        problem = f"The {name.replace('_', ' ')} cannot compute in {str(dtype).removeprefix('torch.')}: {problem}."
        if precision != "auto":
            raise UserError(f"{problem} Give --precision auto or fp32.")
        log.warning("%s It computes in float32.", problem)
    return model


def _cast(tower: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast a tower; what is left of batch norm stays float32, as variances may be far from 1."""
    for module in tower.to(dtype).modules():
        if isinstance(module, _BatchNorm):
            module.float()
    return tower


def _rounded(tower: nn.Module, dtype: torch.dtype) -> nn.Module:
    copy = deepcopy(tower).requires_grad_(False)
    for module in copy.modules():
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1:
            module.weight.data = round_taps(module.weight.data, dtype)
    return copy


def round_taps(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Round filters (out, in, h, w) to a type so that the sum of each stays, which a smooth image is multiplied by.

    The plain loop, over the taps of each filter from the largest to the smallest::

        carry = 0
        for tap in taps:
            rounded = round(tap + carry)
            carry = tap + carry - rounded

    Reduces the mean cosine distance of EfficientNet-Lite0's features in bfloat16 from 0.0011 to 0.0004.
    """
    taps = weight.flatten(2)  # (out, in, h * w)
    order = taps.abs().argsort(dim=2, descending=True)
    rounded, carry = torch.empty_like(taps), torch.zeros_like(taps[..., :1])
    for place in order.split(1, dim=2):
        value = taps.gather(2, place) + carry
        rounded.scatter_(2, place, value.to(dtype).to(weight.dtype))
        carry = value - rounded.gather(2, place)
    return rounded.view_as(weight)
