"""One table of recipes: a run that was stopped and resumed equals one never interrupted, bit for bit."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from declip.errors import UserError
from declip.recipe.schema import Recipe
from declip.runs.folder import KEPT
from declip.training.assemble import assemble
from text_encoders import roberta
from training.starts import recipe_for, resumes_exactly, tuned


class Case(NamedTuple):
    """A recipe, the step at which it is stopped, and a folder that is removed before it is resumed."""

    recipe: Recipe
    stop: int = 4
    removed: Path | None = None


def plain(name: str, workers: int, **train: Any) -> Callable[..., Case]:
    def case(table: Path, start: Path, folder: Path) -> Case:
        data = {"source": str(table), "workers": workers}
        return Case(recipe_for(table, name, {"data": data}, **train))

    return case


def smoothed(table: Path, start: Path, folder: Path) -> Case:
    weights = {"contrastive": 1.0, "nearest_neighbor": 0.5}
    return Case(recipe_for(table, sections={"loss_weights": weights, "contrastive": {"label_smoothing": 0.1}}))


def fine_tuned(train: dict[str, Any] | None = None, **keys: Any) -> Callable[..., Case]:
    def case(table: Path, start: Path, folder: Path) -> Case:
        source = Path(shutil.copytree(start, folder / "source"))
        return Case(tuned(table, source, train, **keys), removed=source)

    return case


def text_encoder(table: Path, start: Path, folder: Path) -> Case:
    pytest.importorskip("transformers")
    encoder = roberta(folder / "roberta")
    text = {"hf_model": str(encoder), "context_length": 24, "pooling": "mean"}
    return Case(recipe_for(table, "declip", {"text": text}), removed=encoder)


CASES = {
    "clip, a loader process": plain("clip", 1),
    "defilip, Muon": plain("defilip", 0, optimizer="muon"),
    "smoothed": smoothed,
    "layer decay, head warm-up": fine_tuned(lr_scale=0.5, layer_decay=0.8, head_warmup_steps=3, freeze_text_blocks=1),
    "adapters": fine_tuned(lora={"rank": 2}, head_warmup_steps=2),
    "another image size and length": fine_tuned(image_size=48, context_length=12),
    "Hugging Face encoder": text_encoder,
}


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_equals_one_never_interrupted(table, start, tmp_path, name):
    case = CASES[name](table, start, tmp_path)
    resumes_exactly(case.recipe, tmp_path, case.stop, lambda: shutil.rmtree(case.removed) if case.removed else None)
    if case.removed is not None:
        assert (tmp_path / "parts" / KEPT).is_file() == (case.removed.name == "source")
        with pytest.raises(UserError, match=str(case.removed)):
            assemble(case.recipe, tmp_path / "new", quiet=True)
