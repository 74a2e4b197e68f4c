"""Formats, modes and damage; pictures that are decoded late have the same pixels and reasons."""

import json
import warnings
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageOps

from conftest import encoded
from data.fakes import jpeg, make_loader, scene, write_tar
from data.test_loader import assert_same
from declip.data.images import decode as module
from declip.data.images.decode import LazyJpeg, apply_exif, decode, open_image, opened
from declip.data.images.views import ViewTransform
from declip.data.pair import BrokenPair, PairSource
from declip.data.sources.open import open_source
from declip.data.sources.subset import Joined, take


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
        with opened(content.getvalue(), "large.png") as (image, _):
            assert image.size == (10_000, 10_000)


SIZE = (150, 101)
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(params=["simplejpeg", "pillow"])
def decoder(request, monkeypatch):
    """Run with each decoder."""
    if request.param == "pillow":
        monkeypatch.setattr(module, "simplejpeg", None)
    elif module.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")
    return request.param


def outcome(read):
    """The pixels, or why there are none."""
    try:
        return np.asarray(read())
    except BrokenPair as broken:
        return broken.reason


def by_pillow(content):
    with opened(content, "k") as (image, _):
        return apply_exif(image)


def assert_as_pillow(content):
    ours, expected = outcome(lambda: open_image(content, "k").pixels()), outcome(lambda: by_pillow(content))
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
    for size in ((1, 1), (7, 5), (33, 16), SIZE):
        content = jpeg(scene(*size), **options)
        picture = open_image(content, "k")
        assert isinstance(picture, LazyJpeg)
        assert picture.size == size
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


@pytest.mark.parametrize("orientation", range(11))
def test_exif_turns_size_pixels_and_smaller_pixels(decoder, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = jpeg(exif=exif)
    picture, expected = open_image(content, "k"), by_pillow(content)
    assert picture.size == expected.size
    np.testing.assert_array_equal(picture.pixels(), np.asarray(expected))
    upright = Image.fromarray(open_image(jpeg(), "k").pixels(2))
    turn = module.TURNS.get(orientation)
    np.testing.assert_array_equal(picture.pixels(2), np.asarray(upright if turn is None else upright.transpose(turn)))


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
    found = [assert_as_pillow(content[:length]) for length in range(0, len(content), 7)]
    assert {reason for reason in found if isinstance(reason, str)} == {"truncated image", "unreadable image"}
    assert_as_pillow(content[:-2])
    assert_as_pillow(content + b"more")


def test_a_damaged_file_is_judged_as_by_decode(decoder):
    generator = np.random.default_rng(0)
    clean = jpeg(scene(64, 48), quality=60)
    seen = []
    for _ in range(300):
        content = bytearray(clean)
        for place in generator.integers(2, len(clean), int(generator.integers(1, 4))):
            content[place] = generator.integers(256)
        seen.append(isinstance(assert_as_pillow(bytes(content)), str))
    assert 10 < sum(seen) < 290


def test_the_size_is_checked_before_a_pixel_is_decoded(decoder, monkeypatch):
    clean = jpeg()
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    huge = bytearray(clean)
    at = huge.index(b"\xff\xc0")
    huge[at + 5 : at + 9] = b"\xff\xdc\xff\xdc"  # 65,500 x 65,500
    for read in (lambda: open_image(bytes(huge), "k"), lambda: open_image(clean, "k", 9999)):
        with pytest.raises(BrokenPair) as caught:
            read()
        assert caught.value.reason == "image too large"
    assert open_image(clean, "k").size == SIZE, "and no pixel is decoded to open a good one"


@pytest.fixture
def sources(tmp_path):
    """The same three pairs as a folder, a table and a shard; the picture of the last is cut short."""
    contents = [jpeg(scene(400, 300, 1)), jpeg(scene(60, 50, 2)), jpeg()[:-400]]
    (tmp_path / "folder").mkdir()
    members = []
    for number, file in enumerate(contents):
        (tmp_path / f"folder/{number}.jpg").write_bytes(file)
        (tmp_path / f"folder/{number}.txt").write_text(f"picture {number}")
        said = {"caption": f"picture {number}"}
        members += [(f"{number}.jpg", file), (f"{number}.json", json.dumps(said).encode())]
    rows = [{"image": f"folder/{number}.jpg", "caption": f"picture {number}"} for number in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_tar(tmp_path / "shards/0.tar", members)
    found = [open_source(tmp_path / name) for name in ("folder", "rows.jsonl", "shards")]
    return [*found, take(found[0], 3, 0), Joined([found[1], found[2], found[2]])]


class Decoded(PairSource):
    """A source with the methods that every one needs; every image is decoded."""

    def __init__(self, source):
        self.source, self.name = source, source.name

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.source[index]


def batches(source, size, count=12, **options):
    options = {"batch_size": 2, "seed": 1, "max_broken_fraction": 1.0, **options}
    with make_loader(source, size=size, **options) as loader:
        return [next(loader) for _ in range(count)], loader.skipped


def test_batches_are_those_of_decoded_pictures_where_nothing_is_scaled(sources, decoder, monkeypatch):
    for source in sources:
        for size, scales in ((152, module.SCALES), (32, ())):
            monkeypatch.setattr(module, "SCALES", scales)
            (ours, skipped), (expected, also) = (batches(s, size, 6) for s in (source, Decoded(source)))
            assert skipped == also
            assert set(skipped.counts) == {"truncated image"}
            assert_same(ours, expected)


def test_the_scale_keeps_the_views_size(sources, monkeypatch):
    scales, cuts = [], []
    pixels, cut = LazyJpeg.pixels, ViewTransform.crop_and_resize
    monkeypatch.setattr(LazyJpeg, "pixels", lambda self, scale=1: scales.append(scale) or pixels(self, scale))
    monkeypatch.setattr(
        ViewTransform,
        "crop_and_resize",
        lambda self, array, crop: cuts.append((crop, array.shape)) or cut(self, array, crop),
    )
    batches(sources[0], 32, count=40)
    assert set(scales) == {1, 2, 4, 8}
    assert len(cuts) > 60
    for crop, (height, width, _) in cuts:
        assert 0 <= crop.left <= crop.left + crop.width <= width
        assert 0 <= crop.top <= crop.top + crop.height <= height
        assert width in (60, 150, 400) or min(crop.width, crop.height) >= 32
