from pathlib import Path

import pytest
import torch

from declip.errors import UserError
from declip.training import checkpoint as checkpoints
from declip.training.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, newest_good, save_checkpoint


def sample(step: int) -> Checkpoint:
    shared = torch.arange(6.0).view(2, 3)
    return Checkpoint(
        step=step,
        weights={"model.a": shared, "model.b": shared.T},
        training={"objective.n": torch.tensor([step, 7]), "random.cpu": torch.get_rng_state()},
        recipe="name: sample\n",
        extra={"versions": {"torch": "x"}},
    )


def test_reads_back_what_was_written(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, sample(5), keep=3)
    found, written = load_checkpoint(folder), sample(5)
    assert (found.step, found.recipe, found.extra) == (5, written.recipe, written.extra)
    for name, tensor in {**written.weights, **written.training}.items():
        assert torch.equal({**found.weights, **found.training}[name], tensor)


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (2, 10, 4, 100):
        save_checkpoint(tmp_path, sample(step), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000100"]


def test_an_unfinished_write_is_no_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, sample(1), keep=2)
    (tmp_path / "checkpoints" / "step-00000002.partial").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    save_checkpoint(tmp_path, sample(2), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "state"])
def test_a_damaged_one_is_named_and_the_one_before_is_taken(tmp_path: Path, damage: str) -> None:
    save_checkpoint(tmp_path, sample(1), keep=2)
    bad = save_checkpoint(tmp_path, sample(2), keep=2)
    path = bad / (checkpoints.STATE if damage == "state" else checkpoints.WEIGHTS)
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-3] ^= 1
        path.write_bytes(content)
    elif damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2])
    found, problems = newest_good(tmp_path)
    assert found is not None
    assert found.step == 1
    assert len(problems) == 1
    assert "step-00000002" in problems[0]


def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = save_checkpoint(tmp_path, sample(1), keep=1)

    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(UserError, match="No space left on device") as caught:
        save_checkpoint(tmp_path, sample(2), keep=1)
    assert str(good) in str(caught.value)
    assert "--resume" in str(caught.value)
    assert list_checkpoints(tmp_path) == [good]
    assert not list((tmp_path / "checkpoints").glob("*.partial"))
    assert load_checkpoint(good).step == 1


def test_the_optimizer_goes_on_as_if_nothing_had_happened() -> None:
    def steps(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter, count: int) -> None:
        for _ in range(count):
            weight.grad = weight.detach() * 0.5 + 1
            optimizer.step()

    whole = torch.nn.Parameter(torch.ones(3))
    reference = torch.optim.AdamW([whole], lr=0.1, fused=True)
    steps(reference, whole, 6)
    half = torch.nn.Parameter(torch.ones(3))
    first = torch.optim.AdamW([half], lr=0.1, fused=True)
    steps(first, half, 3)
    second = torch.optim.AdamW([half], lr=0.1, fused=True)
    checkpoints.load_optimizer(second, checkpoints.optimizer_tensors(first))
    steps(second, half, 3)
    assert torch.equal(whole, half)
