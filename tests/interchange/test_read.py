"""Weights by name: runs, timm's files, and a Hub on this machine by revision."""

import re
from fnmatch import fnmatch

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

import declip
from conftest import refuses
from declip.interchange.read import read, read_start
from declip.interchange.run_folder import read_checkpoint
from declip.runs.checkpoint import WEIGHTS, list_checkpoints, step_of
from interchange.test_export import features
from interchange.towers import EXACT, build, largest
from training.starts import recipe_for, trainer_of


def test_what_is_not_a_model_is_named(table, tmp_path):
    refuses("Cannot find the model", declip.load, tmp_path / "missing")
    refuses("not a run folder", declip.load, tmp_path)
    refuses("Cannot read weights", declip.load, table)
    trainer_of(recipe_for(table), tmp_path / "run")
    refuses("no checkpoint yet", declip.load, tmp_path / "run")


def test_damaged_checkpoints_and_their_weights_alone_are_named(table, tmp_path, caplog):
    plain = recipe_for(table, steps=4, checkpoint_every=1, keep_checkpoints=4, evaluate_every=1)
    evaluation = plain.evaluation.model_copy(update={"retrieval": (str(table),)})
    train = plain.train.model_copy(update={"patience": 9})
    watched = plain.model_copy(update={"evaluation": evaluation, "train": train})
    trainer_of(watched, tmp_path).train()
    best = (tmp_path / "checkpoints/best").resolve()
    kept = list_checkpoints(tmp_path)
    (best / WEIGHTS).write_bytes(b"half")
    good = next(folder for folder in reversed(kept) if folder != best)
    assert read_checkpoint(tmp_path).step == step_of(good)
    assert re.search(rf"{best.name}/{WEIGHTS} is damaged.*step {step_of(good)}", caplog.text)
    folder = list_checkpoints(tmp_path)[-1]
    refuses("by its folder", declip.load, folder / WEIGHTS)
    for folder in list_checkpoints(tmp_path):
        (folder / WEIGHTS).write_bytes(b"half")
    refuses("damaged", declip.load, tmp_path)


def without(part):
    return lambda state: {key: t for key, t in state.items() if part not in key}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (
            "test_vit",
            lambda state: (
                state | {key.replace(".0.", ".9."): t.clone() for key, t in state.items()}
            ),
        ),
        ("test_vit", without("norm1.bias")),
        ("test_resnet", without("running_mean")),
        ("test_vit", lambda _: timm.create_model("test_resnet").state_dict()),
    ],
)
def test_timms_weights_of_another_architecture_are_refused(tmp_path, name, change):
    save_file(change(timm.create_model(name).state_dict()), tmp_path / "w.safetensors")
    said = f"not those of {name}: (Missing|Unexpected) key"
    assert len(refuses(said, declip.load, f"timm:{name}/{tmp_path / 'w.safetensors'}")) < 400


OLD, NEW = "1" * 40, "2" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub: files by repository and revision, oldest first; only what is asked for is copied into the cache."""
    revisions = {}

    def snapshot(repo, allow_patterns, revision, **_):
        if repo not in revisions:
            raise LookupError("no such repository")
        sha = revision or list(revisions[repo])[-1]
        folder = tmp_path / "cache" / sha
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in revisions[repo][sha].items():
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (folder / name).write_bytes(content)
        return folder

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return revisions


def same(model, other):
    """Whether both give the same features of images and of captions."""
    return all(
        largest(*pair) <= EXACT
        for pair in zip(features(model)[1::2], features(other)[1::2], strict=True)
    )


def exported(model, form, folder):
    """Files of an export."""
    declip.export(model, form, folder, repo="me/conv")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_model_is_loaded_by_its_revision(hub, tmp_path):
    first, second = build("conv"), build("conv")
    with torch.no_grad():
        second.image_tower.proj.weight[0] += 1.0
    files = {
        sha: exported(model, "safetensors", tmp_path / sha)
        for sha, model in ((OLD, first), (NEW, second))
    }
    hub["me/conv"] = files
    assert b'declip.load("hf-hub:me/conv")' in files[OLD]["README.md"]
    for name in (f"hf-hub:me/conv@{OLD}", f"huggingface:me/conv@{OLD}"):
        assert same(declip.load(name, device="cpu"), first)
    assert same(declip.load("hf-hub:me/conv", device="cpu"), second)
    assert not same(first, second)
    refuses("Cannot fetch 'hf-hub:me/other@v1'", declip.load, "hf-hub:me/other@v1")


@pytest.mark.parametrize(
    ("form", "names"),
    [("open_clip", ["hf-hub:me/vit"]), ("huggingface", ["hf-hub:me/vit", "huggingface:me/vit"])],
)
def test_a_repository_of_another_library_is_read_without_its_pickles(hub, form, names, tmp_path):
    model = build("vit")
    hub["me/vit"] = {
        NEW: {**exported(model, form, tmp_path / "out"), "pytorch_model.bin": b"a pickle"}
    }
    for name in names:
        assert same(declip.load(name, device="cpu"), model)
        assert read_start(name).has_text
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_no_random_numbers_are_made_for_weights_that_are_read(tiny_run):
    called = set()

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if args and isinstance(args[0], torch.nn.Parameter):
                called.add(getattr(func, "__name__", ""))
            return func(*args, **kwargs or {})

    weights = read(tiny_run)
    with Recorder():
        weights.build()
    assert not called & {"normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_"}
    assert "copy_" in called
