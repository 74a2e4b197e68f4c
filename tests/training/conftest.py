"""What tests of training share."""

import pytest

from conftest import once
from training.starts import CONV, start_from


@pytest.fixture(scope="session")
def start(table, tmp_path_factory):
    return once(tmp_path_factory, "start", lambda folder: start_from(table, folder / "run")) / "run"


@pytest.fixture(scope="session")
def conv_start(table, tmp_path_factory):
    return (
        once(tmp_path_factory, "conv", lambda folder: start_from(table, folder / "run", CONV))
        / "run"
    )
