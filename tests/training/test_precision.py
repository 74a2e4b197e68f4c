"""`train.precision=auto`: settled by the device at the start, and kept by a run that goes on."""

import logging
from pathlib import Path

import pytest
import torch

from conftest import TINY
from declip.api import train
from declip.models import device as devices
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe
from declip.training import setup

CPU = torch.device("cpu")


@pytest.fixture
def bf16(monkeypatch: pytest.MonkeyPatch):
    """Make the device one that computes in bfloat16, or one that does not."""
    return lambda can: monkeypatch.setattr(setup, "computes_bf16", lambda device: can)


@pytest.mark.parametrize(
    ("asked", "can", "taken"),
    [("auto", True, "bf16"), ("auto", False, "fp32"), ("fp32", True, "fp32"), ("bf16", False, "bf16")],
)
def test_auto_takes_what_the_device_can(bf16, tmp_path: Path, asked: str, can: bool, taken: str) -> None:
    bf16(can)
    recipe = load_recipe("demo-declip", {"train.precision": asked})
    assert setup.resolve_precision(recipe, CPU, tmp_path, resume=False).train.precision == taken


@pytest.mark.parametrize("can", [False, True])
def test_the_device_is_asked_and_not_its_name(monkeypatch: pytest.MonkeyPatch, can: bool) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: can, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: can or including_emulation)
    assert devices.computes_bf16(CPU) is can
    assert devices.computes_bf16(torch.device("cuda")) is can
    assert not devices.computes_bf16(torch.device("meta"))


def test_a_run_keeps_its_precision_on_another_device(bf16, table: Path, tmp_path: Path, caplog) -> None:
    bf16(True)
    tree = {**TINY, "data": {"source": str(table)}, "train": {**TINY["train"], "steps": 2, "precision": "auto"}}
    recipe = Recipe.model_validate(tree)
    first = train(recipe, out=tmp_path, quiet=True, report=False)
    assert first.recipe.train.precision == load_recipe(tmp_path / "recipe.yaml").train.precision == "bf16"
    bf16(False)
    with caplog.at_level(logging.WARNING):
        again = train(recipe, out=tmp_path, resume=True, quiet=True, report=False)
    assert again.recipe.train.precision == "bf16"
    assert "does not compute in bfloat16 itself" in caplog.text
