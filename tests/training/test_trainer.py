import multiprocessing
import os
import resource
import signal
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch

from conftest import WEIGHTS, refuses, write_rows
from declip.api import train
from declip.data.images import views
from declip.data.sources.open import open_source
from declip.data.sources.subset import Subset
from declip.errors import UserError
from declip.evaluation import held_out as evaluations
from declip.models.device import computes_bf16
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe
from declip.runs.checkpoint import list_checkpoints, load_checkpoint
from declip.runs.folder import read_rows
from declip.training import assemble as assembly
from declip.training import trainer as trainer_module
from declip.training.assemble import assemble
from declip.training.estimate import estimate
from declip.training.signals import TRY_AGAIN
from declip.training.sinks import Sink
from training.starts import quiet_train, recipe_for, same_end, stop_at, trainer_of


@pytest.mark.parametrize("name", ["slip", "defilip"])  # together they have the losses of all
def test_training_lowers_the_weighted_sum_of_its_losses(table, tmp_path, name):
    recipe = recipe_for(table, name, steps=24, lr=3e-3, log_every=1, checkpoint_every=60)
    run = quiet_train(recipe, tmp_path)
    totals = [row["loss"] for row in run.metrics]
    assert sum(totals[-8:]) < sum(totals[:8]) - 0.8
    for row in run.metrics:
        weighted = [weight * row["losses"][loss] for loss, weight in WEIGHTS[name].items()]
        assert row["loss"] == pytest.approx(sum(weighted), rel=1e-4, abs=1e-4)


def size_of(path):
    return path.stat().st_size if path.exists() else -1


def names_in(folder):
    return {path.name for path in folder.glob("*")}


def test_killed_at_any_moment_it_resumes_to_the_same_bits(table, tmp_path):
    """SIGKILL before the first step, between checkpoints, and while one is written and renamed."""
    recipe = recipe_for(table, "declip", steps=12, checkpoint_every=4, log_every=2)
    quiet_train(recipe, tmp_path / "whole")
    run = tmp_path / "killed"
    checkpoints = partial(names_in, run / "checkpoints")
    options = {"out": run, "resume": True, "progress": False, "report": False}
    moments = [
        (partial(names_in, run), 0.0),
        (partial(size_of, run / "metrics.jsonl"), 0.0),
        (checkpoints, 0.0),
        (checkpoints, 0.004),
    ]
    for changes, delay in moments:
        process = multiprocessing.get_context("fork").Process(
            target=train, args=(recipe,), kwargs=options
        )
        before = changes()
        process.start()
        while process.is_alive() and changes() == before:
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run was too quick to be killed"
    quiet_train(recipe, run, resume=True)
    same_end(tmp_path / "whole", run)


@pytest.fixture(scope="module")
def whole(table, tmp_path_factory):
    """A recipe of CLIP's loss, and a run of it that nothing interrupts."""
    recipe = recipe_for(table, "clip", checkpoint_every=100)
    return recipe, quiet_train(recipe, tmp_path_factory.mktemp("whole") / "run").folder


@pytest.mark.parametrize(
    ("signals", "status"), [([signal.SIGINT], 130), ([signal.SIGUSR1] * 2, TRY_AGAIN)]
)
def test_a_signal_saves_and_the_run_continues(whole, tmp_path, monkeypatch, signals, status):
    """SIGUSR1 may come twice; a second Ctrl-C would end at once."""
    recipe, expected = whole
    step, left = trainer_module.training_step, list(signals)

    def interrupted(*arguments):
        while left:
            os.kill(os.getpid(), left.pop())
        return step(*arguments)

    monkeypatch.setattr(trainer_module, "training_step", interrupted)
    run = quiet_train(recipe, tmp_path / "run")
    assert (run.finished, run.step, run.status) == (False, 1, status)
    assert len(list_checkpoints(run.folder)) == 1
    assert quiet_train(recipe, tmp_path / "run", resume=True).step == 8
    same_end(expected, tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_with_all_that_helps(table, tmp_path, monkeypatch):
    trainer = trainer_of(recipe_for(table, checkpoint_every=2, log_every=1), tmp_path)
    term = trainer.state.objective.terms["contrastive"]
    loss = term.loss
    factor = lambda: float("nan") if trainer.progress.step == 5 else 1.0  # noqa: E731
    monkeypatch.setattr(term, "loss", lambda *rows: loss(*rows) * factor())
    message = refuses(("not finite at step 6", "contrastive nan", "step-00000004"), trainer.train)
    numbers = message.split("pairs ")[1].split(" … of ")[0]
    assert set(map(int, numbers.split(", "))) == set(map(int, trainer.loader.indices(5)))
    weights = load_checkpoint(list_checkpoints(tmp_path)[-1]).weights
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_a_run_of_another_recipe_is_not_resumed(table, tmp_path):
    run = tmp_path / "run"
    quiet_train(recipe_for(table, steps=2), run)
    with pytest.raises(UserError, match=r"lr was 0\.001.*steps was 2.*finetune\.pretrained"):
        quiet_train(recipe_for(table, lr=2e-3, steps=9), run, resume=True)
    rows = (run / "metrics.jsonl").read_text()
    other = recipe_for(table, steps=2, checkpoint_every=3, keep_checkpoints=9)
    assert quiet_train(other, run, resume=True).finished
    assert (run / "metrics.jsonl").read_text() == rows


@pytest.mark.parametrize("name", ["pairs.jsonl", "val.jsonl"])
def test_a_run_is_not_resumed_with_other_pairs_but_with_repaired_ones(rows, tmp_path, name):
    captions = [row["caption"] for row in rows]
    for each in ("pairs.jsonl", "val.jsonl"):
        write_rows(tmp_path / each, [{**rows[0], "caption": ""}, *rows[1:]])
    sections = {"evaluation": {"retrieval": [str(tmp_path / "val.jsonl")]}}
    recipe = recipe_for(tmp_path / "pairs.jsonl", "clip", sections, steps=2)
    run = quiet_train(recipe, tmp_path / "run").folder
    turned = captions[1:] + captions[:1]
    shuffled = [{**row, "caption": each} for row, each in zip(rows, turned, strict=True)]
    changes = {"sampled keys or captions": shuffled, "sampled": rows[::-1], "24 .*23": rows[:-1]}
    for change, others in changes.items():
        write_rows(tmp_path / name, others)
        refuses(f"{change}.*--out", assemble, recipe, run, resume=True)
    write_rows(tmp_path / name, rows)
    assert assemble(recipe, run, resume=True).progress.step == 2


class Breaking(Subset):
    """A source that raises a `UserError` for every pair once it is told to, as a table rewritten in place does."""

    broken = False

    def __init__(self, table):
        source = open_source(str(table))
        super().__init__(source, np.arange(len(source)), "pairs")

    def __getitem__(self, index):
        if self.broken:
            raise UserError("the table changed")
        return super().__getitem__(index)


def test_an_error_of_the_data_in_mid_run_saves_the_steps_before(table, rows, tmp_path):
    val = write_rows(tmp_path / "val.jsonl", rows)
    sections = {"evaluation": {"retrieval": [str(val)]}}
    keys = {"log_every": 1, "checkpoint_every": 100, "evaluate_every": 5}
    recipe = recipe_for(table, "clip", sections, **keys)
    quiet_train(recipe, tmp_path / "whole")
    (tmp_path / "mine.yaml").write_text(recipe.to_yaml())
    source, held_out = Breaking(table), Breaking(val)
    for name, breaks in {"training pairs": source, "held-out set": held_out}.items():
        sink = Mock(Sink)
        sink.log.side_effect = lambda step, _, breaks=breaks: setattr(breaks, "broken", step == 5)
        out, sources = tmp_path / name, {"data": source, "val": [held_out]}
        given = {"recipe": tmp_path / "mine.yaml", "out": out, **sources}
        refuses("the table changed", quiet_train, **given, callbacks=[sink])
        assert [path.name for path in list_checkpoints(out)] == ["step-00000005"], name
        breaks.broken = False
        assert quiet_train(**given, resume=True).finished
        same_end(tmp_path / "whole", out)


def test_damaged_lines_are_dropped_with_a_warning_and_block_no_resume(table, tmp_path):
    stop_at(recipe_for(table, "clip"), tmp_path, 1)
    bad = [b'{"step": 2, "pa', b"\0" * 40, b"\xff\xfe{}", b"17", b"[" * 100_000, b'{"step": 1, "lo']
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        (tmp_path / name).write_bytes(b"\n".join([b'{"step": 1}', *bad]))
    quiet_train(recipe_for(table, "clip"), tmp_path, resume=True)
    for name, steps in (("metrics.jsonl", [1, 2, 4, 6, 8]), ("evaluations.jsonl", [1])):
        assert [row["step"] for row in read_rows(tmp_path / name)] == steps
        assert f"6 damaged lines of {tmp_path / name}" in (tmp_path / "log.txt").read_text()


def test_a_few_pairs_of_which_many_are_broken_are_refused_before_training(table, rows, tmp_path):
    lost = [{"image": f"missing-{number}.png", "caption": "lost"} for number in range(4)]
    data = {"source": str(write_rows(tmp_path / "pairs.jsonl", [*rows[:12], *lost]))}
    recipe = recipe_for(table, "clip", {"data": data})
    told = r"4 of the 16 .*data\.max_broken_fraction.*4 × missing image"
    refuses(told, assemble, recipe, tmp_path / "run")
    refuses(told, estimate, recipe)
    assert not (tmp_path / "run").exists()
    data["max_broken_fraction"] = 0.3
    assemble(recipe_for(table, "clip", {"data": data}), tmp_path / "run")


def test_a_folder_in_use_is_refused_and_free_as_soon_as_its_process_is_killed(table, tmp_path):
    """A worker of the killed process, which lives on for some seconds, holds nothing."""
    data = {"source": str(table), "workers": 1}
    recipe = recipe_for(table, sections={"data": data}, steps=100_000, checkpoint_every=2)
    process = multiprocessing.get_context("fork").Process(
        target=train, args=(recipe,), kwargs={"out": tmp_path}
    )
    process.start()
    while process.is_alive() and not list_checkpoints(tmp_path):
        time.sleep(0.01)
    refuses(rf"in use: process {process.pid} on .*--out", assemble, recipe, tmp_path, resume=True)
    assert process.is_alive()
    process.kill()
    process.join()
    assert assemble(recipe, tmp_path, resume=True).progress.step > 0


def test_wrong_runs_are_refused_before_anything_is_made(table, tmp_path):
    small = {"image": {"model": "convnext_atto", "size": 16}}  # its last grid would be half a cell
    for recipe, message in (
        (recipe_for(table, batch_size=64), "24"),
        (recipe_for(table, device="cuda:7"), r"train\.device"),
        (recipe_for(table, sections=small), r"'convnext_atto'.*16 × 16.*image\.size"),
    ):
        refuses(message, quiet_train, recipe, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_evaluations_change_nothing_and_one_that_a_crash_cut_short_is_done_again_once(
    table, tmp_path, monkeypatch
):
    tree = recipe_for(table, "clip", log_every=1, steps=4).model_dump()
    tree["image"]["model_kwargs"]["pos_drop_rate"] = 0.5
    plain = quiet_train(Recipe.model_validate(tree), tmp_path / "plain")
    tree["evaluation"]["retrieval"] = [str(table)]
    tree["train"]["evaluate_every"] = 2
    recipe = Recipe.model_validate(tree)
    results = [DEFAULT, RuntimeError("crash")]  # after the last step
    with monkeypatch.context() as broken:
        broken.setattr(
            evaluations, "evaluate_all", Mock(wraps=evaluations.evaluate_all, side_effect=results)
        )
        with pytest.raises(RuntimeError, match="crash"):
            quiet_train(recipe, tmp_path / "run")
    for _ in range(2):
        run = quiet_train(recipe, tmp_path / "run", resume=True)
        assert [row["step"] for row in run.evaluations] == [2, 4]
    assert [row["loss"] for row in run.metrics] == [row["loss"] for row in plain.metrics]


@pytest.mark.parametrize("chunk", [None, 3])
def test_views_are_finished_in_full_precision(table, tmp_path, monkeypatch, chunk):
    seen, apply = [], views.apply
    autocast = lambda: torch.is_autocast_enabled("cpu")  # noqa: E731
    monkeypatch.setattr(views, "apply", lambda *given: seen.append(autocast()) or apply(*given))
    quiet_train(recipe_for(table, steps=1, precision="bf16", grad_cache_chunk=chunk), tmp_path)
    assert set(seen) == {False}


@pytest.mark.parametrize(
    ("asked", "can", "taken"),
    [
        ("auto", True, "bf16"),
        ("auto", False, "fp32"),
        ("fp32", True, "fp32"),
        ("bf16", False, "bf16"),
    ],
)
def test_a_run_takes_the_precision_that_its_device_can_and_keeps_it(
    table, tmp_path, monkeypatch, asked, can, taken
):
    monkeypatch.setattr(assembly, "computes_bf16", lambda device: can)
    first = trainer_of(recipe_for(table, precision=asked), tmp_path)
    assert first.state.recipe.train.precision == taken
    first.state.lock.close()
    monkeypatch.setattr(assembly, "computes_bf16", lambda device: not can)
    again = trainer_of(recipe_for(table, precision=asked), tmp_path, resume=True)
    assert again.state.recipe.train.precision == taken


def test_a_device_is_asked_for_its_precision(monkeypatch):
    for can in (False, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda can=can: {"avx512_bf16": can})
        supported = lambda including_emulation, c=can: c or including_emulation  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        found = [computes_bf16(torch.device(name)) for name in ("cpu", "cuda", "meta")]
        assert found == [can, can, False]


def _told_without_memory(recipe, folder, queue):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))
    try:
        assemble(recipe, folder)
    except UserError as error:
        queue.put(str(error))


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_a_model_without_memory_for_it_is_one_error(table, tmp_path):
    large = recipe_for(table, "clip", {"text": {"width": 2**14, "layers": 12, "heads": 2}})
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_told_without_memory, args=(large, tmp_path / "run", queue))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert not queue.empty()
    error = queue.get()
    assert all(part in error for part in ("text.width=16384", "memory"))


@pytest.mark.parametrize("key", ["text.context_length", "text.width", "text.layers", "embed_dim"])
def test_sizes_beyond_all_models_are_refused(key):
    large = {key: 100_000_000}
    refuses(rf"{key}=100000000.*less than or equal to", load_recipe, "demo-clip", large)


class Marked(list):
    """Pairs of which each access leaves the number of its process in a folder."""

    def __getitem__(self, index):
        (self.folder / str(os.getpid())).touch()
        return super().__getitem__(index)


def test_images_of_an_evaluation_are_read_by_loader_processes(rows, table, tmp_path):
    held_out = Marked((row["image"], row["caption"]) for row in rows[:8])
    held_out.folder = tmp_path / "readers"
    held_out.folder.mkdir()
    recipe = recipe_for(table, "clip", {"data": {"source": str(table), "workers": 1}}, steps=1)
    recipe = recipe.with_keys({"evaluation.retrieval": ("python:held-out",)})
    trainer_of(recipe, tmp_path / "run", sources={"python:held-out": held_out}).train()
    readers = {path.name for path in held_out.folder.iterdir()}
    assert len(readers - {str(os.getpid())}) == 1


def test_a_gpu_gets_the_options_of_the_recipe(table, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    set_precision = Mock()
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_precision)
    recipe = recipe_for(table, "clip", matmul_precision="high")
    assembly.set_up(torch.device("cpu"), recipe.train)
    assert (torch.backends.cudnn.benchmark, set_precision.called) == (False, False)
    for deterministic in (False, True):
        monkeypatch.setattr(
            torch, "are_deterministic_algorithms_enabled", lambda asked=deterministic: asked
        )
        assembly.set_up(torch.device("cuda"), recipe.train)
        assert torch.backends.cudnn.benchmark != deterministic
    set_precision.assert_called_with("high")
    monkeypatch.setattr(assembly, "set_up", set_up := Mock())
    trainer_of(recipe, tmp_path).state.lock.close()
    set_up.assert_called_once_with(torch.device("cpu"), recipe.train)
