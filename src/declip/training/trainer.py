"""The trainer: builds what a recipe describes, takes its steps, measures, keeps checkpoints, writes the report."""

import json
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor

from declip.config import Recipe, load_recipe
from declip.data.loader import PairLoader
from declip.data.pairs import SkipCounter
from declip.errors import UserError
from declip.evaluation.protocols import Options, evaluate_all
from declip.models.dual_encoder import DualEncoder
from declip.supervision.objective import Objective
from declip.training import checkpoint as checkpoints
from declip.training.build import (
    averaged,
    build_loader,
    image_views,
    open_training_source,
    pick_device,
    random_states,
    versions,
)
from declip.training.monitor import Monitor, log
from declip.training.optimizer import build_optimizer, named_trainable
from declip.training.run import Run, check_datasets, open_folder
from declip.training.schedule import learning_rate
from declip.training.step import StepParts, training_step

SKIPPED = "skipped.json"
FLAT_AFTER = 300
"""Steps after which a contrastive loss still at ln(batch) is worth a warning."""


def train(
    recipe: str | Path | Recipe,
    overrides: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    quiet: bool = False,
    report: bool = True,
) -> Run:
    """Train a recipe in a run folder.

    Args:
        recipe: A shipped recipe's name, a YAML file, or a `Recipe`.
        overrides: Dotted keys and values, such as ``{"train.steps": 500}``.
        out: The run folder; by default ``runs/NAME``.
        resume: Go on with the run in that folder if there is one; the result is the same to the last bit as without
            the interruption.
        quiet: Draw no progress.
        report: Write report.html at the end.

    Returns:
        The run. `finished` is False after Ctrl-C or SIGTERM; a checkpoint was then written.

    Raises:
        UserError: what was given can't be used; see `load_recipe`, `open_folder`, `open_source`.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    elif overrides:
        raise UserError("Overrides go with a recipe's name or file; this Recipe is already resolved.")
    trainer = Trainer(recipe, Path(out) if out is not None else Path("runs") / recipe.name, resume, quiet)
    return trainer.train(report)


class Trainer:
    """One run of a recipe.

    Args:
        recipe: What to run.
        folder: The run folder.
        resume: Go on with what is there.
        quiet: Draw no progress.

    Raises:
        UserError: see `train`.
    """

    def __init__(self, recipe: Recipe, folder: Path, resume: bool = False, quiet: bool = False) -> None:
        self.recipe, self.folder, self.quiet = recipe, folder, quiet
        if recipe.train.threads is not None:
            torch.set_num_threads(recipe.train.threads)
        self.device = pick_device(recipe.train.device)
        self.source = open_training_source(recipe)
        torch.manual_seed(recipe.seed)
        self.model = DualEncoder.from_recipe(recipe).to(self.device)
        self.objective = Objective.for_model(recipe, self.model).to(self.device)
        if recipe.train.channels_last:
            self.model.image_tower.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        self.average = averaged(self.model, recipe.train.ema)
        self.optimizer = build_optimizer(named_trainable(self.model, self.objective), recipe.train)
        self.views = image_views(recipe)
        self.skipped, self.step = SkipCounter(), 0
        self.stop_asked = False
        self._bad_step = torch.tensor(-1, device=self.device)
        # What can't be used is said before a folder is made or a step taken, not when it is first needed.
        build_loader(recipe, self.source, self.model, self.views).close()
        check_datasets(recipe)
        found = open_folder(recipe, folder, resume)
        if found is not None:
            self.restore(found)

    @cached_property
    def loader(self) -> PairLoader:
        """Batches from the step that the run is at."""
        loader = build_loader(self.recipe, self.source, self.model, self.views, start_step=self.step)
        loader.skipped, loader.seen = self.skipped, self.step * self.recipe.train.batch
        return loader

    def train(self, report: bool = True) -> Run:
        """Take the steps that are left, then measure and, if wanted, write the report."""
        steps = self.recipe.train.steps
        with Monitor(self.folder, self.step, steps, self.recipe.train.batch, self.quiet) as monitor:
            if self.step < steps:
                self._introduce()
                with self._stopping_politely():
                    self._take_steps(monitor)
            if self.step >= steps and not self._measured_at_end():
                monitor.forget_evaluations(self.step)
                self.evaluate(monitor, final=True)
                monitor.flush()
        if self.step >= steps and report:
            self._report()
        if "loader" in self.__dict__:
            self.loader.close()
        return Run(self.folder, self.recipe, self.step, finished=self.step >= steps)

    def _take_steps(self, monitor: Monitor) -> None:
        train = self.recipe.train
        parts = StepParts(
            self.model,
            self.objective,
            self.optimizer,
            self.views,
            self.average.update_parameters if self.average is not None else None,
            train.clip_norm,
            train.precision,
        )
        self.model.train()
        self.objective.train()
        for batch in self.loader:
            rate = learning_rate(self.step, train)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            values: dict[str, Tensor] = {}
            if len(batch) >= 2:  # else its pairs were broken: nothing is learnt, and nothing logged
                values = training_step(parts, batch)
                self._remember_if_not_finite(values)
            self.step += 1
            self._check_finite(values, due=self.step % train.log_every == 0 or self.step % train.checkpoint_every == 0)
            if values and (self.step % train.log_every == 0 or self.step == train.steps):
                numbers = {name: float(value) for name, value in values.items()}
                monitor.metrics(self.step, numbers, rate, self.model.logit_scale.detach().exp().item())
                self._warn_if_flat(numbers)
            else:
                monitor.advance(self.step)
            done = self.step >= train.steps
            if done:
                self._refuse_if_all_broken()
            if train.evaluate_every and self.step % train.evaluate_every == 0 and not done:
                self.evaluate(monitor)
                monitor.pause()
            if done or self.stop_asked or self.step % train.checkpoint_every == 0:
                monitor.flush()
                self.save()
                monitor.pause()
            if done or self.stop_asked:
                return

    def evaluate(self, monitor: Monitor, final: bool = False) -> None:
        """Measure on the recipe's held-out sets; at the end also on its test sets."""
        model = self.evaluated_model
        wanted = self.recipe.evaluation
        zero_shot = {*wanted.zero_shot, *(wanted.final_zero_shot if final else ())}
        retrieval = {*wanted.retrieval, *(wanted.final_retrieval if final else ())}
        ordered = dict.fromkeys(
            (*wanted.zero_shot, *wanted.retrieval, *wanted.final_zero_shot, *wanted.final_retrieval)
        )
        for name in ordered:
            protocols = [p for p, on in (("zero-shot", zero_shot), ("retrieval", retrieval)) if name in on]
            if protocols:
                for result in evaluate_all(model, name, protocols, Options(progress=not self.quiet)):
                    monitor.evaluation(self.step, result.to_dict())

    @property
    def evaluated_model(self) -> DualEncoder:
        """The averaged weights where the recipe asks for them, else the trained ones."""
        return cast(DualEncoder, self.average.module) if self.average is not None else self.model

    def save(self) -> Path:
        """Write a checkpoint and the counts of skipped pairs."""
        counts = {**self.skipped.to_dict(), "seen": self.step * self.recipe.train.batch}
        (self.folder / SKIPPED).write_text(json.dumps(counts, indent=1), encoding="utf-8")
        weights = checkpoints.prefixed("model", self.model.state_dict())
        if self.average is not None:
            weights |= checkpoints.prefixed("average", self.average.module.state_dict())
        training = checkpoints.prefixed("objective", self.objective.state_dict())
        training |= checkpoints.prefixed("optimizer", checkpoints.optimizer_tensors(self.optimizer))
        training |= checkpoints.prefixed("random", random_states(self.device))
        if self.average is not None:
            training["averaged_steps"] = self.average.n_averaged
        extra = {"versions": versions(), "skipped": counts}
        kept = checkpoints.Checkpoint(self.step, weights, training, self.recipe.to_yaml(), extra)
        return checkpoints.save_checkpoint(self.folder, kept, self.recipe.train.keep)

    def restore(self, found: checkpoints.Checkpoint) -> None:
        """Put everything back as it was after that checkpoint's step."""
        self.step = found.step
        self.model.load_state_dict(checkpoints.part("model", found.weights))
        self.objective.load_state_dict(checkpoints.part("objective", found.training))
        checkpoints.load_optimizer(self.optimizer, checkpoints.part("optimizer", found.training))
        if self.average is not None:
            self.average.module.load_state_dict(checkpoints.part("average", found.weights))
            self.average.n_averaged.copy_(found.training["averaged_steps"])
        states = checkpoints.part("random", found.training)
        torch.set_rng_state(states["cpu"])
        if self.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.device)
        self.skipped = SkipCounter.from_dict(found.extra["skipped"])
        now, then = versions(), found.extra["versions"]
        changed = [f"{name} {then.get(name)} → {now[name]}" for name in now if then.get(name) != now[name]]
        if changed:
            log.warning("Versions differ from the checkpoint's, so bits may too: %s", ", ".join(changed))

    def _remember_if_not_finite(self, values: Mapping[str, Tensor]) -> None:
        """Keep the first bad step on the device: asking for it at once would be a wait for the device."""
        good = torch.isfinite(values["total"]) & torch.isfinite(values["grad_norm"])
        self._bad_step = torch.where((self._bad_step < 0) & ~good, self.step, self._bad_step)

    def _check_finite(self, values: Mapping[str, Tensor], due: bool) -> None:
        """Stop at a total or gradient that is not finite; the weights are spoilt then, the checkpoints are not."""
        if not due and self.device.type != "cpu" and not self.stop_asked:
            return
        bad = int(self._bad_step)
        if bad < 0:
            return
        earlier = checkpoints.list_checkpoints(self.folder)
        shown = ", ".join(f"{name} {float(value):.4g}" for name, value in values.items())
        indices = [int(index) for index in self.loader.indices(bad)]
        raise UserError(
            f"The loss is not finite at step {bad + 1}: {shown}. The batch held the pairs "
            f"{', '.join(map(str, indices[:8]))}{' …' if len(indices) > 8 else ''} of '{self.source.name}'. "
            f"The last good checkpoint is {earlier[-1] if earlier else 'missing: none was written yet'}. "
            "A lower train.lr_peak, a longer train.warmup_steps, or train.clip_norm=1.0 usually helps."
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

    def _warn_if_flat(self, values: Mapping[str, float]) -> None:
        chance = torch.tensor(float(self.recipe.train.batch)).log().item()
        if self.step == FLAT_AFTER and abs(values.get("contrastive", 0.0) - chance) < 0.02:
            log.warning(
                "After %d steps the contrastive loss is still ln(%d) = %.2f: nothing is learnt. Usual causes: too "
                "high a learning rate, captions that do not belong to the images, or one caption for all.",
                self.step,
                self.recipe.train.batch,
                chance,
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

    def _measured_at_end(self) -> bool:
        done = {(row["protocol"], row["on"]) for row in Run(self.folder, self.recipe, self.step, True).results}
        wanted = self.recipe.evaluation
        zero_shot = {("zero-shot", name) for name in (*wanted.zero_shot, *wanted.final_zero_shot)}
        retrieval = {("retrieval", name) for name in (*wanted.retrieval, *wanted.final_retrieval)}
        return len(zero_shot | retrieval) <= len(done)

    def _report(self) -> None:
        from declip.evaluation.report import write_report

        write_report(
            self.folder,
            self.evaluated_model,
            recipe=self.recipe,
            loader=self.loader,
            objective=self.objective,
            train_source=self.source,
            image_views=self.views,
        )

    @contextmanager
    def _stopping_politely(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM end the run after the current step, with a checkpoint; a second one at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            self.stop_asked = True
            log.info("Stopping after this step and saving; once more stops at once, without saving.")
            for each, handler in earlier.items():
                signal.signal(each, handler)

        earlier: dict[int, Any] = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
        for each in earlier:
            signal.signal(each, ask)
        try:
            yield
        finally:
            for each, handler in earlier.items():
                signal.signal(each, handler)
