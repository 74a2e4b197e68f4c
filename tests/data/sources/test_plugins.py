"""Sources and downloads of plugins, and the message where the package of the built-in sets is missing."""

from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from conftest import refuses
from data.fakes import Noise
from declip.data.sources.download import download
from declip.data.sources.open import open_source
from declip.evaluation.datasets import open_dataset
from declip.io import plugins
from declip.recipe.checks import check_source


@pytest.fixture
def install(monkeypatch):
    """Make only some entry points exist."""

    def replace(*points):
        installed = EntryPoints(EntryPoint(*point) for point in points)
        monkeypatch.setattr(plugins, "entry_points", installed.select)

    return replace


@pytest.mark.parametrize("line", [
    "data download builtin:emoji",
    "data download emoji",
    "data inspect builtin:emoji",
    "train demo-few-declip --out run",
    "finetune builtin:emoji --from builtin:lite2-minilm --out run",
    "evaluate builtin:lite2-minilm --dataset builtin:emoji",
    "embed builtin:lite2-minilm builtin:emoji --out index",
])  # fmt: skip
def test_a_built_in_set_without_its_package_is_an_error_that_says_what_to_install(
    line, install, command, tmp_path, monkeypatch
):
    install()
    monkeypatch.chdir(tmp_path)
    done = command(*line.split())
    assert done.status == 2
    assert "'builtin:emoji' is a built-in set" in done.err
    assert "`pip install ./packages/declip-sets`" in done.err
    assert done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_python_functions_say_what_to_install_too(install):
    install()
    for call in (open_source, open_dataset, download):
        refuses(
            r"'builtin:icons-test'.*`pip install \./packages/declip-sets`",
            call,
            "builtin:icons-test",
        )


def test_the_check_before_torch_is_imported_says_it_too(install):
    install()
    refuses(
        r"'builtin:icons'.*`pip install \./packages/declip-sets`",
        check_source,
        "builtin:icons",
        "--data",
    )
    refuses("'builtin:lite2-minilm' is a model", check_source, "builtin:lite2-minilm", "--data")


def noise(rest, columns):
    return Noise(int(rest))


def fetch(rest, cache, progress):
    assert cache is None  # the default
    return Path(rest) / str(progress)


def not_a_source(rest, columns):
    return [rest]


def test_a_plugin_opens_evaluates_and_downloads_its_sources(install, tmp_path, command):
    here = "data.sources.test_plugins"
    install(
        ("noise", f"{here}:noise", "declip.sources"),
        ("list", f"{here}:not_a_source", "declip.sources"),
        ("noise", f"{here}:fetch", "declip.downloads"),
    )
    assert len(open_source("noise:7")) == 7
    assert len(open_dataset("noise:7").split("test")) == 7
    done = command("data", "download", "noise:7", "--quiet")
    assert done.out.strip() == f"Ready: {Path('7') / 'False'}"
    refuses("'list:' of a plugin returned a list, not a PairSource", open_source, "list:7")
    refuses("Unknown source to download 'nois'.*'noise'", download, "nois:7")
    refuses("is not a built-in set but a path", download, str(tmp_path))
