"""Weights, checkpoints and recipes from elsewhere: nothing in them runs, memory stays bounded, all is said."""

import json
import pickle
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import declip
from conftest import TINY
from data.fakes import write_tar
from declip.models.dual_encoder import DualEncoder
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe
from declip.runs.checkpoint import STATE, WEIGHTS, Checkpoint, write_snapshot
from golden_cases import read_official, read_state
from hostile import ROOM, Trap, apart, forge, quickly, said

pytestmark = pytest.mark.usefixtures("here", "open_clip_configs")


def legacy_tar(path, trap):
    """torch's form before 0.1.10, which is unpacked to the disk where it is read."""
    write_tar(
        path,
        [(name, pickle.dumps(trap)) for name in ("storages", "tensors", "pickle", "../outside")],
    )


TRAPS = {
    "pickle.pth": lambda path, trap: path.write_bytes(pickle.dumps({"model": trap})),
    "pickle.pth.tar": lambda path, trap: path.write_bytes(
        pickle.dumps({"model": trap}, protocol=2)
    ),
    "zip.pt": lambda path, trap: torch.save({"state_dict": trap}, path),
    "legacy.pth": lambda path, trap: torch.save(
        {"model": trap}, path, _use_new_zipfile_serialization=False
    ),
    "tar.pth": legacy_tar,
    "pickle.safetensors": lambda path, trap: path.write_bytes(pickle.dumps(trap)),
    "array.npy": lambda path, trap: np.save(
        path, np.array([trap], dtype=object), allow_pickle=True
    ),
}


@pytest.mark.parametrize("name", TRAPS)
def test_weights_that_would_run_code(name, here):
    path = here / name
    TRAPS[name](path, Trap(here / "harm"))
    before = set(here.parent.rglob("*"))
    assert "Cannot read weights" in said(lambda: read_official(path))
    for where, message in (
        (path, "Cannot read weights"),
        (f"open_clip:tiny-vit/{path}", "Cannot load"),
    ):
        assert message in said(lambda where=where: declip.load(where, device="cpu"))
    assert set(here.parent.rglob("*")) == before


def zip_bomb(path):
    torch.save({"logit_scale": torch.ones(1)}, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr(f"{path.stem}/data/1", bytes(64 << 20))


def overlapping_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data/0", bytes(1 << 20))
        archive.filelist.extend(archive.filelist * 500)


class Endless:
    """What `weights_only` allows to be made of nothing."""

    def __init__(self, make, *given):
        self.make, self.given = make, given

    def __reduce__(self):
        return self.make, self.given


def holding(value):
    names = ("logit_scale", "visual.conv1.weight", "encode_text.token_embedding.weight")
    return lambda path: torch.save({"model": dict.fromkeys(names, value)}, path)


ITSELF = []
ITSELF.append(ITSELF)


BOMBS = {
    "inflates.pth": zip_bomb,
    "overlaps.pth": overlapping_zip,
    "repeats.pth": holding(torch.zeros(1).expand(1 << 20, 1 << 20)),
    "bytes.pth": holding(Endless(bytearray, 1 << 40)),
    "nowhere.pth": holding(
        Endless(
            torch._utils._rebuild_meta_tensor_no_storage,
            torch.float32,
            (1 << 30, 1 << 20),
            (1 << 20, 1),
            False,
        )
    ),
    "itself.pth": holding(ITSELF),
    "header.safetensors": lambda path: path.write_bytes(
        (1 << 40).to_bytes(8, "little") + b"{" * 100
    ),
    "sizes.safetensors": lambda path: path.write_bytes(
        struct.pack("<Q", 64) + b'{"a":{"dtype":"F32","shape":[99999999],"data_offsets":[0,9]}}   '
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_weights_that_are_larger_than_their_file(name, here):
    BOMBS[name](here / name)
    for where in (str(here / name), f"open_clip:tiny-vit/{here / name}"):
        got, megabytes = apart(lambda where=where: declip.load(where, device="cpu"))
        assert (got != "read", megabytes < ROOM) == (True, True)
        if name in ("inflates.pth", "overlaps.pth", "repeats.pth", "nowhere.pth") and where == str(
            here / name
        ):
            assert re.search(r"takes [\d,]+ bytes of memory, but its weights have [\d,]+", got)


ODD = [
    ("encode_text.text_projection.weight", torch.zeros(1 << 40, 0)),
    ("encode_text.positional_embedding", torch.zeros(1 << 40, 0)),
    ("visual.conv1.weight", torch.zeros(1 << 22, 1, 1, 1, dtype=torch.uint8)),
    ("visual.conv1.weight", torch.zeros(4)),
    ("visual.conv1.weight", torch.zeros(64, 3, 0, 0)),
    ("visual.positional_embedding", torch.tensor(1.0)),
    ("logit_scale", torch.zeros(5)),
]


@pytest.mark.parametrize(("name", "tensor"), ODD)
def test_weights_of_sizes_that_no_one_meant(name, tensor):
    save_file(read_state("defilip_vit_tiny") | {name: tensor}, "odd.safetensors")
    got, megabytes = apart(lambda: declip.load("odd.safetensors", device="cpu"))
    assert (got != "read", megabytes < 2 * ROOM) == (True, True)


@pytest.fixture
def checkpoint(here):
    recipe = Recipe.model_validate({key: TINY[key] for key in ("image", "text", "embed_dim")})
    weights = {f"model.{name}": tensor for name, tensor in DualEncoder(recipe).state_dict().items()}
    return write_snapshot(here / "run", Checkpoint(1, weights, {}, recipe.to_yaml()), keep=1)


def laughs(levels=30):
    """Ten aliases of ten aliases of ten …: 10^30 entries of 30 lines."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join([*lines, f"name: *a{levels - 1}", ""])


RECIPES = {
    "code": "name: !!python/object/apply:os.system ['touch harm']\n",
    "laughs": laughs(),
    "deep": "[" * 5000,
    "binary": "name: !!binary é\n",
    "null": "name: \0\n",
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_would_run_code_or_is_none(name, checkpoint):
    forge(checkpoint, recipe=RECIPES[name])
    Path("mine.yaml").write_text(RECIPES[name])
    for where, work in {
        "run": lambda: declip.load(checkpoint),
        "mine": lambda: load_recipe("mine.yaml"),
    }.items():
        got, megabytes = apart(work)
        assert (where in got, megabytes < 2 * ROOM) == (True, True)
    assert not Path("harm").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"text": {"width": 1 << 20, "heads": 1}},
        {"text": {"context_length": 1 << 40}},
        {"embed_dim": 1 << 50},
        {"image": {"model_kwargs": {"patch_size": 8, "embed_dim": 1 << 20, "depth": 1}}},
        {"image": {"size": 1 << 20}},
        {"image": {"model": "hf-hub:someone/model"}},
    ],
)
def test_a_checkpoint_whose_recipe_asks_for_another_model(change, checkpoint):
    tree = yaml.safe_load(json.loads((checkpoint / STATE).read_text())["recipe"])
    for key, value in change.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) else value
    forge(checkpoint, recipe=yaml.safe_dump(tree))
    got, megabytes = apart(lambda: declip.load(checkpoint, device="cpu"))
    assert (got != "read", megabytes < 2 * ROOM) == (True, True)


def test_a_checkpoint_whose_weights_would_run_code(checkpoint):
    assert said(lambda: declip.load(checkpoint, device="cpu")) == "read"
    (checkpoint / WEIGHTS).write_bytes(pickle.dumps(Trap(Path("harm"))))
    assert "damaged" in said(lambda: declip.load(checkpoint, device="cpu"))
    assert not Path("harm").exists()


@quickly
@given(
    st.binary(max_size=300),
    st.sampled_from([".pth", ".pt", ".safetensors", ".pth.tar"]),
    st.booleans(),
)
def test_any_bytes_as_weights(content, suffix, in_header):
    path = Path(f"any{suffix}")
    path.write_bytes(struct.pack("<Q", len(content)) + content if in_header else content)
    assert "any" in said(lambda: declip.load(path, device="cpu"))
