"""Python's garbage collection beside a training loop."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def frozen_garbage() -> Iterator[None]:
    """Leave all objects that are there now out of every collection, until the end: only what steps make is looked at.

    A full collection visits each of some 300,000 objects of torch, timm and the model for nothing, in the middle of a
    step.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
