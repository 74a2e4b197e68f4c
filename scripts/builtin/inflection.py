"""English inflection: from "riding" to the verb "ride", and from "drive" to "driving".

Regular forms follow WordNet's rules of detachment (its manual page morphy) and their inverse; irregular ones
come from WordNet's exception lists.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

Form = Literal["base", "plural", "third", "ing", "past", "er", "est"]

# part of speech (n, v, a) -> (ending, what replaces it, form)
DETACHMENTS: dict[str, tuple[tuple[str, str, Form], ...]] = {
    "n": (
        ("s", "", "plural"),
        ("ses", "s", "plural"),
        ("xes", "x", "plural"),
        ("zes", "z", "plural"),
        ("ches", "ch", "plural"),
        ("shes", "sh", "plural"),
        ("men", "man", "plural"),
        ("ies", "y", "plural"),
    ),
    "v": (
        ("s", "", "third"),
        ("ies", "y", "third"),
        ("es", "e", "third"),
        ("es", "", "third"),
        ("ed", "e", "past"),
        ("ed", "", "past"),
        ("ing", "e", "ing"),
        ("ing", "", "ing"),
    ),
    "a": (("er", "", "er"), ("est", "", "est"), ("er", "e", "er"), ("est", "e", "est")),
}
_SAME_PLURAL = """
aircraft bison cattle cod deer fish grouse moose offspring people police salmon series sheep shrimp spacecraft
species squid swine trout watercraft
"""
_SAME_PAST = """
bet bid burst bust cast cost cut fit hit hurt let put quit read rid set shed shut slit split spread thrust
upset wed wet
"""
_NOT_A_MAN = "caiman cayman german human norman ottoman roman shaman talisman turkoman"
_LINKS = "about at by for from in of on to under with"
# Words that the regular rules would get wrong, and those that follow the head of a phrase.
_INVARIANT: dict[Form, frozenset[str]] = {
    "plural": frozenset(_SAME_PLURAL.split()),
    "past": frozenset(_SAME_PAST.split()),
}
_NOT_MEN = frozenset(_NOT_A_MAN.split())
_PREPOSITIONS = frozenset(_LINKS.split())
_VOWELS = "aeiou"


def detach(word: str) -> Iterator[tuple[str, Form, str]]:
    """List the lemmas of which a word may be a regular form.

    Args:
        word: A word in lower case.

    Yields:
        (part of speech, form, lemma) of every rule that applies; whether the lemma exists is not checked.
    """
    for part, rules in DETACHMENTS.items():
        for ending, instead, form in rules:
            if word.endswith(ending) and len(word) > len(ending) + 1 and not word.endswith("ss"):
                yield part, form, word[: len(word) - len(ending)] + instead


class Irregular:
    """Irregular forms by lemma, and lemmas by form.

    Args:
        rows: (part of speech, surface form, lemma), as in WordNet's exception lists.
    """

    def __init__(self, rows: Sequence[tuple[str, str, str]]) -> None:
        self._lemmas: defaultdict[str, list[tuple[str, Form, str]]] = defaultdict(list)
        self._surfaces: defaultdict[tuple[Form, str], list[str]] = defaultdict(list)
        for part, surface, lemma in rows:
            form = _irregular_form(part, surface)
            self._lemmas[surface].append((part, form, lemma))
            self._surfaces[form, lemma].append(surface)

    def words(self) -> Iterable[str]:
        """List the irregular surface forms."""
        return self._lemmas

    def lemmas(self, surface: str) -> Sequence[tuple[str, Form, str]]:
        """List (part of speech, form, lemma) that an irregular surface form stands for."""
        return self._lemmas.get(surface, ())

    def surfaces(self, form: Form, lemma: str) -> Sequence[str]:
        """List the irregular surfaces of a lemma's form; empty when the form is regular."""
        return self._surfaces.get((form, lemma), ())


def _irregular_form(part: str, surface: str) -> Form:
    if part == "n":
        return "plural"
    if part == "a":
        return "est" if surface.endswith("st") else "er"
    if surface.endswith("ing"):
        return "ing"
    return "third" if surface.endswith("s") and surface != "was" else "past"


def inflect(phrase: str, form: Form, irregular: Irregular) -> str | None:
    """Inflect a word or phrase.

    Of a phrase the head is inflected: a verb's first word ("chase after" gives "chasing after"), a noun's
    last word or the one before its preposition ("break of day" gives "breaks of day").

    Args:
        phrase: A lemma, words separated by spaces.
        form: The wanted form.
        irregular: The irregular forms.

    Returns:
        The inflected phrase, or None when the form is ambiguous ("swim" has the pasts "swam" and "swum").
    """
    words = phrase.split(" ")
    if form == "base":
        return phrase
    if form in ("er", "est"):
        return _compare(phrase, form, irregular)
    head = 0
    if form == "plural":
        head = next(
            (i - 1 for i, word in enumerate(words) if word in _PREPOSITIONS and i), len(words) - 1
        )
    surfaces = irregular.surfaces(form, words[head].lower())
    if len(surfaces) > 1:
        return None
    words[head] = surfaces[0] if surfaces else _regular(words[head], form)
    return " ".join(words)


def _compare(phrase: str, form: Form, irregular: Irregular) -> str:
    surfaces = irregular.surfaces(form, phrase)
    if surfaces:
        return surfaces[0]
    if len(phrase) > 6 or not phrase.isalpha():
        return ("more " if form == "er" else "most ") + phrase
    if phrase.endswith("e"):
        return phrase + form[1:]
    return (phrase[:-1] + "i" if _consonant_y(phrase) else phrase) + form


def _regular(word: str, form: Form) -> str:
    if word in _INVARIANT.get(form, ()):
        return word
    if form == "ing":
        if word.endswith("ie"):
            return word[:-2] + "ying"
        return (
            word[:-1] if word.endswith("e") and not word.endswith(("ee", "oe", "ye")) else word
        ) + "ing"
    if form == "past":
        return (
            word + "d"
            if word.endswith("e")
            else (word[:-1] + "i" if _consonant_y(word) else word) + "ed"
        )
    if _consonant_y(word):
        return word[:-1] + "ies"
    if form == "plural" and word.endswith("man") and word not in _NOT_MEN:
        return word[:-3] + "men"
    hissing = word.endswith(("s", "x", "z", "ch", "sh")) or (form == "third" and word.endswith("o"))
    return word + ("es" if hissing else "s")


def _consonant_y(word: str) -> bool:
    return len(word) > 1 and word.endswith("y") and word[-2] not in _VOWELS
