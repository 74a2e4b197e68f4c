"""The variants that take one recipe apart, in groups, with the numbers that the paper reports."""

from dataclasses import dataclass
from itertools import accumulate
from operator import or_

from declip.comparison.outcome import Outcome
from declip.comparison.study import Study
from declip.comparison.variants import BASELINE, LEFT_OUT, STEP, STEPS

REPORTED = (20.6, 24.8, 25.4, 27.2)
"""ImageNet zero-shot top-1 in % after each of `STEPS`: ResNet-50 on CC3M (Li et al. 2022, arXiv 2110.05208).

Second-hand: as others quote the paper, not read in the paper itself.
"""


@dataclass(frozen=True)
class AblationPart:
    """A variant, its label within the group, and the percentage that the paper reports for it."""

    label: str
    variant: str
    reported: float | None = None


@dataclass(frozen=True)
class Ablation:
    """The variant `whole` taken apart: its parts by group, each group with the whole in it."""

    whole: str
    groups: dict[str, tuple[AblationPart, ...]]

    @property
    def variants(self) -> list[str]:
        """All variants, each once."""
        return list(dict.fromkeys(part.variant for parts in self.groups.values() for part in parts))

    @property
    def reported(self) -> bool:
        """Whether the steps are the paper's."""
        return any(part.reported for parts in self.groups.values() for part in parts)


def read_ablation(study: Study) -> Ablation | None:
    """Find the parts of the recipe that was taken apart; None when none was."""
    made = [variant for variant in study.variants if variant.group]
    if not made:
        return None
    same = [name for name in study.named if study.variant(name).recipe == made[0].recipe]
    whole = study.variant(same[0] if same else study.compute_budget_of)
    end = AblationPart(whole.name, whole.name)
    groups = {}
    if steps := [variant for variant in made if variant.group == STEP]:
        added = " ".join(f"+{loss}" for loss in whole.losses if loss not in steps[-1].losses)
        labels = {step.name: step.label for step in steps} | {whole.name: f"{added} = {whole.name}"}
        is_the_papers = [set(step.losses) for step in (*steps, whole)] == list(accumulate(map(set, STEPS), or_))
        reported = REPORTED if is_the_papers else [None] * len(labels)
        groups["losses added"] = tuple(
            AblationPart(label, name, percentage)
            for (name, label), percentage in zip(labels.items(), reported, strict=True)
        )
    if any(variant.group == LEFT_OUT for variant in made):
        # The last step is also the recipe without its last losses; it was trained once and stands in both groups.
        by_losses = {frozenset(variant.losses): variant.name for variant in made if variant.group != BASELINE}
        without = {loss: frozenset(whole.losses) - {loss} for loss in whole.losses}
        parts = [AblationPart(loss, by_losses[rest]) for loss, rest in without.items() if rest in by_losses]
        groups["loss left out"] = (*parts, end)
    if baselines := [variant for variant in made if variant.group == BASELINE]:
        groups["plain clip"] = (*(AblationPart(variant.label, variant.name) for variant in baselines), end)
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
