"""What tests of models from elsewhere share."""

import json

import open_clip
import pytest

from interchange.families import CONFIGS


@pytest.fixture(scope="session")
def open_clip_configs(tmp_path_factory):
    """Let open_clip know the tiny configurations."""
    folder = tmp_path_factory.mktemp("configs")
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
    open_clip.add_model_config(folder)
