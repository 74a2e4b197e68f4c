"""The rules of an inspection: which numbers matter for training.

reports/templates/findings.txt has a macro for each rule.
"""

from math import inf
from typing import Any

from declip.inspection import reading
from declip.inspection.results import CaptionStats, Finding, ImageStats, Inspection

BROKEN = 0.05  # default of `data.max_broken_fraction`: a run stops above it
# Fraction of a batch's rows with an equal caption in it: reported from the first on, to be fixed above the second.
EQUAL_ROWS = 0.01
MANY_EQUAL_ROWS = 0.1
# Multiples of the training size: from where on shrinking pays, and to what; pixels that towers' sizes divide by.
LARGE = 3.0
KEPT = 2
MULTIPLE = 32
SMALL = 0.25  # fraction of images under the training size from where on a smaller size pays
# of CLIP, and the fraction of captions that it may truncate
LONGEST_CONTEXT = 77
MANY_TRUNCATED = 0.01


class Findings(list[Finding]):
    """The findings so far."""

    def add(
        self, rule: str, number: float, least: float = 0.0, fix: float = inf, **values: Any
    ) -> None:
        """Apply a rule: it is reported from `least` on, and to be fixed above `fix`.

        Args:
            values: What its sentence needs beyond the numbers.
        """
        if number and number >= least:
            self.append(Finding(rule, number, values, number > fix))


def find(it: Inspection) -> tuple[Finding, ...]:
    """Apply all rules to an inspection without findings; what is to be fixed comes first."""
    found = Findings()
    if it.reasons:
        reason = max(it.reasons, key=lambda reason: it.reasons[reason]["count"])
        example = it.reasons[reason]["examples"][0]
        found.add("broken", it.broken.fraction, fix=BROKEN, reason=reason, example=example)
    for leak in it.leakages:
        found.add("leakage", leak.matches.fraction, fix=0, set=leak.name, images=leak.images)
    if it.split_copies is not None:
        found.add("split_copies", it.split_copies.fraction, fix=0)
    if it.images and it.captions and it.equal_images and it.near_images:
        equal = it.equal_images.members / it.usable
        near = it.near_images.members / it.usable
        found.add("equal_images", equal, fix=0.01)
        if near > equal:
            found.add("near_images", near, least=0.01)
        _check_captions(found, it.captions)
        _check_images(found, it.images)
    return tuple(sorted(found, key=lambda finding: not finding.fix))


def _check_captions(found: Findings, captions: CaptionStats) -> None:
    couples = captions.batch_size / 2  # of equal captions, if all rows of a batch had one
    some = couples * EQUAL_ROWS
    found.add("equal_captions", captions.equal_in_batch, some, couples * MANY_EQUAL_ROWS)
    odd = {kind: part.fraction for kind, part in captions.kinds.items()}
    one_word = odd.pop(reading.ONE_WORD, 0)
    other_script = odd.pop(reading.OTHER_SCRIPT, 0)
    foreign = odd.pop(reading.FOREIGN, 0)
    example = ""
    if odd:
        most_frequent = max(odd, key=odd.__getitem__)
        example = ", ".join(captions.examples[most_frequent])
    found.add("odd_captions", sum(odd.values()), 0.01, BROKEN, kinds=odd, example=example)
    found.add("one_word", one_word, least=0.2)
    found.add("other_script", other_script, least=0.05)
    found.add("foreign", foreign, least=0.1)
    rule = "context_length"
    if captions.truncated[LONGEST_CONTEXT].fraction > MANY_TRUNCATED:
        rule = "truncated"
    found.add(rule, captions.context_length)


def _check_images(found: Findings, images: ImageStats) -> None:
    small = images.smaller.fraction
    quartile = int(images.shorter["p25"])
    smaller_side = max(MULTIPLE, quartile // MULTIPLE * MULTIPLE)
    found.add("small_images", small, least=SMALL, side=smaller_side)
    if small < SMALL:
        times = images.shorter["p50"] / images.size
        found.add("large_images", times, least=LARGE, side=KEPT * images.size)
