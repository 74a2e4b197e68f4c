"""Methods for the heads of frozen towers, against plain computations; and the towers' features in evaluation."""

from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import declip
from conftest import TINY
from declip.api import train
from declip.data.cached import CachedFeatures, VariantAssembler, fusemix
from declip.data.pair import BrokenPair
from declip.data.sources.open import open_source
from declip.data.text.tokenizer import Tokenizer
from declip.errors import UserError
from declip.interchange.export import export
from declip.models.image_tower import ImageTower
from declip.recipe.schema import DistillationConfig, Recipe
from declip.runs.checkpoint import load_checkpoint
from declip.supervision.contrastive import info_nce, shared_info_nce
from declip.training.assemble import assemble, cache_features, plan_of
from declip.training.closed_form import cca, start_closed_form
from declip.training.frozen_encoder import FrozenEncoder
from declip.training.trainer import Trainer
from text_encoders import bert
from training.starts import SMALL, recipe_for

GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path / "cache"))


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def test_cca_is_that_of_a_plain_computation() -> None:
    latent = doubles(400, 3)
    images = latent @ doubles(3, 7) + doubles(400, 7) + 5 * doubles(7)
    texts = latent @ doubles(3, 5) + doubles(400, 5) + 5 * doubles(5)
    first, second, correlations = cca(images, texts, ridge=1e-12)
    centered = []
    for side in (images, texts):
        mean = side.mean(0) / side.mean(0).norm()
        rest = side - torch.outer(side @ mean, mean)
        basis, values, _ = torch.linalg.svd(rest, full_matrices=False)
        centered.append(basis[:, values > 1e-9])
    expected = torch.linalg.svdvals(centered[0].mT @ centered[1])  # cosines of the angles between the two spans
    torch.testing.assert_close(correlations[:4], expected[:4], rtol=1e-6, atol=1e-8)
    for weights, side in ((first, images), (second, texts)):
        assert (side @ weights.mT).mean(0).abs().max() < 1e-6, "the projection ignores the mean"
    outputs = torch.cat([images @ first[:4].mT, texts @ second[:4].mT], dim=1)
    found = torch.corrcoef(outputs.mT)
    block = torch.diag(expected[:4])
    plain = torch.cat([torch.cat([torch.eye(4), block], 1), torch.cat([block, torch.eye(4)], 1)])
    torch.testing.assert_close(found, plain.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("value", [0.0, 1.7, float("nan")])
def test_cca_refuses_features_without_variance(side: int, value: float) -> None:
    features = [torch.randn(50, 7), torch.randn(50, 5)]
    features[side] = torch.full_like(features[side], value) * torch.linspace(1, 2, features[side].shape[1])
    with pytest.raises(UserError, match="captions" if side else "images"):
        cca(*features, ridge=1.0)


def test_of_many_rows_the_start_needs_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    latent = doubles(5_000, 3)
    images, texts = (latent @ doubles(3, width) + 0.3 * doubles(5_000, width) for width in (7, 5))
    rows = np.arange(5_000).reshape(2, 2_500)
    features = CachedFeatures({"first": images}, texts, rows, rows[:, None], {}, 0.0)
    found = []
    for enough in (5_000, 500):
        monkeypatch.setattr("declip.training.closed_form.ENOUGH", enough)
        first, second = nn.Linear(7, 4, bias=False), nn.Linear(5, 4, bias=False)
        model: Any = Namespace(image_tower=Namespace(proj=first), text_tower=Namespace(text_projection=second))
        start_closed_form(model, features, "first")
        found.append(torch.cosine_similarity(first(images.float()), second(texts.float())).mean().item())
    assert found[0] > 0.8
    assert found[1] == pytest.approx(found[0], abs=0.02)


@pytest.mark.parametrize(("pairs", "ridge"), [(50, 20.0), (1_000, 1.0), (2_000, 1.0)])
def test_the_ridge_falls_with_the_number_of_pairs(pairs: int, ridge: float) -> None:
    images, texts = torch.randn(2 * pairs, 7), torch.randn(2 * pairs, 5)
    rows = np.arange(2 * pairs).reshape(2, pairs)
    first, second = nn.Linear(7, 5, bias=False), nn.Linear(5, 5, bias=False)
    model: Any = Namespace(image_tower=Namespace(proj=first), text_tower=Namespace(text_projection=second))
    start_closed_form(model, CachedFeatures({"first": images}, texts, rows, rows[:, None], {}, 0.0), "first")
    expected, _, _ = cca(images, texts, ridge)
    torch.testing.assert_close(
        F.normalize(first.weight.flatten(), dim=0), F.normalize(expected.float().flatten(), dim=0)
    )


def test_shared_logits_give_the_same_loss_and_gradients() -> None:
    image, text = (F.normalize(doubles(6, 4), dim=-1).requires_grad_() for _ in range(2))
    scale = torch.tensor(14.0, dtype=torch.float64, requires_grad=True)
    inputs = (image, text, scale)
    losses = [shared_info_nce(image, text, scale), info_nce(image, text, image, text, scale)]
    torch.testing.assert_close(*losses)
    for found, expected in zip(*(torch.autograd.grad(3 * loss, inputs) for loss in losses), strict=True):
        torch.testing.assert_close(found, expected)


def some_features(n: int, mixup: float) -> CachedFeatures:
    rows, broken = np.arange(2 * n).reshape(2, n), {3: BrokenPair("missing image", "3")}
    rows[:, 3] = -1
    images, texts = (torch.arange(2.0 * n)[:, None].repeat(1, width) for width in (4, 3))
    return CachedFeatures({"first": images}, texts, rows, rows.reshape(2, 1, n) * (rows >= 0)[:, None], broken, mixup)


def test_fusemix_mixes_both_sides_alike_and_ranks_share_the_choice(table: Path) -> None:
    first, second, weights = doubles(2, 3, 4), doubles(2, 3, 4), doubles(3).sigmoid()
    mixed = fusemix(first.float(), second.float(), weights.float())
    for v in range(2):
        for b in range(3):
            plain = weights[b] * first[v, b] + (1 - weights[b]) * second[v, b]
            torch.testing.assert_close(mixed[v, b].double(), plain, rtol=1e-5, atol=1e-6)

    recipe, source = Recipe.model_validate(TINY), open_source(str(table))
    tokenizer = Tokenizer(context=16, merges=300)

    def assembler(mixup: float, rank: int = 0, ranks: int = 1) -> VariantAssembler:
        features = some_features(len(source), mixup)
        options: dict[str, Any] = {"batch_size": 8, "seed": 0, "rank": rank, "ranks": ranks}
        return VariantAssembler(source, tokenizer, plan_of(recipe), variants=2, features=features, **options)

    for step in range(4):
        whole, plain = assembler(0.5)[step], assembler(0)[step]
        image, text = whole.views["first"].pixels[:, 0], whole.texts[0, :, 0]
        torch.testing.assert_close(image, text)  # the same partner and λ, as row r of both is filled with r
        assert not torch.equal(image, plain.views["first"].pixels[:, 0])
        assert torch.equal(whole.sample_ids, plain.sample_ids)
        parts = [assembler(0.5, rank, 2)[step] for rank in range(2)]
        assert torch.equal(torch.cat([part.texts for part in parts], 1), whole.texts)
        assert torch.isfinite(whole.texts).all()
        assert whole.texts.min() >= 0


def tuned(table: Path, start: object, losses: dict[str, float] | None = None, **keys: Any) -> Recipe:
    tree = {**TINY, "name": "frozen", "data": {"source": str(table)}, "loss_weights": losses or {"contrastive": 1.0}}
    tree["text"] = keys.pop("text", TINY["text"])
    frozen = {"freeze_image_blocks": "all", "freeze_text_blocks": "all", "cached_views": 2}
    return Recipe.model_validate({**tree, "finetune": {**frozen, "pretrained": str(start), **keys}})


def test_all_methods_at_once_train_export_and_start_another(table: Path, start: Path, tmp_path: Path) -> None:
    weights = {"contrastive": 1.0, "nearest_neighbor": 0.5}
    recipe = tuned(table, start, weights, head_init="cca", mixup=1.0)
    averaged = recipe.model_copy(update={"train": recipe.train.model_copy(update={"ema_decay": 1.0})})
    train(averaged, out=tmp_path / "whole", quiet=True, report=False)
    kept = load_checkpoint(tmp_path / "whole" / "checkpoints" / "last").weights
    model: Any = declip.load(tmp_path / "whole", device="cpu")
    assert torch.equal(model.image_tower.proj.weight, kept["average.image_tower.proj.weight"])
    export(model, "safetensors", tmp_path / "ours")
    again: Any = declip.load(tmp_path / "ours", device="cpu")
    image = model.preprocess(Image.new("RGB", (40, 40), "red"))
    assert torch.equal(again.encode_image(image), model.encode_image(image))
    # the towers continue from the trained heads.
    second = Recipe.model_validate(
        {**TINY, "data": {"source": str(table)}, "finetune": {"pretrained": str(tmp_path / "whole")}}
    )
    Trainer(assemble(second, tmp_path / "second", quiet=True)).train()


def test_step_0_evaluates_and_stores_the_closed_form_start(table: Path, start: Path, tmp_path: Path) -> None:
    recipe = tuned(table, start, head_init="cca")
    averaged = recipe.model_copy(update={"train": recipe.train.model_copy(update={"ema_decay": 1.0})})
    parts = assemble(averaged, tmp_path / "run", quiet=True)
    cache_features(parts).close()
    assert torch.equal(parts.evaluated_model.image_tower.proj.weight, parts.model.image_tower.proj.weight)


def test_towers_of_two_models_are_frozen_and_cached(table: Path, tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(1)  # 0 would be taken for the random start
    save_file(timm.create_model("test_vit", num_classes=0, img_size=32).state_dict(), tmp_path / "vit.safetensors")
    text = {"hf_model": str(bert(tmp_path / "bert")), "context_length": 16}
    image = f"timm:test_vit/{tmp_path / 'vit.safetensors'}"
    recipe = tuned(table, image, text=text, head_init="cca")
    recipe._given = frozenset({"image.size"})
    trainer = Trainer(assemble(recipe, tmp_path / "run", quiet=True))
    learning = {name for name, p in trainer.parts.model.named_parameters() if p.requires_grad}
    assert learning == {"image_tower.proj.weight", "text_tower.text_projection.weight", "logit_scale"}
    assert trainer.train().finished
    weights = {"contrastive": 1.0, "distillation": 1.0}
    taught = recipe_for(table).model_copy(
        update={"loss_weights": weights, "distillation": DistillationConfig(teacher=image)}
    )
    with pytest.raises(UserError, match=r"distillation\.teacher=.*both towers"):
        Trainer(assemble(taught, tmp_path / "taught", quiet=True))


def test_evaluation_computes_the_towers_once(start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = declip.load(start, device="cpu")
    encoder = FrozenEncoder(model)
    images, tokens = torch.randn(3, 3, 32, 32), model.tokenize(["a red circle", "a square"])
    expected = model.encode_image(images), model.encode_text(tokens)

    def look() -> None:
        with torch.no_grad():
            torch.testing.assert_close(encoder.encode_image(images), expected[0])
            torch.testing.assert_close(encoder.encode_text(tokens), expected[1])

    look()
    monkeypatch.setattr(ImageTower, "pool", None)
    read_keys = Mock()
    monkeypatch.setattr("declip.data.feature_store.FeatureStore.refresh", read_keys)
    look()
    assert not read_keys.called, "the store is read_keys once, not for every batch"
    monkeypatch.undo()


def test_a_fixed_teacher_of_another_width_is_loaded_as_it_is(table: Path, start: Path, tmp_path: Path) -> None:
    tree = {**TINY, "data": {"source": str(table)}, "loss_weights": {"contrastive": 0.5, "distillation": 0.5}}
    recipe = Recipe.model_validate({**tree, "text": SMALL, "distillation": {"teacher": str(start)}})
    term: Any = assemble(recipe, tmp_path / "again", quiet=True).objective.terms["distillation"]
    teacher: Any = declip.load(start, device="cpu")
    assert torch.equal(term._fixed[0].image_tower.proj.weight, teacher.image_tower.proj.weight)
    assert teacher.image_tower.proj.out_features == 24 != recipe.embed_dim
    other = recipe.model_copy(update={"text": recipe.text.model_copy(update={"bpe_merges": 200})})
    with pytest.raises(UserError, match=r"distillation\.teacher=.*tokenizer"):
        assemble(other, tmp_path / "other", quiet=True)


def test_methods_of_cached_features_are_refused_without_them(table: Path, start: Path) -> None:
    with pytest.raises(ValueError, match=r"finetune\.cached_views"):
        tuned(table, start, cached_views=0, mixup=1.0)
