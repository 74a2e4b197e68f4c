"""The trainer: builds the parts that a recipe describes, takes the steps, evaluates, keeps checkpoints."""

import itertools
import json
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from functools import cache, cached_property, partial
from io import FileIO
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from declip.data.batch import PairBatch
from declip.data.cached import CachedFeatures
from declip.data.loader import PairLoader
from declip.data.pair import PairSource, SkipCounter
from declip.errors import UserError
from declip.evaluation.encode import Encoder
from declip.evaluation.protocols import Options, evaluate_all
from declip.evaluation.results import Result
from declip.io.pool import naming_lost_workers
from declip.models.average import Average
from declip.models.device import pick_device
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schedule import learning_rate
from declip.recipe.schema import Recipe
from declip.runs import checkpoint as checkpoints
from declip.runs import folder as run_folder
from declip.runs.checkpoint import Checkpoint, CheckpointWriter, part, prefixed
from declip.runs.folder import Run, log
from declip.supervision.objective import Objective
from declip.training import distributed, setup
from declip.training import optimizer as optimizers
from declip.training.closed_form import start_closed_form
from declip.training.compilation import compile_towers
from declip.training.distributed import HostGroup
from declip.training.examples import example_views, write_examples
from declip.training.frozen import cached_features, check_frozen
from declip.training.frozen_encoder import FrozenEncoder, set_teacher
from declip.training.monitor import Monitor, monitored
from declip.training.parallel import build_learner, full_tensor, load_full_state, unwrap
from declip.training.pretrained import apply_pretrained, load_pretrained
from declip.training.sinks import Sink, Stretch
from declip.training.step import StepParts, training_step
from declip.training.stopping import TRY_AGAIN, BestEvaluation, StopRequest
from declip.training.trackers import require_trackers
from declip.training.watchdogs import LossMonitor, NonFiniteGuard, ThroughputMonitor, auto_workers, shown

warn_once = cache(log.warning)


class Trainer:
    """A run of a recipe, continued with `resume` if there is one in the folder.

    What cannot be used is found before a folder is made or a step taken.

    Args:
        callbacks: Sinks that get the run's numbers, on rank 0.
        source: Takes the place of `data.source`.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        resume: bool = False,
        quiet: bool = False,
        callbacks: Sequence[Sink] = (),
        source: PairSource | None = None,
    ) -> None:
        self.folder, self.quiet, self.callbacks = folder, quiet, callbacks
        self.device = pick_device(distributed.own_device(recipe.train.device))
        distributed.join(self.device)
        self.hosts = HostGroup()
        self.is_rank_zero = distributed.is_rank_zero()
        self.hosts.on_rank_zero(partial(require_trackers, recipe.train.report_to))
        recipe = self.hosts.on_rank_zero(partial(setup.resolve_precision, recipe, self.device, folder, resume))
        start = load_pretrained(recipe, folder, resume)
        recipe = start.fit(recipe) if start is not None else recipe
        self.source = setup.open_training_source(recipe, source)
        self.recipe = recipe = setup.resolve_epochs(recipe, self.source)
        torch.manual_seed(recipe.seed)
        encoder = start.encoder if start is not None else None
        if encoder is None and resume:
            encoder = run_folder.kept_encoder(recipe, folder)
        self.model = DualEncoder.from_recipe(recipe, encoder).to(self.device)
        for key, size in recipe.image_sizes.items():
            self.model.image_tower.refuse_size(recipe.image.model, size, key)
        self.objective = Objective(recipe, self.model).to(self.device)
        self.plan = setup.plan_of(recipe)
        self.pretrained = apply_pretrained(start, recipe, self.model, self.objective)
        self.objective.prepare(self.source, self.model, not quiet and self.is_rank_zero)
        set_teacher(self.objective, self.source, self.model, not quiet and self.is_rank_zero)
        if recipe.finetune.cached_views:
            check_frozen(recipe, self.model)
        multipliers = self.pretrained.multipliers if self.pretrained is not None else {}
        self.learner = build_learner(recipe, self.model, self.objective)
        self.average = Average(self.model, recipe.train.ema_decay) if recipe.train.ema_decay else None
        if recipe.train.compile and not recipe.finetune.cached_views:  # which leave heads alone
            compile_towers(recipe, self.model, self.plan)
        named = optimizers.named_trainable(self.model, self.objective)
        self.optimizer = optimizers.build_optimizer(named, recipe.train, multipliers, self.objective.over_vocabulary)
        if not self.is_rank_zero:  # rank 0 continues the stream of the weights, as one process does
            setup.seed_rank(recipe.seed, 0)
        self.skipped, self.step = SkipCounter(), 0
        self.best: BestEvaluation | None = None
        self.guard = NonFiniteGuard(recipe.train.max_nonfinite_steps, self.device)
        self.losses = LossMonitor(recipe.train.batch_size, recipe.train.warmup_steps, self.objective.watched)
        self.throughput = ThroughputMonitor()
        threads, workers = torch.get_num_threads() if self.device.type == "cpu" else 1, recipe.data.workers
        self.workers = auto_workers(threads) if workers == "auto" else workers
        self.stop = StopRequest(folder)
        self.writer = CheckpointWriter(folder, recipe.train.keep_checkpoints)
        self.lock: FileIO | None = None
        setup.build_loader(recipe, self.source, self.model, workers=self.workers).close()
        setup.check_datasets(recipe)
        checkpoint = self._open_folder(resume)
        if checkpoint is not None:
            self._restore(checkpoint)
        elif self.pretrained is not None and self.is_rank_zero:
            self.pretrained.keep(folder, recipe)

    @cached_property
    def loader(self) -> PairLoader:
        """Batches from the present step on."""
        features = None
        if self.recipe.finetune.cached_views:
            read = partial(cached_features, self.recipe, self.source, self.model, self.plan)
            kept: list[CachedFeatures] = []
            self.hosts.on_rank_zero(lambda: kept.append(read(not self.quiet)))
            features = kept[0] if kept else read(False)
            if self.step == 0 and self.recipe.finetune.head_init == "cca":
                start_closed_form(self.model, features, self.plan.views[0].name)
        workers = self.workers if features is None else 0
        loader = setup.build_loader(self.recipe, self.source, self.model, self.step, workers, features)
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
            self.average.update if self.average is not None else None,
            train.grad_clip_norm,
            train.precision,
            train.grad_cache_chunk,
            skip_nonfinite=train.max_nonfinite_steps > 0,
        )

    @property
    def evaluated_model(self) -> DualEncoder:
        """The averaged weights where the recipe asks for them, else the trained ones."""
        return self.average.module if self.average is not None else self.model

    @property
    def encoder(self) -> Encoder:
        """The evaluated model; of frozen towers each image and text is computed once for all runs."""
        model = self.evaluated_model
        return cast(Encoder, FrozenEncoder(model)) if self.recipe.finetune.cached_views else model

    @property
    def sharded(self) -> bool:
        """Whether FSDP shards the model."""
        return unwrap(self.learner).sharded

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or the last `train.patience` evaluations were no better than one before."""
        patience = self.recipe.train.patience
        stale = self.best is not None and patience is not None and self.best.stale >= patience
        return self.step >= self.recipe.train.steps or stale

    # --- the loop of steps

    def train(self, finish: Callable[["Trainer"], None] | None = None) -> Run:
        """Take the remaining steps, then evaluate; rank 0 then calls `finish`."""
        train = self.recipe.train
        stretch = Stretch(self.folder, self.step, train.steps, train.batch_size, self.quiet)
        with self.lock or nullcontext():
            with monitored(stretch, train.report_to, self.callbacks, not self.is_rank_zero) as monitor, self.writer:
                if not self.finished:
                    self._introduce()
                    if self.step == 0 and self.pretrained is not None and self.pretrained.whole:
                        results = self.evaluate(monitor, final=True)  # the pretrained model, to compare with
                        if self._is_best(results):
                            self.save()
                    _ = self.loader  # computes the features of frozen towers
                    monitor.go_on()
                    with self.stop.listening():
                        self._take_steps(monitor)
                        if not self.finished:
                            self.writer.wait()  # a second signal must not end the process before
                if self.finished:
                    self._take_best()
                    if not self.hosts.on_rank_zero(self._evaluated_at_end):
                        self.evaluate(monitor, final=True)
                        monitor.flush()
            finished = self.finished
            if finished and finish is not None:
                self.hosts.on_rank_zero(lambda: finish(self))
            if "loader" in self.__dict__:
                self.loader.close()
        status = 130 if self.stop.signal == signal.SIGINT else 0 if distributed.launched() else TRY_AGAIN
        return Run(self.folder, self.step, finished, status, self.is_rank_zero)

    def _take_steps(self, monitor: Monitor) -> None:
        self.learner.train()
        if self.device.type == "cpu":
            setup.keep_freed_memory()
        done = False
        while not done:
            with naming_lost_workers(f" at step {self.step}"):
                asked = time.perf_counter()
                batch = next(self.loader)
                if self.is_rank_zero and not (self.folder / run_folder.EXAMPLES).exists():
                    self._write_examples(batch)
                with self.hosts.name_missing_ranks(self.step):
                    done = self._take_step(batch, time.perf_counter() - asked, monitor)

    def _take_step(self, batch: PairBatch, waited: float, monitor: Monitor) -> bool:
        """Take a step; give whether it was the last one."""
        train, begun = self.recipe.train, time.perf_counter()
        sync = self.hosts.sync_step(self.step, len(batch), self.stop.poll(), batch.skipped or None)
        if len(sync.rows) > 1:
            self.loader.count(sync.total, list(itertools.chain(*sync.notes)))
        lr = self._set_learning_rate()
        values: dict[str, Tensor] = {}
        self.objective.set_progress(self.step / train.steps)
        if sync.usable:
            values = training_step(self.parts, batch, sync)
            self.guard.check(self.step, values)
        elif self.is_rank_zero:
            warn_once("Steps with too few usable pairs, fewer than one on a process, are left out: nothing is learned.")
        self.step += 1
        done, watched = self.step >= train.steps, train.patience is not None
        stop = sync.stop or (self.stop.asked and len(sync.rows) == 1)
        due = train.evaluate_every > 0 and self.step % train.evaluate_every == 0
        evaluated = (watched and done) or (due and not done)
        logged = self.step % train.log_every == 0 or done or (watched and evaluated)  # the run may end here
        saved = self.step % train.checkpoint_every == 0 or done or stop
        if logged or evaluated or saved or self.device.type == "cpu":  # elsewhere each look is a wait for the device
            self._refuse_nonfinite(values)
        if values and logged:
            self._log(monitor, values, lr)
        else:
            monitor.advance(self.step)
        starved = self.throughput.check(waited, time.perf_counter() - begun, self.workers)
        if starved is not None and self.is_rank_zero:
            log.warning(starved)
        if done and self.skipped.total >= self.loader.seen:
            reasons = "; ".join(f"{reason}: {', '.join(keys)}" for reason, keys in self.skipped.examples.items())
            raise UserError(
                f"No pair of '{self.source.name}' could be used, so nothing was learned. Fix the pairs, or give others "
                f"as data.source. {reasons}."
            )
        allowed = self.recipe.data.max_broken_fraction * self.loader.seen
        if done and self.skipped.total > allowed and self.is_rank_zero:  # fewer pairs than stop a run, or by chance
            lost = f"{self.skipped.total:,} of the {self.loader.seen:,} pairs seen could not be used"
            log.warning("%s. %s", lost, self.skipped.explanation())
        monitor.count(self.step)
        if evaluated:
            saved = self._is_best(self.evaluate(monitor)) or self.finished or saved
        if saved:
            monitor.flush()
            self.save()
        monitor.go_on()
        return self.finished or stop

    def _set_learning_rate(self) -> float:
        warmup = self.recipe.head_warmup
        lr = learning_rate(self.step, self.recipe.train)
        for group in self.optimizer.param_groups:
            group["lr"] = optimizers.group_lr(lr, self.step, group["multiplier"], warmup, self.recipe.train)
        return lr

    def _log(self, monitor: Monitor, values: Mapping[str, Tensor], lr: float) -> None:
        # A collective and a wait for the device, so only at logged steps.
        means = distributed.average(torch.stack(list(values.values()))).tolist()
        numbers = dict(zip(values, means, strict=True))
        monitor.log(self.step, numbers, lr, self.model.logit_scale.detach().exp().item())
        warning = self.losses.check(self.step, numbers)
        if warning is not None and self.is_rank_zero:
            log.warning(warning)

    def _refuse_nonfinite(self, values: Mapping[str, Tensor]) -> None:
        """Stop at a loss or gradient that is not finite: the weights are spoiled then, the checkpoints are not."""
        bad = self.guard.first
        if bad is None:
            return
        self.writer.wait()
        earlier = checkpoints.list_checkpoints(self.folder)
        indices = ", ".join(map(str, self.loader.indices(bad)[:8].tolist()))
        raise UserError(
            f"The loss is not finite at step {bad + 1}: {shown(values)}. The batch held the pairs {indices} … of "
            f"'{self.source.name}'. The last good checkpoint is {earlier[-1] if earlier else 'missing'}. A lower "
            "train.lr, a longer train.warmup_steps, or train.grad_clip_norm=1.0 usually helps."
        )

    def _write_examples(self, batch: PairBatch) -> None:
        """Write what the report shows of the training pairs, once in a run."""
        if self.recipe.finetune.cached_views:  # the batches of the loop hold features, not images
            with closing(setup.build_loader(self.recipe, self.source, self.model, self.step, 0)) as loader:
                batch = next(loader)
        views = example_views(batch, self.source, self.plan, self.model.tokenizer)
        write_examples(self.folder, self.recipe, self.objective, self.source, views)

    # --- evaluation

    def evaluate(self, monitor: Monitor, final: bool = False) -> list[Result]:
        """Evaluate on the recipe's held-out sets; at the end also on its test sets.

        Rank 0 evaluates while the others wait. With FSDP all do, since each holds a part of the model. All get the
        results.
        """

        def run() -> list[Result]:
            options = Options(progress=not self.quiet and self.is_rank_zero)
            weights = {"best_step": self.best.step} if self.best is not None and self.finished and final else {}
            results: list[Result] = []
            for name, protocols in setup.evaluation_tasks(self.recipe, final).items():
                for result in evaluate_all(self.encoder, name, protocols, options):
                    monitor.evaluation(self.step, {**result.to_dict(), **weights})
                    results.append(result)
            return results

        if final and self.is_rank_zero:  # a crash may have interrupted it before
            run_folder.drop_rows(self.folder / run_folder.EVALUATIONS, after=self.step - 1)
        if self.sharded:
            results = run()
            return self.hosts.on_rank_zero(lambda: results)
        return self.hosts.on_rank_zero(run)

    def _is_best(self, results: list[Result]) -> bool:
        """Compare an evaluation with the best one so far; False where the recipe does not watch them."""
        if self.recipe.train.patience is None or (self.best is not None and self.best.step == self.step):
            return False
        self.best = self.best or BestEvaluation()
        return self.best.update(self.step, results, self.recipe.evaluation)

    def _take_best(self) -> None:
        """Put the weights of the best evaluation in place of the last ones."""
        if self.best is None or self.best.step == self.step:
            return
        self.hosts.on_rank_zero(self.writer.wait)
        try:
            best = checkpoints.load_checkpoint(checkpoints.folder_of(self.folder, self.best.step))
        except UserError as error:
            raise UserError(
                f"{error} It had the best weights. Use another checkpoint, or start anew with --out."
            ) from error
        self._load_weights(best)
        log.info("Best: step %d, validation loss %.4f; its weights are kept.", self.best.step, self.best.loss)

    def _evaluated_at_end(self) -> bool:
        """Whether the run folder has the results of the last step, by the best weights, already."""
        best = self.best.step if self.best is not None else self.step
        rows = (row for row in Run(self.folder, self.step).results if row.get("best_step", self.step) == best)
        done = {(row["dataset"], row["task"]) for row in rows}
        tasks = setup.evaluation_tasks(self.recipe, final=True)
        return all((name, protocol) in done for name, protocols in tasks.items() for protocol in protocols)

    # --- checkpoints

    def save(self) -> None:
        """Begin to write a checkpoint, and write the counts of skipped pairs; every rank must call it."""
        state = self.checkpoint()
        if state is not None:
            counts = json.dumps(state.extra["skipped"], indent=1)
            (self.folder / run_folder.SKIPPED).write_text(counts, encoding="utf-8")
            self.writer.write(state)

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
            frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
            averages = self.average.module.state_dict().items()
            weights |= prefixed("average", {name: tensor for name, tensor in averages if name not in frozen})
            training["averaged_steps"] = self.average.n_averaged
        if self.sharded:
            weights = {name: full_tensor(tensor) for name, tensor in weights.items()}
            training = {name: full_tensor(tensor) for name, tensor in training.items()}
        for rank, states in enumerate(generators):
            training |= prefixed(f"random.{rank}", states)
        extra = {
            "versions": setup.versions(),
            "skipped": {**self.skipped.to_dict(), "seen": self.step * self.recipe.train.batch_size},
            "pairs": len(self.source),
            "bad_steps": self.guard.skipped,
            **({} if self.best is None else {"best": asdict(self.best)}),
        }
        return Checkpoint(self.step, weights, training, self.recipe.to_yaml(), extra) if self.is_rank_zero else None

    def _restore(self, found: Checkpoint) -> None:
        """Put the state of a checkpoint back on this rank."""
        extra = found.extra
        if extra["pairs"] != len(self.source):
            raise UserError(
                f"'{self.source.name}' holds {len(self.source):,} pairs; when the run in '{self.folder}' stopped "
                f"it held {extra['pairs']:,}. Its order would change in the middle of an epoch. Give the pairs as they "
                "were, or start a run in another folder with --out."
            )
        self.step = found.step
        if "best" in extra:
            self.best = BestEvaluation(**extra["best"])
        try:
            self._load_weights(found)
            optimizers.load_moments(self.optimizer, part("optimizer", found.training))
        except (RuntimeError, KeyError) as error:
            raise UserError(
                f"The newest checkpoint in '{self.folder}' does not fit the recipe of its run: "
                f"{str(error).splitlines()[0]}. Start anew with --out."
            ) from error
        generators = part(f"random.{distributed.rank()}", found.training)
        if generators:
            setup.set_random_states(generators, self.device)
        else:  # a rank that the checkpoint does not know
            setup.seed_rank(self.recipe.seed, found.step)
        self.skipped = SkipCounter.from_dict(extra["skipped"])
        self.guard.skipped = list(extra["bad_steps"])
        then, now = extra["versions"], setup.versions()
        changed = [f"{name} {then.get(name)} → {value}" for name, value in now.items() if then.get(name) != value]
        if changed and self.is_rank_zero:
            log.warning(
                "This differs from the checkpoint's: %s. The batches and their order stay the same, but sums may be "
                "rounded otherwise and dropout masks differ.",
                ", ".join(changed),
            )

    def _load_weights(self, found: Checkpoint) -> None:
        for name, module in (("model", self.model), ("objective", self.objective)):
            load_full_state(module, part(name, {**found.weights, **found.training}))
        if self.average is not None:
            self.average.module.load_state_dict(part("model", found.weights) | part("average", found.weights))
            self.average.n_averaged.copy_(found.training["averaged_steps"])

    def _open_folder(self, resume: bool) -> Checkpoint | None:
        """Find the checkpoint to resume from, if any: rank 0 chooses it, the others read the same."""
        newest: Checkpoint | None = None

        def choose() -> int | None:
            nonlocal newest
            self.lock = run_folder.lock_folder(self.folder)
            newest = run_folder.open_folder(self.recipe, self.folder, resume)
            return newest.step if newest is not None else None

        step = self.hosts.on_rank_zero(choose)
        if step is None or newest is not None:
            return newest
        return checkpoints.load_checkpoint(checkpoints.folder_of(self.folder, step))

    # --- messages

    def _introduce(self) -> None:
        trained = sum(p.numel() for group in self.optimizer.param_groups for p in group["params"]) / 1e6
        weights = ", ".join(f"{weight:g} {name}" for name, weight in self.objective.weights.items())
        log.info(
            f"{f'Resuming at step {self.step}' if self.step else 'Starting'}: {len(self.source):,} pairs of "
            f"{self.source.name}; {trained:,.2f} M parameters are trained; {weights}; {self.device}, "
            f"{self.recipe.train.precision}, {torch.get_num_threads()} threads"
        )
        if self.pretrained is not None:
            log.info(self.pretrained.summary)
        if message := setup.unaugmented(self.source, self.plan):
            log.warning(message)
