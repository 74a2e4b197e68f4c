"""timm, imported without torch's compiler, which takes another 2 s, and without wandb; both are imported when used.

Every module of declip takes timm from here.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

COMPILER, WANDB = "torch._dynamo.utils", "wandb"


class Later(ModuleType):
    """Stands in for a module, which is imported when something of it is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # `inspect` asks all modules for their `__file__`
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


@contextmanager
def without_extras() -> Iterator[None]:
    """Replace what torchvision 0.28 and timm 1.0 ask for while they are imported: parts of the compiler, and wandb.

    torchvision decides by one part, at each call, how it pools regions; timm excludes its NaFlex towers by the other.
    wandb is for a function of timm that declip does not call.
    """
    names = [name for name in (COMPILER, WANDB) if name not in sys.modules and (name == COMPILER or find_spec(name))]
    stubs, disable = {name: Later(name) for name in names}, torch.compiler.disable
    if COMPILER in stubs:
        compiler = stubs[COMPILER]
        vars(compiler).update(is_compile_supported=lambda kind: compiler.__getattr__("is_compile_supported")(kind))
        vars(torch.compiler)["disable"] = _disable_later
    sys.modules.update(stubs)
    try:
        yield
    finally:
        vars(torch.compiler)["disable"] = disable
        for name, stub in stubs.items():
            if sys.modules.get(name) is stub:
                del sys.modules[name]


def _disable_later(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """Stand in for `torch.compiler.disable`, a decorator with or without options, which would import the compiler."""
    if function is None:
        return partial(_disable_later, **options)

    @wraps(function)
    def disabled(*given: Any, **named: Any) -> Any:
        compiled = "torch._dynamo" in sys.modules
        return (torch.compiler.disable(function, **options) if compiled else function)(*given, **named)

    return disabled


with without_extras():
    import timm

__all__ = ["timm"]
