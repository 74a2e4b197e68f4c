"""Tokenising against open_clip's `SimpleTokenizer`, and EDA."""

from collections.abc import Callable

import numpy as np

from declip.data.text_views import augment
from declip.data.tokenizer import Tokenizer
from pairs import open_pairs
from timing import row, take_turns

CAPTIONS = 2048
OURS, PEER, EDA = "Tokenizer", "open_clip's SimpleTokenizer", "EDA"


def measure(repeats: int) -> list[dict[str, object]]:
    """2,048 captions of a dozen words to padded ids, by each; words met before are in both tokenizers' caches."""
    source, tokenizer, generator = open_pairs(), Tokenizer(), np.random.default_rng(0)
    names = [source.captions(index)[0] for index in np.linspace(0, len(source) - 1, 2 * CAPTIONS, dtype=int)]
    captions = [
        f"a small drawing of {a} beside {b} on a white page" for a, b in zip(names[::2], names[1::2], strict=True)
    ]
    tasks: dict[str, Callable[[], object]] = {
        OURS: lambda: tokenizer(captions),
        EDA: lambda: [augment(caption, generator) for caption in captions],
    }
    notes = []
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError:
        note = "open_clip is not installed (pip install open_clip_torch), so there is nothing to compare with"
        notes.append({"part": "tokens", "note": note})
    else:
        peer = SimpleTokenizer()
        tasks[PEER] = lambda: peer(captions)
        theirs = [[number for number in ids.tolist() if number] for ids in peer(captions)]
        assert [tokenizer.encode(caption) for caption in captions] == theirs, "the two give other ids"
    seconds = take_turns(repeats, tasks)
    words = round(sum(len(caption.split()) for caption in captions) / CAPTIONS, 1)
    rows = {name: row("text", name, seconds[name], CAPTIONS, "captions", words_a_caption=words) for name in tasks}
    if PEER in rows:
        rows[PEER]["times_ours"] = round(seconds[PEER] / seconds[OURS], 2)
    return [rows[name] for name in (OURS, PEER, EDA) if name in rows] + notes
