"""The trainer: builds what a recipe describes, takes its steps, measures, keeps checkpoints, writes the report."""

import itertools
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from io import FileIO
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from declip.data.batch import PairBatch
from declip.data.loader import PairLoader
from declip.data.pair import SkipCounter
from declip.errors import UserError
from declip.io.pool import naming_lost_workers
from declip.models.device import pick_device
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.runs import checkpoint as checkpoints
from declip.runs.folder import Run, check_datasets, kept_encoder, lock_folder, log, open_folder
from declip.supervision.objective import Objective
from declip.training import distributed
from declip.training.bad_steps import NonFiniteGuard, shown
from declip.training.checkpoint_writer import CheckpointWriter
from declip.training.compilation import compile_towers, rows_of_rank
from declip.training.distributed import HostGroup
from declip.training.health import LossMonitor
from declip.training.measuring import measure, measured_at_end
from declip.training.memory import frozen_garbage, kept_memory
from declip.training.monitor import Monitor, NullMonitor
from declip.training.optimizer import build_optimizer, named_trainable
from declip.training.parallel import build_learner, core
from declip.training.precision import resolve_precision
from declip.training.pretrained import apply_pretrained, load_pretrained, waiting_norms
from declip.training.schedule import group_lr, learning_rate
from declip.training.setup import averaged, build_loader, open_training_source, plan_of
from declip.training.state import capture, restore, seed_rank
from declip.training.step import StepParts, training_step
from declip.training.stopping import STOP, TRY_AGAIN, stopping_politely
from declip.training.supply import ThroughputMonitor, free_cores

SKIPPED = "skipped.json"
WORTH_FREEZING = 200
"""Steps from which on freezing the garbage collector pays: it takes 0.3 s."""


class Trainer:
    """One run of a recipe.

    Args:
        recipe: What to run.
        folder: The run folder.
        resume: Go on with what is there.
        quiet: Draw no progress.

    Raises:
        UserError: see `declip.train`.
    """

    def __init__(self, recipe: Recipe, folder: Path, resume: bool = False, quiet: bool = False) -> None:
        self.folder, self.quiet = folder, quiet
        if recipe.train.threads is not None:
            torch.set_num_threads(recipe.train.threads)
        self.device = pick_device(distributed.own_device(recipe.train.device))
        distributed.join(self.device, recipe.train.rank_timeout)
        self.council = HostGroup(recipe.train.rank_timeout)
        self.leads = distributed.rank() == 0
        recipe = self.council.first(partial(resolve_precision, recipe, self.device, folder, resume))
        start = load_pretrained(recipe, folder, resume)
        self.recipe = recipe = start.fit(recipe) if start is not None else recipe
        self.source = open_training_source(recipe)
        torch.manual_seed(recipe.seed)
        encoder = start.encoder if start is not None else None
        if encoder is None and resume:
            encoder = kept_encoder(recipe, folder)
        self.model = DualEncoder.from_recipe(recipe, encoder).to(self.device)
        self.model.image_tower.refuse_size(recipe.image.model, recipe.image.size)
        self.objective = Objective(recipe, self.model).to(self.device)
        self.plan = plan_of(recipe)
        self.begun = apply_pretrained(start, recipe, self.model, self.objective)
        if recipe.train.channels_last:
            self.model.image_tower.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        self.learner = build_learner(recipe, self.model, self.objective)
        self.average = averaged(self.model, recipe.train.ema_decay)
        if recipe.train.compile:
            compile_towers(recipe, self.model, self.plan, rows_of_rank(recipe.train.batch_size))
        self.optimizer = build_optimizer(
            named_trainable(self.model, self.objective), recipe.train, self.begun.paces if self.begun else None
        )
        if not self.leads:  # the first goes on with the stream of the weights, as one process does
            seed_rank(recipe.seed, 0)
        self.skipped, self.step = SkipCounter(), 0
        self.bad_steps = NonFiniteGuard(recipe.train.max_nonfinite_steps, self.device)
        self.writer = CheckpointWriter(folder, recipe.train.keep_checkpoints)
        cores = free_cores(torch.get_num_threads() if self.device.type == "cpu" else 1)
        self.workers = min(1, cores) if recipe.data.workers == "auto" else recipe.data.workers
        self.supply = ThroughputMonitor(self.workers, cores)
        self._health = LossMonitor(recipe.train.batch_size, recipe.train.warmup_steps)
        self.stop_asked, self._signal, self._looked = False, 0, 0.0
        self.lock: FileIO | None = None
        # What can't be used is said before a folder is made or a step taken, not when it is first needed.
        self._loader_at(0).close()
        check_datasets(recipe)
        found = self._open_folder(resume)
        if found is not None:
            self._restore(found)
        elif self.begun is not None and self.leads:
            self.begun.keep(folder, recipe)

    @cached_property
    def loader(self) -> PairLoader:
        """Batches from the step that the run is at."""
        loader = self._loader_at(self.step)
        loader.skipped, loader.seen = self.skipped, self.step * self.recipe.train.batch_size
        return loader

    @cached_property
    def _waiting_norms(self) -> list[nn.Module]:
        return waiting_norms(self.model, self.begun.paces) if self.begun is not None else []

    def _loader_at(self, step: int) -> PairLoader:
        return build_loader(self.recipe, self.source, self.model, step, self.workers)

    @cached_property
    def parts(self) -> StepParts:
        """What a step works on."""
        train = self.recipe.train
        return StepParts(
            self.learner,
            self.optimizer,
            torch.tensor(self.plan.mean, device=self.device),
            torch.tensor(self.plan.std, device=self.device),
            self.average.update_parameters if self.average is not None else None,
            train.grad_clip_norm,
            train.precision,
            train.grad_cache_chunk,
            skip_nonfinite=train.max_nonfinite_steps > 0,
        )

    def train(self, finish: Callable[["Trainer"], None] | None = None) -> Run:
        """Take the steps that are left, then evaluate; the first rank then calls `finish`."""
        with self.lock or nullcontext():
            return self._train(finish)

    def _train(self, finish: Callable[["Trainer"], None] | None) -> Run:
        steps, batch = self.recipe.train.steps, self.recipe.train.batch_size
        monitor_of = Monitor if self.leads else NullMonitor
        with (
            monitor_of(self.folder, self.step, steps, batch, self.quiet) as monitor,
            self.writer,
        ):
            if self.step < steps:
                self._introduce()
                self._measure_start(monitor)
                with stopping_politely(self._ask_to_stop):
                    self._take_steps(monitor)
                    if self.step < steps:
                        self.writer.wait()  # a signal that comes again must not end the process before
            if self.step >= steps and not self.council.first(lambda: measured_at_end(self)):
                monitor.forget_evaluations(self.step)
                self.evaluate(monitor, final=True)
                monitor.flush()
        if self.step >= steps and finish is not None:
            self.council.first(lambda: finish(self))
        if "loader" in self.__dict__:
            self.loader.close()
        finished = self.step >= steps
        status = 130 if self._signal == signal.SIGINT else 0 if distributed.launched() else TRY_AGAIN
        return Run(self.folder, self.recipe, self.step, finished, status, self.leads)

    def _take_steps(self, monitor: Monitor) -> None:
        with self.learning():
            while True:
                with naming_lost_workers(f" at step {self.step}"):
                    asked = time.perf_counter()
                    batch = next(self.loader)
                    if self._step_with_others(batch, time.perf_counter() - asked, monitor):
                        return

    @contextmanager
    def learning(self) -> Iterator[None]:
        """What surrounds the loop of steps: training mode, and the memory's management."""
        train, on_cpu = self.recipe.train, self.device.type == "cpu"
        self.learner.train()
        with (
            frozen_garbage() if train.steps - self.step >= WORTH_FREEZING else nullcontext(),
            kept_memory() if on_cpu else nullcontext(),
        ):
            yield

    def _step_with_others(self, batch: PairBatch, waited: float, monitor: Monitor) -> bool:
        """Take a step; whether it was the last one."""
        train, begun = self.recipe.train, time.perf_counter()
        with self.council.naming_the_missing(self.step):
            meeting = self.council.meet(self.step, len(batch), self._asked_to_stop(), batch.skipped or None)
            if len(meeting.rows) > 1:
                self.loader.count(meeting.total, list(itertools.chain(*meeting.notes)))
            rate = learning_rate(self.step, train)
            for group in self.optimizer.param_groups:
                group["lr"] = group_lr(rate, self.step, group["pace"], self.recipe.head_warmup, train)
            if self.step <= self.recipe.head_warmup:
                for norm in self._waiting_norms:
                    norm.train(self.step == self.recipe.head_warmup)
            values: dict[str, Tensor] = {}
            if meeting.usable:  # else its pairs were broken: nothing is learnt, and nothing logged
                values = training_step(self.parts, batch, meeting)
                self.bad_steps.look(self.step, values)
            self.step += 1
            stop = meeting.stop or (self.stop_asked and len(meeting.rows) == 1)
            logged = self.step % train.log_every == 0 or self.step == train.steps
            kept = self.step % train.checkpoint_every == 0 or self.step == train.steps or stop
            self._check_finite(values, due=logged or kept)
            if values and logged:
                self._tell(monitor, values, rate)
            else:
                monitor.advance(self.step)
            self.supply.step(waited, time.perf_counter() - begun)
            done = self.step >= train.steps
            if logged and not done:
                self._mind_supply()
            if done:
                self._refuse_if_all_broken()
            if train.evaluate_every and self.step % train.evaluate_every == 0 and not done:
                self.evaluate(monitor)
                monitor.pause()
            if kept:
                monitor.flush()
                self.save()
                monitor.pause()
            return done or stop

    def _mind_supply(self) -> None:
        """Say once that the loader is too slow, or, where the recipe leaves that to us, give it more workers."""
        if not self.supply.starved():
            return
        if self.recipe.data.workers != "auto":
            if self.leads and not self.supply.told:
                log.warning(self.supply.advice())
            return
        more = min(self.supply.needed, self.supply.cores)
        if more > self.workers:
            log.info("Steps wait %.0f %% of their time for batches: %d workers.", 100 * self.supply.share, more)
            self.workers, self.supply = more, ThroughputMonitor(more, self.supply.cores)
            self.loader.close()
            del self.loader

    def _tell(self, monitor: Monitor, values: Mapping[str, Tensor], rate: float) -> None:
        """Log a step: the values are averaged over the ranks only here."""
        means = distributed.average(torch.stack(list(values.values()))).tolist()
        numbers = dict(zip(values, means, strict=True))
        monitor.metrics(self.step, numbers, rate, self.model.logit_scale.detach().exp().item())
        for warning in self._health.look(self.step, numbers) if self.leads else ():
            log.warning(warning)

    def _asked_to_stop(self) -> bool:
        """By a signal, or by a file that is looked for once a second."""
        now = time.monotonic()
        if self.leads and now - self._looked > 1:
            self._looked = now
            if (self.folder / STOP).exists():
                log.info("Found the file '%s': stopping after this step and saving.", STOP)
                (self.folder / STOP).unlink(missing_ok=True)
                self.stop_asked = True
        return self.stop_asked

    def evaluate(self, monitor: Monitor, final: bool = False) -> None:
        """Measure on the recipe's held-out sets; at the end also on its test sets.

        The first rank measures while the others wait. With FSDP all do, since each holds a part of the model.
        """
        if self.sharded:
            measure(self, monitor, final)
        else:
            self.council.first(lambda: measure(self, monitor, final))

    def _measure_start(self, monitor: Monitor) -> None:
        """Measure weights that exist before they are trained further, so that it is seen what is won and forgotten."""
        if self.step == 0 and self.begun is not None and self.begun.whole:
            monitor.forget_evaluations(0)
            self.evaluate(monitor, final=True)

    @property
    def evaluated_model(self) -> DualEncoder:
        """The averaged weights where the recipe asks for them, else the trained ones."""
        return cast(DualEncoder, self.average.module) if self.average is not None else self.model

    @property
    def sharded(self) -> bool:
        """Whether FSDP cut the model into shards."""
        return core(self.learner).sharded

    def counts(self) -> dict[str, Any]:
        """The pairs that were skipped, by reason, and how many were seen."""
        return {**self.skipped.to_dict(), "seen": self.step * self.recipe.train.batch_size}

    def save(self) -> Path:
        """Begin to write a checkpoint, and write the counts of skipped pairs; every rank must come here."""
        state = capture(self)
        if state is not None:
            (self.folder / SKIPPED).write_text(json.dumps(self.counts(), indent=1), encoding="utf-8")
            self.writer.write(state)
        return checkpoints.folder_of(self.folder, self.step)

    def _restore(self, found: checkpoints.Checkpoint) -> None:
        try:
            restore(self, found)
        except (RuntimeError, KeyError, ValueError, IndexError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{checkpoints.folder_of(self.folder, found.step)} does not fit the recipe of its run: "
                f"{str(error).splitlines()[0]}. Move it away to go on from an earlier one, or start anew with --out."
            ) from error

    def _open_folder(self, resume: bool) -> checkpoints.Checkpoint | None:
        """The checkpoint to go on from, if any: the first rank chooses it, the others read the same."""
        chosen: list[checkpoints.Checkpoint | None] = []

        def choose() -> Path | None:
            self.lock = lock_folder(self.folder)
            chosen.append(open_folder(self.recipe, self.folder, resume))
            return checkpoints.folder_of(self.folder, chosen[0].step) if chosen[0] else None

        path = self.council.first(choose)
        if path is None or chosen:
            return chosen[0] if chosen else None
        return checkpoints.load_checkpoint(path)

    def _check_finite(self, values: Mapping[str, Tensor], due: bool) -> None:
        """Stop at a total or gradient that is not finite; the weights are spoilt then, the checkpoints are not."""
        if not due and self.device.type != "cpu" and not self.stop_asked:
            return
        bad = self.bad_steps.first
        if bad is None:
            return
        earlier = checkpoints.list_checkpoints(self.folder)
        indices = [int(index) for index in self.loader.indices(bad)]
        raise UserError(
            f"The loss is not finite at step {bad + 1}: {shown(values)}. The batch held the pairs "
            f"{', '.join(map(str, indices[:8]))}{' …' if len(indices) > 8 else ''} of '{self.source.name}'. "
            f"The last good checkpoint is {earlier[-1] if earlier else 'missing: none was written yet'}. "
            "A lower train.lr, a longer train.warmup_steps, or train.grad_clip_norm=1.0 usually helps."
        )

    def _refuse_if_all_broken(self) -> None:
        """Call nothing a trained model that saw no pair."""
        if self.skipped.total < self.loader.seen:
            return
        reasons = "; ".join(f"{reason}: {', '.join(keys)}" for reason, keys in self.skipped.examples.items())
        raise UserError(
            f"None of the {self.loader.seen} pairs seen of '{self.source.name}' could be used, so nothing was learnt. "
            f"Mend the pairs, or give others as data.source. {reasons}."
        )

    def _introduce(self) -> None:
        size = sum(p.numel() for p in self.model.parameters()) / 1e6
        head = sum(p.numel() for p in self.objective.parameters()) / 1e6
        terms = ", ".join(f"{weight:g} {name}" for name, weight in self.objective.weights.items())
        log.info(
            "%s: %s pairs of %s; %.1f M parameters and %.1f M in heads; %s; %s, %s, %d threads",
            f"Going on at step {self.step}" if self.step else "Starting",
            f"{len(self.source):,}",
            self.source.name,
            size,
            head,
            terms,
            self.device,
            self.recipe.train.precision,
            torch.get_num_threads(),
        )
        if self.begun is not None:
            log.info("%s %s", self.begun.story, self._who_learns_when())

    def _who_learns_when(self) -> str:
        groups, until = self.optimizer.param_groups, self.recipe.head_warmup
        learn = sum(p.numel() for group in groups for p in group["params"]) / 1e6
        waiting = sum(p.numel() for group in groups if group["pace"].waits for p in group["params"]) / 1e6
        if not waiting:
            return f"{learn:,.2f} M parameters learn in every step."
        asked = self.recipe.finetune.head_warmup_steps
        cut = "" if until == asked else f" (a quarter of train.steps, since finetune.head_warmup_steps={asked} is more)"
        return (
            f"Steps 1 to {until}{cut}: only what is new learns, {learn - waiting:,.2f} M parameters. From step "
            f"{until + 1} on what came with the weights learns too: {learn:,.2f} M."
        )

    def _ask_to_stop(self, number: int) -> None:
        self.stop_asked, self._signal = True, number
