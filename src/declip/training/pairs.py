"""The pairs of a run: training pairs and held-out sets are opened, and a sample is checked before the first step."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import suppress

import numpy as np

from declip.data.columns import Columns
from declip.data.pair import BrokenPair, PairSource, SkipCounter
from declip.data.sources.open import open_source
from declip.data.sources.subset import Joined, take, training_part
from declip.data.text.tokenizer import CaptionTokenizer
from declip.errors import UserError
from declip.evaluation.datasets import open_dataset, with_classes
from declip.evaluation.encode import Encoder
from declip.evaluation.protocols import Options, evaluate_all
from declip.evaluation.results import Result
from declip.io.text import percent
from declip.recipe.schema import Recipe

TRAINING = "training pairs"
FEW = 1_000  # pairs up to which all are opened before training, in about a second: one broken pair in a few matters
SAMPLE = 64  # pairs, evenly spaced, that stand for all where reading all would take too long
UNKNOWN, CUT = 0.1, 0.05  # fractions of unknown tokens, and of captions that are cut, above which a warning is due


def open_training_source(recipe: Recipe) -> PairSource:
    """Open the training pairs, of a source with splits those of "train", limited to `data.max_pairs` by the seed."""
    data = recipe.data
    names = [data.source] if isinstance(data.source, str) else data.source
    parts = [training_part(open_source(name, Columns.of(data))) for name in names]
    source = parts[0] if isinstance(data.source, str) else Joined(parts)
    if data.columns.get("group") is not None and source.group_column is None:
        raise UserError(f"data.columns.group names a column of a table, which '{source.name}' is not. Leave it out.")
    return source if data.max_pairs is None else take(source, data.max_pairs, recipe.seed)


def refuse_broken(source: PairSource, allowed: float) -> None:
    """Raise an error if more than a fraction of a few pairs cannot be used; images are opened, not decoded."""
    broken = SkipCounter()
    for index in range(0 if source.remote or len(source) > FEW else len(source)):
        try:
            source.read_lazy(index)
        except BrokenPair as error:
            broken.add(error)
    refuse_many(broken, source, allowed)


def refuse_many(broken: SkipCounter, source: PairSource, allowed: float) -> None:
    """Raise an error if more than a fraction of the pairs is broken."""
    if broken.total > allowed * len(source):
        raise broken.refusal(len(source), allowed, source.name)


def sample_hashes(recipe: Recipe, source: PairSource) -> dict[str, list[str]]:
    """Open every held-out set, to find an unusable one before training, and hash it and the training pairs."""
    sets = {TRAINING: source}
    for name, protocols in evaluation_tasks(recipe, final=True).items():
        sets[name] = open_dataset(name).split("test")
        if "zero-shot" in protocols:
            with_classes(sets[name])
    return {name: _hashes(pairs) for name, pairs in sets.items()}


def _hashes(source: PairSource) -> list[str]:
    """Number of pairs, and hashes of key and captions of some; empty for a pair that is broken or not at hand."""
    hashes = [str(len(source))]
    for index in _sample(source):
        found = ""
        with suppress(BrokenPair):
            text = "\n".join((source.key(index), *source.captions(index)))
            found = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        hashes.append(found)
    return hashes


def _sample(source: PairSource, size: int = SAMPLE) -> list[int]:
    """Indices of evenly spaced pairs; none of a remote source."""
    count = 0 if source.remote else min(size, len(source))
    places: list[int] = np.linspace(0, len(source) - 1, count).astype(int).tolist()
    return places


def evaluation_tasks(recipe: Recipe, final: bool) -> dict[str, list[str]]:
    """Map each dataset that a recipe evaluates on, at the end or during training, to its protocols."""
    wanted, tasks = recipe.evaluation, tasks_to_keep(recipe) if final else {}
    ends = (("zero-shot", wanted.final_zero_shot), ("retrieval", wanted.final_retrieval)) if final else ()
    for protocol, names in (("zero-shot", wanted.zero_shot), ("retrieval", wanted.retrieval), *ends):
        for name in names:
            if protocol not in tasks.setdefault(name, []):
                tasks[name].append(protocol)
    return tasks


def measure(model: Encoder, tasks: Mapping[str, list[str]], progress: bool) -> Iterator[Result]:
    """Evaluate a model on datasets by their protocols, see `evaluation_tasks`."""
    for name, protocols in tasks.items():
        yield from evaluate_all(model, name, protocols, Options(progress=progress))


def has_captions(source: PairSource) -> bool:
    """Whether any of the first pairs has a caption other than the name of its class, for retrieval."""
    for index in range(min(SAMPLE, len(source))):
        with suppress(BrokenPair):
            captions, names = source.captions(index), source.class_names
            if source.labels is None or names is None or captions != (names[source.labels[index]],):
                return True
    return False


def tasks_to_keep(recipe: Recipe) -> dict[str, list[str]]:
    """Map the sets of `evaluation.keep` to their protocols: retrieval with captions, else zero-shot."""
    sets = {name: open_dataset(name).split("test") for name in recipe.evaluation.keep}
    return {name: ["retrieval" if has_captions(source) else "zero-shot"] for name, source in sets.items()}


def caption_warnings(source: PairSource, tokenizer: CaptionTokenizer) -> list[str]:
    """Look at the tokens of some captions, evenly spaced in the source; remote sources are not read."""
    texts, unknown_id = list[list[int]](), _unknown_id(tokenizer)
    for index in _sample(source, 512):
        with suppress(BrokenPair):
            texts += [[*tokenizer.word_ids(text)] for text in source.captions(index)]
    unknown = sum(ids.count(unknown_id) for ids in texts) / max(1, sum(map(len, texts)))
    cut = sum(len(ids) + 2 > tokenizer.context for ids in texts) / max(1, len(texts))  # with start and end
    warnings = []
    if unknown > UNKNOWN:
        warnings.append(
            f"{percent(unknown)} of the captions' tokens are unknown to the text tower, which cannot tell them apart. "
            "Write captions in its language, or give weights of a multilingual text tower with --from."
        )
    if cut > CUT:
        warnings.append(
            f"{percent(cut)} of the captions are longer than {tokenizer.context} tokens (text.context_length); what "
            "follows is not read. Write what matters first."
        )
    return warnings


def _unknown_id(tokenizer: CaptionTokenizer) -> int:
    """The id of words that the vocabulary lacks; -1 for tokenizers that spell them in bytes."""
    named = getattr(tokenizer.library.model, "unk_token", None)
    found = (tokenizer.library.token_to_id(name) for name in (named, "<unk>", "[UNK]") if name is not None)
    return next((number for number in found if number is not None), -1)
