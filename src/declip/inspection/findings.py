"""What the numbers of an inspection mean for contrastive training on few pairs: rules, each with its threshold."""

from collections.abc import Callable, Iterator

from declip.inspection.captions import NO_LETTER, ONE_WORD
from declip.inspection.result import Finding, Inspection
from declip.io.text import about, percent, shown

BROKEN = 0.05
"""`data.max_broken_fraction`: a run stops beyond it."""

ONE_WORD_SHARE, ODD_SHARE, CUT_SHARE, SCRIPT_SHARE = 0.2, 0.01, 0.01, 0.05
SMALL_SHARE, LONG_SHARE, REPEATED_SHARE = 0.25, 0.05, 0.01
"""Shares from which a rule speaks."""

EQUAL_ROWS, MANY_EQUAL_ROWS = 0.01, 0.1
"""Rows of a batch that have an equal caption in it, as a share: worth a word, and to be mended."""

LARGE, KEPT = 3.0, 2.0
"""Training sizes: from where on shrinking once pays, and to how many. A crop of a quarter is then not enlarged."""

MULTIPLE = 32
"""Pixels: towers take sizes that are a multiple of their patch or stride."""

QUEUE_PART, SMALLEST_QUEUE, USUAL_QUEUE = 3, 64, 65_536
"""Pairs for each entry of the nearest-neighbor queue (`declip-small` has 512 entries and was chosen on 1,453 pairs),
entries at least, and the authors' entries (Li et al. 2022)."""


def find(inspection: Inspection) -> tuple[Finding, ...]:
    """Say what an inspection means, what is to be mended first.

    Args:
        inspection: All of it but the findings.

    Returns:
        Findings of the rules below that were set off.
    """
    found = [finding for rule in RULES for finding in rule(inspection)]
    return tuple(sorted(found, key=lambda finding: not finding.mend))


def _broken(inspection: Inspection) -> Iterator[Finding]:
    share = inspection.broken
    if not share.count:
        return
    if share.count == share.of:
        advice = "Nothing can be trained on. The table has the reasons and the first keys of each."
    elif share.value > BROKEN:
        advice = f"A run stops at {percent(BROKEN)} (data.max_broken_fraction). Mend or remove them, or allow more."
    else:
        advice = "They are left out of training and counted."
    estimated = not inspection.whole and share.count < share.of
    wide = f" (95 %: {percent(share.low)} to {percent(share.high)})" if estimated else ""
    text = f"{percent(share.value)}{wide} of the pairs cannot be used."
    yield Finding("broken", share.value, text, advice, share.value > BROKEN)


def _overlaps(inspection: Inspection) -> Iterator[Finding]:
    for overlap in inspection.overlaps:
        if not overlap.found.count:
            continue
        share = overlap.found.value
        text = f"{percent(share)} of the images look like one of the {overlap.images:,} of {overlap.name}."
        advice = "Look at them, and remove the copies from training: else results on that set are too good."
        yield Finding("overlap", share, text, advice, True)


def _repeated_images(inspection: Inspection) -> Iterator[Finding]:
    equal, near = inspection.equal_images, inspection.near_images
    if equal is None or near is None:
        return
    if equal.groups:
        share = equal.members / inspection.usable
        text = f"{equal.members:,} of {inspection.usable:,} pairs read have the same image as another"
        if not inspection.whole:
            text += f"; in the whole source there are about {about(equal.expected)} couples of equal images"
        advice = "Make each image one pair with several captions: else a batch may hold it as its own negative."
        yield Finding("equal images", share, f"{text}.", advice, share > REPEATED_SHARE)
    share = near.members / inspection.usable
    if near.members > equal.members and share > REPEATED_SHARE:
        text = f"{near.members:,} of {inspection.usable:,} pairs read have an image that looks like another's."
        advice = "Look at some. Copies should not be both in training and in a test set."
        yield Finding("near images", share, text, advice)


def _equal_captions(inspection: Inspection) -> Iterator[Finding]:
    captions = inspection.captions
    if captions is None:
        return
    rows = 2 * captions.equal_in_batch / captions.batch
    if rows < EQUAL_ROWS:
        return
    couples = about(captions.equal_in_batch)
    text = f"Captions repeat: a batch of {captions.batch} holds {couples} couples of equal ones on average."
    if captions.frequent:
        words, count = captions.frequent[0]
        text += f" The commonest, “{shown(words, 60)}”, is with {percent(count / inspection.usable)} of the pairs."
    advice = (
        "Each is a false negative: the contrast pushes an image from its own caption. Write what tells the images "
        "apart, or take a smaller train.batch_size."
    )
    yield Finding("equal captions", captions.equal_in_batch, text, advice, rows > MANY_EQUAL_ROWS)


def _odd(inspection: Inspection) -> Iterator[Finding]:
    captions = inspection.captions
    if captions is None:
        return
    odd = {kind: share for kind, share in captions.kinds.items() if kind != ONE_WORD}
    share = sum(each.value for each in odd.values())
    if share < ODD_SHARE:
        return
    listed = ", ".join(f"{_plural(kind)} {percent(each.value)}" for kind, each in odd.items())
    example = captions.examples[max(odd, key=lambda kind: odd[kind].count)][0]
    text = f"{percent(share)} of the captions say nothing of the image, such as “{shown(example, 60)}”: {listed}."
    yield Finding("odd captions", share, text, "Remove those pairs, or write captions for them.", share > BROKEN)


def _one_word(inspection: Inspection) -> Iterator[Finding]:
    captions, keywords = inspection.captions, inspection.keywords
    if captions is None or keywords is None or ONE_WORD not in captions.kinds:
        return
    share = captions.kinds[ONE_WORD].value
    if share < ONE_WORD_SHARE:
        return
    if captions.per_pair.mean > 1.5:
        advice = "There are several captions a pair: take views.text.second_view=caption (declip-captions)."
    elif keywords.value > 0.5:
        known = percent(keywords.value)
        advice = f"{known} of the pairs have keywords: take views.text.second_view=keywords (declip-small)."
    else:
        advice = "Add words or keywords if you can; see declip-small in docs/results.md."
    text = f"{percent(share)} of the captions are one word: EDA and masking have nothing to work with."
    yield Finding("one word", share, text, advice)


def _context(inspection: Inspection) -> Iterator[Finding]:
    captions = inspection.captions
    if captions is None:
        return
    short, longest = min(captions.cut), max(captions.cut)
    share = captions.cut[longest].value
    if share > CUT_SHARE:
        text = f"{percent(share)} of the captions are longer than {longest} tokens, CLIP's context, and are cut."
        yield Finding("context", share, text, "Put what is seen first, or give the sentences as several captions.")
        return
    text = (
        f"Captions have {captions.tokens.median:.0f} tokens (median) and 99 % at most {captions.tokens.at(99):.0f}; "
        f"text.context_length={short} would cut {percent(captions.cut[short].value)} of them."
    )
    cheaper = ", and is faster" if captions.context < longest else ""
    yield Finding(
        "context", captions.context, text, f"text.context_length={captions.context} cuts at most 1 %{cheaper}."
    )


def _scripts(inspection: Inspection) -> Iterator[Finding]:
    captions = inspection.captions
    if captions is None:
        return
    letters = sum(captions.scripts.values())
    others = {name: count for name, count in captions.scripts.items() if name != "Latin"}
    share = sum(others.values()) / letters if letters else 0.0
    if share < SCRIPT_SHARE:
        return
    listed = ", ".join(f"{name} {percent(count / letters)}" for name, count in list(others.items())[:4])
    text = f"{percent(share)} of the captions are in other scripts than Latin: {listed}."
    advice = (
        "CLIP's vocabulary was made from English: it spells these in several times the tokens, and EDA knows no "
        "synonyms for them."
    )
    yield Finding("scripts", share, text, advice)


def _resolution(inspection: Inspection) -> Iterator[Finding]:
    images = inspection.images
    if images is None:
        return
    median, small = images.shorter.median, images.smaller.value
    if small >= SMALL_SHARE:
        side = max(MULTIPLE, int(images.shorter.at(25)) // MULTIPLE * MULTIPLE)
        text = f"{percent(small)} of the images are smaller than {images.size} px (median {median:,.0f})."
        advice = f"Enlarging them costs time and adds nothing: take a smaller image.size, such as {side}."
        yield Finding("small images", small, text, advice)
    elif median >= LARGE * images.size:
        side = round(KEPT * images.size)
        text = f"Images are larger than needed: median {median:,.0f} px for {images.size}."
        if images.bytes is not None:
            text += f" Each epoch reads about {about(images.bytes.mean * inspection.total / 1e9)} GB."
        advice = f"Shrink them once to {side} px: {about((median / side) ** 2)} times fewer pixels to decode."
        yield Finding("large images", median / images.size, text, advice)


def _shape(inspection: Inspection) -> Iterator[Finding]:
    images = inspection.images
    if images is None:
        return
    if images.long.value >= LONG_SHARE:
        text = f"{percent(images.long.value)} of the images are more than three times as long as wide."
        advice = "A square crop sees a third of each at most: cut them up or leave them out."
        yield Finding("long images", images.long.value, text, advice)
    if images.blank.count:
        first = shown(images.blank_keys[0], 60) if images.blank_keys else ""
        text = f"{images.blank.count:,} of {images.blank.of:,} images are a single color, such as {first}."
        advice = "Look at them: most often a download failed."
        yield Finding("blank images", images.blank.value, text, advice, images.blank.value > REPEATED_SHARE)


def _queue(inspection: Inspection) -> Iterator[Finding]:
    if inspection.captions is None or inspection.total > QUEUE_PART * USUAL_QUEUE:
        return
    size = SMALLEST_QUEUE
    while 2 * size * QUEUE_PART <= inspection.total:
        size *= 2
    times = USUAL_QUEUE / inspection.total
    text = f"The usual queue of {USUAL_QUEUE:,} captions is {about(times)} times these {inspection.total:,} pairs."
    advice = (
        "A caption then meets itself in it as its nearest neighbor. For recipes with that term: "
        f"nearest_neighbor.queue_size={size}, small against the data, as in declip-small (docs/results.md)."
    )
    yield Finding("queue", times, text, advice)


RULES: tuple[Callable[[Inspection], Iterator[Finding]], ...] = (
    _broken,
    _overlaps,
    _repeated_images,
    _equal_captions,
    _odd,
    _one_word,
    _context,
    _scripts,
    _resolution,
    _shape,
    _queue,
)


def _plural(kind: str) -> str:
    return {NO_LETTER: "without a letter", "web address": "web addresses"}.get(kind, f"{kind}s")
