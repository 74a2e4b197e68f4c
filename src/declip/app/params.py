"""Parameters and bodies of requests, with limits that are checked before they are read; nothing is written to disk."""

import asyncio
from typing import Annotated, Self

from PIL import Image
from pydantic import AfterValidator, BaseModel, Field, StringConstraints
from starlette.exceptions import HTTPException
from starlette.requests import Request

from declip.data.images.decode import decode
from declip.data.pair import BrokenPair

LARGEST_UPLOAD, LARGEST_JSON = 20 << 20, 2 << 20  # bytes of an uploaded image, and of JSON: the ids of 200,000 pairs
MOST_PIXELS = 50_000_000  # pixels of an uploaded image, more than those of cameras and phones
SECONDS = 60  # time in which a body must arrive

OneLine = AfterValidator(lambda text: " ".join(text.split()))
Text = Annotated[str, StringConstraints(max_length=2_000), OneLine]
Template = Annotated[str, StringConstraints(max_length=300), OneLine]
"""A prompt template or the name of a set; empty for the text itself."""
ImageId = Annotated[int, Field(ge=0, lt=2**62)]


class Question(BaseModel):
    """Parameters of a request; invalid ones raise pydantic's `ValidationError`, which the server answers."""

    @classmethod
    def of(cls, request: Request) -> Self:
        """Read the parameters from the query string."""
        return cls.model_validate(dict(request.query_params))

    @classmethod
    async def in_body(cls, request: Request) -> Self:
        """Read the parameters from the body, a JSON object."""
        return cls.model_validate_json(await read_body(request, LARGEST_JSON))


class ImageQuestion(Question):
    """An image: the token of an uploaded one, or the id of one of the index."""

    image: str | None = None
    id: ImageId | None = None


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
