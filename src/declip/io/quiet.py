"""Suppress log messages of libraries."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(library: str) -> Iterator[None]:
    """Show only errors of a library's loggers, and prevent it from adding a handler to the root logger."""
    handler, logger = logging.NullHandler(), logging.getLogger(library)
    level = logger.level
    logging.root.addHandler(handler)
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.removeHandler(handler)
        logger.setLevel(level)
