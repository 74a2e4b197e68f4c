"""The variants that take one recipe apart, in groups."""

from dataclasses import dataclass

from declip.comparison.outcome import Outcome
from declip.comparison.study import Study
from declip.comparison.variants import STEP


@dataclass(frozen=True)
class Ablation:
    """The variant `whole` taken apart: by group, the variant of each part by its label, with the whole as the last."""

    whole: str
    groups: dict[str, dict[str, str]]

    @property
    def variants(self) -> list[str]:
        """All variants, each once."""
        return list(dict.fromkeys(variant for parts in self.groups.values() for variant in parts.values()))


def read_ablation(study: Study) -> Ablation | None:
    """Find the parts of the recipe that was taken apart; None when none was."""
    made = [variant for variant in study.variants if variant.group]
    if not made:
        return None
    same = [name for name in study.named if study.variant(name).recipe == made[0].recipe]
    whole = study.variant(same[0] if same else study.compute_budget_of)
    steps = [variant for variant in made if variant.group == STEP]
    added = " ".join(f"+{loss}" for loss in whole.losses if loss not in steps[-1].losses)
    # The last step is also the recipe without its last losses; it was trained once and stands in both groups.
    by_losses = {frozenset(variant.losses): variant.name for variant in made}
    without = {loss: by_losses.get(frozenset(whole.losses) - {loss}) for loss in whole.losses}
    groups = {
        "losses added": {**{step.label: step.name for step in steps}, f"{added} = {whole.name}": whole.name},
        "loss left out": {**{loss: name for loss, name in without.items() if name}, whole.name: whole.name},
    }
    return Ablation(whole.name, groups)


def measured_sizes(outcome: Outcome, ablation: Ablation, measure: str) -> list[int]:
    """Numbers of pairs at which every variant was measured under every budget, the largest first.

    Where there is none, those at which the whole and another variant were measured.
    """

    def done(variant: str, pairs: int) -> bool:
        return all(outcome.values(variant, budget, pairs, measure) for budget in outcome.study.budgets)

    sizes = sorted(outcome.study.pairs, reverse=True)
    whole, others = ablation.whole, [name for name in ablation.variants if name != ablation.whole]
    every = [pairs for pairs in sizes if all(done(name, pairs) for name in ablation.variants)]
    return every or [pairs for pairs in sizes if done(whole, pairs) and any(done(name, pairs) for name in others)]
