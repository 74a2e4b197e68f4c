"""The fast preprocessing of files: the pixels of Pillow's, to a level or two."""

import pytest
from PIL import Image

from conftest import encoded, texture
from declip.data.images.decode import open_image
from declip.data.images.preprocess import Preprocess


@pytest.mark.parametrize("size", [(150, 110), (40, 33), (20, 31), (32, 32), (900, 30)])
@pytest.mark.parametrize("options", [{}, {"squash": True}, {"interpolation": "bilinear"}])
def test_pixels_are_pillows_to_a_level_or_two(size, options):
    image, preprocess = texture(0).resize(size, 3), Preprocess(32, [0.5] * 3, [0.25] * 3, **options)
    own = preprocess.fast(open_image(encoded(image, "PNG"), "x"))
    assert (own.shape, str(own.dtype)) == ((3, 32, 32), "torch.uint8")
    difference = (preprocess.normalize(own[None]) - preprocess(image)).abs() * 0.25 * 255
    assert float(difference.max()) < 3.5
    assert float(difference.mean()) < 0.6


def test_a_large_jpeg_is_decoded_smaller():
    image, preprocess = (
        open_image(encoded(texture(0).resize((640, 480), 3), "JPEG", quality=95), "x"),
        Preprocess(32, [0] * 3, [1] * 3),
    )
    decoded = []
    pixels = image.pixels
    image.pixels = lambda scale=1: decoded.append(scale) or pixels(scale)
    own = preprocess.fast(image)
    assert decoded == [4], "of 480 pixels 120 are left; 64 are enough, 60 are not"
    difference = (preprocess.normalize(own[None]) - preprocess(Image.fromarray(pixels()))).abs() * 255
    assert float(difference.mean()) < 2
