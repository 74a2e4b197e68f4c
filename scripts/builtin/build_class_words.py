"""Build the table of words for several of ImageNet's classes, such as "animal", from WordNet's files.

    python scripts/builtin/build_class_words.py /usr/share/wordnet

The folder is WordNet 3.0's "dict", as for build_synonyms.py; timm has the classes. The same files give the same bytes.
"""

import argparse
from collections import defaultdict
from pathlib import Path

from timm.data import ImageNetInfo

from build_synonyms import ASSETS, CRUDE, _lines, read_exceptions
from inflection import Irregular, inflect
from packing import pack

MOST = 400  # classes of a word: "object" and "artifact" say nothing


def build(folder: Path) -> list[str]:
    """Return a line for each group of classes: its words with their plurals, a tab, the numbers of its classes."""
    words, above = dict[str, list[str]](), dict[str, list[str]]()
    for line in _lines(folder / "data.noun"):
        fields = line.partition("|")[0].split()
        end = 4 + 2 * int(fields[3], 16)
        words[fields[0]] = [word.replace("_", " ").lower() for word in fields[4:end:2]]
        pointers = zip(*[iter(fields[end + 1 :])] * 4, strict=False)
        above[fields[0]] = [
            offset for kind, offset, part, _ in pointers if kind == "@" and part == "n"
        ]
    # --- the classes of each synset
    classes = defaultdict[str, list[int]](list)
    for number, label in enumerate(ImageNetInfo("imagenet-1k").label_names()):
        for offset in ancestors(label[1:], above):
            classes[offset].append(number)
    # --- the words of which it is the most frequent sense: "toy" is not a group of dogs
    first = {
        entry.split()[0]: entry.split()[-int(entry.split()[2])]
        for entry in _lines(folder / "index.noun")
    }
    irregular, lines = Irregular(sorted(set(read_exceptions(folder)))), list[str]()
    for offset, numbers in sorted(classes.items()):
        used = [word for word in words[offset] if first[word.replace(" ", "_")] == offset]
        used = [word for word in used if not CRUDE & set(word.split())]
        if used and 2 <= len(numbers) <= MOST:
            forms = [
                form for word in used for form in (word, inflect(word, "plural", irregular)) if form
            ]
            lines.append("|".join(dict.fromkeys(forms)) + "\t" + " ".join(map(str, numbers)))
    return lines


def ancestors(offset: str, above: dict[str, list[str]]) -> set[str]:
    """Return a synset and all above it."""
    return {offset}.union(*(ancestors(each, above) for each in above[offset]))


def main() -> None:
    """Write the table into the package."""
    parser = argparse.ArgumentParser(description="Build the table of words for several classes.")
    parser.add_argument("wordnet", type=Path, help="folder with WordNet 3.0's dict files")
    lines = build(parser.parse_args().wordnet)
    packed = pack(lines)
    (ASSETS / "class_words.txt.xz").write_bytes(packed)
    print(f"{len(lines):,} lines, {len(packed):,} bytes")


if __name__ == "__main__":
    main()
