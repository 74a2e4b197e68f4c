"""What tests of models from elsewhere share."""

import json

import pytest

from interchange.families import CONFIGS


@pytest.fixture(scope="module")
def open_clip_configs(tmp_path_factory):
    """The tiny configurations, known to open_clip for the time of a file that asks for them."""
    import open_clip
    from open_clip import factory

    paths, configs = list(factory._MODEL_CONFIG_PATHS), dict(factory._MODEL_CONFIGS)
    folder = tmp_path_factory.mktemp("configs")
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
    open_clip.add_model_config(folder)
    yield
    factory._MODEL_CONFIG_PATHS[:] = paths
    factory._MODEL_CONFIGS = configs
