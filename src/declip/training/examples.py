"""Facts and example pairs of a run for its report, written once into the run folder."""

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from declip.data.batch import IGNORED, PairBatch
from declip.data.images.thumbnails import pixels, thumbnails_of
from declip.data.images.views import apply_photometric
from declip.data.pair import PairSource
from declip.data.text.tokenizer import CaptionTokenizer
from declip.io.atomic import write_text
from declip.recipe.schema import ImageTowerConfig
from declip.runs.folder import EXAMPLES
from declip.training.state import RunState

SHOWN_PAIRS = 4


def write_examples(state: RunState, batch: PairBatch) -> None:
    """Write examples.json: the training source, the losses with their chance levels, and the views of some pairs."""
    source, losses = state.source, dict[str, dict[str, Any]]()
    for name, term in state.objective.terms.items():
        chance = term.chance(state.recipe.train.batch_size)  # type: ignore[operator]
        title = getattr(term, "title", name)  # a user's own term may have none
        losses[name] = {"title": title, "explanation": term.explanation, "chance": chance}
    views = example_views(batch, source, state.recipe.image, state.model.tokenizer)
    facts = {"name": source.name, "pairs": len(source), "captions": source.captions_from, "credit": source.credit}
    write_text(state.folder / EXAMPLES, json.dumps({"source": facts, "losses": losses, "views": views}))


def example_views(
    batch: PairBatch, source: PairSource, statistics: ImageTowerConfig, tokenizer: CaptionTokenizer
) -> list[dict[str, Any]]:
    """Show random pairs of a batch as the towers see them: pixels un-normalized, token ids decoded.

    Pairs whose text was changed or masked come first. An image is the `src` and `alt` of a thumbnail, or None.
    """
    mean, std = torch.tensor(statistics.mean), torch.tensor(statistics.std)
    finished = apply_photometric(batch.views, mean, std)
    images = [view.pixels * std.view(3, 1, 1) + mean.view(3, 1, 1) for view in finished.values()]  # (B, 3, S, S) each
    changed = (batch.texts[0] != batch.texts[-1]).any(1).float()
    if batch.labels is not None:
        changed += (batch.labels != IGNORED).any(1)
    order = np.random.default_rng(0).permutation(len(batch))
    chosen = order[np.argsort(-changed.numpy()[order], kind="stable")][:SHOWN_PAIRS]
    assert batch.sample_ids is not None, "the loader sets them"
    thumbnails = thumbnails_of(source)
    pairs: list[dict[str, Any]] = []
    for row in chosen.tolist():
        decoded = (tokenizer.decode(text[row].tolist()) for text in batch.texts)
        texts = dict(zip(("caption", "augmented"), decoded, strict=False))
        if batch.masked is not None and batch.labels is not None:
            texts["masked"] = _masked(tokenizer, batch.masked[row], batch.labels[row])
        image = thumbnails(int(batch.sample_ids[row]) % len(source))
        views = [pixels(view[row].float().numpy(), f"View of: {texts['caption']}")._asdict() for view in images]
        pairs.append({"image": image and image._asdict(), "views": views, "texts": texts})
    return pairs


def _masked(tokenizer: CaptionTokenizer, masked: Tensor, labels: Tensor) -> str:
    """Decode a corrupted caption; a token to predict is in brackets with its original: "a [mask: cat] sat"."""
    words = []
    for token, label in zip(masked.tolist()[1:], labels.tolist()[1:], strict=True):
        if token == tokenizer.end:
            break
        word = "mask" if token == tokenizer.mask else tokenizer.decode([token])
        words.append(word if label == IGNORED else f"[{word}: {tokenizer.decode([label])}]")
    return " ".join(words)
