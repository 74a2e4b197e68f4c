"""Rules: thresholds at which numbers of an inspection matter for contrastive training on few pairs.

The sentences are in `declip/reports/templates/findings.txt`, one macro for each rule.
"""

from math import inf
from typing import Any

from declip.inspection.reading import ONE_WORD, OTHER_SCRIPT
from declip.inspection.result import CaptionStats, Finding, ImageStats, Inspection

# Default of `data.max_broken_fraction`: a run stops above it.
BROKEN = 0.05

# Fraction of a batch's rows with an equal caption in it: reported from the first on, to be fixed above the second.
EQUAL_ROWS, MANY_EQUAL_ROWS = 0.01, 0.1

# Multiples of the training size: from where on shrinking pays, and to what; pixels that towers' sizes divide by.
LARGE, KEPT, MULTIPLE = 3.0, 2, 32

# Fraction of images under the training size from where on a smaller size pays.
SMALL = 0.25

# The longest context of CLIP, and the fraction that it may truncate.
LONGEST_CONTEXT, MANY_TRUNCATED = 77, 0.01

# Pairs for each entry of the nearest-neighbor queue, entries at least, and the official implementation's entries.
QUEUE_FRACTION, SMALLEST_QUEUE, USUAL_QUEUE = 3, 64, 65_536

# A rule, its number, from where on it is reported and to be fixed, and what its sentence needs beyond the numbers.
Row = tuple[str, float, float, float, dict[str, Any]]


def find(it: Inspection) -> tuple[Finding, ...]:
    """Apply all rules to an inspection without findings; what is to be fixed comes first."""
    rows: list[Row] = []
    for reason, row in sorted(it.reasons.items(), key=lambda item: -item[1]["count"])[:1]:
        rows.append(("broken", it.broken.fraction, 0, BROKEN, {"reason": reason, "example": row["examples"][0]}))
    for leak in it.leakages:
        rows.append(("leakage", leak.found.fraction, 0, 0, {"set": leak.name, "images": leak.images}))
    if it.images is not None and it.captions is not None:
        rows += _repeats(it, it.captions) + _captions(it.captions) + _images(it.images)
        size = SMALLEST_QUEUE
        while 2 * size * QUEUE_FRACTION <= it.total:
            size *= 2
        rows.append(("queue", USUAL_QUEUE / it.total, 1 / QUEUE_FRACTION, inf, {"usual": USUAL_QUEUE, "size": size}))
    found = [Finding(name, n, values, n > fix) for name, n, least, fix, values in rows if n and n >= least]
    return tuple(sorted(found, key=lambda finding: not finding.fix))


def _repeats(it: Inspection, captions: CaptionStats) -> list[Row]:
    assert it.equal_images is not None
    assert it.near_images is not None
    equal, near = it.equal_images.members / it.usable, it.near_images.members / it.usable
    couples = captions.batch_size / 2  # of equal captions, if all rows of a batch had one
    return [
        ("equal_images", equal, 0, 0.01, {}),
        ("near_images", near if near > equal else 0, 0.01, inf, {}),
        ("equal_captions", captions.equal_in_batch, couples * EQUAL_ROWS, couples * MANY_EQUAL_ROWS, {}),
    ]


def _captions(captions: CaptionStats) -> list[Row]:
    odd = {kind: part.fraction for kind, part in captions.kinds.items()}
    one_word, other_script = odd.pop(ONE_WORD, 0), odd.pop(OTHER_SCRIPT, 0)
    example = ", ".join(captions.examples[max(odd, key=odd.__getitem__)]) if odd else ""
    truncated = captions.truncated[LONGEST_CONTEXT].fraction > MANY_TRUNCATED
    return [
        ("odd_captions", sum(odd.values()), 0.01, BROKEN, {"kinds": odd, "example": example}),
        ("one_word", one_word, 0.2, inf, {}),
        ("other_script", other_script, 0.05, inf, {}),
        ("truncated" if truncated else "context_length", captions.context_length, 0, inf, {}),
    ]


def _images(images: ImageStats) -> list[Row]:
    small, times = images.smaller.fraction, images.shorter["p50"] / images.size
    smaller_side = max(MULTIPLE, int(images.shorter["p25"]) // MULTIPLE * MULTIPLE)
    return [
        ("small_images", small, SMALL, inf, {"side": smaller_side}),
        ("large_images", times if small < SMALL else 0, LARGE, inf, {"side": KEPT * images.size}),
    ]
