"""What the stamps of Tux Paint show: their sentences, names and kinds, and which are photographs."""

import re
from collections import defaultdict
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

KINDS = {
    "animals": "animal",
    "clothes": "piece of clothing",
    "food": "food",
    "hobbies": "musical instrument",
    "household": "household object",
    "military": "military object",
    "people": "person or part of a body",
    "plants": "plant",
    "seasonal": "holiday decoration",
    "space": "planet or spacecraft",
    "sports": "piece of sports equipment",
    "town": "building or road sign",
    "vehicles": "vehicle",
}
"""Class name by folder. Letters, coins and chess men ("symbols") are no one kind; two folders are too small."""

NAME = re.compile(r"(?:An?|The) (?:pair of )?(.+)")
LONGEST_NAME = 3
"""Words. Longer ones tell a story."""

DRAWN_FOLDERS = {"cartoon", "symbols", "roadsigns", "flags", "hanukkah", "easter", "newyears"}
DRAWN = frozenset((
    "lightningbolt", "echidna", "star", "blackcat", "spider", "bat_left", "inukshuk-outline", "lamp", "mug", "glass",
    "birch", "tooth", "hedgehog", "lens_flare", "highlighter", "tree", "ghost", "bow", "eye", "skull", "pizza",
    "hard_candy", "stocking", "toilet", "xmas_tp_bulb", "rubberduck", "stripedfish", "Santa", "santahat", "button",
    "7spoke256", "t_jacket", "t_pants", "t_shirt", "t_scarf", "t_glove", "t_baseballcap", "t_sock", "t_poloshirt",
    "t_tshirt", "fly", "sedan_police",
))  # fmt: skip
"""Stamps that are drawn though their folder does not say so, found by looking at all."""

TEST_SHARE = 0.3
SALT = "stamps"


@dataclass(frozen=True)
class Stamp:
    """A stamp.

    Attributes:
        key: Its path below the folder of stamps, without ending.
        sentence: What its author wrote below it.
        name: The sentence's thing, such as "koala"; empty where the sentence says it otherwise.
        kind: One of `KINDS`, empty for what is of none.
        photo: Whether it is a photograph.
        test: Whether it is in the test half of its kind.
    """

    key: str
    sentence: str
    name: str
    kind: str
    photo: bool
    test: bool


def read_stamps(folder: Path) -> list[Stamp]:
    """Read all stamps that have a picture and a sentence, by path.

    Args:
        folder: The package's folder `stamps`.
    """
    keys, sentences = [], {}
    for text in sorted(folder.rglob("*.txt"), key=lambda path: path.relative_to(folder).with_suffix("").as_posix()):
        lines = text.read_text(encoding="utf-8").splitlines()
        key = text.relative_to(folder).with_suffix("").as_posix()
        if text.with_suffix(".png").is_file() and lines and lines[0].strip():
            keys.append(key)
            sentences[key] = " ".join(lines[0].split())
    names = {key: "" if key.startswith("symbols/") else name_of(sentences[key]) for key in keys}
    kinds = {key: KINDS.get(key.split("/")[0], "") for key in keys}
    test = _test_keys(names, kinds)
    return [Stamp(key, sentences[key], names[key], kinds[key], _is_photo(folder, key), key in test) for key in keys]


def name_of(sentence: str) -> str:
    """The thing that a sentence names: "A koala." gives "koala", "Say cheese!" nothing.

    Args:
        sentence: In English.
    """
    first = re.split(r"(?<=[.!?])\s|—| \(|[,;:]", sentence)[0].rstrip(".!? ")
    found = NAME.fullmatch(re.sub(r"[“”\"]", "", first))
    return found[1] if found and len(found[1].split()) <= LONGEST_NAME else ""


def _is_photo(folder: Path, key: str) -> bool:
    """A stamp that is no drawing: those that were vectors first are drawings."""
    *folders, stem = key.split("/")
    return not (DRAWN_FOLDERS & {*folders} or stem in DRAWN or (folder / f"{key}.svg").is_file())


def _test_keys(names: dict[str, str], kinds: dict[str, str]) -> set[str]:
    """Keys of the test stamps: of every kind about `TEST_SHARE`, stamps of one name or numbered alike together."""
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for key, kind in kinds.items():
        stem = re.split(r"[-_\d]", key.rsplit("/", 1)[-1].lower())[0]
        groups[kind][names[key].lower() or stem].append(key)
    test: set[str] = set()
    for kind, members in groups.items():
        wanted = round(TEST_SHARE * sum(map(len, members.values())))
        for group in sorted(members, key=lambda name: sha256(f"{SALT}:{kind}:{name}".encode()).digest()):
            if len(members[group]) <= wanted:
                test.update(members[group])
                wanted -= len(members[group])
    return test
