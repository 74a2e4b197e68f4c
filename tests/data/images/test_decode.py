import warnings
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageOps

from conftest import encoded
from declip.data.images.decode import decode, opened
from declip.data.pair import BrokenPair


def noise(seed=0, size=(40, 60, 3)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, size, dtype=np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "JPEG", "WEBP", "GIF", "MPO"])
def test_formats_are_read(kind):
    image = decode(encoded(noise(), kind), "k")
    assert (image.mode, image.size) == ("RGB", (60, 40))
    if kind in ("PNG", "BMP", "TIFF"):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(noise()))


def test_first_frame_of_a_moving_gif():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    image = decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "k")
    assert image.getpixel((1, 1)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(noise(), "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(BytesIO(content)))
    assert decode(content, "k").tobytes() == expected.tobytes()
    assert decode(content, "k").size == ((60, 40) if orientation < 5 else (40, 60))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_leaves_the_image_as_it_is():
    content = encoded(noise(), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff\xff")
    assert decode(content, "k").size == (60, 40)


@pytest.mark.parametrize(
    ("image", "kind", "options", "pixel"),
    [
        (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG", {}, (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 128)), "PNG", {}, (255, 127, 127)),
        (Image.new("LA", (4, 4), (0, 0)), "PNG", {}, (255, 255, 255)),
        (Image.new("L", (4, 4), 7), "PNG", {"transparency": 7}, (255, 255, 255)),
        (Image.new("L", (4, 4), 7), "PNG", {}, (7, 7, 7)),
        (Image.new("1", (4, 4), 1), "PNG", {}, (255, 255, 255)),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF", {}, (255, 0, 0)),
        (Image.fromarray(np.full((4, 4), 40_000, np.uint16)), "PNG", {}, (156, 156, 156)),
        (Image.fromarray(np.full((4, 4), 40_000, np.int32)), "TIFF", {}, (156, 156, 156)),
        (Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF", {}, (128, 128, 128)),
        (Image.fromarray(np.full((4, 4), 200.0, np.float32)), "TIFF", {}, (200, 200, 200)),
        (Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF", {}, (0, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb_over_white(image, kind, options, pixel):
    decoded = decode(encoded(image, kind, **options), "k")
    assert decoded.mode == "RGB"
    assert decoded.getpixel((1, 1)) == pixel


def test_a_scan_in_16_bits_whose_zero_is_white_is_not_inverted():
    content = encoded(Image.fromarray(np.full((4, 4), 40_000, np.uint16)), "TIFF")
    black, white = (b"\x06\x01\x03\x00\x01\x00\x00\x00" + bytes([kind, 0]) for kind in (1, 0))  # tag 262
    assert decode(content.replace(black, white), "k").getpixel((1, 1)) == (99, 99, 99)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "TIFF"])
def test_half_a_file_is_truncated(kind):
    content = encoded(noise(), kind)
    with pytest.raises(BrokenPair, match=r"^truncated image: k "):
        decode(content[: len(content) // 2], "k")


def test_a_large_image_is_read_without_a_warning(tmp_path):
    content = BytesIO()
    Image.new("1", (10_000, 10_000)).save(content, "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with opened(content.getvalue(), "large.png") as image:
            assert image.size == (10_000, 10_000)
