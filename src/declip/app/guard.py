"""What every request passes first: whose page asks, and what the answer allows a browser to do."""

import ipaddress
import re
import socket
from collections.abc import Set
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}

SAFE_METHODS = ("GET", "HEAD")
OWN = ("same-origin", "none")
"""What a browser says of a request that our page, or the user's address bar, made."""

HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(?::\d{1,5})?")


def known_names(given: str) -> frozenset[str]:
    """The names that the page answers to, besides addresses in numbers: a foreign name may lead here by DNS rebinding.

    Args:
        given: What the server listens on.
    """
    return frozenset({"localhost", given.lower(), socket.gethostname().lower()})


class Guard:
    """Refuses requests by foreign pages and for foreign names, and adds the security headers.

    A request is refused where its Host is not one of ours, where it changes something or sends a picture and its
    Origin is not this page, or where another site's page loads from here.

    Args:
        app: What answers the others.
        names: As `known_names` gives them.
    """

    def __init__(self, app: ASGIApp, names: Set[str]) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        refused = self._refused(scope["method"], Headers(scope=scope))
        answer = self.app if refused is None else PlainTextResponse(refused[1], refused[0])
        await answer(scope, receive, with_headers)

    def _refused(self, method: str, headers: Headers) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if len(headers.getlist("host")) != 1 or not self._is_ours(host):
            return HTTPStatus.MISDIRECTED_REQUEST, "This page does not answer to that name. Open it by its address."
        if method not in SAFE_METHODS and headers.get("origin") not in (f"http://{host}", f"https://{host}"):
            return HTTPStatus.FORBIDDEN, "Only the page itself may ask for this."
        if headers.get("sec-fetch-site", "none") not in OWN and headers.get("sec-fetch-mode") != "navigate":
            return HTTPStatus.FORBIDDEN, "Another site's page may not load from here."
        return None

    def _is_ours(self, host: str) -> bool:
        found = HOST.fullmatch(host)
        if found is None:
            return False
        name = found.group(1).strip("[]").lower()
        if name in self.names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True
