"""A step of a recipe on a pretended GPU: its memory, its operations and what the host waits for.

    python scripts/fake_step.py declip-yfcc15m-vitb32 train.batch_size=128

Nothing is computed and no data are read. In Python: `fake_step(recipe)`.
"""

import sys
import weakref
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

import declip
from declip.data.batch import IGNORED, PairBatch, Photometric, View
from declip.data.images.crops import ViewTransform
from declip.data.plan import Plan
from declip.errors import UserError
from declip.models.average import Average
from declip.models.dual_encoder import DualEncoder
from declip.recipe.load import load_recipe, parse_overrides
from declip.recipe.schema import Recipe
from declip.supervision.objective import Objective
from declip.training.optimizer import build_optimizer, named_trainable
from declip.training.parallel import build_learner
from declip.training.setup import plan_of
from declip.training.step import StepParts, training_step
from declip.training.watchdogs import NonFiniteGuard

DEVICE = "pretended"
PACKAGE = str(Path(declip.__file__).parent)
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}
"""Operations whose outcome the host reads, and so waits for."""
AUTOCAST = ("linear", "conv2d", "matmul", "bmm", "mm", "addmm", "baddbmm", "scaled_dot_product_attention")
"""Operations that autocast computes in bfloat16."""


@dataclass(frozen=True)
class FakeStep:
    """The cost of a step on one accelerator.

    Attributes:
        flops: Floating-point operations of matrix products and convolutions, forward and backward.
        state_bytes: Weights, gradients, moments and the queue: what is left after a step.
        peak_bytes: The most that is held within a step; an allocator needs some more.
        waits: "file:line operation" for each time that the host waits for the device within a step.
    """

    recipe: str
    batch_size: int
    parameters: int
    flops: int
    state_bytes: int
    peak_bytes: int
    waits: tuple[str, ...]


def fake_step(recipe: Recipe, tokens: int | None = None) -> FakeStep:
    """Take a step of a recipe in which nothing is computed, in a process of their own.

    Args:
        recipe: Its data are not read. `train.compile`, several processes and pretrained weights are not considered.
        tokens: Length of all captions; by default the context length, the longest.

    Raises:
        UserError: torch is too old, or the recipe starts from weights.
    """
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        raise UserError(f"A pretended GPU needs torch 2.10 or newer; this is {torch.__version__}.")
    if recipe.finetune.pretrained is not None or recipe.text.hf_model is not None:
        raise UserError("A pretended GPU has random weights only. Leave finetune.pretrained and text.hf_model out.")
    # Not forked from here: autograd, once used, takes no further kind of device.
    context = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
    context.set_forkserver_preload(["declip.training.setup"])  # imported once; Python 3.11 finds no script there
    with ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return pool.submit(_measure, recipe, tokens).result()  # the pretended device stays in that process


class PretendedDevice(FakeTensorMode):
    """Tensors on `DEVICE` have shapes and no numbers; those on the host are real, as the host's planning needs them."""

    avoid_device_init = True

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.live = self.peak = 0
        self.waits: list[str] = []
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if not any(isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type == DEVICE) for x in leaves):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in WAITS or self._copies_and_waits(name, args, kwargs) or (name == "index" and _has_mask(args[1])):
            self.waits.append(f"{_place()} {name}")
            if name == "_local_scalar_dense":
                return 1
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, FakeTensor) and tensor.device.type == DEVICE:
                self._count(tensor.untyped_storage())
        return out

    def _copies_and_waits(self, name: str, args: Any, kwargs: Any) -> bool:
        """Whether an operation is a copy between host and device that was not asked not to block."""
        if name == "_to_copy":
            to, blocking = kwargs.get("device") or args[0].device, not kwargs.get("non_blocking")
        elif name == "copy_":
            to, blocking = args[0].device, len(args) < 3 or not args[2]
            args = args[1:]
        else:
            return False
        return blocking and torch.device(to).type != args[0].device.type

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += self._sizes[key]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def _has_mask(indices: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _place() -> str:
    """The innermost line of declip that is being run."""
    frame: Any = sys._getframe(2)
    while frame is not None and (
        not frame.f_code.co_filename.startswith(PACKAGE) or frame.f_code.co_filename == __file__
    ):
        frame = frame.f_back
    return "backward" if frame is None else f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"


def _register() -> list[torch.library.Library]:
    """Make `DEVICE` known to torch, with autocast; the result must be kept."""
    words = {"is_available": lambda: True, "is_initialized": lambda: True, "device_count": lambda: 1}
    module = SimpleNamespace(
        **words, current_device=lambda: 0, _is_in_bad_fork=lambda: False, manual_seed_all=lambda seed: None,
        get_amp_supported_dtype=lambda: [torch.bfloat16],
    )  # fmt: skip
    backend_registration._setup_privateuseone_for_python_backend(DEVICE, module)
    key = "AutocastPrivateUse1"
    guard = partial(torch._C._ExcludeDispatchKeyGuard, torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)))

    def narrow(x: Any) -> Any:
        return x.bfloat16() if isinstance(x, Tensor) and x.dtype == torch.float32 and x.device.type == DEVICE else x

    def call(operation: Any, *args: Any, **kwargs: Any) -> Any:
        with guard():
            return operation(*tree_map(narrow, args), **tree_map(narrow, kwargs))

    others, casts = torch.library.Library("_", "IMPL", key), torch.library.Library("aten", "IMPL", key)
    others.fallback(torch.library.fallthrough_kernel)
    for name in AUTOCAST:
        casts.impl(name, partial(call, getattr(torch.ops.aten, name).default), key)
    return [others, casts]


def _measure(recipe: Recipe, tokens: int | None) -> FakeStep:
    kept = _register()
    train = recipe.train.model_copy(update={"channels_last": False})  # takes no other number of bytes
    recipe, plan = recipe.model_copy(update={"train": train}), plan_of(recipe)
    with PretendedDevice() as device:
        with torch.device(DEVICE):
            model = DualEncoder.from_recipe(recipe)
            objective = Objective(recipe, model)
            mean, std = torch.tensor(plan.mean), torch.tensor(plan.std)
        average = None if train.ema_decay is None else Average(model, train.ema_decay)
        guard = NonFiniteGuard(train.max_nonfinite_steps, mean.device)
        if objective.queue is not None:
            objective.queue.written = objective.queue.size
        learner = build_learner(recipe, model, objective).train()
        optimizer = build_optimizer(named_trainable(model, objective), train)
        precision = "bf16" if train.precision == "auto" else train.precision
        parts = StepParts(
            learner, optimizer, mean, std, average and average.update, train.grad_clip_norm, precision,
            train.grad_cache_chunk, train.max_nonfinite_steps > 0,
        )  # fmt: skip
        batch = _batch(train.batch_size, plan, model.tokenizer.end, tokens or recipe.text.context_length)
        device.waits.clear()
        peaks: list[int] = []
        optimizer.register_step_pre_hook(lambda *_: peaks.append(device.peak))
        with FlopCounterMode(display=False) as counter:
            guard.check(0, training_step(parts, batch))
    # The first step makes the moments; all others hold them from the beginning.
    moments = [tensor for values in optimizer.state.values() for tensor in values.values()]
    peak = max(device.peak, peaks[0] + sum(tensor.nbytes for tensor in moments))
    del kept
    parameters = sum(parameter.numel() for parameter in learner.parameters())
    return FakeStep(
        recipe.name, train.batch_size, parameters, int(counter.get_total_flops()), device.live, peak,
        tuple(device.waits),
    )  # fmt: skip


def _batch(count: int, plan: Plan, end: int, length: int) -> PairBatch:
    """A batch on the host as the loader gives it, of black images and one word repeated."""
    generator, views = np.random.default_rng(0), {}
    for view in plan.views:
        sample = ViewTransform(view.size, view.augmentation).sample_params
        photometric = Photometric.stack([sample(generator) for _ in range(count)])
        views[view.name] = View(torch.zeros(count, 3, view.size, view.size, dtype=torch.uint8), photometric)
    texts = torch.ones(plan.texts.count, count, length, dtype=torch.int64)
    texts[..., -1] = end
    masked = labels = None
    if plan.texts.mask_probability is not None:
        masked, labels = texts[0].clone(), torch.full((count, length), IGNORED)
        labels[:, : max(1, round(plan.texts.mask_probability * length))] = 1
    lengths = torch.full((plan.texts.count, count), length)
    return PairBatch(views, texts, masked, labels, torch.arange(count), lengths)


def main() -> None:
    """Print the cost of a step with the longest captions."""
    if len(sys.argv) < 2 or "--help" in sys.argv:
        sys.exit(__doc__)
    try:
        step = fake_step(load_recipe(sys.argv[1], parse_overrides(sys.argv[2:])))
    except UserError as error:
        sys.exit(f"fake_step: {error}")
    print(
        f"A step of {step.batch_size:,} pairs: {step.parameters / 1e6:,.1f} M parameters, "
        f"{step.peak_bytes / 1e9:,.2f} GB, of which {step.state_bytes / 1e9:,.2f} GB stay, "
        f"{step.flops / 1e12:,.2f} TFLOP, {len(step.waits)} waits of the host for the device"
    )


if __name__ == "__main__":
    main()
