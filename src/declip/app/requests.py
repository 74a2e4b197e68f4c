"""Limits of what requests send, checked before it is read, and the guard that refuses requests of other sites."""

import asyncio
import ipaddress
import socket
from typing import Annotated
from urllib.parse import urlsplit

from PIL import Image
from pydantic import AfterValidator, Field, StringConstraints
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from declip.data.images.decode import decode
from declip.data.pair import BrokenPair, on_one_line

# bytes of an uploaded image, and of JSON: the ids of 200,000 pairs
LARGEST_UPLOAD = 20 << 20
LARGEST_JSON = 2 << 20
MOST_PIXELS = 50_000_000  # pixels of an uploaded image, more than those of cameras and phones
SECONDS = 60  # time in which a body must arrive

OneLine = AfterValidator(on_one_line)
Text = Annotated[str, StringConstraints(max_length=2_000), OneLine]
Template = Annotated[str, StringConstraints(max_length=300), OneLine]
"""A prompt template or the name of a set; empty for the text itself."""
ImageId = Annotated[int, Field(ge=0, lt=2**62)]

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


async def read_body(request: Request, most: int) -> bytes:
    """Read a body of at most `most` bytes; starlette's forms would write a large one to disk."""
    content = bytearray()
    try:
        async with asyncio.timeout(SECONDS):
            async for chunk in request.stream():
                content += chunk
                if len(content) > most:
                    raise HTTPException(413, f"The file is too large: at most {most >> 20} MB.")
    except TimeoutError:
        raise HTTPException(408, "The file took too long to arrive.") from None
    return bytes(content)


def read_image(content: bytes) -> Image.Image:
    """Decode an uploaded image, RGB and upright; its size is checked before it is decoded."""
    try:
        return decode(content, "the image", MOST_PIXELS)
    except BrokenPair as broken:
        kinds = f"JPEG, PNG, WebP, BMP, GIF and TIFF of up to {MOST_PIXELS // 1_000_000} million pixels are supported"
        raise HTTPException(422, f"The image cannot be read: {broken.reason}. {kinds}.") from broken


class Guard:
    """Refuse requests of other sites' pages and for other host names, and add the security headers.

    A request is refused if its Host is neither an IP address nor a name of this machine (DNS rebinding), if it is a
    POST request whose Origin is not this app, or if another site's page loads something from here.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app = app
        self.names = {"localhost", host.lower(), socket.gethostname().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        if scope["type"] != "http":
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(SECURITY_HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        refusal = self._refusal(scope["method"], Headers(scope=scope))
        await (refusal or self.app)(scope, receive, send_with_headers)

    def _refusal(self, method: str, headers: Headers) -> PlainTextResponse | None:
        # --- DNS rebinding: another name that leads to this machine
        host = headers.get("host", "")
        if len(headers.getlist("host")) != 1 or not self._is_ours(host):
            message = "The app does not answer to this host name. Open the address that `declip app` printed."
            return PlainTextResponse(message, 421)
        # --- forms and scripts of other sites
        ours = (f"http://{host}", f"https://{host}")
        if method not in ("GET", "HEAD") and headers.get("origin") not in ours:
            return PlainTextResponse("Only the pages of the app may send this request.", 403)
        # --- images and scripts that other sites load from here; links to here are allowed
        site = headers.get("sec-fetch-site", "none")
        mode = headers.get("sec-fetch-mode")
        if site not in ("same-origin", "none") and mode != "navigate":
            return PlainTextResponse("Pages of other sites may not load from this app.", 403)
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name in self.names or bool(ipaddress.ip_address(name))
        except ValueError:
            return False
