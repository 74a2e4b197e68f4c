"""Tokenising against open_clip's `SimpleTokenizer`, and EDA."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

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
    notes: list[dict[str, object]] = []
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError:
        note = "open_clip is not installed (pip install open_clip_torch), so there is nothing to compare with"
        notes.append({"part": "text", "note": note})
    else:
        peer = SimpleTokenizer()
        tasks[PEER] = lambda: peer(captions)
        ids = tokenizer(captions)
        assert torch.equal(peer(captions), F.pad(ids, (0, peer.context_length - ids.shape[1]))), "other ids"
    seconds = take_turns(repeats, tasks)
    words = round(sum(len(caption.split()) for caption in captions) / CAPTIONS, 1)
    more = {"captions": source.name, "words_a_caption": words}
    rows = {name: row("text", name, seconds[name], CAPTIONS, "captions", **more) for name in tasks}
    if PEER in rows:
        rows[PEER]["times_ours"] = round(seconds[PEER] / seconds[OURS], 2)
    return [rows[name] for name in (OURS, PEER, EDA) if name in rows] + notes
