"""What tests of training share."""

from pathlib import Path

import pytest

from training.starts import CONV, start_from


@pytest.fixture(scope="module")
def start(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start_from(table, tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def conv_start(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start_from(table, tmp_path_factory.mktemp("conv"), CONV)
