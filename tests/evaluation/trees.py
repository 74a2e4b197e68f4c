"""Tiny data sets in their real layouts: real folders, file names and formats; an image's color tells its label."""

import hashlib
import json
import pickle

import numpy as np
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

SHADES = 20
TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
"""CIFAR-10's classes."""


def color(label):
    """The color of a class's images: labels in steps that JPEG keeps apart."""
    return (SHADES * (label % 10), SHADES * (label // 10 % 10), SHADES * (label // 100))


def label_of(image):
    """The label that an image's color tells."""
    red, green, blue = (
        round(value / SHADES) for value in np.asarray(image, np.float64).mean((0, 1))
    )
    return red + 10 * green + 100 * blue


def labels_of(source):
    """The labels of a source, which its images tell too."""
    labels = source.columns["label"].tolist()
    assert [label_of(source[row].open().decoded()) for row in range(len(source))] == labels
    return labels


def paint(path, label):
    """Write an image of a class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), color(label)).save(path, "JPEG", quality=100, subsampling=0)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def pets(root):
    """Three breeds; the test has 3, 1 and 2 images of them."""
    base = root / "oxford-iiit-pet"
    lists = {
        "trainval": ["Abyssinian_100 1 1 1", "american_bulldog_7 2 2 1", "great_pyrenees_1 3 2 2"],
        "test": [
            "great_pyrenees_9 3 2 2", "Abyssinian_201 1 1 1", "Abyssinian_202 1 1 1", "Abyssinian_203 1 1 1",
            "american_bulldog_203 2 2 1", "great_pyrenees_10 3 2 2",
        ],
    }  # fmt: skip
    for name, lines in lists.items():
        write(base / "annotations" / f"{name}.txt", "".join(f"{line}\n" for line in lines))
        for line in lines:
            image, label, *_ = line.split()
            paint(base / "images" / f"{image}.jpg", int(label) - 1)


def flowers102(root, patch):
    """Images 1 to 6 of the classes 77, 1, 93, 60, 102, 16, as imagelabels.mat numbers them."""
    base, labels = root / "flowers-102", np.array([77, 1, 93, 60, 102, 16])
    base.mkdir(parents=True)
    for number, label in enumerate(labels, 1):
        paint(base / "jpg" / f"image_{number:05d}.jpg", int(label) - 1)
    savemat(base / "imagelabels.mat", {"labels": labels[None]})
    savemat(
        base / "setid.mat",
        {"trnid": np.array([[2, 4]]), "valid": np.array([[1, 6]]), "tstid": np.array([[5, 3]])},
    )
    known = {
        key: (name, md5(base / name))
        for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat"))
    }
    patch.setattr(datasets.Flowers102, "_file_dict", datasets.Flowers102._file_dict | known)


CARS = (
    "AM General Hummer SUV 2000",
    "Ram C/V Cargo Van Minivan 2012",
    "smart fortwo Convertible 2012",
)


def cars(root):
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array([CARS], dtype=object)})
    kind = [(each, object) for each in ("bbox_x1", "class", "fname")]
    for file, folder, classes in (
        (base / "devkit" / "cars_train_annos.mat", "cars_train", (3, 1)),
        (base / "cars_test_annos_withlabels.mat", "cars_test", (2, 3, 1)),
    ):
        rows = np.empty((1, len(classes)), dtype=kind)
        for place, label in enumerate(classes):
            rows[0, place] = (1, label, f"{place + 1:05d}.jpg")
            paint(base / folder / f"{place + 1:05d}.jpg", label - 1)
        savemat(file, {"annotations": rows})


AIRCRAFT = ("707-320", "C-130", "F-16A/B", "F/A-18")


def aircraft(root):
    base = root / "fgvc-aircraft-2013b" / "data"
    write(base / "variants.txt", "".join(f"{name}\n" for name in AIRCRAFT))
    for split, labels in (("train", (0, 3)), ("val", (1,)), ("test", (2, 0, 3))):
        for label in labels:
            paint(base / "images" / f"{split}{label}.jpg", label)
        write(
            base / f"images_variant_{split}.txt",
            "".join(f"{split}{each} {AIRCRAFT[each]}\n" for each in labels),
        )


def food101(root):
    """The lists name the classes in another order than the alphabet's."""
    base = root / "food-101"
    names = ("apple_pie", "creme_brulee", "waffles")
    for split in ("train", "test"):
        write(
            base / "meta" / f"{split}.json",
            json.dumps({name: [f"{name}/{split}"] for name in names[::-1]}),
        )
        for label, name in enumerate(names):
            paint(base / "images" / name / f"{split}.jpg", label)


def dtd(root):
    base = root / "dtd" / "dtd"
    names = ("banded", "polka-dotted", "zigzagged")
    for number, split in enumerate(("train", "val", "test")):
        write(
            base / "labels" / f"{split}1.txt",
            "".join(f"{name}/{name}_000{number}.jpg\n" for name in names[::-1]),
        )
        for label, name in enumerate(names):
            paint(base / "images" / name / f"{name}_000{number}.jpg", label)


def cifar(root, patch, kind, classes, count=4):
    """Batches of `count` images each, of the classes in turn from the last one down."""
    base = root / kind.base_folder
    base.mkdir(parents=True)
    key = "labels" if kind is datasets.CIFAR10 else "fine_labels"
    for lists in ("train_list", "test_list"):
        files = []
        for number, (name, _) in enumerate(getattr(kind, lists)):
            labels = [(len(classes) - 1 - row - number) % len(classes) for row in range(count)]
            pixels = np.array([color(label) for label in labels], dtype=np.uint8)
            data = np.repeat(pixels, 32 * 32, axis=1)  # (n, 3072): all red, all green, all blue
            (base / name).write_bytes(pickle.dumps({"data": data, key: labels}, protocol=2))
            files.append([name, md5(base / name)])
        patch.setattr(kind, lists, files)
    meta = base / kind.meta["filename"]
    meta.write_bytes(pickle.dumps({kind.meta["key"]: classes}, protocol=2))
    patch.setattr(kind, "meta", {**kind.meta, "md5": md5(meta)})
