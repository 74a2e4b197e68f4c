"""Quiet libraries."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(library: str) -> Iterator[None]:
    """Let a library's loggers pass errors only, and keep it from giving the root logger a handler."""
    handler, logger = logging.NullHandler(), logging.getLogger(library)
    level = logger.level
    logging.root.addHandler(handler)
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.removeHandler(handler)
        logger.setLevel(level)
