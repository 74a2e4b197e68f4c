"""Facts and example pairs of a run for its report, written once into the run folder."""

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from declip.data.batch import IGNORED, PairBatch
from declip.data.images.thumbnails import pixels
from declip.data.images.views import apply_photometric
from declip.data.text.tokenizer import CaptionTokenizer
from declip.io.atomic import write_text
from declip.recipe.schema import ImageTowerConfig
from declip.runs.folder import EXAMPLES
from declip.training.state import RunState

SHOWN_PAIRS = 4


def write_examples(state: RunState, batch: PairBatch) -> None:
    """Write examples.json: the training source, the losses with their chance levels, and a sheet of views."""
    source = state.source
    losses = dict[str, dict[str, Any]]()
    for name, term in state.objective.named_terms():
        chance = term.chance(state.recipe.train.batch_size)
        title = getattr(term, "title", name)  # a user's own term may have none
        losses[name] = {"title": title, "explanation": term.explanation, "chance": chance}
    sheet = view_sheet(batch, state.recipe.image, state.model.tokenizer)
    facts = {
        "name": source.name,
        "pairs": len(source),
        "captions": source.captions_from,
        "credit": source.credit,
    }
    examples = {"source": facts, "losses": losses, "view_sheet": sheet}
    write_text(state.folder / EXAMPLES, json.dumps(examples))


def view_sheet(
    batch: PairBatch, statistics: ImageTowerConfig, tokenizer: CaptionTokenizer
) -> dict[str, Any]:
    """Show random pairs of a batch as the towers see them: one picture of all views, and the token ids decoded.

    Pairs whose text was changed or masked come first. The picture, the `src` and `alt` of a thumbnail, has a row for
    each pair and a column for each view; `texts` has the texts of each row by name.
    """
    mean = torch.tensor(statistics.mean).view(3, 1, 1)
    std = torch.tensor(statistics.std).view(3, 1, 1)
    finished = apply_photometric(batch.views, mean, std)
    augmented = batch.texts[0] != batch.texts[-1]
    changed = augmented.any(1).float()
    if batch.labels is not None:
        changed += (batch.labels != IGNORED).any(1)
    order = np.random.default_rng(0).permutation(len(batch))
    most_changed = np.argsort(-changed.numpy()[order], kind="stable")
    chosen = order[most_changed][:SHOWN_PAIRS]
    rows = []
    all_texts = []
    for row in chosen.tolist():
        # (3, S, S) each
        views = [view.pixels[row].float() * std + mean for view in finished.values()]
        rows.append(torch.cat(views, dim=2))
        decoded = [tokenizer.decode(text[row].tolist()) for text in batch.texts]
        texts = dict(zip(("caption", "augmented"), decoded, strict=False))
        if batch.masked is not None and batch.labels is not None:
            texts["masked"] = _masked_text(tokenizer, batch.masked[row], batch.labels[row])
        all_texts.append(texts)
    if not rows:
        return {}
    captions = "; ".join(texts["caption"] for texts in all_texts)
    picture = pixels(torch.cat(rows, dim=1).numpy(), f"Views of: {captions}")
    return {"picture": picture._asdict(), "texts": all_texts}


def _masked_text(tokenizer: CaptionTokenizer, masked: Tensor, labels: Tensor) -> str:
    """Decode a corrupted caption; a token to predict is in brackets with its original: "a [mask: cat] sat"."""
    words = []
    for token, label in zip(masked[1:].tolist(), labels[1:].tolist(), strict=True):
        if token == tokenizer.end:
            break
        word = "mask" if token == tokenizer.mask else tokenizer.decode([token])
        if label != IGNORED:
            word = f"[{word}: {tokenizer.decode([label])}]"
        words.append(word)
    return " ".join(words)
