"""Features of frozen towers: the same losses and gradients as computing them at every step, and exact invalidation."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from conftest import TINY
from declip.data.batch import PairBatch
from declip.data.cached import VariantAssembler
from declip.data.feature_store import FeatureStore
from declip.data.images.crops import apply_photometric
from declip.data.pair import PairSource
from declip.data.sources.open import open_source
from declip.errors import UserError
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.supervision.objective import Objective
from declip.training.assemble import build_loader, plan_of
from declip.training.frozen import cached_features, check_frozen, text_key

VARIANTS = 2


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = []
    for number in range(10):
        Image.new("RGB", (40, 40), (25 * number, 200, 255 - 25 * number)).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": [f"a thing of number {number}", "one of many things"]})
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def frozen(**losses: float) -> tuple[Recipe, DualEncoder]:
    losses = losses or {"contrastive": 0.2, "multi_view": 0.5, "simsiam": 0.2, "nearest_neighbor": 0.1}
    recipe = Recipe.model_validate({**TINY, "loss_weights": losses})
    tune = recipe.finetune.model_copy(update={"cached_views": VARIANTS})
    recipe = recipe.model_copy(update={"finetune": tune})
    torch.manual_seed(0)
    model = DualEncoder.from_recipe(recipe)
    model.image_tower.trunk.requires_grad_(False)
    model.image_tower.norm.requires_grad_(False)
    model.text_tower.requires_grad_(False).text_projection.requires_grad_(True)
    return recipe, model


def loss_and_gradients(recipe: Recipe, model: DualEncoder, batch: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    objective = Objective(recipe, model)
    views = apply_photometric(batch.views, torch.zeros(3), torch.ones(3))
    batch.views = views
    found = objective(model, batch)
    found["loss"].backward()
    parameters = [*model.named_parameters(), *objective.named_parameters()]
    gradients = {name: p.grad.clone() for name, p in parameters if p.grad is not None}
    model.zero_grad()
    return {**{name: value.detach() for name, value in found.items()}, **gradients}


def test_losses_and_gradients_are_those_of_the_towers(pairs: Path) -> None:
    recipe, model = frozen()
    source, image = open_source(str(pairs)), recipe.image.model_copy(update={"mean": (0.0,) * 3, "std": (1.0,) * 3})
    recipe = recipe.model_copy(update={"image": image})
    plan = plan_of(recipe)
    features = cached_features(recipe, source, model, plan, shown=False)
    loader = build_loader(recipe, source, model, features=features)
    options: dict[str, Any] = {"batch_size": recipe.train.batch_size, "seed": recipe.seed}
    uncached = VariantAssembler(source, model.tokenizer, plan, variants=VARIANTS, **options)
    for step in range(3):  # each in an epoch of its own: two variants, and the first again
        expected = loss_and_gradients(recipe, model, uncached[step])
        found = loss_and_gradients(recipe, model, next(loader))
        assert found.keys() == expected.keys()
        assert any(name.endswith("text_projection.weight") for name in found)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_neighbors_by_frozen_features_are_those_of_a_plain_loop(pairs: Path) -> None:
    recipe, model = frozen(nearest_neighbor=1.0)
    objective = Objective(recipe, model)
    objective.prepare(open_source(str(pairs)), model)  # 10 pairs
    generator, held = torch.Generator().manual_seed(0), list[tuple[int, torch.Tensor, torch.Tensor]]()

    def unit(rows: torch.Tensor, head: torch.nn.Module | None = None) -> torch.Tensor:
        return F.normalize(head(rows).detach() if head else rows, dim=-1).double()

    first, new = torch.randn(2, 2, 6, model.text_tower.width, generator=generator)
    again = torch.cat([first[:, 3:], new[:, 3:]], dim=1)
    for texts, ids in ((first, torch.arange(6)), (again, torch.arange(13, 19))):  # in another epoch 3 to 5 come again
        views = torch.randn(2, 6, model.image_tower.pre_logits_width, generator=generator)
        batch = PairBatch({"first": views[0], "second": views[1]}, texts, sample_ids=ids)
        found, expected = objective(model, batch)["nearest_neighbor"], torch.zeros(())
        for captions in unit(texts) if held else ():
            neighbors = []
            for pair, caption in zip(ids.tolist(), captions, strict=True):
                others = [(float(caption @ h), n) for other, h, n in held if other % 10 != pair % 10]
                neighbors.append(max(others, key=lambda other: other[0])[1])
            for images in unit(views, model.image_tower.proj):
                logits = model.logit_scale.exp().detach().double() * images @ torch.stack(neighbors).mT
                expected = expected + (logits.logsumexp(1) - logits.diagonal()).mean() / 4
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-6)
        objective.after_step(model)
        embedded = unit(texts, model.text_tower.text_projection)
        held += [row for view in (1, 0) for row in zip(ids.tolist(), unit(texts)[view], embedded[view], strict=True)]


def computed(pairs: Path, cache: Path, **losses: float) -> int:
    """Number of views that a call computes, by what it adds to the store."""

    def rows() -> int:
        return sum(path.stat().st_size for path in cache.glob("image-*/keys")) // 16

    before = rows()
    recipe, model = frozen(**losses)
    cached_features(recipe, open_source(str(pairs)), model, plan_of(recipe), shown=False)
    return rows() - before


def test_only_what_changed_is_computed(pairs: Path, cache: Path) -> None:
    assert computed(pairs, cache) == 10 * VARIANTS
    assert computed(pairs, cache) == 0
    (keys,) = cache.glob("image-*/keys")
    with keys.open("r+b") as file:  # as after a kill: the rows of the last pairs were written, their keys were not
        file.truncate(16 * 14 + 5)
    assert computed(pairs, cache) == 6
    Image.new("RGB", (40, 40), "white").save(pairs.parent / "3.png")
    assert computed(pairs, cache) == VARIANTS
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    rows[5]["caption"] = "another caption"
    pairs.write_text("\n".join(map(json.dumps, rows)))
    assert computed(pairs, cache) == VARIANTS
    assert computed(pairs, cache, contrastive=1.0) == 10 * VARIANTS, "other views"


def test_features_of_one_tower_serve_with_another_one_of_the_other_kind(pairs: Path, cache: Path) -> None:
    def texts(weight: float, activation: str) -> torch.Tensor:
        recipe, _ = frozen()
        text = recipe.text.model_copy(update={"activation": activation})
        torch.manual_seed(0)
        model = DualEncoder.from_recipe(recipe.model_copy(update={"text": text}))
        torch.nn.init.constant_(model.text_tower.token_embedding.weight, weight)
        found = cached_features(recipe, open_source(str(pairs)), model, plan_of(recipe), shown=False)
        return found.texts[torch.from_numpy(found.text_rows[:, 0])]

    each = (0.1, "gelu"), (0.1, "quick_gelu"), (0.5, "gelu")
    shared = [texts(*tower) for tower in each]
    assert len(list(cache.glob("image-*"))) == 1
    for tower, found in zip(each, shared, strict=True):
        shutil.rmtree(cache)
        assert torch.equal(texts(*tower), found)
    assert not torch.equal(shared[0], shared[1])
    shutil.rmtree(next(cache.glob("text-*")))
    assert torch.equal(texts(*each[2]), shared[2]), "the images' features alone are left"


def test_features_of_other_versions_are_computed_again(
    pairs: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert computed(pairs, cache) == 10 * VARIANTS
    for name in ("torch.__version__", "timm.__version__", "PIL.__version__", "declip.training.frozen.FEATURE_VERSION"):
        with monkeypatch.context() as patch:
            patch.setattr(name, "another")
            assert computed(pairs, cache) == 10 * VARIANTS, name


@pytest.mark.parametrize("padding", [0, 1, 49])
def test_a_caption_has_one_key_for_every_padded_length(padding: int) -> None:
    ids = [5, 0, 1, 49, 7]
    keys = {text_key(torch.tensor(ids + [padding] * count), padding) for count in (0, 1, 9)}
    assert len(keys) == 1
    assert text_key(torch.tensor([*ids, 8]), padding) not in keys


def test_a_store_reads_only_the_keys_that_another_process_appended(tmp_path: Path) -> None:
    first, second = (FeatureStore(tmp_path, 1, torch.float32) for _ in range(2))
    keys = [bytes([number]) * 16 for number in range(4)]
    first.append(keys[:2], torch.tensor([[0.0], [1.0]]))
    assert keys[0] not in second
    second.refresh()
    second.append(keys[2:], torch.tensor([[2.0], [3.0]]))
    with (tmp_path / "keys").open("r+b") as file:  # keys that were read once are not read again
        file.write(bytes(16))
    first.refresh()
    assert first.rows()[first.places(keys)].squeeze(1).tolist() == [0, 1, 2, 3]


def test_a_broken_pair_is_left_out_and_named(pairs: Path) -> None:
    (pairs.parent / "7.png").write_bytes(b"no image")
    recipe, model = frozen()
    source: PairSource = open_source(str(pairs))
    features = cached_features(recipe, source, model, plan_of(recipe), shown=False)
    assert list(features.broken) == [7]
    loader = build_loader(recipe, source, model, features=features)
    batches = [next(loader) for _ in range(5)]
    assert {len(batch) + len(batch.skipped) for batch in batches} == {8}
    assert any(batch.skipped for batch in batches)


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    store, key = FeatureStore(tmp_path, 2, torch.float32), b"b" * 16
    store.append([b"a" * 16], torch.ones(1, 2))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(UserError, match="DECLIP_CACHE"):
            store.append([key], torch.zeros(1, 2))
    assert key not in store
    store.append([key], torch.full((1, 2), 3.0))
    assert FeatureStore(tmp_path, 2, torch.float32).rows().tolist() == [[1, 1], [3, 3]]


def test_towers_that_learn_or_losses_of_tokens_are_refused() -> None:
    with pytest.raises(UserError, match="masked_language"):
        check_frozen(*frozen(contrastive=1.0, masked_language=1.0))
    recipe, model = frozen()
    model.image_tower.trunk.requires_grad_(True)
    with pytest.raises(UserError, match="freeze_image_blocks"):
        check_frozen(recipe, model)
