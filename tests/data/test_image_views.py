"""Image views against torchvision on the same parameters, and against the distributions they are drawn from."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from PIL import Image
from scipy.stats import binomtest, ks_2samp, kstest
from torch import Tensor

from declip.data.batch import Draw, Photometric
from declip.data.images import photometric
from declip.data.images.crops import ImageViews, Preprocess
from declip.errors import UserError

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
OFF = {"color_jitter_prob": 0.0, "grayscale_prob": 0.0, "blur_prob": 0.0}
OPERATIONS = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)


def views(size: int = 24, **options) -> ImageViews:
    return ImageViews(size, mean=MEAN, std=STD, **options)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A gradient of noisy colors with a dark and a light bar: smooth parts, sharp edges, no symmetry."""
    generator = np.random.default_rng(seed)
    pixels = np.linspace(40, 200, width)[None, :, None] + generator.normal(0, 8, (height, width, 3))
    pixels[:, :, 1] += np.linspace(-40, 40, height)[:, None]
    pixels[height // 4 : height // 3] = 40
    pixels[:, width // 2 : 2 * width // 3] = 215
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def colors(count: int, size: int = 24, seed: int = 0) -> Tensor:
    """(2, count, 3, size, size) uint8: noise, flat grays, primary colors and ties between channels."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (2, count, 3, size, size), dtype=np.uint8)
    images[:, 0] = 128
    images[:, 1] = 0
    images[0, 2] = generator.choice(np.array([0, 255], dtype=np.uint8), (3, size, size))
    images[1, 2, 1] = images[1, 2, 0]
    return torch.from_numpy(images)


def one_by_one(views: ImageViews, images: Tensor, drawn: Photometric) -> Tensor:
    """What torchvision makes of each sample alone."""
    out = torch.empty(images.shape)
    for row in np.ndindex(*images.shape[:2]):
        image = TF.to_dtype(images[row], torch.float32, scale=True)
        values = (drawn.brightness, drawn.contrast, drawn.saturation, drawn.hue)
        for number in drawn.order[row].tolist() if drawn.jitter[row] else []:
            image = OPERATIONS[number](image, values[number][row].item())
        if drawn.gray[row]:
            image = TF.rgb_to_grayscale(image, num_output_channels=3)
        if drawn.sigma[row] > 0:
            image = TF.gaussian_blur(image, 2 * views.blur_radius + 1, drawn.sigma[row].item())
        out[row] = TF.normalize(image, list(MEAN), list(STD))
    return out


def assert_equal_views(given: Tensor, expected: Tensor) -> None:
    """Equal to 3e-6 of the range of pixel values; torchvision's own hue is 1e-6 off in float32."""
    assert ((given - expected) * torch.tensor(STD).view(3, 1, 1)).abs().max() < 3e-6


ALONE = {
    "nothing": OFF,
    "brightness": OFF | {"jitter": (0.9, 0, 0, 0), "color_jitter_prob": 1.0},
    "contrast": OFF | {"jitter": (0, 0.9, 0, 0), "color_jitter_prob": 1.0},
    "saturation": OFF | {"jitter": (0, 0, 0.9, 0), "color_jitter_prob": 1.0},
    "hue": OFF | {"jitter": (0, 0, 0, 0.5), "color_jitter_prob": 1.0},
    "jitter": OFF | {"jitter": (0.8, 0.8, 0.8, 0.5), "color_jitter_prob": 0.8},
    "gray": OFF | {"grayscale_prob": 0.5},
    "blur": OFF | {"blur_prob": 0.7, "blur_sigma": (0.05, 3.0)},
    "all": {},
}


@pytest.mark.parametrize("options", ALONE.values(), ids=ALONE.keys())
def test_finish_equals_torchvision_on_each_sample(options, monkeypatch):
    monkeypatch.setattr(photometric, "CHUNK_BYTES", 3 * 4 * 3 * 24 * 24)  # parts of three: boundaries are met
    maker, generator = views(**options), np.random.default_rng(1)
    images = colors(40)
    drawn = Photometric.stack([[maker.draw(generator) for _ in range(40)] for _ in range(2)])
    untouched = images.clone()
    assert_equal_views(maker.finish(images, drawn), one_by_one(maker, images, drawn))
    assert torch.equal(images, untouched)


def test_every_order_of_the_jitter_occurs_and_matters():
    maker, generator = views(color_jitter_prob=1.0), np.random.default_rng(0)
    orders = [maker.draw(generator).order for _ in range(4800)]
    counts = {order: orders.count(order) for order in set(orders)}
    assert len(counts) == 24
    assert all(binomtest(count, 4800, 1 / 24).pvalue > 1e-4 for count in counts.values())
    image = colors(4)[:1, 3:]
    strong = Draw(1.6, 0.5, 1.7, 0.3, (0, 1, 2, 3), True, False, 0.0, 6)
    results = [
        maker.finish(image, Photometric.stack([[strong._replace(order=order)]]))
        for order in ((0, 1, 2, 3), (3, 2, 1, 0))
    ]
    assert (results[0] - results[1]).abs().max() > 0.1


def test_the_flip_commutes_with_the_photometric_part():
    maker, generator = views(), np.random.default_rng(2)
    images = colors(30)
    drawn = Photometric.stack([[maker.draw(generator) for _ in range(30)] for _ in range(2)])
    torch.testing.assert_close(
        maker.finish(images.flip(-1), drawn), maker.finish(images, drawn).flip(-1), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize(("size", "radius"), [(3, 2), (48, 6), (1, 0)])
def test_the_blur_kernel_reaches_three_sigma_within_the_view(size, radius):
    maker = views(size, blur_prob=1.0)
    assert maker.blur_radius == radius
    images = colors(4, size)
    generator = np.random.default_rng(0)
    drawn = Photometric.stack([[maker.draw(generator) for _ in range(4)] for _ in range(2)])
    assert_equal_views(maker.finish(images, drawn), one_by_one(maker, images, drawn))


def test_what_is_switched_off_does_no_work(monkeypatch):
    def fail(*_):
        raise AssertionError("work was done")

    monkeypatch.setattr(photometric, "JITTER", (fail,) * 4)
    monkeypatch.setattr(photometric, "gray", fail)
    monkeypatch.setattr(photometric, "blur", fail)
    images, generator = colors(8), np.random.default_rng(0)
    expected = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    for options in (OFF, OFF | {"color_jitter_prob": 1.0, "jitter": (0, 0, 0, 0)}):
        maker = views(**options)
        drawn = Photometric.stack([[maker.draw(generator) for _ in range(8)] for _ in range(2)])
        torch.testing.assert_close(maker.finish(images, drawn), expected, rtol=0, atol=1e-6)


def test_parameters_are_drawn_as_moco_draws_them():
    maker, generator = views(), np.random.default_rng(3)
    draws = [maker.draw(generator) for _ in range(4000)]
    for name, low, width in (
        ("brightness", 0.6, 0.8),
        ("contrast", 0.6, 0.8),
        ("saturation", 0.6, 0.8),
        ("hue", -0.1, 0.2),
    ):
        assert kstest([getattr(draw, name) for draw in draws], "uniform", (low, width)).pvalue > 1e-3
    assert kstest([draw.sigma for draw in draws if draw.sigma], "uniform", (0.1, 1.9)).pvalue > 1e-3
    for share, count in (
        (0.8, sum(draw.jitter for draw in draws)),
        (0.2, sum(draw.gray for draw in draws)),
        (0.5, sum(draw.sigma > 0 for draw in draws)),
    ):
        assert binomtest(count, 4000, share).pvalue > 1e-3


def test_one_option_leaves_the_draws_of_the_others_alone():
    plain, other = (
        maker.draw(np.random.default_rng(7))
        for maker in (views(), views(jitter=(0.4, 0, 0.4, 0.1), blur_prob=0.0, grayscale_prob=1.0))
    )
    assert (other.contrast, other.sigma, other.gray) == (1.0, 0.0, True)
    assert (plain.brightness, plain.saturation, plain.hue, plain.order, plain.jitter) == (
        other.brightness,
        other.saturation,
        other.hue,
        other.order,
        other.jitter,
    )


@pytest.mark.parametrize("shape", [(60, 40), (17, 90), (5, 5), (300, 200)])
def test_crop_equals_torchvision_on_the_same_box(shape):
    image, flips = picture(*shape), []
    cubic = T.InterpolationMode.BICUBIC
    for seed in range(20):
        maker = views(32, hflip_prob=0.5)
        left, top, width, height = maker.box(*image.size, np.random.default_rng(seed))
        exact = TF.resized_crop(TF.pil_to_tensor(image), top, left, height, width, [32, 32], cubic).numpy()
        pillow = TF.pil_to_tensor(TF.resized_crop(image, top, left, height, width, [32, 32], cubic)).numpy()
        cropped = maker.crop(image, np.random.default_rng(seed))
        assert (cropped.shape, cropped.dtype) == ((3, 32, 32), np.uint8)
        flips.append(not np.array_equal(cropped, exact))
        unflipped = cropped[:, :, ::-1] if flips[-1] else cropped
        assert np.array_equal(unflipped, exact)
        # Both round to uint8 between their two passes, in another order: a level or two apart.
        difference = np.abs(unflipped.astype(int) - pillow)
        assert difference.max() <= 2
        assert difference.mean() < 0.25
        assert np.array_equal(maker.crop(np.asarray(image), np.random.default_rng(seed)), cropped)
    assert 0 < sum(flips) < 20


@pytest.mark.parametrize("shape", [(64, 64), (100, 40), (30, 90)])
def test_boxes_are_distributed_as_torchvisions(shape):
    width, height = shape
    maker, generator = views(), np.random.default_rng(11)
    ours = np.array([maker.box(width, height, generator) for _ in range(3000)])
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    crop = T.RandomResizedCrop(8, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3))
    theirs = [crop.make_params([image]) for _ in range(3000)]
    theirs = np.array([[p[key] for key in ("left", "top", "width", "height")] for p in theirs])
    for measure in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 2] / box[:, 3],
        lambda box: box[:, 0],
        lambda box: box[:, 1],
        lambda box: box[:, 0] - box[:, 1],
    ):
        assert ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3
    left, top, wide, high = ours.T
    assert min(left.min(), top.min()) == 0
    assert ((left + wide) <= width).all()
    assert ((top + high) <= height).all()
    areas = wide * high / (width * height)
    assert 0.18 < areas.min() < 0.25
    assert (wide / high > 0.7).all()
    assert (wide / high < 1.4).all()


@pytest.mark.parametrize(
    ("shape", "box"),
    [((400, 10), (193, 0, 13, 10)), ((10, 400), (0, 193, 10, 13)), ((1, 50), (0, 24, 1, 1))],
)
def test_a_picture_too_long_for_any_box_gives_its_middle(shape, box):
    maker = views(scale=(0.9, 1.0))
    assert maker.box(*shape, np.random.default_rng(0)) == box


@pytest.mark.parametrize("shape", [(50, 70), (70, 50), (64, 64), (31, 200), (500, 333), (9, 8), (32, 35)])
def test_preprocess_equals_clips(shape):
    image = picture(*shape)
    clip = T.Compose(
        [
            T.Resize(32, T.InterpolationMode.BICUBIC),
            T.CenterCrop(32),
            T.PILToTensor(),
            T.ToDtype(torch.float32, scale=True),
            T.Normalize(MEAN, STD),
        ]
    )
    prepared = Preprocess(32, MEAN, STD)([image, image])
    assert prepared.shape == (2, 3, 32, 32)
    torch.testing.assert_close(prepared, torch.stack([clip(image)] * 2), rtol=0, atol=1e-6)


def test_preprocess_takes_any_mode_any_shape_and_one_picture():
    white = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    prepare = Preprocess(16, MEAN, STD)
    clear = Image.new("RGBA", (20, 30), (0, 0, 0, 0))
    for image in (clear, Image.new("L", (20, 20), 255), Image.new("P", (1, 30_000), (255, 255, 255))):
        prepared = prepare(image)
        assert prepared.shape == (1, 3, 16, 16)
        torch.testing.assert_close(prepared, white.view(1, 3, 1, 1).expand(1, 3, 16, 16))
    assert prepare([]).shape == (0, 3, 16, 16)


def test_a_thin_line_is_not_blown_up_before_it_is_cut(monkeypatch):
    sizes, resize = [], Image.Image.resize

    def spy(image, size, *arguments):
        sizes.append(size)
        return resize(image, size, *arguments)

    monkeypatch.setattr(Image.Image, "resize", spy)
    line = Image.new("RGB", (30_001, 3))
    line.paste((255, 255, 255), (14_990, 0, 15_010, 3))
    prepared = Preprocess(16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))(line)
    assert sizes == [(160, 16)]
    torch.testing.assert_close(prepared, torch.ones(1, 3, 16, 16))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scale": (0.0, 1.0)}, r"scale is \[0.0, 1.0\]; it must be two numbers, above 0 and at most 1"),
        ({"scale": (0.5, 0.2)}, "the smaller one first"),
        ({"ratio": (0.75,)}, "ratio"),
        ({"ratio": (0.75, float("inf"))}, "ratio"),
        ({"jitter": (0.4, 0.4, 0.4)}, "four strengths"),
        ({"jitter": (0.4, -1, 0.4, 0.1)}, "jitter for contrast is -1; it must be 0 or more"),
        ({"jitter": (0.4, 0.4, 0.4, 0.6)}, "jitter for hue is 0.6; it must be between 0 and 0.5"),
        ({"grayscale_prob": 1.2}, "grayscale_prob is 1.2; it must be between 0 and 1"),
        ({"hflip_prob": float("nan")}, "hflip_prob is nan"),
        ({"blur_sigma": (0.0, 2.0)}, "blur_sigma"),
        ({"size": 0}, "size is 0"),
        ({"size": 100_000}, "size is 100000; it must be between 1 and 4096"),
        ({"std": (0.2, 0.0, 0.2)}, "std is 0.0"),
        ({"mean": (0.5, 0.5)}, "mean is .* three numbers"),
    ],
)
def test_options_out_of_range_are_refused(options, says):
    with pytest.raises(UserError, match=says):
        ImageViews(**({"size": 24, "mean": MEAN, "std": STD} | options))
