"""Rules: which numbers of an inspection matter for contrastive training on few pairs, and from which value on.

The sentences are in `declip/reports/templates/findings.txt`, one macro for each rule.
"""

from collections.abc import Iterator
from typing import Any

from declip.inspection.captions import ONE_WORD
from declip.inspection.result import CaptionStats, Finding, ImageStats, Inspection, RepeatGroup

BROKEN = 0.05
"""Default of `data.max_broken_fraction`: a run stops above it."""

MANY_ONE_WORD, MANY_ODD, MANY_TRUNCATED, MANY_OTHER_SCRIPTS = 0.2, 0.01, 0.01, 0.05
MANY_SMALL, MANY_LONG, MANY_REPEATED = 0.25, 0.05, 0.01
"""Fractions from which a rule reports."""

EQUAL_ROWS, MANY_EQUAL_ROWS = 0.01, 0.1
"""Fraction of a batch's rows that have an equal caption in it: from where it is reported, and is to be fixed."""

LARGE, KEPT, MULTIPLE = 3.0, 2.0, 32
"""Multiples of the training size: from where on shrinking pays, and to what; pixels that towers' sizes divide by."""

QUEUE_FRACTION, SMALLEST_QUEUE, USUAL_QUEUE = 3, 64, 65_536
"""Pairs for each entry of the nearest-neighbor queue, entries at least, and the official implementation's entries."""


def find(inspection: Inspection) -> tuple[Finding, ...]:
    """Apply all rules to an inspection without findings; what is to be fixed comes first."""
    findings = [*_broken_and_leaked(inspection)]
    if inspection.images is not None and inspection.captions is not None:
        findings += _repeats(inspection)
        findings += _captions(inspection, inspection.captions)
        findings += _images(inspection.images)
        if inspection.total <= QUEUE_FRACTION * USUAL_QUEUE:
            size = SMALLEST_QUEUE
            while 2 * size * QUEUE_FRACTION <= inspection.total:
                size *= 2
            findings.append(Finding("queue", USUAL_QUEUE / inspection.total, {"usual": USUAL_QUEUE, "size": size}))
    return tuple(sorted(findings, key=lambda finding: not finding.fix))


def _broken_and_leaked(it: Inspection) -> Iterator[Finding]:
    if it.broken.count:
        reason = max(it.reasons, key=lambda name: it.reasons[name]["count"])
        values = {"limit": BROKEN, "reason": reason, "example": it.reasons[reason]["examples"][0]}
        yield Finding("broken", it.broken.value, values, it.broken.value > BROKEN)
    for leakage in it.leakages:
        if leakage.found.count:
            yield Finding("leakage", leakage.found.value, {"set": leakage.name, "images": leakage.images}, True)


def _repeats(it: Inspection) -> Iterator[Finding]:
    equal, near = it.equal_images, it.near_images
    assert equal is not None
    assert near is not None
    if equal.groups:
        fraction = equal.members / it.usable
        values = {"members": equal.members, "expected": equal.expected}
        yield Finding("equal_images", fraction, values, fraction > MANY_REPEATED)
    if near.members > equal.members and near.members / it.usable > MANY_REPEATED:
        yield Finding("near_images", near.members / it.usable, {"members": near.members})


def _captions(it: Inspection, captions: CaptionStats) -> Iterator[Finding]:
    rows = 2 * captions.equal_in_batch / captions.batch_size
    if rows >= EQUAL_ROWS:
        group = next(iter(it.equal_captions.examples if it.equal_captions else ()), RepeatGroup(0, (), ""))
        values: dict[str, Any] = {"batch_size": captions.batch_size, "text": group.caption}
        values["fraction"] = group.size / it.usable
        yield Finding("equal_captions", captions.equal_in_batch, values, rows > MANY_EQUAL_ROWS)
    odd = {kind: part.value for kind, part in captions.kinds.items() if kind != ONE_WORD}
    fraction = sum(odd.values())
    if fraction >= MANY_ODD:
        values = {"kinds": odd, "example": captions.examples[max(odd, key=odd.__getitem__)][0]}
        yield Finding("odd_captions", fraction, values, fraction > BROKEN)
    one_word = captions.kinds.get(ONE_WORD)
    if one_word is not None and one_word.value >= MANY_ONE_WORD and it.keywords is not None:
        values = {"captions": captions.per_pair.mean, "keywords": it.keywords.value}
        yield Finding("one_word", one_word.value, values)
    longest = max(captions.truncated)
    values = {
        "truncated": captions.truncated[captions.context_length].value,
        "most": captions.tokens.at(99),
        "median": captions.tokens.median,
        "longest": longest,
    }
    rule = "truncated" if captions.truncated[longest].value > MANY_TRUNCATED else "context_length"
    yield Finding(rule, captions.context_length, values)
    letters = sum(captions.scripts.values())
    others = {name: count / letters for name, count in captions.scripts.items() if name != "Latin"}
    if sum(others.values()) >= MANY_OTHER_SCRIPTS:
        yield Finding("scripts", sum(others.values()), {"scripts": dict(list(others.items())[:4])})


def _images(images: ImageStats) -> Iterator[Finding]:
    median, small = images.shorter.median, images.smaller.value
    values: dict[str, Any] = {"size": images.size, "median": median}
    if small >= MANY_SMALL:
        side = max(MULTIPLE, int(images.shorter.at(25)) // MULTIPLE * MULTIPLE)
        yield Finding("small_images", small, {**values, "side": side})
    elif median >= LARGE * images.size:
        yield Finding("large_images", median / images.size, {**values, "side": round(KEPT * images.size)})
    if images.long.value >= MANY_LONG:
        yield Finding("long_images", images.long.value)
    if (blank := images.blank).count:
        values = {"count": blank.count, "of": blank.of, "key": next(iter(images.blank_keys), "")}
        yield Finding("blank_images", blank.value, values, blank.value > MANY_REPEATED)
