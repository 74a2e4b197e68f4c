"""What tests of models from elsewhere share."""

import json
import shutil
from functools import cache

import pytest
import torch

from conftest import Lazy, once
from declip.interchange.timm_weights import complete
from interchange.families import CONFIGS
from interchange.towers import PIXELS, VIT, add_neighbors, build, export_exactly, unprojected
from text_encoders import roberta

open_clip = Lazy("open_clip")
ONE_BLOCK = {"image.model_kwargs": {**VIT["image.model_kwargs"], "depth": 1}, "text.layers": 1}
"""Keys of smaller towers: the exporter of ONNX takes a second for each block."""


@pytest.fixture(scope="session")
def one_registry():
    """Collect the operators of ONNX once; torch does so for a second at each export."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib))
        )
        yield


@pytest.fixture(scope="session")
def onnx_clip(one_registry, tmp_path_factory):
    """A model whose text projection has a bias, and its folder."""
    model = build("vit-bias", **ONE_BLOCK, **PIXELS)
    folder = once(
        tmp_path_factory, "onnx", lambda made: export_exactly(model, "onnx", made / "out")
    )
    return model, folder / "out"


@pytest.fixture(scope="session")
def onnx_roberta(one_registry, tmp_path_factory):
    """A model with class posteriors, neighbors and a text encoder of transformers, and its folder.

    That of the encoder is gone.
    """
    folder = tmp_path_factory.mktemp("onnx")
    torch.manual_seed(4)
    encoder = roberta(folder / "roberta", num_hidden_layers=1)
    keys = {**ONE_BLOCK, "text.hf_model": str(encoder), "text.context_length": 24}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DECLIP_CACHE", str(folder / "cache"))
        model = add_neighbors(complete(unprojected("vit", 32, **keys)).build().eval())
    shutil.rmtree(encoder)
    made = once(
        tmp_path_factory,
        "onnx-roberta",
        lambda shared: export_exactly(model, "onnx", shared / "out"),
    )
    return model, made / "out"


@pytest.fixture(scope="session")
def open_clip_configs(tmp_path_factory):
    """Let open_clip know the tiny configurations."""
    folder = tmp_path_factory.mktemp("configs")
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
    open_clip.add_model_config(folder)
