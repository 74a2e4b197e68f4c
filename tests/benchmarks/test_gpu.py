"""The benchmark for a GPU and the reproduction of the papers' runs, with toy towers on this machine."""

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Call a script's main function; give its exit status and what it printed."""

    def called(module: ModuleType, *words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [module.__name__, *words])
        try:
            module.main()
        except SystemExit as ended:
            return int(ended.code or 0), "".join(capsys.readouterr())
        return 0, capsys.readouterr().out

    return called


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = load(ROOT / "benchmarks" / "gpu.py")
    monkeypatch.setattr(module, "RECIPES", ("clip",))
    return module


def test_parts_are_measured_once(gpu: ModuleType, call: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    words = ("--out", str(tmp_path), "--device", "cpu", "--tiny", "--only")
    status, printed = call(gpu, *words, "ViT-B-32")
    rows = json.loads(printed)["ViT-B-32"]["rows"]
    assert (status, [row["what"] for row in rows]) == (0, ["clip", "open_clip"])
    for row in rows:
        assert row["batch"] == 4
        assert row["gflop_per_pair"] > 0
        assert row["samples_per_second"] * row["ms"] == pytest.approx(4000, rel=0.05)
    before = (tmp_path / "ViT-B-32.json").read_text()
    both = json.loads(call(gpu, *words, "ViT-B-32,views")[1])
    assert (tmp_path / "ViT-B-32.json").read_text() == before
    assert both["views"]["rows"][-1] == {"what": "largest difference", "value": 0.0}
    assert json.loads(call(gpu, *words, "loading", "--minutes", "0")[1]) == {}  # too late to begin
    assert call(gpu, *words, "vit")[0] == 2


def test_utilization_is_of_the_card(gpu: ModuleType) -> None:
    assert gpu.peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert gpu.peak_of("NVIDIA H100 PCIe") == 756e12
    assert gpu.peak_of("cpu") is None


def test_a_batch_is_repeated_whole(gpu: ModuleType) -> None:
    recipe = gpu.load_recipe("demo-declip-official", {"train.batch_size": 4})
    batch = next(gpu.build(recipe, gpu.InMemory(["a red circle", "a blue square"] * 4, 32)).loader)
    more = gpu.tiled(batch, 10)
    for name, view in batch.views.items():
        assert torch.equal(more.views[name].pixels[4:8], view.pixels)
        assert torch.equal(more.views[name].photometric.sigma[8:], view.photometric.sigma[:2])
    assert torch.equal(more.texts[:, 4:8], batch.texts)
    assert torch.equal(more.labels[8:], batch.labels[:2])


def test_reproduction(call: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load(ROOT / "scripts" / "reproduce.py")
    known = script.EXPERIMENTS["synthetic"]
    small = {**known.keys, "train.steps": 4, "train.batch_size": 8, "train.warmup_steps": 0, "train.lr": 0.002}
    monkeypatch.setitem(script.EXPERIMENTS, "synthetic", replace(known, keys=small, pairs=40))
    shards, out = str(tmp_path / "shards"), str(tmp_path / "out")
    status, printed = call(script, "synthetic", "--data", shards, "--check-leakage", shards, "--out", out)
    assert status == 1  # the data are their own test set
    assert "40 of 40 pairs look like" in printed
    assert not (tmp_path / "out" / "run").exists()
    status, printed = call(script, "synthetic", "--data", shards, "--out", out)
    assert status == 0, printed
    curve = json.loads((tmp_path / "out" / "run" / "curve.json").read_text())
    assert list(curve) == ["1", "2", "3", "4"]
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**curve, "2": 2 * curve["2"]}))
    status, printed = call(script, "synthetic", "--data", shards, "--out", out, "--curve", str(other))
    assert status == 1
    assert "at step 2" in printed
