"""What tests of training share."""

import pytest

from training.starts import CONV, start_from


@pytest.fixture(scope="session")
def start(table, tmp_path_factory):
    return start_from(table, tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="session")
def conv_start(table, tmp_path_factory):
    return start_from(table, tmp_path_factory.mktemp("conv"), CONV)
