"""The trainer on several processes: one run, one folder, one end, whatever happens to a rank."""

import logging
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import declip
from conftest import TINY, WEIGHTS, in_processes, tiny_tree, write_rows
from declip.errors import UserError
from declip.recipe.schema import Recipe
from declip.runs.checkpoint import list_checkpoints, load_checkpoint
from declip.runs.folder import KEPT, log, read_rows
from declip.supervision.objective import Objective
from declip.training import distributed
from declip.training.distributed import HostGroup
from declip.training.sinks import Sink
from declip.training.trainer import warn_once
from training.starts import (
    UNCOLORED,
    losses,
    moved,
    quiet_train,
    same_end,
    trained,
    trainer_of,
    tuned,
)

DROPOUT = {
    "image": {
        **TINY["image"],
        "model_kwargs": {**TINY["image"]["model_kwargs"], "pos_drop_rate": 0.5},
    }
}


@pytest.fixture(scope="module")
def recipe(rows, tmp_path_factory):
    """The keys of a run over the shapes and two pairs without an image, so that ranks hold unequal numbers."""
    broken = [{"image": f"missing-{number}.png", "caption": "nothing"} for number in range(2)]
    path = write_rows(tmp_path_factory.mktemp("broken") / "pairs.jsonl", [*rows, *broken])
    tree = tiny_tree(path, "declip", name="declip", views=UNCOLORED)
    return {**tree, "data": {**tree["data"], "max_broken_fraction": 0.5}}


def of(keys, **train_keys):
    train = {**TINY["train"], "steps": 5, "log_every": 1, **train_keys}
    return Recipe.model_validate({**keys, "train": train})


def _meet_twice(rank, folder):
    os.environ["RANK"] = str(rank)
    for number in range(2):
        distributed.init_distributed("cpu")
        total = torch.tensor([float(rank + number)])
        torch.distributed.all_reduce(total)
        distributed.destroy_distributed()
        Path(folder, f"{rank}-{number}").write_text(f"{total.item():g}")


def test_the_processes_of_a_run_can_begin_another(tmp_path, monkeypatch):
    # torchrun's own
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {"ADDR": "127.0.0.1", "PORT": server.port}.items():
        monkeypatch.setenv(f"MASTER_{name}", str(value))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    torch.multiprocessing.start_processes(
        _meet_twice, (str(tmp_path),), nprocs=2, start_method="fork"
    )
    assert [
        (tmp_path / f"{rank}-{number}").read_text() for number in range(2) for rank in range(2)
    ] == list("1133")


def stopped(recipe, folder, at, by):
    """A run in which one rank is asked to stop before it comes to a step."""
    trainer = trainer_of(recipe, folder)
    meet = trainer.state.hosts.sync_step

    def ask(step, *rest):
        if step == at and distributed.rank() == by:
            os.kill(os.getpid(), signal.SIGTERM)
            rest = (rest[0], trainer.stop.asked, rest[2])
        return meet(step, *rest)

    trainer.state.hosts.sync_step = ask
    run = trainer.train()
    assert run.finished or run.status == 75
    return run.step, run.finished


QUEUE = "objective.terms.nearest_neighbor.queue.features"


def end_of(folder):
    return load_checkpoint(folder / "checkpoints/last").training


@pytest.fixture(scope="module")
def one(recipe, tmp_path_factory):
    """The run of one process."""
    return quiet_train(of(recipe), tmp_path_factory.mktemp("one") / "run").folder


def whole_and_in_parts(recipe, folder):
    whole, parts = folder / "whole", folder / "parts"
    return trained(recipe, whole), stopped(recipe, parts, 0, 1), trained(recipe, parts, True)


def warned(recipe, folder):
    """How often a run warns of steps that it leaves out."""
    warn_once.cache_clear()
    records, handler = [], logging.Handler()
    handler.emit = records.append
    log.addHandler(handler)
    assert trained(recipe, folder) == (13, True)
    return sum("too few usable pairs" in record.getMessage() for record in records)


@pytest.fixture(scope="module")
def tunings(table, start, tmp_path_factory):
    """Recipes that start from weights, of which some stay; and the folder of a run of each by one process."""
    keys, folder = {"steps": 2, "log_every": 1}, tmp_path_factory.mktemp("tunings")
    frozen = {"freeze_image_blocks": 2, "layer_decay": 0.8}
    recipes = {
        "frozen": tuned(table, start, {"strategy": "fsdp", **keys}, **frozen),
        "lora": tuned(table, start, keys, lora={"rank": 2}),
    }
    for name, recipe in recipes.items():
        quiet_train(recipe, folder / name)
    return recipes, folder


def every_run(recipe, table, tunings, folder):
    """Train what the tests compare, in one of two processes; how each run ended."""
    clip = {**recipe, "loss_weights": WEIGHTS["clip"]}
    dropout = of({**clip, **DROPOUT}, strategy="fsdp", checkpoint_every=100, steps=2)
    queues = {**recipe, "nearest_neighbor": {"queue_size": 16, "queue_per_process": True}}
    epoch = of(clip, batch_size=2, steps=13, checkpoint_every=100)
    evaluated = {**clip, "evaluation": {"retrieval": [str(table)]}}
    slow = of(evaluated, steps=4, log_every=2, strategy="fsdp")
    return {
        "two": trained(of(recipe), folder / "two"),
        "continued": trained(of(recipe, strategy="fsdp"), folder / "continued", True),
        "dropout": whole_and_in_parts(dropout, folder / "dropout"),
        "queues": whole_and_in_parts(of(queues, steps=2), folder / "queues"),
        "warned": warned(epoch, folder / "warned"),
        "slow": told(slow_callback, slow, folder / "slow", 1.0),
        "evaluated": images_evaluated(of(evaluated, steps=1), folder / "evaluated"),
        **{name: trained(tuning, folder / name) for name, tuning in tunings.items()},
    }


@pytest.fixture(scope="module")
def two(recipe, table, tunings, tmp_path_factory):
    """The folder of all runs of two processes, and how they ended in each; FSDP plans each operation once."""
    folder = tmp_path_factory.mktemp("two")
    assert not stopped(of(recipe, strategy="fsdp"), folder / "continued", 3, 0)[1]
    ends = in_processes(every_run, 2, folder / "meet", recipe, table, tunings[0], folder)
    return folder, {name: [end[name] for end in ends] for name in ends[0]}


def test_two_processes_make_one_run(one, two):
    folder, ends = two
    assert ends["two"] == [(5, True)] * 2
    run = folder / "two"
    assert losses(run) == pytest.approx(losses(one), rel=1e-3)
    assert (one / "skipped.json").read_text() == (run / "skipped.json").read_text()
    queues = end_of(one)[QUEUE], end_of(run)[QUEUE]
    torch.testing.assert_close(*queues, rtol=0, atol=0.02)  # the same captions in the same slots
    assert len(list_checkpoints(run)) == 2


@pytest.mark.parametrize("name", ["frozen", "lora"])
def test_two_processes_tune_as_one(name, two, tunings, start):
    folder, ends = two
    assert ends[name] == [(2, True)] * 2
    runs = start, tunings[1] / name, folder / name
    assert losses(runs[2]) == pytest.approx(losses(runs[1]), rel=1e-3)
    given, first, second = (declip.load(run, device="cpu").state_dict() for run in runs)
    still = given.keys() - moved(given, first)
    assert still == given.keys() - moved(given, second)
    assert len(still) > 10
    assert (folder / name / KEPT).is_file()


def test_steps_in_which_a_process_has_no_pair_are_left_out_with_one_warning(two):
    folder, ends = two
    assert ends["warned"] == [1, 0]
    assert len(losses(folder / "warned")) == 13 - 2, "two pairs have no image"


@pytest.mark.parametrize("name", ["dropout", "queues"])
def test_stopped_on_one_rank_both_stop_and_the_rest_is_bit_for_bit(name, two):
    folder, ends = two
    assert ends[name] == [((2, True), (1, False), (2, True))] * 2
    whole, parts = folder / name / "whole", folder / name / "parts"
    same_end(whole, parts)
    end = end_of(whole)
    assert not torch.equal(end["random.0.cpu"], end["random.1.cpu"])
    if name == "queues":
        assert not torch.equal(end[QUEUE], end[QUEUE.replace("objective", "process.1")])


def test_another_number_of_processes_goes_on_with_the_same_batches_and_moments(one, two):
    folder, ends = two
    assert ends["continued"] == [(5, True)] * 2
    assert losses(folder / "continued") == pytest.approx(losses(one), rel=1e-3)
    resumed, expected = end_of(folder / "continued"), end_of(one)
    torch.testing.assert_close(resumed[QUEUE], expected[QUEUE], rtol=0, atol=0.02)
    moments = {name for name in expected if name.startswith("optimizer.")}
    assert moments == {name for name in resumed if name.startswith("optimizer.")}
    assert "optimizer.model.logit_scale.exp_avg" in moments
    for name in moments:
        # Before batch norm a bias has no gradient but rounding, so the scale has a floor.
        floor, scale = 1e-10 if name.endswith("_sq") else 1e-5, expected[name].abs().max().item()
        torch.testing.assert_close(
            resumed[name], expected[name], rtol=0, atol=0.02 * scale + floor, msg=name
        )


def told(call, *arguments):
    """The error that a call ends with."""
    try:
        call(*arguments)
    except (UserError, SystemExit) as error:
        return str(error)
    return "none"


def absent(patience):
    """Rank 1 sleeps where it should come to step 3."""
    hosts = HostGroup(patience)
    for step in range(4):
        if step == 3 and distributed.rank() == 1:
            time.sleep(patience + 2.3)  # the others look for 2 s who is missing
        hosts.sync_step(step, 4, stop=False)


def test_a_rank_that_does_not_come_is_named(tmp_path):
    error = in_processes(told, 2, tmp_path, absent, 0.2)[0]
    assert error.startswith("Rank 1 did not reach step 3 within 0.2 s")
    assert "--resume" in error


def died(recipe, folder):
    """Rank 1 dies within a step: the other one waits for it in the gather or in the sum of the gradients."""
    trainer = trainer_of(recipe, folder)
    forward, calls = Objective.forward, iter(range(100))

    def deadly(self, *arguments):
        if distributed.rank() == 1 and next(calls) == 3:
            os._exit(0)
        return forward(self, *arguments)

    Objective.forward = deadly
    trainer.train()


def test_a_rank_that_dies_within_a_step_ends_the_run_without_a_trace(recipe, tmp_path):
    error = in_processes(told, 2, tmp_path / "a", died, of(recipe), tmp_path / "run")[0]
    assert all(part in error for part in ("did not reach step 3 within", "--resume"))


def test_what_the_first_rank_refuses_ends_the_others_too(recipe, one, tmp_path):
    first, second = in_processes(told, 2, tmp_path / "a", trainer_of, of(recipe), one)
    assert "already holds a run" in first
    assert second == "2", "the exit status"


class Slow(Sink):
    """A callback whose methods take their time once each."""

    def __init__(self, methods, seconds):
        for method in methods:
            setattr(self, method, partial(self.wait, [seconds]))

    def wait(self, left, *_):
        if left:
            time.sleep(left.pop())


SLOW = ("start", "log", "advance", "evaluation")


def slow_callback(recipe, folder, patience):
    trainer = trainer_of(recipe, folder, callbacks=[Slow(SLOW, patience + 0.2)])
    trainer.state.hosts = HostGroup(patience)
    return trainer.train().finished


def test_other_ranks_wait_for_a_slow_callback(two):
    assert two[1]["slow"] == ["none"] * 2


def dropout_mask(recipe, folder):
    trainer_of(recipe, folder)
    return torch.nn.functional.dropout(torch.ones(64)).tolist()


def test_no_two_processes_have_equal_dropout_masks(recipe, tmp_path):
    masks = in_processes(
        dropout_mask, 3, tmp_path / "a", of(recipe, batch_size=6), tmp_path / "run"
    )
    assert len(set(map(tuple, masks))) == 3


def only_one_fails(recipe, folder):
    """Rank 1 has an error of its data at the second step."""

    def augment(view, generator):
        fails = distributed.rank() == 1 and trainer.progress.step == 1
        return view[:, :1] if fails else view

    trainer = trainer_of(recipe, folder, augment=augment)
    trainer.state.hosts = HostGroup(10)
    trainer.train()


def test_an_error_of_one_ranks_data_ends_all_with_its_message_once(recipe, tmp_path):
    first, second = in_processes(
        told, 2, tmp_path / "a", only_one_fails, of(recipe), tmp_path / "run"
    )
    assert second.startswith("augment returned")
    assert first == "2", "the exit status"
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000001"]


def images_evaluated(recipe, folder):
    """The number of images that a process of a run encodes for evaluations."""
    trainer, encoded = trainer_of(recipe, folder), []

    def count(tower, given, _):
        if not tower.training:
            encoded.append(len(given[0]))

    trainer.state.model.image_tower.register_forward_hook(count)
    trainer.train()
    return sum(encoded)


def test_the_processes_of_a_run_share_its_evaluation(two):
    folder, ends = two
    assert ends["evaluated"] == [0, 24], "one batch, which the last rank encodes"
    (row,) = read_rows(folder / "evaluated/evaluations.jsonl")
    assert row["images"] == 24, "rank 0 writes what the other one encoded"
