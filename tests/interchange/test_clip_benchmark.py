"""CLIP_benchmark's own command on a model of ours and a WebDataset: its numbers are those of our evaluation."""

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import declip
from declip.evaluation.datasets import Dataset
from declip.interchange import clip_benchmark as adapter
from interchange.test_import import Painted
from interchange.towers import build

TEMPLATES = ("a {} shape", "something {}")


class Captioned(Painted):
    """The same with two captions."""

    def captions(self, index: int) -> tuple[str, ...]:
        color, shape = self.rows[index]
        return f"a {color} {shape}", f"{shape} painted in {color}"


def webdataset(folder: Path, source: Painted, kind: str, shards: int = 2) -> Path:
    """What `--dataset wds/…` reads: shards of PNG files with classes and captions."""
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text(str(shards))
    (folder / "dataset_type.txt").write_text(kind)
    (folder / "classnames.txt").write_text("\n".join(source.class_names))
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(t.format("{c}") for t in TEMPLATES))
    for shard, rows in enumerate(np.array_split(range(len(source)), shards)):
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as tar:
            for row in rows:
                picture = io.BytesIO()
                source[row].image.save(picture, "PNG")
                captions = "\n".join(source.captions(row)).encode()
                files = {"png": picture.getvalue(), "cls": b"%d" % source.labels[row], "txt": captions}
                for ending, content in files.items():
                    entry = tarfile.TarInfo(f"{row:04}.{ending}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return folder


def test_its_numbers_are_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero-shot top-1, top-5 and mean per class, recall both ways; of our file, and of our open_clip export."""
    pytest.importorskip("clip_benchmark")
    monkeypatch.chdir(tmp_path)
    model = build("vit")
    declip.export(model, "safetensors", tmp_path / "model")
    declip.export(model, "open_clip", tmp_path / "theirs")
    shown = declip.evaluate(
        model, Dataset("painted", {"test": Painted}), templates=TEMPLATES, progress=False, cache=False
    )
    found = declip.evaluate(model, Dataset("painted", {"test": Captioned}), "retrieval", progress=False)
    sets = {"classification": shown, "retrieval": found}
    assert torch.equal(adapter.load("model")[1](Painted()[3].image), model.preprocess(Painted()[3].image)[0])
    for name, task in (("classification", "zeroshot_classification"), ("retrieval", "zeroshot_retrieval")):
        folder = webdataset(tmp_path / name, Captioned(), name)
        words = ["--dataset", "wds/painted", "--dataset_root", str(folder), "--task", task, "--no_amp", "--quiet"]
        words += ["--num_workers", "0", "--recall_k", "1", "5", "--batch_size", "7"]
        for which in (["--model", "model"], ["--model", f"local-dir:{tmp_path}/theirs", "--model_type", "open_clip"]):
            monkeypatch.setattr("sys.argv", ["clip_benchmark", "eval", *which, *words])
            adapter.main()
            written = json.loads((tmp_path / f"painted_{task}.json").read_text())
            metrics = written["metrics"]
            assert written["pretrained"] == "declip"
            if name == "classification":
                expected = {"acc1": sets[name].top1, "acc5": sets[name].top5}
                expected["mean_per_class_recall"] = sets[name].mean_per_class
            else:
                ways = {"image": sets[name].text_to_image, "text": sets[name].image_to_text}
                expected = {
                    f"{way}_retrieval_recall@{k}": getattr(r, f"r{k}") for way, r in ways.items() for k in (1, 5)
                }
            assert metrics == pytest.approx(expected, abs=1e-6)
            assert 0 < min(metrics.values()) < max(metrics.values())


def test_without_the_benchmark_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "clip_benchmark", None)
    with pytest.raises(SystemExit, match=r"Error: .*pip install 'declip\[clip_benchmark\]'"):
        adapter.main()
