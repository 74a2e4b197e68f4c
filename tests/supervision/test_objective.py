"""The objective as a whole: the weighted sum, the views of each loss, and the queue."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from conftest import TINY, WEIGHTS
from declip.data.batch import PairBatch
from declip.data.plan import plan_views
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.supervision import contrastive
from declip.supervision import term as supervision_term
from declip.supervision.contrastive import info_nce
from declip.supervision.objective import Objective, needs_of
from supervision.conftest import NoDeviceReads

WITHOUT_BATCH_NORM = {
    "contrastive": 0.1, "multi_view": 0.3, "masked_language": 0.2, "nearest_neighbor": 0.2, "late_interaction": 0.2,
}  # fmt: skip


def parts(weights, **sections):
    recipe = Recipe.model_validate({**TINY, "loss_weights": weights, **sections})
    torch.manual_seed(0)
    model = DualEncoder(recipe)
    return model, Objective(recipe, model)


def random_batch(size=8, views=2, length=16):
    generator = torch.Generator().manual_seed(3)
    tokenizer = DualEncoder(Recipe.model_validate(TINY)).tokenizer
    texts = torch.randint(1, 500, (2, size, length), generator=generator)
    ends = torch.randint(4, length, (2, size), generator=generator)
    place = torch.arange(length)
    texts = torch.where(place == ends[..., None], tokenizer.end, texts).where(
        place <= ends[..., None], 0
    )
    masked, labels = texts[0].clone(), torch.full((size, length), -100)
    labels[::2, 1], masked[::2, 1] = texts[0, ::2, 1], tokenizer.mask
    labels[1, 2], masked[1, 2] = texts[0, 1, 2], tokenizer.mask
    images = torch.randn(views, size, 3, 32, 32, generator=generator)
    names = ("first", "second") if views < 3 else ("contrastive", "first", "second")
    return PairBatch(
        dict(zip(names, images, strict=False)), texts, masked, labels, torch.arange(size)
    )


def queue_of(objective):
    return objective.terms["nearest_neighbor"].queue


def known(objective):
    """The captions in the queue."""
    return queue_of(objective).features[: len(queue_of(objective))]


def double(batch):
    return replace(batch, views={name: view.pixels.double() for name, view in batch.views.items()})


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_total_is_the_weighted_sum_of_the_active_terms(name):
    model, objective = parts(WEIGHTS[name])
    terms = objective(model, random_batch())
    assert set(terms) == {*WEIGHTS[name], "loss"}
    assert ("nearest_neighbor" in objective.terms) == ("nearest_neighbor" in WEIGHTS[name])
    expected = sum(weight * terms[term] for term, weight in WEIGHTS[name].items())
    torch.testing.assert_close(terms["loss"], expected)


def test_the_contrastive_loss_sees_the_masked_or_the_clean_caption_and_both_predict_the_same_words():
    weights, batch = {"contrastive": 1.0, "masked_language": 1.0}, random_batch()
    assert batch.masked is not None
    predicted = []
    for masked, captions in ((True, batch.masked), (False, batch.texts[0])):
        model, objective = parts(weights, views={"text": {"mask": masked}})
        terms = objective(model, batch)
        images, texts = model.encode_image(batch.views["first"].pixels), model.encode_text(captions)
        expected = contrastive.info_nce(images, texts, images, texts, model.logit_scale.exp())
        torch.testing.assert_close(terms["contrastive"], expected)
        predicted.append(terms["masked_language"])
    torch.testing.assert_close(*predicted)
    batch.labels.fill_(-100)
    assert objective(model, batch)["masked_language"].item() == 0, "no word is masked"


def test_two_image_views_share_one_caption():
    """Each has CLIP's loss with it, and the text tower sees it once; the queue gets it once."""
    keys = {"loss_weights": {"contrastive": 0.5, "multi_view": 0.5, "nearest_neighbor": 0.1}}
    recipe = Recipe.model_validate({**TINY, **keys, "views": {"text": {"second_view": "none"}}})
    torch.manual_seed(0)
    model = DualEncoder(recipe)
    objective = Objective(recipe, model)
    plan = plan_views(recipe, needs_of(recipe))
    assert ([view.name for view in plan.views], plan.texts) == (["first", "second"], 1)
    images = {view.name: torch.randn(4, 3, 32, 32) for view in plan.views}
    texts = torch.randint(1, 300, (1, 4, 8))
    losses = objective(model, PairBatch(images, texts))
    features = [F.normalize(model.image_tower(view).pooled, dim=-1) for view in images.values()]
    words = F.normalize(model.text_tower(texts[0]).pooled, dim=-1)
    for name, image in zip(("contrastive", "multi_view"), features, strict=True):
        expected = info_nce(image, words, image, words, model.logit_scale.exp())
        torch.testing.assert_close(losses[name], expected, rtol=1e-5, atol=1e-6)
    objective.after_step(model)
    assert len(queue_of(objective)) == 4


def test_one_image_and_one_caption_have_no_other_pairing():
    views = {"image_second": False, "text": {"second_view": "none"}}
    with pytest.raises(ValueError, match="multi_view requires a second view"):
        Recipe.model_validate({**TINY, "loss_weights": {"multi_view": 1.0}, "views": views})


def test_the_queue_is_looked_up_before_it_is_written_augmentations_first():
    model, objective = parts({"nearest_neighbor": 1.0, "contrastive": 1.0})
    batch = random_batch()
    assert objective(model, batch)["nearest_neighbor"].item() == 0, "nothing to find yet"
    assert len(known(objective)) == 0
    objective.after_step(model)
    second, first = model.encode_text(batch.texts[1]), model.encode_text(batch.masked)
    torch.testing.assert_close(known(objective), torch.cat([second, first]).detach())
    assert objective(model, batch)["nearest_neighbor"].item() > 0
    for train in (True, False):
        objective.train(train)(model, batch)
        objective.after_step(model)
        assert len(known(objective)) == 32


def test_a_base_view_is_for_the_contrast_alone():
    model, objective = parts(WEIGHTS["slip"])
    three = random_batch(views=3)
    terms = objective(model, three)
    images = model.encode_image(three.views["contrastive"].pixels)
    texts = model.encode_text(three.masked)
    expected = contrastive.info_nce(images, texts, images, texts, model.logit_scale.exp())
    torch.testing.assert_close(terms["contrastive"], expected)
    model, objective = parts(WEIGHTS["slip"])
    two = replace(three, views={name: three.views[name] for name in ("first", "second")})
    torch.testing.assert_close(terms["simclr"], objective(model, two)["simclr"])


def test_one_image_view_meets_both_captions():
    weights = {"contrastive": 0.4, "multi_view": 0.4, "nearest_neighbor": 0.2}
    model, objective = parts(weights, views={"image_second": False})
    batch = random_batch(views=1)
    batch = PairBatch(batch.views, batch.texts, sample_ids=batch.sample_ids)
    objective(model, batch)
    objective.after_step(model)
    terms, queue, scale = objective(model, batch), known(objective), model.logit_scale.exp()
    image = model.encode_image(batch.views["first"].pixels)
    texts = [*map(model.encode_text, batch.texts)]
    nearest = [queue[(text @ queue.T).argmax(dim=1)] for text in texts]
    expected = {
        "contrastive": contrastive.info_nce(image, texts[0], image, texts[0], scale),
        "multi_view": contrastive.info_nce(image, texts[1], image, texts[1], scale),
        "nearest_neighbor": sum(
            contrastive.cross_entropy_to_keys(image, keys, scale) for keys in nearest
        )
        / 2,
    }
    expected["loss"] = sum(weight * expected[name] for name, weight in weights.items())
    torch.testing.assert_close(terms, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["slip", "defilip"])
def test_loss_matrices_above_the_limit_are_not_kept_for_the_backward_pass(name, monkeypatch):
    monkeypatch.setattr(contrastive, "BLOCK_BYTES", 2**26)  # every matrix is one block
    batch = double(random_batch(size=7))  # no other tensor has rows of a multiple of 7 numbers
    found, kept = [], []
    for limit in (1e9, 7 * 7 * 8 - 1):
        monkeypatch.setattr(supervision_term, "MAX_LOGIT_BYTES", limit)
        model, objective = parts(WEIGHTS[name])
        model.double(), objective.double()
        objective(model, batch)
        objective.after_step(model)
        matrices = []

        def keep(tensor, matrices=matrices):
            if tensor.ndim > 1 and tensor.shape[-1] % 7 == 0:
                matrices.append(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            terms = objective(model, batch)
        terms["loss"].backward()
        parameters = [*model.parameters(), *objective.parameters()]
        gradients = [each.grad for each in parameters if each.grad is not None]
        found.append([*terms.values(), *gradients])
        kept.append(matrices)
    assert kept[0]
    assert kept[1] == []
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9)


def test_scales_are_limited_after_the_step():
    model, objective = parts(WEIGHTS["filip"], logit_scale={"min": 3.0})
    model.logit_scale.data.fill_(9.0)
    objective.terms["late_interaction"].logit_scale.data.fill_(1.0)
    objective.after_step(model)
    assert model.logit_scale.exp().item() == pytest.approx(100, rel=1e-5)
    assert objective.terms["late_interaction"].logit_scale.item() == 3.0
    model.logit_scale.data.fill_(1.0)
    objective.after_step(model)
    assert model.logit_scale.item() == 3.0


def test_with_places_of_masked_words_known_nothing_waits_for_the_device():
    found = []
    for given in (random_batch(), random_batch().to("cpu")):
        model, objective = parts(WITHOUT_BATCH_NORM)
        queue_of(objective).push(torch.randn(5, 16, generator=torch.Generator().manual_seed(0)))
        with NoDeviceReads() if given.mask_positions is not None else nullcontext():
            found.append(objective(model, given))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_batch_norm_sees_each_view_alone():
    model, objective = parts(
        {"contrastive": 0.5, "multi_view": 0.5}, image={"model": "declip_conv_tiny", "size": 32}
    )
    batch = random_batch()
    views = [view.pixels for view in batch.views.values()]
    found = objective.run_towers(model, batch).images
    each = torch.stack([model.image_tower(view).pooled for view in views])
    torch.testing.assert_close(found, each, rtol=1e-5, atol=1e-6)
    flat = model.image_tower(torch.cat(views)).pooled.unflatten(0, (2, 8))
    assert (flat - each).abs().max() > 1e-3
    model, objective = parts({"multi_view": 1.0})
    together = objective(model, batch)["multi_view"]
    model.image_tower.has_batch_norm = True
    torch.testing.assert_close(together, objective(model, batch)["multi_view"])


@pytest.mark.parametrize("mask", [True, False])
def test_captions_in_groups_of_like_length_give_the_same_terms(mask):
    batch = random_batch()
    end = DualEncoder(Recipe.model_validate(TINY)).tokenizer.end
    lengths = (batch.texts == end).int().argmax(dim=2) + 1
    batch = replace(double(batch), lengths=lengths)
    found = []
    for groups in (1, 3):
        train = {**TINY["train"], "length_buckets": groups}
        model, objective = parts(WITHOUT_BATCH_NORM, train=train, views={"text": {"mask": mask}})
        terms = objective.double()(model.double(), batch)
        terms["loss"].backward()
        found.append((terms, [p.grad for p in model.parameters()]))
    (terms, gradients), (expected, expected_gradients) = found
    torch.testing.assert_close(terms, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-8, atol=1e-12)


def test_groups_that_leave_out_padding_are_refused_where_padding_counts():
    with pytest.raises(ValueError, match="include_padding"):
        Recipe.model_validate(
            {**TINY, "train": {"length_buckets": 2}, "late_interaction": {"include_padding": True}}
        )
