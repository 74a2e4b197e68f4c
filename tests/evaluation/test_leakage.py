"""Columns whose equal values mark images of one object."""

import numpy as np
import pytest
import torch

from declip.evaluation.leakage import leaking_column

OBJECTS, VIEWS = 30, 4


class Table:
    """A source with columns that are not read."""

    def __init__(self, **columns):
        self.numbers = {name: np.array(cells) for name, cells in columns.items()}

    def other_columns(self):
        return self.numbers


def found(table, noise=0.3, groups=None, classes=0):
    rng = torch.Generator().manual_seed(0)
    objects = torch.randn(OBJECTS, 16, generator=rng).repeat_interleave(VIEWS, dim=0)
    images = objects + noise * torch.randn(objects.shape, generator=rng) + 5
    groups = np.arange(len(images)) if groups is None else groups
    return leaking_column(table, range(len(images)), images, groups, classes)


PRODUCT = np.arange(OBJECTS * VIEWS) // VIEWS + 1


def test_views_of_one_object_are_found():
    brand = PRODUCT % 29 + 1  # two products of one brand, and one of each other
    assert found(Table(brand=brand, product=PRODUCT)) == "product", "the finest of several columns"
    assert found(Table(product=PRODUCT), noise=0.8) == "product", (
        "of the nearest images 0.7 are views"
    )
    assert found(Table(product=PRODUCT), noise=3.0) is None, (
        "images of one value that are not alike"
    )
    assert found(Table(product=PRODUCT), groups=PRODUCT) is None, "they are left out together"
    assert found(Table(product=PRODUCT), classes=OBJECTS) is None, "the column of the classes"


def test_images_that_are_left_out_together_are_not_compared():
    kind = (PRODUCT + 1) // 2  # two objects of each, which are not alike; the views of each are
    assert found(Table(kind=kind), groups=PRODUCT) is None


@pytest.mark.parametrize(
    "cells",
    [
        PRODUCT % 4
        + 1,  # a category: each image has a view of its object with the same value near it
        np.ones_like(PRODUCT),
        np.arange(len(PRODUCT)) + 1,  # no value is repeated
        np.where(PRODUCT < 2, PRODUCT, 0),  # one value is, all other cells are empty
        np.zeros_like(PRODUCT),
    ],
)
def test_other_columns_are_not(cells):
    assert found(Table(column=cells)) is None


def test_many_images_are_sampled_by_values(monkeypatch):
    monkeypatch.setattr("declip.evaluation.leakage.MOST", 81)
    assert found(Table(product=PRODUCT)) == "product"
