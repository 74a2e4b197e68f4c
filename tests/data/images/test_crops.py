"""Training views against torchvision on the same parameters, and against the distributions that they sample."""

import io

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from PIL import Image
from scipy.stats import binomtest, ks_2samp, kstest

from conftest import encoded, texture
from data.fakes import scene
from declip.data.batch import View, unpack_photometric
from declip.data.images import views
from declip.data.images.decode import decode, open_image
from declip.data.images.preprocess import Preprocess
from declip.data.images.views import ViewTransform, apply_photometric
from declip.recipe.schema import ImageView

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
OFF = {"color_jitter_prob": 0.0, "grayscale_prob": 0.0, "blur_prob": 0.0}
OPERATIONS = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)


def transform(size=24, **options):
    return ViewTransform("first", size, ImageView(**options))


def sampled(maker, count, generator):
    return torch.tensor([maker.sample_params(generator) for _ in range(count)])


def applied(images, params):
    return apply_photometric(
        {"first": View(images, params)}, torch.tensor(MEAN), torch.tensor(STD)
    )["first"].pixels


def colors(count, size=24, seed=0):
    """(count, 3, size, size) uint8: noise, flat grays, primary colors and ties between channels."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    images[0], images[1] = 128, 0
    images[2] = generator.choice(np.array([0, 255], dtype=np.uint8), (3, size, size))
    images[3, 1] = images[3, 0]
    return torch.from_numpy(images)


def one_by_one(images, params):
    """The same views, each sample alone through torchvision."""
    out = torch.empty(images.shape)
    params = unpack_photometric(params)
    for row in range(len(images)):
        image = TF.to_dtype(images[row], torch.float32, scale=True)
        for number in params.order[row].tolist() if params.jitter[row] else []:
            image = OPERATIONS[number](image, params.factors[row, number].item())
        if params.gray[row]:
            image = TF.rgb_to_grayscale(image, num_output_channels=3)
        if params.sigma[row] > 0:
            image = TF.gaussian_blur(image, 2 * views.BLUR_RADIUS + 1, params.sigma[row].item())
        out[row] = TF.normalize(image, list(MEAN), list(STD))
    return out


def assert_equal_views(given, expected):
    """Equal to 3e-6 of the range of pixel values; torchvision's own hue is 1e-6 off in float32."""
    assert ((given - expected) * torch.tensor(STD).view(3, 1, 1)).abs().max() < 3e-6


ALONE = {
    "nothing": OFF,
    "brightness": OFF | {"color_jitter": (0.9, 0, 0, 0), "color_jitter_prob": 1.0},
    "contrast": OFF | {"color_jitter": (0, 0.9, 0, 0), "color_jitter_prob": 1.0},
    "saturation": OFF | {"color_jitter": (0, 0, 0.9, 0), "color_jitter_prob": 1.0},
    "hue": OFF | {"color_jitter": (0, 0, 0, 0.5), "color_jitter_prob": 1.0},
    "jitter": OFF | {"color_jitter": (0.8, 0.8, 0.8, 0.5), "color_jitter_prob": 0.8},
    "gray": OFF | {"grayscale_prob": 0.5},
    "blur": OFF | {"blur_prob": 0.7},
    "all": {},
}


@pytest.mark.parametrize("options", ALONE.values(), ids=ALONE.keys())
def test_photometric_equals_torchvision_on_each_sample(options, monkeypatch):
    # Chunks of three: boundaries are met
    monkeypatch.setattr(views, "CHUNK_BYTES", 3 * 4 * 3 * 24 * 24)
    maker, images = transform(**options), colors(80)
    params, untouched = sampled(maker, 80, np.random.default_rng(1)), images.clone()
    assert_equal_views(applied(images, params), one_by_one(images, params))
    assert torch.equal(images, untouched)


def test_every_order_of_the_jitter_occurs():
    maker, generator = transform(color_jitter_prob=1.0), np.random.default_rng(0)
    orders = [tuple(maker.sample_params(generator)[4:8]) for _ in range(4800)]
    counts = {order: orders.count(order) for order in set(orders)}
    assert len(counts) == 24
    assert all(binomtest(count, 4800, 1 / 24).pvalue > 1e-4 for count in counts.values())


def test_views_of_any_size_go_together():
    generator = np.random.default_rng(0)
    makers = [transform(size, blur_prob=1.0) for size in (16, 48, 17)]
    given = {
        str(maker.size): View(colors(8, maker.size), sampled(maker, 8, generator))
        for maker in makers
    }
    done = View(torch.zeros(8, 3, 8, 8))
    finished = apply_photometric({**given, "done": done}, torch.tensor(MEAN), torch.tensor(STD))
    assert finished["done"] is done
    for name, view in given.items():
        assert_equal_views(finished[name].pixels, one_by_one(view.pixels, view.photometric))


def test_parameters_are_sampled_as_moco_samples_them():
    params = unpack_photometric(sampled(transform(), 4000, np.random.default_rng(3)))
    *factors, hue = params.factors.T
    expected = [(factor, (0.6, 0.8)) for factor in factors]
    expected += [(hue, (-0.1, 0.2)), (params.sigma[params.sigma > 0], (0.1, 1.9))]
    for values, limits in expected:
        assert kstest(values, "uniform", limits).pvalue > 1e-3
    for probability, chosen in ((0.8, params.jitter), (0.2, params.gray), (0.5, params.sigma > 0)):
        assert binomtest(int(chosen.sum()), 4000, probability).pvalue > 1e-3


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(60, 40), (17, 90), (5, 5), (300, 200)])
def test_crop_equals_torchvision_on_the_same_box(shape, mode):
    image, flips = scene(*shape), []
    how, maker = (
        T.InterpolationMode(mode),
        ViewTransform("first", 32, ImageView(hflip_prob=0.5), mode),
    )
    for seed in range(20):
        crop = maker.sample_crop(*image.size, np.random.default_rng(seed))
        box = (crop.top, crop.left, crop.height, crop.width)
        view = maker.crop_and_resize(np.asarray(image), crop)
        flips.append(crop.flip)
        unflipped = view.flip(-1) if crop.flip else view
        assert torch.equal(unflipped, TF.resized_crop(TF.pil_to_tensor(image), *box, [32, 32], how))
        # Pillow rounds to uint8 between its two passes in another order: a level or two apart.
        pillow = TF.pil_to_tensor(TF.resized_crop(image, *box, [32, 32], how))
        difference = (unflipped.int() - pillow.int()).abs().float()
        assert (difference.max() <= 2, difference.mean() < 0.25) == (True, True)
    assert 0 < sum(flips) < 20


@pytest.mark.parametrize("shape", [(64, 64), (100, 40), (30, 90)])
def test_boxes_are_distributed_as_torchvisions(shape):
    width, height = shape
    maker, generator = transform(), np.random.default_rng(11)
    ours = np.array([maker.box(width, height, generator) for _ in range(3000)])
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    crop = T.RandomResizedCrop(8, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3))
    theirs = [crop.make_params([image]) for _ in range(3000)]
    theirs = np.array([[p[key] for key in ("left", "top", "width", "height")] for p in theirs])
    measures = (
        (left, top, wide * high, wide / high, left - top)
        for left, top, wide, high in (ours.T, theirs.T)
    )
    assert all(ks_2samp(one, other).pvalue > 1e-3 for one, other in zip(*measures, strict=True))
    left, top, wide, high = ours.T
    assert min(left.min(), top.min()) == 0
    assert ((left + wide <= width) & (top + high <= height)).all()
    assert 0.18 < (wide * high).min() / (width * height) < 0.25
    assert ((wide / high > 0.7) & (wide / high < 1.4)).all()


def test_a_picture_too_long_for_any_box_gives_its_middle():
    maker = transform(scale=(0.9, 1.0))
    boxes = [
        maker.box(*shape, np.random.default_rng(0)) for shape in ((400, 10), (10, 400), (1, 50))
    ]
    assert boxes == [(193, 0, 13, 10), (0, 193, 10, 13), (0, 24, 1, 1)]


@pytest.mark.parametrize(("resize", "mode"), [(None, "bicubic"), (37, "bilinear")])
@pytest.mark.parametrize(
    "shape", [(50, 70), (70, 50), (64, 64), (31, 200), (500, 333), (9, 8), (32, 35)]
)
def test_preprocess_equals_torchvisions(shape, resize, mode):
    image = scene(*shape)
    crop = [T.Resize(resize or 32, T.InterpolationMode(mode)), T.CenterCrop(32), T.PILToTensor()]
    expected = T.Compose([*crop, T.ToDtype(torch.float32, scale=True), T.Normalize(MEAN, STD)])
    prepared = Preprocess(32, MEAN, STD, mode, resize=resize)([image, image])
    torch.testing.assert_close(prepared, torch.stack([expected(image)] * 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("resize", [64, 73])
@pytest.mark.parametrize("shape", [(41, 887), (887, 42), (3000, 130)])
def test_long_images_differ_little_from_clips(shape, resize):
    # Noise would differ by up to 20 levels in one pixel of a hundred: Pillow rounds and clips between its two passes,
    # and since version 13 their order depends on the size of what is cut out.
    image = scene(*shape)
    clip = np.asarray(
        T.Compose([T.Resize(resize, T.InterpolationMode.BICUBIC), T.CenterCrop(64)])(image)
    )
    found = (
        Preprocess(64, (0, 0, 0), (1, 1, 1), resize=resize)(image)[0].permute(1, 2, 0).numpy() * 255
    )
    inner = slice(3, -3)  # pixels outside the crop are outside the filter too
    np.testing.assert_allclose(found[inner, inner], clip[inner, inner], atol=2.01)


@pytest.mark.parametrize("options", [{}, {"transparency": (9, 9, 9)}])
def test_preprocess_takes_a_photograph_as_it_was_opened(options):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 9, (40, 60, 3), dtype=np.uint8)
    pixels[:20] = 9
    content = encoded(Image.fromarray(pixels), "PNG", exif=exif, **options)
    prepare = Preprocess(32, MEAN, STD)
    upright = decode(content, "k")
    assert torch.equal(prepare(Image.open(io.BytesIO(content))), prepare(upright))
    assert decode(upright, "k").tobytes() == upright.tobytes(), "not turned again"


def test_preprocess_takes_any_mode_any_shape_and_one_image(monkeypatch):
    sizes, resize = [], Image.Image.resize
    resized = lambda image, size, *how: sizes.append(size) or resize(image, size, *how)  # noqa: E731
    monkeypatch.setattr(Image.Image, "resize", resized)
    white = ((1 - torch.tensor(MEAN)) / torch.tensor(STD)).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    prepare = Preprocess(16, MEAN, STD)
    line = Image.new("RGB", (30_001, 3))
    line.paste((255, 255, 255), (14_990, 0, 15_010, 3))
    clear = Image.new("RGBA", (20, 30), (0, 0, 0, 0))
    for image in (
        clear,
        Image.new("L", (20, 20), 255),
        Image.new("P", (1, 30_000), (255, 255, 255)),
        line,
    ):
        torch.testing.assert_close(prepare(image), white)
    assert sizes[-1] == (16, 16), "a thin line is not blown up before it is cropped"
    assert prepare([]).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("size", [(150, 110), (40, 33), (20, 31), (32, 32), (900, 30)])
@pytest.mark.parametrize(
    "options", [{}, {"squash": True}, {"interpolation": "bilinear"}, {"resize": 37}]
)
def test_pixels_are_pillows_to_a_level_or_two(size, options):
    image, preprocess = texture(0).resize(size, 3), Preprocess(32, [0.5] * 3, [0.25] * 3, **options)
    own = preprocess.fast(open_image(encoded(image, "PNG"), "x"))
    assert (own.shape, str(own.dtype)) == ((3, 32, 32), "torch.uint8")
    difference = (preprocess.normalize(own[None]) - preprocess(image)).abs() * 0.25 * 255
    assert float(difference.max()) < 3.5
    assert float(difference.mean()) < 0.6


@pytest.mark.parametrize(("resize", "scale"), [(32, 4), (60, 4), (61, 2)])
def test_a_large_jpeg_is_decoded_smaller(resize, scale):
    """Of 480 pixels 120 are left: enough for a resize to 60, not to 61."""
    image = open_image(encoded(texture(0).resize((640, 480), 3), "JPEG", quality=95), "x")
    preprocess, decoded, pixels = Preprocess(32, [0] * 3, [1] * 3, resize=resize), [], image.pixels
    image.pixels = lambda scale=1: decoded.append(scale) or pixels(scale)
    own = preprocess.fast(image)
    assert decoded == [scale]
    difference = (
        preprocess.normalize(own[None]) - preprocess(Image.fromarray(pixels()))
    ).abs() * 255
    assert float(difference.mean()) < 2
