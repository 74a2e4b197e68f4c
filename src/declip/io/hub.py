"""Fetching from the Hugging Face Hub, or from its cache if the Hub cannot be reached."""

import socket
import threading
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
    except Exception as error:  # hub, network and disk have errors of their own
        reason = f"no connection to {constants.ENDPOINT}" if offline else one_line(error, 180).rstrip(".")
        raise UserError(
            f"Cannot fetch '{given}': {reason}. Check the network and the name. Weights on this machine are given as "
            f"{local}; builtin:lite2-minilm needs no network."
        ) from error


def online(seconds: float = 5.0) -> bool:
    """Whether the Hub can be reached; without this check its client retries for about a minute."""
    if constants.HF_HUB_OFFLINE:
        return False
    address, connected = urlsplit(constants.ENDPOINT), list[bool]()
    if getproxies():  # the proxy connects, and may do so even if this machine cannot
        return True

    def connect() -> None:
        port = address.port or (443 if address.scheme == "https" else 80)
        with suppress(OSError), socket.create_connection((address.hostname or "", port), seconds):
            connected.append(True)

    # In a thread, because looking up a name has no time limit of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(connected)
