"""The trainer: builds the parts that a recipe describes, takes the steps, evaluates, keeps checkpoints."""

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
from declip.evaluation.protocols import Options, evaluate_all
from declip.io.pool import naming_lost_workers
from declip.models.device import pick_device
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.runs import checkpoint as checkpoints
from declip.runs import folder as run_folder
from declip.runs.checkpoint import Checkpoint, CheckpointWriter, part, prefixed
from declip.runs.folder import Run, log
from declip.supervision.objective import Objective
from declip.training import distributed, setup
from declip.training import optimizer as optimizers
from declip.training.compilation import compile_towers, rows_of_rank
from declip.training.distributed import HostGroup
from declip.training.memory import frozen_garbage, kept_memory
from declip.training.monitor import Monitor
from declip.training.parallel import build_learner, full_tensor, load_full_state, shard_like, unwrap
from declip.training.pretrained import apply_pretrained, frozen_norms, load_pretrained
from declip.training.sinks import Stretch
from declip.training.step import StepParts, training_step
from declip.training.stopping import TRY_AGAIN, StopRequest
from declip.training.watchdogs import LossMonitor, NonFiniteGuard, ThroughputMonitor, free_cores, shown

WORTH_FREEZING = 200
"""Steps from which on freezing the garbage collector pays: it takes 0.3 s."""


class Trainer:
    """A run of a recipe.

    Args:
        folder: The run folder.
        resume: Continue the run in the folder if there is one.
        quiet: Show no progress.

    Raises:
        UserError: something given cannot be used; found before a folder is made or a step taken.
    """

    def __init__(self, recipe: Recipe, folder: Path, resume: bool = False, quiet: bool = False) -> None:
        self.folder, self.quiet = folder, quiet
        self.device = pick_device(distributed.own_device(recipe.train.device))
        distributed.join(self.device, recipe.train.rank_timeout)
        self.hosts = HostGroup(recipe.train.rank_timeout)
        self.is_rank_zero = distributed.is_rank_zero()
        recipe = self.hosts.on_rank_zero(partial(setup.resolve_precision, recipe, self.device, folder, resume))
        start = load_pretrained(recipe, folder, resume)
        self.recipe = recipe = start.fit(recipe) if start is not None else recipe
        self.source = setup.open_training_source(recipe)
        torch.manual_seed(recipe.seed)
        encoder = start.encoder if start is not None else None
        if encoder is None and resume:
            encoder = run_folder.kept_encoder(recipe, folder)
        self.model = DualEncoder.from_recipe(recipe, encoder).to(self.device)
        self.model.image_tower.refuse_size(recipe.image.model, recipe.image.size)
        self.objective = Objective(recipe, self.model).to(self.device)
        self.plan = setup.plan_of(recipe)
        self.pretrained = apply_pretrained(start, recipe, self.model, self.objective)
        multipliers = self.pretrained.multipliers if self.pretrained is not None else {}
        if recipe.train.channels_last:
            self.model.image_tower.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        self.learner = build_learner(recipe, self.model, self.objective)
        self.average = setup.averaged(self.model, recipe.train.ema_decay)
        if recipe.train.compile:
            compile_towers(recipe, self.model, self.plan, rows_of_rank(recipe.train.batch_size))
        named = optimizers.named_trainable(self.model, self.objective)
        self.optimizer = optimizers.build_optimizer(named, recipe.train, multipliers)
        self._norms_frozen_in_warmup = frozen_norms(self.model, multipliers)
        if not self.is_rank_zero:  # rank 0 continues the stream of the weights, as one process does
            setup.seed_rank(recipe.seed, 0)
        self.skipped, self.step = SkipCounter(), 0
        self.guard = NonFiniteGuard(recipe.train.max_nonfinite_steps, self.device)
        self.losses = LossMonitor(recipe.train.batch_size, recipe.train.warmup_steps)
        cores = free_cores(torch.get_num_threads() if self.device.type == "cpu" else 1)
        self.workers = min(1, cores) if recipe.data.workers == "auto" else recipe.data.workers
        self.throughput = ThroughputMonitor(self.workers, cores)
        self.stop = StopRequest(folder if self.is_rank_zero else None)
        self.writer = CheckpointWriter(folder, recipe.train.keep_checkpoints)
        self.lock: FileIO | None = None
        setup.build_loader(recipe, self.source, self.model, workers=self.workers).close()
        run_folder.check_datasets(recipe)
        checkpoint = self._open_folder(resume)
        if checkpoint is not None:
            self._restore(checkpoint)
        elif self.pretrained is not None and self.is_rank_zero:
            self.pretrained.keep(folder, recipe)

    @cached_property
    def loader(self) -> PairLoader:
        """Batches from the present step on."""
        loader = setup.build_loader(self.recipe, self.source, self.model, self.step, self.workers)
        loader.skipped, loader.seen = self.skipped, self.step * self.recipe.train.batch_size
        return loader

    @cached_property
    def parts(self) -> StepParts:
        """The objects and settings of a step."""
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

    @property
    def evaluated_model(self) -> DualEncoder:
        """The averaged weights where the recipe asks for them, else the trained ones."""
        return cast(DualEncoder, self.average.module) if self.average is not None else self.model

    @property
    def sharded(self) -> bool:
        """Whether FSDP shards the model."""
        return unwrap(self.learner).sharded

    # --- the loop of steps

    def train(self, finish: Callable[["Trainer"], None] | None = None) -> Run:
        """Take the remaining steps, then evaluate; rank 0 then calls `finish`."""
        train = self.recipe.train
        stretch = Stretch(self.folder, self.step, train.steps, train.batch_size, self.quiet)
        with self.lock or nullcontext():
            with Monitor(stretch, silent=not self.is_rank_zero) as monitor, self.writer:
                if self.step < train.steps:
                    self._introduce()
                    if self.step == 0 and self.pretrained is not None and self.pretrained.whole:
                        self._evaluate_anew(monitor)  # what the pretrained model can do, to compare with
                    with self.stop.listening():
                        self._take_steps(monitor)
                        if self.step < train.steps:
                            self.writer.wait()  # a second signal must not end the process before
                if self.step >= train.steps and not self.hosts.on_rank_zero(self._evaluated_at_end):
                    self._evaluate_anew(monitor)
                    monitor.flush()
            finished = self.step >= train.steps
            if finished and finish is not None:
                self.hosts.on_rank_zero(lambda: finish(self))
            if "loader" in self.__dict__:
                self.loader.close()
        status = 130 if self.stop.signal == signal.SIGINT else 0 if distributed.launched() else TRY_AGAIN
        return Run(self.folder, self.step, finished, status, self.is_rank_zero)

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Training mode and memory management around a loop of steps."""
        train, on_cpu = self.recipe.train, self.device.type == "cpu"
        self.learner.train()
        with (
            frozen_garbage() if train.steps - self.step >= WORTH_FREEZING else nullcontext(),
            kept_memory() if on_cpu else nullcontext(),
        ):
            yield

    def _take_steps(self, monitor: Monitor) -> None:
        with self.learning():
            while True:
                with naming_lost_workers(f" at step {self.step}"):
                    asked = time.perf_counter()
                    batch = next(self.loader)
                    with self.hosts.name_missing_ranks(self.step):
                        if self._take_step(batch, time.perf_counter() - asked, monitor):
                            return

    def _take_step(self, batch: PairBatch, waited: float, monitor: Monitor) -> bool:
        """Take a step; give whether it was the last one."""
        train, begun = self.recipe.train, time.perf_counter()
        sync = self.hosts.sync_step(self.step, len(batch), self.stop.poll(), batch.skipped or None)
        if len(sync.rows) > 1:
            self.loader.count(sync.total, list(itertools.chain(*sync.notes)))
        lr = self._set_learning_rate()
        values: dict[str, Tensor] = {}
        if sync.usable:  # else its pairs were broken: nothing is learned or logged
            values = training_step(self.parts, batch, sync)
            self.guard.check(self.step, values)
        self.step += 1
        done = self.step >= train.steps
        stop = sync.stop or (self.stop.asked and len(sync.rows) == 1)
        logged = self.step % train.log_every == 0 or done
        saved = self.step % train.checkpoint_every == 0 or done or stop
        if logged or saved or stop or self.device.type == "cpu":  # elsewhere each look is a wait for the device
            self._refuse_nonfinite(values)
        if values and logged:
            self._log(monitor, values, lr)
        else:
            monitor.advance(self.step)
        self.throughput.step(waited, time.perf_counter() - begun)
        if logged and not done:
            self._adjust_workers()
        if done:
            self._refuse_if_all_broken()
        if train.evaluate_every and self.step % train.evaluate_every == 0 and not done:
            self.evaluate(monitor)
            monitor.pause()
        if saved:
            monitor.flush()
            self.save()
            monitor.pause()
        return done or stop

    def _set_learning_rate(self) -> float:
        warmup = self.recipe.head_warmup
        lr = optimizers.learning_rate(self.step, self.recipe.train)
        for group in self.optimizer.param_groups:
            group["lr"] = optimizers.group_lr(lr, self.step, group["multiplier"], warmup, self.recipe.train)
        if self.step <= warmup:
            for norm in self._norms_frozen_in_warmup:
                norm.train(self.step == warmup)
        return lr

    def _log(self, monitor: Monitor, values: Mapping[str, Tensor], lr: float) -> None:
        # A collective and a wait for the device, so only at logged steps.
        means = distributed.average(torch.stack(list(values.values()))).tolist()
        numbers = dict(zip(values, means, strict=True))
        monitor.log(self.step, numbers, lr, self.model.logit_scale.detach().exp().item())
        for warning in self.losses.check(self.step, numbers) if self.is_rank_zero else ():
            log.warning(warning)

    def _adjust_workers(self) -> None:
        """Warn once that the loader is too slow or, with data.workers=auto, add workers."""
        throughput = self.throughput
        if not throughput.starved():
            return
        if self.recipe.data.workers != "auto":
            if self.is_rank_zero and not throughput.warned:
                log.warning(throughput.advice())
            return
        more = min(throughput.needed, throughput.cores)
        if more > self.workers:
            log.info("Steps wait %.0f %% of their time for batches: %d workers.", 100 * throughput.fraction, more)
            self.workers, self.throughput = more, ThroughputMonitor(more, throughput.cores)
            self.loader.close()
            del self.loader

    def _refuse_nonfinite(self, values: Mapping[str, Tensor]) -> None:
        """Stop at a loss or gradient that is not finite: the weights are spoiled then, the checkpoints are not."""
        bad = self.guard.first
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
        if self.skipped.total < self.loader.seen:
            return
        reasons = "; ".join(f"{reason}: {', '.join(keys)}" for reason, keys in self.skipped.examples.items())
        raise UserError(
            f"None of the {self.loader.seen} pairs seen of '{self.source.name}' could be used, so nothing was learned. "
            f"Fix the pairs, or give others as data.source. {reasons}."
        )

    # --- evaluation

    def evaluate(self, monitor: Monitor, final: bool = False) -> None:
        """Evaluate on the recipe's held-out sets; at the end also on its test sets.

        Rank 0 evaluates while the others wait. With FSDP all do, since each holds a part of the model.
        """
        if self.sharded:
            self._evaluate(monitor, final)
        else:
            self.hosts.on_rank_zero(lambda: self._evaluate(monitor, final))

    def _evaluate(self, monitor: Monitor, final: bool) -> None:
        options = Options(progress=not self.quiet and self.is_rank_zero)
        for name, protocols in self._datasets(final).items():
            for result in evaluate_all(self.evaluated_model, name, protocols, options):
                monitor.evaluation(self.step, result.to_dict())

    def _evaluate_anew(self, monitor: Monitor) -> None:
        """Evaluate on all sets after dropping the results of an evaluation that a crash interrupted."""
        if self.is_rank_zero:
            run_folder.drop_rows(self.folder / run_folder.EVALUATIONS, after=self.step - 1)
        self.evaluate(monitor, final=True)

    def _datasets(self, final: bool) -> dict[str, list[str]]:
        """Map each dataset to the protocols that are evaluated on it."""
        wanted = self.recipe.evaluation
        protocols = {
            "zero-shot": {*wanted.zero_shot, *(wanted.final_zero_shot if final else ())},
            "retrieval": {*wanted.retrieval, *(wanted.final_retrieval if final else ())},
        }
        names = (*wanted.zero_shot, *wanted.retrieval, *wanted.final_zero_shot, *wanted.final_retrieval)
        tasks = {name: [protocol for protocol, on in protocols.items() if name in on] for name in names}
        return {name: some for name, some in tasks.items() if some}

    def _evaluated_at_end(self) -> bool:
        """Whether the run folder has the results of the last step already."""
        done = {(row["task"], row["dataset"]) for row in Run(self.folder, self.step).results}
        return all((p, name) in done for name, protocols in self._datasets(final=True).items() for p in protocols)

    # --- checkpoints

    def counts(self) -> dict[str, Any]:
        """Count the pairs that were skipped, by reason, and those that were seen."""
        return {**self.skipped.to_dict(), "seen": self.step * self.recipe.train.batch_size}

    def save(self) -> Path:
        """Begin to write a checkpoint, and write the counts of skipped pairs; every rank must call it."""
        state = self.checkpoint()
        if state is not None:
            (self.folder / run_folder.SKIPPED).write_text(json.dumps(self.counts(), indent=1), encoding="utf-8")
            self.writer.write(state)
        return checkpoints.folder_of(self.folder, self.step)

    def checkpoint(self) -> Checkpoint | None:
        """Collect the state that the next step depends on; every rank must call it, and rank 0 gets it.

        Generators of all ranks are kept, by rank: "random.0.cpu" and so on.
        """
        generators = self.hosts.gather_objects(setup.random_states(self.device))
        if not (self.is_rank_zero or self.sharded):
            return None
        state = dict(unwrap(self.learner).state_dict())  # "model.…" and "objective.…"
        weights = {name: state.pop(name) for name in list(state) if name.startswith("model.")}
        training = state | prefixed("optimizer", optimizers.moments(self.optimizer))
        if self.average is not None:
            weights |= prefixed("average", self.average.module.state_dict())
            training["averaged_steps"] = self.average.n_averaged
        if self.sharded:
            weights = {name: full_tensor(tensor) for name, tensor in weights.items()}
            training = {name: full_tensor(tensor) for name, tensor in training.items()}
        for rank, states in enumerate(generators):
            training |= prefixed(f"random.{rank}", states)
        extra = {
            "versions": setup.versions(),
            "skipped": self.counts(),
            "ranks": distributed.world_size(),
            "pairs": len(self.source),
            "bad_steps": self.guard.skipped,
        }
        return Checkpoint(self.step, weights, training, self.recipe.to_yaml(), extra) if self.is_rank_zero else None

    def _restore(self, found: Checkpoint) -> None:
        """Put the state of a checkpoint back on this rank."""
        extra, ranks = found.extra, int(found.extra["ranks"])
        if extra["pairs"] != len(self.source):
            raise UserError(
                f"'{self.source.name}' holds {len(self.source):,} pairs; when the run in '{self.folder}' stopped "
                f"it held {extra['pairs']:,}. Its order would change in the middle of an epoch. Give the pairs as they "
                "were, or start a run in another folder with --out."
            )
        self.step = found.step
        try:
            learner_state = {n: tensor for n, tensor in found.weights.items() if n.startswith("model.")}
            learner_state |= prefixed("objective", part("objective", found.training))
            load_full_state(unwrap(self.learner), learner_state)
            optimizers.load_moments(self.optimizer, part("optimizer", found.training), shard_like)
            if self.average is not None:
                self.average.module.load_state_dict(part("average", found.weights))
                self.average.n_averaged.copy_(found.training["averaged_steps"])
        except (RuntimeError, KeyError, IndexError, TypeError) as error:
            raise UserError(
                f"{checkpoints.folder_of(self.folder, found.step)} does not fit the recipe of its run: "
                f"{str(error).splitlines()[0]}. Move it away to resume from an earlier one, or start anew with --out."
            ) from error
        generators = part(f"random.{distributed.rank()}", found.training)
        if generators:
            setup.set_random_states(generators, self.device)
        else:  # a rank that the checkpoint does not know
            setup.seed_rank(self.recipe.seed, found.step)
        self.skipped = SkipCounter.from_dict(extra["skipped"])
        self.guard.skipped = list(extra["bad_steps"])
        if self.is_rank_zero:
            self._warn_of_differences(ranks, extra["versions"])

    def _warn_of_differences(self, ranks: int, then: Mapping[str, str]) -> None:
        if ranks != (own := distributed.world_size()):
            log.warning(
                f"The checkpoint is of {ranks} processes, now there are {own}: the batches and their order stay the "
                "same, but sums are rounded otherwise and dropout masks differ."
            )
        now = setup.versions()
        changed = [f"{name} {then.get(name)} → {now[name]}" for name in now if then.get(name) != now[name]]
        if changed:
            log.warning("Versions differ from the checkpoint's, so bits may too: %s", ", ".join(changed))

    def _open_folder(self, resume: bool) -> Checkpoint | None:
        """Find the checkpoint to resume from, if any: rank 0 chooses it, the others read the same."""
        chosen: list[Checkpoint | None] = []

        def choose() -> Path | None:
            self.lock = run_folder.lock_folder(self.folder)
            chosen.append(run_folder.open_folder(self.recipe, self.folder, resume))
            return checkpoints.folder_of(self.folder, chosen[0].step) if chosen[0] else None

        path = self.hosts.on_rank_zero(choose)
        if path is None or chosen:
            return chosen[0] if chosen else None
        return checkpoints.load_checkpoint(path)

    # --- messages

    def _introduce(self) -> None:
        def millions(module: nn.Module) -> float:
            return sum(parameter.numel() for parameter in module.parameters()) / 1e6

        begun = f"Resuming at step {self.step}" if self.step else "Starting"
        weights = ", ".join(f"{weight:g} {name}" for name, weight in self.objective.weights.items())
        log.info(
            f"{begun}: {len(self.source):,} pairs of {self.source.name}; {millions(self.model):.1f} M parameters and "
            f"{millions(self.objective):.1f} M in heads; {weights}; {self.device}, {self.recipe.train.precision}, "
            f"{torch.get_num_threads()} threads"
        )
        if self.pretrained is not None:
            log.info("%s %s", self.pretrained.summary, self._word_warmup())

    def _word_warmup(self) -> str:
        groups, until = self.optimizer.param_groups, self.recipe.head_warmup
        total = sum(p.numel() for group in groups for p in group["params"]) / 1e6
        frozen = sum(p.numel() for group in groups if group["multiplier"].frozen_in_warmup for p in group["params"])
        if not frozen:
            return f"{total:,.2f} M parameters are trained in every step."
        asked = self.recipe.finetune.head_warmup_steps
        limit = "" if until == asked else f" (a quarter of train.steps; finetune.head_warmup_steps={asked} is more)"
        return (
            f"Steps 1 to {until}{limit}: only new parameters are trained, {total - frozen / 1e6:,.2f} M. From step "
            f"{until + 1} on the pretrained ones too: {total:,.2f} M."
        )
