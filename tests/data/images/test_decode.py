"""Formats, modes and damage; pictures that are decoded late have the same pixels and reasons."""

from io import BytesIO

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps, features

from conftest import encoded
from data.fakes import jpeg, make_loader, scene
from declip.data.images import decode as module
from declip.data.images.decode import LazyJpeg, apply_exif, decode, open_image, opened
from declip.data.images.views import ViewTransform
from declip.data.pair import BrokenPair
from declip.data.sources.open import open_source


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "JPEG", "WEBP", "GIF", "MPO"])
def test_formats_are_read(kind):
    image = decode(encoded(scene(60, 40), kind), "k")
    assert (image.mode, image.size) == ("RGB", (60, 40))
    if kind in ("PNG", "BMP", "TIFF"):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(scene(60, 40)))
    if kind == "GIF":  # the first frame of several
        frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
        moving = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert decode(moving, "k").getpixel((1, 1)) == (255, 0, 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_leaves_the_image_as_it_is():
    assert decode(jpeg(exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff\xff"), "k").size == (150, 101)


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
        (Image.fromarray(np.full((4, 4), 1.0, np.float32)), "TIFF", {}, (255, 255, 255)),
        (Image.fromarray(np.full((4, 4), 200.0, np.float32)), "TIFF", {}, (200, 200, 200)),
        (Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF", {}, (0, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb_over_white(image, kind, options, pixel):
    decoded = decode(encoded(image, kind, **options), "k")
    assert (decoded.mode, decoded.getpixel((1, 1))) == ("RGB", pixel)


def test_a_scan_in_16_bits_whose_zero_is_white_is_not_inverted():
    content = encoded(Image.fromarray(np.full((4, 4), 40_000, np.uint16)), "TIFF")
    # Tag 262
    black, white = (b"\x06\x01\x03\x00\x01\x00\x00\x00" + bytes([kind, 0]) for kind in (1, 0))
    assert decode(content.replace(black, white), "k").getpixel((1, 1)) == (99, 99, 99)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "TIFF"])
def test_half_a_file_is_truncated(kind):
    content = encoded(scene(), kind)
    assert outcome(lambda: decode(content[: len(content) // 2], "k")) == "truncated image"


@pytest.fixture(params=["simplejpeg", "pillow"])
def decoder(request, monkeypatch):
    """Run with each decoder."""
    if request.param == "pillow":
        monkeypatch.setattr(module, "simplejpeg", None)
    else:
        pytest.importorskip("simplejpeg")


def outcome(read):
    """The pixels, or why there are none."""
    try:
        return np.asarray(read())
    except BrokenPair as broken:
        return broken.reason


def assert_as_pillow(content):
    def by_pillow():
        with opened(content, "k") as (image, _):
            return apply_exif(image)

    ours, expected = outcome(lambda: open_image(content, "k").pixels()), outcome(by_pillow)
    assert type(ours) is type(expected), (ours, expected)
    np.testing.assert_array_equal(ours, expected)
    return expected


JPEGS = {
    "4:2:0": {},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "progressive": {"progressive": True},
    "poor": {"quality": 20, "optimize": True},
    "restarts": {"restart_marker_rows": 1},
    "stored as RGB": {"keep_rgb": True},
}


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_full_size_pixels_are_those_of_decode(decoder, options):
    for size in ((1, 1), (7, 5), (33, 16), (150, 101)):
        content = jpeg(scene(*size), **options)
        picture = open_image(content, "k")
        assert (type(picture), picture.size) == (LazyJpeg, size)
        assert_as_pillow(content)


def test_other_contents_of_a_jpeg_are_read_as_by_decode(decoder):
    for mode in ("L", "CMYK", "1"):
        content = jpeg(scene().convert(mode))
        assert_as_pillow(content)
        assert open_image(content, "k").pixels(4).shape == (26, 38, 3)
    several = encoded(scene(), "MPO", save_all=True, append_images=[scene(seed=1)], quality=90)
    assert isinstance(open_image(several, "k"), LazyJpeg)
    for content in (several, several[:-99]):
        assert_as_pillow(content)


def test_a_photograph_of_a_phone_is_read_upright(monkeypatch):
    pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(scene(64, 48), "HEIF", exif=exif.tobytes(), quality=100)
    upright = np.asarray(scene(64, 48).transpose(Image.Transpose.ROTATE_270), int)
    assert np.abs(np.asarray(decode(content, "k"), int) - upright).mean() < 10
    monkeypatch.setattr(module, "FORMATS", ("JPEG",))
    assert "pip install 'declip[heif]'" in outcome(lambda: decode(content, "k"))


@pytest.mark.parametrize("orientation", range(11))
def test_exif_turns_size_pixels_and_smaller_pixels(decoder, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("JPEG", "PNG"):
        content = encoded(scene(), kind, exif=exif)
        picture = open_image(content, "k")
        expected = ImageOps.exif_transpose(Image.open(BytesIO(content)))
        assert picture.size == expected.size
        np.testing.assert_array_equal(picture.pixels(), np.asarray(expected))
        assert decode(content, "k").tobytes() == expected.tobytes()
    smaller = Image.fromarray(open_image(jpeg(), "k").pixels(2))
    turn = module.TURNS.get(orientation)
    turned = open_image(jpeg(exif=exif), "k").pixels(2)
    np.testing.assert_array_equal(
        turned, np.asarray(smaller if turn is None else smaller.transpose(turn))
    )


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_both_decoders_give_the_pixels_of_a_smaller_picture(options, monkeypatch):
    image = scene(301, 200)
    picture = open_image(jpeg(image, **options), "k")
    assert picture.scales == (8, 4, 2)
    assert open_image(jpeg(scene(300, 31)), "k").scales == (2,)
    scaled = {scale: picture.pixels(scale) for scale in picture.scales}
    monkeypatch.setattr(module, "simplejpeg", None)
    for scale, pixels in scaled.items():
        assert pixels.shape == (-(-200 // scale), -(-301 // scale), 3)
        np.testing.assert_array_equal(pixels, picture.pixels(scale))
        box = np.asarray(image.reduce(scale)).astype(int)
        apart, shifted = (np.abs(found - box).mean() for found in (pixels, np.roll(pixels, 1, 1)))
        assert apart < 0.7 * shifted, "a shift by a pixel would be seen"


@pytest.mark.parametrize("progressive", [False, True])
def test_a_file_cut_short_anywhere_is_judged_as_by_decode(decoder, progressive):
    content = jpeg(scene(40, 30), quality=60, progressive=progressive)
    cut = [content[:length] for length in range(0, len(content), 7)]
    found = [assert_as_pillow(each) for each in (*cut, content[:-2], content + b"more")]
    assert {reason for reason in found if isinstance(reason, str)} == {
        "truncated image",
        "unreadable image",
    }


def test_a_damaged_file_is_judged_as_by_decode(decoder):
    generator, clean = np.random.default_rng(0), jpeg(scene(64, 48), quality=60)
    broken = 0
    for _ in range(300):
        content = bytearray(clean)
        for place in generator.integers(2, len(clean), int(generator.integers(1, 4))):
            content[place] = generator.integers(256)
        broken += isinstance(assert_as_pillow(bytes(content)), str)
    assert 10 < broken < 290


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_a_damaged_avif_is_a_broken_image():
    content = encoded(scene(64, 48), "AVIF").replace(b"av01", b"av02")
    assert outcome(lambda: decode(content, "k")) == "unreadable image"


def test_the_size_is_checked_before_a_pixel_is_decoded(decoder, monkeypatch):
    clean = jpeg()
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    with pytest.raises(BrokenPair, match="image too large"):
        open_image(clean, "k", 9999)
    assert open_image(clean, "k").size == (150, 101), "and no pixel is decoded to open a good one"


def test_the_scale_keeps_the_views_size(tmp_path, monkeypatch):
    for number, size in enumerate(((400, 300), (60, 50), (150, 101))):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(scene(*size)))
        (tmp_path / f"{number}.txt").write_text("a picture")
    cuts, cut = [], ViewTransform.crop_and_resize

    def recorded(self, array, crop):
        cuts.append((crop, array.shape))
        return cut(self, array, crop)

    monkeypatch.setattr(ViewTransform, "crop_and_resize", recorded)
    with make_loader(open_source(tmp_path), size=32, batch_size=2, seed=1) as loader:
        for _ in range(40):
            next(loader)
    assert {50, 100, 75, 150} <= {width for _, (_, width, _) in cuts}, "scales 8, 4, 2 and 1"
    for crop, (height, width, _) in cuts:
        assert 0 <= crop.left <= crop.left + crop.width <= width
        assert 0 <= crop.top <= crop.top + crop.height <= height
        assert width in (60, 150, 400) or min(crop.width, crop.height) >= 32


@pytest.mark.parametrize("kind", ["PNG", "BMP", "JPEG"])
def test_a_file_is_opened_by_its_header_and_damage_behind_it_shows_when_it_is_decoded(kind):
    content = encoded(scene(160, 120), kind)
    whole, damaged = (open_image(some, "k") for some in (content, content[: len(content) // 2]))
    assert (whole.size, whole.pixels().shape) == ((160, 120), (120, 160, 3))
    with pytest.raises(BrokenPair):
        damaged.pixels()


def test_the_size_of_a_file_is_upright():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    lazy = open_image(encoded(scene(60, 40), "PNG", exif=exif), "k")
    assert (lazy.size, lazy.pixels().shape) == ((40, 60), (60, 40, 3))
