"""Run folders are read in whatever state they are; checkpoints are written whole or not at all."""

import json
import multiprocessing
import os
import shutil
import threading
import time

import numpy as np
import pytest
import torch

from conftest import refuses, write_rows
from declip.evaluation.results import ZeroShotResult
from declip.io.atomic import sha256
from declip.runs import checkpoint as checkpoints
from declip.runs.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    list_checkpoints,
    load_checkpoint,
    write_snapshot,
)
from declip.runs.folder import read_run
from hostile import forge


def _metrics(step, **more):
    row = {
        "step": step,
        "samples_seen": 10 * step,
        "seconds": 2.0,
        "samples_per_second": 100.0,
        "loss": 1.0,
    }
    return row | {"losses": {"contrastive": step / 10}} | more


def test_an_empty_folder(tmp_path):
    run = read_run(tmp_path)
    assert (run.metrics, run.evaluations, run.skipped, run.recipe_text) == ([], [], None, "")
    assert (run.step, run.samples_per_second, run.seconds) == (0, None, 0.0)
    assert run.last() == []
    refuses("no run folder", read_run, tmp_path / "nowhere")


def test_metrics_by_step_the_later_row_of_a_step_wins_and_a_torn_line_is_left_out(tmp_path):
    rows = [
        _metrics(2),
        _metrics(4, samples_per_second=None),
        _metrics(6, samples_per_second=300.0),
    ]
    write_rows(tmp_path / "metrics.jsonl", [*rows, _metrics(4, samples_per_second=200.0)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "pairs')
    run = read_run(tmp_path)
    assert run.steps.tolist() == [2, 4, 6]
    assert (run.step, run.samples_per_second, run.seconds) == (6, 200.0, 6.0)
    np.testing.assert_allclose(run.column("losses.contrastive"), [0.2, 0.4, 0.6])
    assert np.isnan(run.column("losses.simsiam")).all()


def test_evaluations_in_order_and_the_last_of_each(tmp_path):
    def row(step, on, top1):
        return {"step": step} | ZeroShotResult(on, 100, 10, top1, 0.5, 0.3).to_dict()

    other = {"step": 20, "dataset": "a", "task": "of another version", "top1": 0.9}
    write_rows(
        tmp_path / "evaluations.jsonl",
        [row(20, "a", 0.3), row(10, "a", 0.2), row(20, "b", 0.1), other],
    )
    run = read_run(tmp_path)
    assert run.step == 20, "also where the last step has no metrics"
    assert [each.step for each in run.evaluated] == [10, 20, 20]
    assert [[row.step for row in rows] for rows in run.series()] == [[10, 20], [20]]
    assert [(each.result.dataset, each.result.top1) for each in run.last()] == [
        ("a", 0.3),
        ("b", 0.1),
    ]


FILES = (checkpoints.WEIGHTS, checkpoints.TRAINING, checkpoints.STATE)


def sample(step):
    shared = torch.arange(6.0).view(2, 3)
    checkpoint = Checkpoint(
        step=step,
        weights={"model.a": shared, "model.b": shared.T},
        training={"objective.n": torch.tensor([step, 7]), "random.cpu": torch.get_rng_state()},
        recipe="name: sample\n",
        extra={"versions": {"torch": "x"}, "é": [float("nan"), 0.1]},
    )
    return checkpoints.snapshot(checkpoint)


def same(found, written):
    """Equal to the last bit, NaN and its payload too."""

    def content(checkpoint):
        tensors = {**checkpoint.weights, **checkpoint.training}
        bits = {
            name: tensor.contiguous().view(-1).view(torch.uint8).tolist()
            for name, tensor in tensors.items()
        }
        return checkpoint.step, checkpoint.recipe, json.dumps(checkpoint.extra), bits

    return content(found) == content(written)


def test_the_newest_read_back_as_they_were_written(tmp_path):
    before = os.umask(0o027)
    for step in (2, 10, 4, 100, 123_456_789, 123_456_789):
        folder = write_snapshot(tmp_path, sample(step), keep=2)
        last = tmp_path / "checkpoints" / checkpoints.LAST
        assert os.readlink(last) == folder.name
        assert same(load_checkpoint(last), sample(step))
    os.umask(before)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000100", "step-123456789"]
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}, (
        "safetensors' own are its owner's"
    )


def test_after_falling_back_the_damaged_ones_push_no_good_one_out(tmp_path):
    for step in (100, 200, 300):
        write_snapshot(tmp_path, sample(step), keep=3)
    for step in (200, 300):
        (checkpoints.folder_of(tmp_path, step) / checkpoints.WEIGHTS).write_bytes(b"half")
    write_snapshot(tmp_path, sample(150), keep=1)
    found, problems = checkpoints.newest_good(tmp_path)
    assert (found.step, len(problems)) == (150, 2)
    write_snapshot(tmp_path, sample(200), keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000200", "step-00000300"]
    assert load_checkpoint(checkpoints.folder_of(tmp_path, 200)).step == 200


def test_an_unfinished_write_is_no_checkpoint_and_the_next_one_clears_it_away(tmp_path):
    write_snapshot(tmp_path, sample(1), keep=2)
    for name in ("step-00000002.partial", "step-00000001.old.partial", "step-00000099.partial"):
        shutil.copytree(checkpoints.folder_of(tmp_path, 1), tmp_path / "checkpoints" / name)
    (tmp_path / "checkpoints" / "step-00000007").write_text("a file")
    (tmp_path / "checkpoints" / "step-mine").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    write_snapshot(tmp_path, sample(2), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]
    assert not list((tmp_path / "checkpoints").glob("*.partial"))


DAMAGES = {
    "empty": lambda path, content: path.write_bytes(b""),
    "half": lambda path, content: path.write_bytes(content[: len(content) // 2]),
    "one byte less": lambda path, content: path.write_bytes(content[:-1]),
    "one byte more": lambda path, content: path.write_bytes(content + b" "),
    "zeros": lambda path, content: path.write_bytes(bytes(len(content))),
    "nested": lambda path, content: path.write_bytes(b"[" * 100_000),
    "missing": lambda path, content: None,
    "folder": lambda path, content: path.mkdir(),
    "pipe": lambda path, content: os.mkfifo(path),
    "device": lambda path, content: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_is_taken(tmp_path, how, name):
    write_snapshot(tmp_path, sample(1), keep=2)
    path = write_snapshot(tmp_path, sample(2), keep=2) / name
    content = path.read_bytes()
    path.unlink()
    DAMAGES[how](path, content)
    found, (problem,) = checkpoints.newest_good(tmp_path)
    assert same(found, sample(1))
    assert "step-00000002" in problem


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_noticed(tmp_path, name):
    folder = write_snapshot(tmp_path, sample(2), keep=2)
    path, content = folder / name, (folder / name).read_bytes()
    places = range(0, len(content), max(len(content) // 100, 1))
    assert len(places) >= 100
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        refuses("step-00000002", load_checkpoint, folder)
    path.write_bytes(content)
    assert same(load_checkpoint(folder), sample(2))


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": {"../../dev/zero": "0"}},
        {"sha256": []},
        {"step": -1},
        {"step": True},
        {"more": 1},
    ],
)
def test_a_state_of_another_make_is_refused(tmp_path, change):
    folder = write_snapshot(tmp_path, sample(3), keep=1)
    forge(folder, **change)
    refuses(r"state\.json is damaged", load_checkpoint, folder)


def test_tensors_that_are_whole_but_none_are_refused(tmp_path):
    """As someone could write them on purpose: the checksums match."""
    folder = write_snapshot(tmp_path, sample(3), keep=1)
    (folder / checkpoints.WEIGHTS).write_bytes((1 << 62).to_bytes(8, "little"))
    forge(
        folder,
        sha256={
            name: sha256(folder / name) for name in (checkpoints.WEIGHTS, checkpoints.TRAINING)
        },
    )
    refuses("step-00000003 is not a complete checkpoint", load_checkpoint, folder)


@pytest.mark.parametrize("name", FILES)
def test_a_disk_that_gives_back_something_else_costs_no_earlier_one(tmp_path, monkeypatch, name):
    good = write_snapshot(tmp_path, sample(1), keep=1)
    flush = checkpoints.flush

    def rot(path):
        flush(path)
        if path.name == name:
            content = bytearray(path.read_bytes())
            content[-20] ^= 4
            path.write_bytes(content)

    monkeypatch.setattr(checkpoints, "flush", rot)
    refuses(rf"{name} is damaged.*{good}", write_snapshot, tmp_path, sample(2), keep=1)
    assert list_checkpoints(tmp_path) == [good]
    assert load_checkpoint(good).step == 1


def test_a_crash_in_the_middle_of_removing_leaves_no_part(tmp_path, monkeypatch):
    write_snapshot(tmp_path, sample(1), keep=1)

    def crash(path):
        if path.exists():
            (path / checkpoints.WEIGHTS).unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "remove", crash)
    with pytest.raises(KeyboardInterrupt):
        write_snapshot(tmp_path, sample(2), keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002"]


def test_a_snapshot_is_written_in_a_thread_as_it_was_taken(tmp_path, monkeypatch):
    go, save, live = threading.Event(), checkpoints.save_tensors, sample(1)
    monkeypatch.setattr(checkpoints, "save_tensors", lambda *given: go.wait(10) and save(*given))
    # NaN with payloads, a denormal
    odd = torch.tensor([0x7FC00001, -1, 1], dtype=torch.int32).view(torch.float32)
    live.weights |= {
        "model.odd": odd,
        "model.half": torch.randn(5, 4).bfloat16().T,
        "model.scalar": torch.tensor(2.5),
    }
    before = checkpoints.snapshot(live)
    with CheckpointWriter(tmp_path, keep=2) as writer:
        writer.write(live)
        assert not list_checkpoints(tmp_path), "it returned before the disk"
        for tensor in (*live.weights.values(), *live.training.values()):
            tensor.zero_()
        live.extra["versions"].clear()
        waiting = threading.Thread(target=writer.write, args=(sample(2),))
        waiting.start()
        time.sleep(0.05)
        assert waiting.is_alive(), "at most one is under way"
        go.set()
        waiting.join()
    assert same(load_checkpoint(checkpoints.folder_of(tmp_path, 1)), before)
    assert same(load_checkpoint(checkpoints.folder_of(tmp_path, 2)), sample(2))


def test_what_a_write_met_is_raised_at_the_next_once(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.write(sample(1))
    refuses(r"Cannot write the checkpoint .*step-00000001.*no earlier", writer.write, sample(2))
    (tmp_path / "checkpoints").unlink()
    with writer:
        writer.write(sample(3))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003"]


def test_a_process_that_ends_finishes_the_write(tmp_path, monkeypatch):
    save = checkpoints.save_tensors
    monkeypatch.setattr(checkpoints, "save_tensors", lambda *given: (time.sleep(0.1), save(*given)))
    writer = CheckpointWriter(tmp_path, keep=1)
    child = multiprocessing.get_context("fork").Process(target=writer.write, args=(sample(1),))
    child.start()
    child.join(20)
    assert child.exitcode == 0
    assert same(load_checkpoint(list_checkpoints(tmp_path)[0]), sample(1))
