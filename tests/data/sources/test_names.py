"""Paths that files store stay valid when their project moves."""

import pytest

from declip.data.sources.names import resolve, stored_path


@pytest.mark.parametrize("inner", ["run/index", "run/indices/mine", "indices/mine", "run"])
def test_a_stored_path_is_resolved_in_the_folder_that_stores_it(inner, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "run"
    folder = tmp_path / inner
    model.mkdir()
    folder.mkdir(parents=True, exist_ok=True)
    stored = stored_path("run", folder)
    assert resolve(stored, folder) == str(model)


@pytest.mark.parametrize(
    "name", ["builtin:emoji", "open_clip:ViT-B-32/openai", "https://a/../b.tar", ""]
)
def test_names_stay(name, tmp_path):
    assert resolve(stored_path(name, tmp_path), tmp_path) == name
