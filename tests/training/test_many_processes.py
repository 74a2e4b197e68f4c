"""The trainer on several processes: one run, one folder, one end, whatever happens to a rank."""

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
from declip.runs.folder import KEPT, read_rows
from declip.supervision.objective import Objective
from declip.training import distributed
from declip.training.distributed import HostGroup
from declip.training.sinks import Sink
from declip.training.trainer import warn_once
from training.starts import losses, moved, quiet_train, same_end, trained, trainer_of, tuned

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
    tree = tiny_tree(path, "declip", name="declip")
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


def test_two_processes_make_one_run(recipe, one, tmp_path):
    assert in_processes(trained, 2, tmp_path / "a", of(recipe), tmp_path / "two") == [(5, True)] * 2
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-3)
    assert (one / "skipped.json").read_text() == (tmp_path / "two/skipped.json").read_text()
    queues = [end_of(run)[QUEUE] for run in (one, tmp_path / "two")]
    torch.testing.assert_close(*queues, rtol=0, atol=0.02)  # the same captions in the same slots
    assert len(list_checkpoints(tmp_path / "two")) == 2


@pytest.mark.parametrize(
    ("keys", "parallel"),
    [({"freeze_image_blocks": 2, "layer_decay": 0.8}, "fsdp"), ({"lora": {"rank": 2}}, "ddp")],
    ids=["frozen-sharded", "lora"],
)
def test_two_processes_tune_as_one(table, tmp_path, start, keys, parallel):
    recipe = tuned(table, start, {"strategy": parallel, "steps": 2, "log_every": 1}, **keys)
    quiet_train(recipe, tmp_path / "one")
    assert in_processes(trained, 2, tmp_path / "ranks", recipe, tmp_path / "two") == [(2, True)] * 2
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    given, first, second = (
        declip.load(run, device="cpu").state_dict()
        for run in (start, tmp_path / "one", tmp_path / "two")
    )
    still = given.keys() - moved(given, first)
    assert still == given.keys() - moved(given, second)
    assert len(still) > 10
    assert (tmp_path / "two" / KEPT).is_file()


def warned(recipe, folder, caplog):
    warn_once.cache_clear()
    assert trained(recipe, folder) == (26, True)
    return caplog.text.count("too few usable pairs")


def test_steps_in_which_a_process_has_no_pair_are_left_out_with_one_warning(
    recipe, tmp_path, caplog
):
    two_epochs = of(
        {**recipe, "loss_weights": WEIGHTS["clip"]}, batch_size=2, steps=26, checkpoint_every=100
    )
    assert in_processes(warned, 2, tmp_path / "a", two_epochs, tmp_path / "run", caplog) == [1, 0]
    assert 22 <= len(losses(tmp_path / "run")) < 25


def whole_and_in_parts(recipe, whole, parts):
    return [trained(recipe, whole), stopped(recipe, parts, 0, 1), trained(recipe, parts, True)]


def test_stopped_on_one_rank_both_stop_and_the_rest_is_bit_for_bit(recipe, tmp_path):
    dropout = of({**recipe, **DROPOUT}, strategy="fsdp", checkpoint_every=100, steps=2)
    ends = in_processes(
        whole_and_in_parts, 2, tmp_path / "a", dropout, tmp_path / "whole", tmp_path / "parts"
    )
    assert ends == [[(2, True), (1, False), (2, True)]] * 2
    whole = end_of(tmp_path / "whole")
    assert not torch.equal(whole["random.0.cpu"], whole["random.1.cpu"])
    same_end(tmp_path / "whole", tmp_path / "parts")


def test_another_number_of_processes_goes_on_with_the_same_batches_and_moments(
    recipe, one, tmp_path
):
    parts, other = tmp_path / "parts", of(recipe, strategy="fsdp")
    assert not stopped(other, parts, 3, 0)[1]
    assert in_processes(trained, 2, tmp_path / "b", other, parts, True) == [(5, True)] * 2
    assert losses(parts) == pytest.approx(losses(one), rel=1e-3)
    resumed, expected = end_of(parts), end_of(one)
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


def test_other_ranks_wait_for_a_slow_callback(recipe, table, tmp_path):
    keys = {**recipe, "loss_weights": WEIGHTS["clip"], "evaluation": {"retrieval": [str(table)]}}
    two = of(keys, steps=4, log_every=2, strategy="fsdp")
    found = in_processes(told, 2, tmp_path / "a", slow_callback, two, tmp_path / "run", 1.0)
    assert found == ["none"] * 2


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


def test_a_queue_of_each_process_is_resumed(recipe, tmp_path):
    keys = {**recipe, "nearest_neighbor": {"queue_size": 16, "queue_per_process": True}}
    folders = tmp_path / "one", tmp_path / "two"
    in_processes(whole_and_in_parts, 2, tmp_path / "ranks", of(keys, steps=2), *folders)
    one, two = map(end_of, folders)
    other = QUEUE.replace("objective", "process.1")
    assert not torch.equal(one[QUEUE], one[other])
    assert torch.equal(one[QUEUE], two[QUEUE])
    assert torch.equal(one[other], two[other])


def images_evaluated(recipe, folder):
    """The number of images that a process of a run encodes for evaluations."""
    trainer, encoded = trainer_of(recipe, folder), []

    def count(tower, given, _):
        if not tower.training:
            encoded.append(len(given[0]))

    trainer.state.model.image_tower.register_forward_hook(count)
    trainer.train()
    return sum(encoded)


def test_the_processes_of_a_run_share_its_evaluation(table, tmp_path):
    keys = of(tiny_tree(table, evaluation={"retrieval": [str(table)]}), steps=1)
    run = tmp_path / "run"
    found = in_processes(images_evaluated, 2, tmp_path / "ranks", keys, run)
    assert found == [0, 24], "one batch, which the last rank encodes"
    (row,) = read_rows(run / "evaluations.jsonl")
    assert row["images"] == 24, "rank 0 writes what the other one encoded"
