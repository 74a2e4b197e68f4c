"""The loop of a run: steps, evaluations and checkpoints, until the last step or a request to stop."""

import itertools
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from declip.data.batch import PairBatch
from declip.data.sources.checks import describe_source
from declip.errors import UserError
from declip.evaluation.results import Result
from declip.io.pool import naming_lost_workers
from declip.models.dual_encoder import DualEncoder
from declip.runs import checkpoint as checkpoints
from declip.runs import folder as run_folder
from declip.runs.checkpoint import CheckpointWriter
from declip.runs.folder import Run, log
from declip.training import distributed
from declip.training.distributed import StepSync
from declip.training.examples import write_examples
from declip.training.optimizer import group_lr, learning_rate
from declip.training.parallel import whole_model
from declip.training.signals import TRY_AGAIN, StopRequest
from declip.training.sinks import Monitor, RunInfo, Sink, open_monitor
from declip.training.state import BestEvaluation, RunState, collect, load_weights
from declip.training.step import training_step
from declip.training.trackers import trackers_of
from declip.training.warnings import LossMonitor, ThroughputMonitor

warn_once = cache(log.warning)


class Trainer:
    """Takes the remaining steps of a run."""

    def __init__(self, state: RunState, progress: bool = True) -> None:
        recipe = state.recipe
        self.state = state
        self.progress = state.progress
        self.loader = state.loader
        # Step whose loss or gradient is not finite
        self.first_bad = torch.tensor(-1, device=state.model.device)
        self.losses = LossMonitor(
            recipe.train.batch_size, recipe.train.warmup_steps, state.objective.watched
        )
        self.throughput = ThroughputMonitor()
        self.stop = StopRequest()
        self.writer = CheckpointWriter(state.folder, recipe.train.keep_checkpoints)
        self.start = state.progress.step
        self.is_rank_zero = distributed.is_rank_zero()
        self.info = RunInfo(
            state.folder,
            self.start,
            recipe.train.steps,
            recipe.train.batch_size,
            progress,
            state.model,
            dict(state.objective.terms.items()),
        )
        self.calls_user = False  # whether rank 0 has callbacks, which may be slow at any step

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or the last `train.patience` evaluations were no better than one before."""
        train = self.state.recipe.train
        best = self.progress.best
        stale = best is not None and train.patience is not None and best.stale >= train.patience
        return self.progress.step >= train.steps or stale

    def train(self, finish: Callable[[Path, DualEncoder], object] | None = None) -> Run:
        """Take the remaining steps, then evaluate; rank 0 then calls `finish` with the folder and the model."""
        state = self.state
        train = state.recipe.train
        with state.lock or nullcontext():
            sinks: list[Sink] = []
            if self.is_rank_zero:
                sinks = [*trackers_of(train.report_to), *state.extensions.callbacks]
            with open_monitor(self.info, sinks, not self.is_rank_zero) as monitor, self.writer:
                # Other ranks wait here for the start of slow sinks.
                self.calls_user = state.hosts.on_rank_zero(lambda: bool(state.extensions.callbacks))
                if not self.finished:
                    self._prepare(monitor)
                    monitor.restart_timer()
                    with self.stop.listening():
                        self._take_steps(monitor)
                        if not self.finished:
                            self.writer.wait()  # a second signal must not end the process before
                if self.finished:
                    self._load_best()
                    if not state.hosts.on_rank_zero(self._evaluated_at_end):
                        self.evaluate(monitor, final=True)
                        monitor.flush()
            finished = self.finished
            if finished and finish is not None:
                whole = whole_model(state.learner)
                state.hosts.on_rank_zero(partial(finish, state.folder, whole))
            self.loader.close()
        status = 0 if distributed.launched() else TRY_AGAIN
        if self.stop.signal == signal.SIGINT:
            status = 130
        return Run(state.folder, self.progress.step, finished, status, self.is_rank_zero)

    def _prepare(self, monitor: Monitor) -> None:
        """Do what precedes the next step: messages, and evaluation of the starting weights."""
        state = self.state
        step = self.progress.step
        groups = (group["params"] for group in state.optimizer.param_groups)
        trained = sum(p.numel() for p in itertools.chain(*groups)) / 1e6
        named = state.objective.weights.items()
        weights = ", ".join(f"{weight:g} {name}" for name, weight in named)
        begins = "Starting"
        if step:
            begins = f"Resuming at step {step}"
        log.info(
            f"{begins}: {describe_source(state.source)}; "
            f"{trained:,.2f} M trainable parameters; {weights}; {state.model.device}, "
            f"{state.recipe.train.precision}, {torch.get_num_threads()} threads"
        )
        if state.pretrained is not None:
            log.info(state.pretrained.summary)
        if step == 0 and state.pretrained is not None and state.pretrained.whole:
            results = self.evaluate(monitor, final=True)
            if self._update_best(results):
                self.save(monitor)
        state.learner.train()

    def _take_steps(self, monitor: Monitor) -> None:
        """Take steps until the last one, a request to stop, or evaluations that no longer improve."""
        state = self.state
        progress = self.progress
        train = state.recipe.train
        stopped = False
        while not (self.finished or stopped):
            with (
                naming_lost_workers(f" at step {progress.step}"),
                state.hosts.explain_timeout(progress.step),
            ):
                # --- batch
                batch, sync, waited = self._next_batch(monitor)

                # --- step
                began = time.perf_counter()
                values, lr = self._step(batch, sync)
                progress.step += 1
                step = progress.step
                done = step >= train.steps
                stopped = sync.stop or (self.stop.asked and len(sync.rows) == 1)
                # Elsewhere a wait for the device, so only where one is due
                if state.model.device.type == "cpu":
                    self._refuse_nonfinite(values)

                # --- log, also before an evaluation that may end the run
                may_end = train.patience is not None and self._evaluation_due()
                if step % train.log_every == 0 or done or may_end:
                    self._refuse_nonfinite(values)
                    self._log(monitor, values, lr)
                else:
                    self._advance(monitor)
                self._warn(
                    self.throughput.check(waited, time.perf_counter() - began, state.workers)
                )
                if done:
                    self._check_skipped()
                monitor.count()

                # --- evaluate
                if self._evaluation_due():
                    self._refuse_nonfinite(values)
                    with self._saving(monitor):
                        results = self.evaluate(monitor)
                        self._update_best(results)

                # --- save
                best = progress.best is not None and progress.best.step == step
                if step % train.checkpoint_every == 0 or best or self.finished or stopped:
                    self._refuse_nonfinite(values)
                    self.save(monitor)
                monitor.restart_timer()

    def _evaluation_due(self) -> bool:
        """Whether this step is followed by an evaluation; the last one is only if it may have the best weights."""
        step = self.progress.step
        train = self.state.recipe.train
        last = step >= train.steps
        if last:
            return train.patience is not None
        return train.evaluate_every > 0 and step % train.evaluate_every == 0

    def _next_batch(self, monitor: Monitor) -> tuple[PairBatch, StepSync, float]:
        """Read a batch; return it with the state of all ranks and the seconds that it took."""
        batch: PairBatch | None = None
        error: UserError | SystemExit = SystemExit(2)  # if another rank has the error
        rows = 0
        skipped = None
        asked = time.perf_counter()
        try:
            batch = next(self.loader)
            rows = len(batch)
            skipped = batch.skipped or None
        except UserError as broken:
            error = broken
        waited = time.perf_counter() - asked
        sync = self.state.hosts.sync_step(
            self.progress.step, rows, self.stop.asked, skipped, batch is None
        )
        with self._saving(monitor):
            if batch is None or sync.failed:  # any rank cannot read its pairs: all save and end
                raise error
            if len(sync.rows) > 1:
                self.loader.count(sync.total, list(itertools.chain(*sync.notes)))
        if self.is_rank_zero and not (self.state.folder / run_folder.EXAMPLES).exists():
            write_examples(self.state, batch)
        return batch, sync, waited

    @contextmanager
    def _saving(self, monitor: Monitor) -> Iterator[None]:
        """Save a checkpoint before an error that all ranks raise here ends the run."""
        try:
            yield
        except (UserError, SystemExit):  # SystemExit: rank 0 has the error
            if self.progress.step > self.start:
                self.save(monitor)
            raise

    def _step(self, batch: PairBatch, sync: StepSync) -> tuple[dict[str, Tensor], float]:
        """Take a step; return its losses, none if it was left out, and the learning rate."""
        state = self.state
        step = self.progress.step
        train = state.recipe.train
        lr = learning_rate(step, train)
        for group in state.optimizer.param_groups:
            group["lr"] = group_lr(lr, step, group["multiplier"], state.recipe.head_warmup, train)
        if sync.usable:
            values = training_step(state.learner, state.optimizer, batch, sync)
            bad = ~torch.isfinite(values["loss"] + values["grad_norm"])
            # No wait for the device
            self.first_bad = torch.where((self.first_bad < 0) & bad, step, self.first_bad)
            return values, lr
        if self.is_rank_zero:
            warn_once("Steps with too few usable pairs (fewer than one on a process) are skipped.")
        return {}, lr

    # --- what belongs to a step

    def _log(self, monitor: Monitor, values: Mapping[str, Tensor], lr: float) -> None:
        """Log a step; report it without numbers if `values` is empty, because it was left out."""
        if not values:
            self._advance(monitor)
            return
        # A collective and a wait for the device, so only at logged steps.
        stacked = torch.stack(list(values.values()))
        means = distributed.average(stacked).tolist()
        numbers = dict(zip(values, means, strict=True))
        logit_scale = self.state.model.logit_scale.detach().exp().item()
        # A callback may take longer than ranks wait for each other at a step.
        self.state.hosts.on_rank_zero(
            partial(monitor.log, self.progress.step, numbers, lr, logit_scale)
        )
        self._warn(self.losses.check(self.progress.step, numbers))

    def _advance(self, monitor: Monitor) -> None:
        """Report a step that is not logged."""
        report = partial(monitor.advance, self.progress.step)
        if self.calls_user:
            self.state.hosts.on_rank_zero(report)
        else:
            report()

    def _warn(self, message: str | None) -> None:
        if message is not None and self.is_rank_zero:
            log.warning(message)

    def _check_skipped(self) -> None:
        """Warn of lost pairs after the last step; refuse a run that had no pair."""
        skipped = self.progress.skipped
        seen = self.loader.seen
        name = self.state.source.name
        if skipped.total >= seen:
            raise UserError(
                f"No pair of '{name}' could be used, so nothing was learned. {skipped.explanation()}"
            )
        if skipped.total > self.state.recipe.data.max_broken_fraction * seen:
            self._warn(
                f"{skipped.total:,} of the {seen:,} pairs seen could not be used. {skipped.explanation()}"
            )

    def _refuse_nonfinite(self, values: Mapping[str, Tensor]) -> None:
        """Stop at a loss or gradient that is not finite: the weights may be corrupted, the checkpoints are not."""
        bad = int(self.first_bad)
        if bad < 0:
            return
        self.writer.wait()
        earlier = checkpoints.list_checkpoints(self.state.folder)
        first = self.loader.indices(bad)[:8]
        indices = ", ".join(map(str, first.tolist()))
        losses = ", ".join(f"{name} {float(value):.4g}" for name, value in values.items())
        good = earlier[-1] if earlier else "missing"
        raise UserError(
            f"The loss is not finite at step {bad + 1}: {losses}. The batch held the pairs {indices} … of "
            f"'{self.state.source.name}'. The last good checkpoint is {good}. Try a lower train.lr, a longer "
            "train.warmup_steps, or train.grad_clip_norm=1.0."
        )

    # --- evaluation

    def evaluate(self, monitor: Monitor, final: bool = False) -> list[Result]:
        """Evaluate on the recipe's held-out sets, at the end also on its test sets; all ranks get the results."""
        state = self.state
        progress = self.progress
        if final and self.is_rank_zero:  # a crash may have interrupted it before
            run_folder.drop_rows(state.folder / run_folder.EVALUATIONS, after=progress.step - 1)
        best = progress.best if final and self.finished else None
        weights = {} if best is None else {"best_step": best.step}
        tasks = state.hosts.on_rank_zero(
            partial(state.held_out.tasks, state.recipe.evaluation, final)
        )
        progress_shown = self.is_rank_zero and self.info.progress
        results = list[Result]()
        model = whole_model(state.learner)
        for result in state.held_out.measure(
            model, tasks, progress_shown, state.workers, state.hosts
        ):
            row = {**result.to_dict(), **weights}
            # A callback may take longer than ranks wait for each other.
            state.hosts.on_rank_zero(partial(monitor.evaluation, progress.step, row))
            results.append(result)
        return state.hosts.on_rank_zero(lambda: results)

    def _update_best(self, results: list[Result]) -> bool:
        """Record an evaluation if it is the best so far, and return whether it is; False if none are watched."""
        recipe, step = self.state.recipe, self.progress.step
        best = self.progress.best or BestEvaluation()
        if recipe.train.patience is None or best.step == step:
            return False
        self.progress.best = best
        return best.update(step, results, recipe.evaluation)

    def _load_best(self) -> None:
        best, folder = self.progress.best, self.state.folder
        if best is None or best.step == self.progress.step:
            return
        self.state.hosts.on_rank_zero(self.writer.wait)
        load_weights(
            self.state, checkpoints.load_checkpoint(checkpoints.folder_of(folder, best.step))
        )
        log.info("Best: step %d, validation loss %.4f; its weights are used.", best.step, best.loss)

    def _evaluated_at_end(self) -> bool:
        """Whether the run folder has the results of the last step, by the best weights, already."""
        step = self.progress.step
        best = self.progress.best.step if self.progress.best is not None else step
        rows = [
            row
            for row in Run(self.state.folder, step).results
            if row.get("best_step", step) == best
        ]
        done = {(row["dataset"], row["task"]) for row in rows}
        tasks = self.state.held_out.tasks(self.state.recipe.evaluation, final=True)
        return all((name, task) in done for name in tasks for task in tasks[name])

    def save(self, monitor: Monitor) -> None:
        """Begin to write a checkpoint, and write the counts of skipped pairs; every rank must call it."""
        monitor.flush()
        checkpoint = collect(self.state)
        if checkpoint is not None:
            counts = json.dumps(checkpoint.extra["skipped"], indent=1)
            (self.state.folder / run_folder.SKIPPED).write_text(counts, encoding="utf-8")
            self.writer.write(checkpoint)
