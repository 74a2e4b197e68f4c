"""Operations and memory of a training step, counted from its recipe without computing it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from declip.data.plan import plan_views
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.supervision.objective import Objective, needs_of


@dataclass(frozen=True)
class Cost:
    """Operations and memory of a training step, counted from the towers without computing it."""

    flops: float  # per pair, forward and backward; a multiplication and an addition are two, as peaks are given
    activations: float  # bytes per pair that the backward pass reads
    states: int  # bytes of weights, gradients, moments of the optimizer and the queue, on each GPU


def count_cost(recipe: Recipe, caption_length: int) -> Cost:
    """Count the operations and the memory of both towers for all views of a pair.

    The losses and their heads are left out of the operations, but for FILIP's comparison of tokens: they are about 1 %
    of DeCLIP's with ViT-B/32.

    Args:
        caption_length: Token ids of a caption, padding included.
    """
    plan, train, size = plan_views(recipe, needs_of(recipe)), recipe.train, recipe.image.size
    with torch.device("meta"):
        model = DualEncoder(recipe).train()
        objective = Objective(recipe, model)
    weights = [p for module in (model, objective) for p in module.parameters()]
    trained = 16 if train.optimizer == "adamw" else 12  # weight, gradient, two moments or one
    states = sum((trained if p.requires_grad else 4) * p.numel() for p in weights) + sum(
        buffer.numel() * buffer.element_size() for buffer in objective.buffers()
    )
    # A caption that the contrastive loss sees unmasked is encoded a second time for the masked words.
    texts = plan.texts + (plan.mask_probability is not None and recipe.views.text.mask is False)
    passes = 1 + (train.grad_checkpointing or train.grad_cache_chunk is not None)
    flops, activations = 0.0, 0.0
    with FakeTensorMode(allow_non_fake_inputs=True):  # shapes without values
        model.to_empty(device="cpu")
        images = torch.zeros(4, 3, size, size)
        tokens = torch.ones(4, caption_length, dtype=torch.int64)
        for tower, inputs, views in (
            (model.image_tower, images, len(plan.views)),
            (model.text_tower, tokens, texts),
        ):
            forward, backward = _flops(tower, inputs)
            flops += views * (passes * forward + backward) / 4
            # The difference leaves out what is saved once for a batch, such as weights cast to bfloat16.
            four, two = (_saved_bytes(tower, inputs[:n], train.precision != "fp32") for n in (4, 2))
            activations += views * (four - two) / 2
        if "late_interaction" in recipe.active_losses:
            with torch.no_grad():
                patches = model.image_tower(images).tokens.shape[1]
            flops += _token_flops(recipe, patches, caption_length)
    return Cost(flops, activations, states)


def _token_flops(recipe: Recipe, patches: int, words: int) -> float:
    """Operations per pair of FILIP's loss, which compares its tokens with those of all pairs of a step, in float32.

    The products are made four times: forward, again for the backward pass, and there for either side.
    """
    section = recipe.late_interaction
    kept_words = min(words, section.top_k or words)
    kept_patches = min(patches, section.top_k or patches)
    products = patches * kept_words + words * kept_patches
    return 4 * 2 * section.width * products * recipe.train.batch_size


def _flops(tower: nn.Module, inputs: Tensor) -> tuple[int, int]:
    """Operations forward and backward; torch counts attention where it is a product of matrices."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        features = tower(inputs).pooled
        forward = counter.get_total_flops()
        if features.requires_grad:
            features.sum().backward()
    return forward, counter.get_total_flops() - forward


def _saved_bytes(tower: nn.Module, inputs: Tensor, bf16: bool) -> int:
    """Bytes that a forward pass saves for the backward pass."""
    saved = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), hooks:
        tower(inputs)
    return sum(saved.values())
