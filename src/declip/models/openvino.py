"""Towers that OpenVINO computes: faster than torch on a CPU."""

import sys
import warnings
from functools import cache
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

from declip.io.text import one_line
from declip.models.device import lanes

HINTS = {torch.float32: "f32", torch.bfloat16: "bf16"}


class OpenVinoTower(nn.Module):
    """A tower whose forward pass OpenVINO computes; all other members are the tower's own.

    Args:
        tower: A tower on the CPU with float32 weights, which both engines share.
        example: Images (n, 3, S, S) or token ids (n, L) to trace; others may have another n and L.
        dtype: Type that OpenVINO computes in.
    """

    has_batch_norm = False  # OpenVINO folds it into the convolutions

    def __init__(self, tower: nn.Module, example: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.tower, self.dtype = tower, dtype
        with torch.no_grad():
            self._features = type(tower(example))
        self._compiled = _compile(_Outputs(tower).eval(), example, HINTS[dtype])
        self._idle = SimpleQueue[Any]()  # requests that no thread uses

    def __getattr__(self, name: str) -> Any:
        """Look up a member of the tower."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("tower"), name)

    def forward(self, given: Tensor) -> Any:
        """Compute the features of images or token ids."""
        try:
            request = self._idle.get_nowait()
        except Empty:  # one for each thread that computes at the same time
            request = self._compiled.create_infer_request()
        outputs = request.infer([given.contiguous().numpy()], share_inputs=True)
        self._idle.put(request)
        return self._features(*(torch.from_numpy(outputs[number]) for number in range(len(outputs))))


class _Outputs(nn.Module):
    """A tower that returns its features as a tuple, for tracing."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, given: Tensor) -> tuple[Tensor, ...]:
        return tuple(vars(self.tower(given)).values())


def _compile(module: nn.Module, example: Tensor, hint: str) -> Any:
    """Trace a module and compile it for other numbers and lengths; raises `RuntimeError` if that is not possible."""
    openvino, decoder_of = _import()
    settings = {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": lanes() if example.is_floating_point() else 1,  # batches at a time: see `chunked`
        "ENABLE_HYPER_THREADING": True,
        "ENABLE_CPU_PINNING": False,  # the processes that read images need the cores too
    }
    try:
        # Not openvino.convert_model, which traces a second time to check the first.
        with warnings.catch_warnings(action="ignore"), torch.no_grad():
            decoder = decoder_of(module, example_input=example, trace_kwargs={"check_trace": False})
            frontend = openvino.frontend.FrontEndManager().load_by_framework("pytorch")
            model = frontend.convert(frontend.load(decoder))
        model.reshape([-1, *example.shape[1:]] if example.is_floating_point() else [-1, -1])
        return _core().compile_model(model, "CPU", settings)
    except Exception as error:  # it has classes of its own
        raise RuntimeError(one_line(error, 200)) from error


@cache
def _core() -> Any:
    """The one core of this process, which is never freed.

    It replaces the stack of signal handlers of a thread that has one, as with faulthandler in pytest and Jupyter. Freed
    by another thread, it would take that stack away, and the next Ctrl-C would be a segmentation fault.
    """
    return _import()[0].Core()


def _import() -> tuple[Any, Any]:
    """Import OpenVINO and its reader of torch's graphs, without the module that reports to Google Analytics.

    OpenVINO reports each import and conversion unless its user has refused, but does without the module.
    """
    reporter = "openvino_telemetry"
    hide = reporter not in sys.modules
    if hide:
        sys.modules[reporter] = None  # type: ignore[assignment]  # its import fails
    try:
        import openvino
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
    finally:
        if hide:
            del sys.modules[reporter]
    return openvino, TorchScriptPythonDecoder
