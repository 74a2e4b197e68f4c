"""A second view of its own size that starts late."""

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import resample_abs_pos_embed

from declip.api import train
from declip.data.batch import PairBatch
from declip.errors import UserError
from declip.models.dual_encoder import DualEncoder
from declip.models.image_tower import ImageTower
from declip.recipe.schema import Recipe
from declip.supervision.objective import encode_views
from declip.training import estimate
from declip.training.assemble import assemble, build_loader
from declip.training.pairs import open_training_source
from training.starts import CONV, recipe_for


def late(table: Path, second: dict[str, Any] | None, name: str = "declip", **sections: Any) -> Recipe:
    views = {"image": {"scale": [0.5, 1.0]}, "image_second": second, **sections.pop("views", {})}
    return recipe_for(table, name, {"views": views, **sections}, log_every=1)


def batches(recipe: Recipe, start: int = 0, workers: int = 0) -> list[PairBatch]:
    source, model = open_training_source(recipe), DualEncoder.from_recipe(recipe)
    with build_loader(recipe, source, model, workers) as loader:
        loader.step = start
        return [next(loader) for _ in range(8 - start)]


def test_a_batch_has_the_second_view_from_its_step_on_and_is_else_the_same(table: Path) -> None:
    plain, given = (batches(late(table, second)) for second in ({}, {"size": 16, "start": 0.5}))
    for step, (one, other) in enumerate(zip(plain, given, strict=True)):
        assert list(other.views) == (["first", "second"] if step >= 4 else ["first"])
        assert torch.equal(one.views["first"].pixels, other.views["first"].pixels)
        assert torch.equal(one.texts, other.texts)
    assert given[4].views["second"].pixels.shape == (8, 3, 16, 16)
    again = batches(late(table, {"size": 16, "start": 0.5}), start=3, workers=1)
    assert all(
        torch.equal(a.views[v].pixels, b.views[v].pixels)
        for a, b in zip(again, given[3:], strict=True)
        for v in b.views
    )


@pytest.mark.parametrize(("contrastive", "expected"), [(None, ["first"]), ({}, ["contrastive"])])
def test_views_that_no_loss_reads_yet_are_not_made(table: Path, contrastive: Any, expected: list[str]) -> None:
    recipe = late(table, {"start": 0.9}, "slip", views={"contrastive_view": contrastive})
    first, *_, last = batches(recipe)
    assert list(first.views) == expected
    assert list(last.views) == [*expected, *(["first"] if contrastive is not None else []), "second"]


def test_running_statistics_are_those_of_the_first_size(table: Path) -> None:
    recipe = late(table, {"size": 16}, image=CONV)
    images, small = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 16, 16)
    torch.manual_seed(0)
    model = DualEncoder.from_recipe(recipe).train()
    torch.manual_seed(0)
    alone = DualEncoder.from_recipe(recipe).train()
    found = encode_views(model, [images, small])
    torch.testing.assert_close(found.pooled[0], alone.image_tower(images).pooled)
    for name, value in alone.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    torch.testing.assert_close(found.pooled[1], alone.image_tower(small).pooled)
    assert any(not torch.equal(model.state_dict()[name], value) for name, value in alone.state_dict().items())


def test_position_embeddings_are_resampled_to_the_smaller_grid() -> None:
    options = {"patch_size": 8, "embed_dim": 64, "depth": 1}
    tower = ImageTower("declip_vit_tiny", 32, 16, options, any_size=True).double()
    small = ImageTower("declip_vit_tiny", 16, 16, options).double()
    state = tower.state_dict()
    positions = resample_abs_pos_embed(state["trunk.pos_embed"], [2, 2], [4, 4], num_prefix_tokens=1)
    small.load_state_dict({**state, "trunk.pos_embed": positions})
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(tower(images).pooled, small(images).pooled, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("second", "loss", "says"),
    [
        ({"size": 20}, "declip", "views.image_second.size"),
        ({"start": 0.2}, "simsiam", "views.image_second.start"),
        ({"start": 1.1}, "declip", "views.image_second.start"),
        ({"start": 1.0}, "declip", "views.image_second.start"),
        ({"start": 1.0}, "simsiam", "views.image_second.start"),
    ],
)
def test_what_does_not_fit_is_refused(table: Path, tmp_path: Path, second: Any, loss: str, says: str) -> None:
    sections = {"loss_weights": {"simsiam": 1.0}} if loss == "simsiam" else {}
    with pytest.raises((UserError, ValueError)) as caught:
        train(late(table, second, **sections), out=tmp_path, quiet=True, report=False)
    assert says in str(caught.value)


def test_a_step_is_timed_before_and_after_the_start(table: Path, tmp_path: Path, monkeypatch: Any) -> None:
    clock = [0.0]

    def step(_: Any, batch: PairBatch, sync: Any) -> dict[str, torch.Tensor]:
        clock[0] += sum((view.pixels.shape[-1] / 32) ** 2 for view in batch.views.values())
        return {"loss": torch.zeros(())}

    monkeypatch.setattr(estimate, "training_step", step)
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: clock[0])
    parts = assemble(late(table, {"start": 0.75}), tmp_path / "run", quiet=True)
    assert estimate.step_seconds(parts, 1, 2) == [0.75 * 1 + 0.25 * 2] * 2
