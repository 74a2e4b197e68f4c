"""Kinds of captions, and images that look alike."""

from functools import partial
from itertools import combinations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from conftest import COLORS, SHAPES, draw, encoded, texture
from declip.data.images.decode import decode
from declip.inspection.reading import (
    COARSE_BITS,
    FINE_BITS,
    KINDS,
    LOOK,
    TINT,
    across,
    caption_hash,
    components,
    image_hash,
    kind_of,
    look,
    near_groups,
)


@pytest.mark.parametrize(
    ("kind", "captions"),
    [
        ("file name", ["IMG_1234.jpg", "DSC 0042"]),
        ("web address", ["https://example.org/a?b=c"]),
        (
            "number or date",
            ["2021-03-04", "4.3.2021 12:30", "12 March 2021", "12345", "3.5 %", "...", "❤"],
        ),
        ("one word", ["cat"]),
        (
            "not in English",
            ["ein roter Kreis", "Der Hund", "un chat dans la maison", "una casa", "een hond"],
        ),
        ("not in Latin script", ["кошка", "белая кошка, 3", "猫の写真"]),
        (None, ["un café", "Andes mountains", "кошка the cat", "a cat", "photo of 3 cats"]),
        (None, ["a picture, see https://example.org", "image editor", "may 5 cats sit here"]),
    ],
)
def test_kinds_of_captions(kind, captions):
    names = [*KINDS, None]  # the number of none is -1
    assert {names[kind_of(caption)] for caption in captions} == {kind}


photo = partial(texture, side=256)


def compressed(image, quality):
    return decode(encoded(image, "JPEG", quality=quality), "k")


def groups_of(images):
    return near_groups(np.array([look(image) for image in images], LOOK)).tolist()


def test_hashes_tell_images_and_captions_apart():
    other = photo(0)
    assert image_hash(other) == image_hash(photo(0))
    other.putpixel((3, 3), (1, 2, 3))
    assert image_hash(other) != image_hash(photo(0))
    assert image_hash(Image.new("RGB", (2, 8))) != image_hash(Image.new("RGB", (8, 2)))
    assert caption_hash("A  Cat &amp; dog") == caption_hash("a cat & dog")
    assert caption_hash("a cat") != caption_hash("a cat.")


def test_copies_look_alike_and_other_images_do_not():
    originals = [photo(seed) for seed in range(30)]
    halves = [image.resize((128, 128)) for image in originals]
    copies = [compressed(image.resize((200, 200)), 60) for image in originals]
    groups = groups_of([*originals, *halves, *copies])
    assert groups[:30] == groups[30:60] == groups[60:]
    assert len(set(groups)) == 30


def test_color_shape_and_a_small_sign_tell_drawings_apart():
    groups = groups_of([draw(color, shape) for color in COLORS for shape in SHAPES])
    assert len(set(groups)) == len(groups)

    def sign(box):
        image = Image.new("RGB", (64, 64), "white")
        pen = ImageDraw.Draw(image)
        pen.ellipse((2, 2, 62, 62), fill="black")
        pen.rectangle((16, 29, 48, 35), fill="white")
        pen.rectangle(box, fill="white")
        return image

    minus, plus = sign((16, 29, 48, 35)), sign((29, 16, 35, 48))
    assert len(set(groups_of([minus, plus, minus.resize((48, 48))]))) == 2


def bits(looks, name, i, j):
    words = np.bitwise_xor(looks[name][i], looks[name][j])
    return sum(int(word).bit_count() for word in words)


def test_near_groups_are_those_of_comparing_all_with_all(generator):
    looks = np.zeros(300, LOOK)
    centers = generator.integers(0, 2**64, (60, 10), dtype=np.uint64)
    for n in range(len(looks)):
        words = centers[n % 60].copy()
        for name, first, flips in (("coarse", 0, 5), ("fine", 2, 20)):
            for bit in generator.integers(
                0, 64 * (2 if name == "coarse" else 8), generator.integers(0, flips)
            ):
                words[first + bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
        looks["coarse"][n], looks["fine"][n] = words[:2], words[2:]
        looks["tint"][n] = 100 + generator.integers(0, 20, 3)
    tints = looks["tint"].astype(int)

    def is_near(i, j):
        coarse, fine = (bits(looks, name, i, j) for name in ("coarse", "fine"))
        tint = abs(tints[i] - tints[j]).max()
        return coarse <= COARSE_BITS and fine <= FINE_BITS and tint <= TINT

    near = [pair for pair in combinations(range(len(looks)), 2) if is_near(*pair)]
    assert 200 < len(near) < 600
    expected, found = components(len(looks), np.array(near).T), near_groups(looks)
    count = expected.max() + 1
    assert 70 < count < 250
    assert len(np.unique(np.stack([found, expected]), axis=1).T) == count == found.max() + 1


def test_one_image_many_blank_ones_and_thousands_that_nearly_look_alike(generator):
    assert near_groups(np.zeros(1, LOOK)).tolist() == [0]
    looks = np.zeros(5000, LOOK)
    assert set(near_groups(looks).tolist()) == {0}
    looks["fine"][:, 0] = generator.integers(0, 2**12, len(looks))
    looks["coarse"][:, 1] = generator.integers(0, 2**3, len(looks))
    assert set(near_groups(looks).tolist()) == {0}


def test_images_of_another_set_are_found():
    mine, theirs = (
        np.array([(look(image),) for image in images], [("look", LOOK)])
        for images in (
            [photo(0), photo(1), photo(2)],
            [compressed(photo(1), 70), photo(9), photo(2)],
        )
    )
    assert across(mine, theirs).tolist() == [False, True, True]
