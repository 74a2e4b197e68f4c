"""What is done with the model of a run: measured on held-out sets on the way and at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from declip.evaluation.protocols import Options, evaluate_all
from declip.runs.folder import Run

if TYPE_CHECKING:
    from declip.training.monitor import Monitor
    from declip.training.trainer import Trainer


def measure(trainer: Trainer, monitor: Monitor, final: bool) -> None:
    """Measure on the recipe's held-out sets; at the end also on its test sets."""
    wanted = trainer.recipe.evaluation
    zero_shot = {*wanted.zero_shot, *(wanted.final_zero_shot if final else ())}
    retrieval = {*wanted.retrieval, *(wanted.final_retrieval if final else ())}
    options = Options(progress=not trainer.quiet and trainer.leads)
    for name in dict.fromkeys((*wanted.zero_shot, *wanted.retrieval, *wanted.final_zero_shot, *wanted.final_retrieval)):
        protocols = [p for p, on in (("zero-shot", zero_shot), ("retrieval", retrieval)) if name in on]
        if protocols:
            for result in evaluate_all(trainer.evaluated_model, name, protocols, options):
                monitor.evaluation(trainer.step, result.to_dict())


def measured_at_end(trainer: Trainer) -> bool:
    """Whether the run folder holds the results of the last step already."""
    done = {(row["protocol"], row["on"]) for row in Run(trainer.folder, trainer.recipe, trainer.step, True).results}
    wanted = trainer.recipe.evaluation
    zero_shot = {("zero-shot", name) for name in (*wanted.zero_shot, *wanted.final_zero_shot)}
    retrieval = {("retrieval", name) for name in (*wanted.retrieval, *wanted.final_retrieval)}
    return zero_shot | retrieval <= done
