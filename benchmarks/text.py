"""Tokenising against open_clip's `SimpleTokenizer`, EDA against textaugment's, and whether a cache of ids would pay.

    python benchmarks/text.py --repeats 5 --wordnet /usr/share/wordnet

textaugment reads WordNet through nltk, which wants to download it. Debian's package `wordnet-base` has the files;
without them, or without textaugment, EDA has no peer and a note says so. The last line is JSON.
"""

import argparse
import json
import random
import shutil
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from declip.data.images.decode import decode
from declip.data.text.augment import STOP_WORDS, augment
from declip.data.text.tokenizer import Tokenizer
from machine import machine
from pairs import open_pairs, texts_of
from timing import row, take_turns

CAPTIONS = 2048
OURS, PEER, EDA, EDA_PEER = "Tokenizer", "open_clip's SimpleTokenizer", "EDA", "textaugment's EDA"
ALPHA = 0.1
"""Share of a caption's words that EDA changes."""

NAMES_OF_FILES = 45
"""Of WordNet's lexicographers; a synset names its own by number."""


def measure(repeats: int, wordnet: Path | None = None) -> list[dict[str, object]]:
    """2,048 captions of a dozen words to padded ids, by each; words met before are in both tokenizers' caches."""
    source, tokenizer, generator = open_pairs(), Tokenizer(), np.random.default_rng(0)
    names = [source.captions(index)[0] for index in np.linspace(0, len(source) - 1, 2 * CAPTIONS, dtype=int)]
    captions = [
        f"a small drawing of {a} beside {b} on a white page" for a, b in zip(names[::2], names[1::2], strict=True)
    ]
    tasks: dict[str, Callable[[], object]] = {
        OURS: lambda: tokenizer(captions),
        EDA: lambda: [augment(caption, generator, ALPHA) for caption in captions],
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
    with TemporaryDirectory() as folder:
        theirs = textaugment_eda(wordnet, Path(folder))
        if isinstance(theirs, str):
            notes.append({"part": "text", "note": theirs})
        else:
            tasks[EDA_PEER] = lambda: [theirs(caption) for caption in captions]
        seconds = take_turns(repeats, tasks)
    words = round(sum(len(caption.split()) for caption in captions) / CAPTIONS, 1)
    more = {"captions": source.name, "words_a_caption": words}
    rows = {name: row("text", name, seconds[name], CAPTIONS, "captions", **more) for name in tasks}
    for ours, peers in ((OURS, PEER), (EDA, EDA_PEER)):
        if peers in rows:
            rows[peers]["times_ours"] = round(seconds[peers] / seconds[ours], 2)
    ordered = [rows[name] for name in (OURS, PEER, EDA, EDA_PEER) if name in rows]
    return ordered + notes + cached(repeats, texts_of(source, "joined", CAPTIONS))


def textaugment_eda(wordnet: Path | None, folder: Path) -> Callable[[str], str] | str:
    """textaugment's synonym replacement, swap or deletion, a third each, as ours; or why there is none.

    Args:
        wordnet: The folder of WordNet's files, or None for where nltk looks.
        folder: Where nltk may find a copy of them with what Debian leaves out.
    """
    try:
        import nltk
        from textaugment import EDA as Theirs
    except ImportError as error:
        return f"EDA has no peer here: {error} (pip install textaugment)"
    if wordnet is not None:
        copy = folder / "corpora" / "wordnet"
        shutil.copytree(wordnet, copy)
        if not (copy / "lexnames").exists():
            names = "".join(f"{number:02d}\tfile{number:02d}\t0\n" for number in range(NAMES_OF_FILES))
            (copy / "lexnames").write_text(names)
        (copy / "index.sense").touch()  # for other versions' numbers of synsets, which EDA does not ask for
        nltk.data.path.insert(0, str(folder))
    with patch.object(nltk, "download"):  # its constructor calls it
        eda = Theirs(stop_words=sorted(STOP_WORDS), random_state=0)
    draws = random.Random(0)
    try:
        eda.synonym_replacement("a small dog")
    except LookupError:
        return "EDA has no peer here: nltk has no WordNet; name a folder with its files as --wordnet"

    def augmented(caption: str) -> str:
        count = max(1, int(ALPHA * len(caption.split())))
        kind = draws.randrange(3)
        if kind == 0:
            return eda.synonym_replacement(caption, count)
        return eda.random_swap(caption, count) if kind == 1 else eda.random_deletion(caption, ALPHA)

    return augmented


def cached(repeats: int, captions: Sequence[str]) -> list[dict[str, object]]:
    """Ids anew against ids from a dict, both as lists, beside decoding the pair's picture: what a cache would save."""
    encode, pictures = Tokenizer().encode, jpegs(32)
    known = {caption: encode(caption) for caption in captions}
    tasks: dict[str, Callable[[], object]] = {
        "tokenise a caption": lambda: [encode(caption) for caption in captions],
        "look its ids up in a dict": lambda: [known[caption] for caption in captions],
        "decode a JPEG of 320 x 240": lambda: [decode(picture, "") for picture in pictures],
    }
    seconds = take_turns(repeats, tasks)
    counts = dict(zip(tasks, (len(captions), len(captions), len(pictures)), strict=True))
    units = dict(zip(tasks, ("captions", "captions", "images"), strict=True))
    words = round(sum(len(caption.split()) for caption in captions) / len(captions), 1)
    rows = [row("text, cached?", name, seconds[name], counts[name], units[name]) for name in tasks]
    tokenise, _, picture = (float(str(found["microseconds_each"])) for found in rows)
    rows[0] |= {"words_a_caption": words, "share_of_decoding": round(tokenise / picture, 4)}
    return rows


def jpegs(count: int) -> list[bytes]:
    """Pictures whose detail falls with its fineness, as a photograph's does; quality 90."""
    generator, found = np.random.default_rng(0), []
    for _ in range(count):
        whole = np.zeros((240, 320, 3))
        for side in (4, 16, 64):
            noise = generator.integers(0, 256, (side * 3 // 4, side, 3), np.uint8)
            whole += np.asarray(Image.fromarray(noise).resize((320, 240), Image.Resampling.BICUBIC)) / side
        picture = BytesIO()
        Image.fromarray((whole * 255 / whole.max()).astype(np.uint8)).save(picture, "JPEG", quality=90)
        found.append(picture.getvalue())
    return found


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each, 1 or more (default 5)")
    parser.add_argument("--wordnet", type=Path, help="folder with WordNet's files (data.noun, index.noun …)")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; give 1 or more")
    if options.wordnet and not (options.wordnet / "data.noun").is_file():
        parser.error(
            f"--wordnet {options.wordnet} has no file data.noun; Debian's wordnet-base has it in /usr/share/wordnet"
        )
    torch.set_num_threads(1)
    about = machine()
    print(json.dumps({"machine": about, "repeats": options.repeats, "rows": measure(options.repeats, options.wordnet)}))


if __name__ == "__main__":
    main()
