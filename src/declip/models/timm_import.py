"""timm, imported without torch's compiler, whose import takes another 2 s; `torch.compile` imports it when it is used.

Every module of declip takes timm from here.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from types import ModuleType
from typing import Any

import torch

COMPILER = "torch._dynamo.utils"


@contextmanager
def without_compiler() -> Iterator[None]:
    """Replace the two parts of the compiler that torchvision 0.28 and timm 1.0 ask for while they are imported.

    torchvision decides by one, at each call, how it pools regions; timm excludes its NaFlex towers by the other.
    """
    if COMPILER in sys.modules:
        yield
        return

    def imported(name: str) -> Any:
        """Any other part is imported; `inspect` asks all modules for their `__file__`."""
        if name.startswith("__"):
            raise AttributeError(name)
        sys.modules.pop(COMPILER, None)
        return getattr(importlib.import_module(COMPILER), name)

    later = ModuleType(COMPILER)
    vars(later).update(is_compile_supported=lambda kind: imported("is_compile_supported")(kind), __getattr__=imported)
    sys.modules[COMPILER], disable = later, torch.compiler.disable
    vars(torch.compiler)["disable"] = _disable_later
    try:
        yield
    finally:
        vars(torch.compiler)["disable"] = disable
        if sys.modules.get(COMPILER) is later:
            del sys.modules[COMPILER]


def _disable_later(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """Stand in for `torch.compiler.disable`, a decorator with or without options, which would import the compiler."""
    if function is None:
        return partial(_disable_later, **options)

    @wraps(function)
    def disabled(*given: Any, **named: Any) -> Any:
        compiled = "torch._dynamo" in sys.modules
        return (torch.compiler.disable(function, **options) if compiled else function)(*given, **named)

    return disabled


with without_compiler():
    import timm

__all__ = ["timm"]
