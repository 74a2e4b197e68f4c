"""Fetching from the Hugging Face Hub, or from its cache if the Hub cannot be reached."""

import socket
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

from declip.errors import UserError
from declip.io.text import one_line

T = TypeVar("T")


def fetch(given: str, get: Callable[[bool], T], local: str) -> T:
    """Fetch a model by its name with `get(offline)`; `local` says how weights on this machine are named instead."""
    offline = not online()
    try:
        return get(offline)
    except Exception as error:  # hub, network and disk raise their own exceptions
        reason = (
            f"no connection to {constants.ENDPOINT}"
            if offline
            else one_line(error, 180).rstrip(".")
        )
        others = (
            f"Weights on this machine are given as {local}; builtin:lite2-minilm needs no network."
        )
        raise UserError(
            f"Cannot fetch '{given}': {reason}. Check the network and the name. {others}"
        ) from error


def online() -> bool:
    """Whether the Hub can be reached; without this check its client retries for about a minute."""
    address = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or getproxies():  # a proxy may connect even if this machine cannot
        return not constants.HF_HUB_OFFLINE
    with suppress(OSError):
        socket.create_connection((address.hostname or "", address.port or 443), timeout=5).close()
        return True
    return False
