"""The authors' whole losses as weighted sums of our terms, from the outputs that were put into their loops.

Their outputs are logits. A term gets them back when the rows are the logits side by side and the keys pick out one
block each.
"""

import pytest
import torch

from declip.supervision.contrastive import info_nce
from declip.supervision.multi_view import multi_view
from declip.supervision.nearest_neighbor import neighbor_contrast
from declip.supervision.simclr import nt_xent
from declip.supervision.simsiam import negative_cosine
from golden_cases import loss_cases


def blocks(size, count):
    """Keys (count, size, count · size): the dot product with a row gives that row's n-th block."""
    return torch.eye(count * size).unflatten(0, (count, size))


def check(case, total, terms):
    """Compare each term with what the authors logged, then the total and its gradient on every input."""
    total.backward()
    for logged, term in terms.items():
        assert term.item() == pytest.approx(case[logged].item(), rel=1e-5, abs=1e-7), logged
    assert total.item() == pytest.approx(case["losses"].item(), rel=1e-5)
    compared = 0
    for name, expected in case.items():
        if name.startswith("grad/"):
            found = case[name.replace("grad/", "in/")].grad
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
            compared += 1
    assert compared > 2


def declip_terms(case, text_views):
    """The four contrasts by our functions; InfoNCE of the first pair and of the others apart."""
    inputs = {name.removeprefix("in/"): x.requires_grad_() for name, x in case.items() if name.startswith("in/")}
    sources = ("logits", "logits_aug")[:text_views]
    size = len(inputs["logits.0"])
    images = torch.stack([torch.cat([inputs[f"{s}.{view}"] for s in sources], dim=1) for view in (0, 1)])
    texts = torch.stack([torch.cat([inputs[f"{s}.{view}"] for view in (2, 3)], dim=1) for s in sources])
    text_keys, image_keys = blocks(size, text_views), blocks(size, 2)
    found = inputs["nn_text_logits.0"], inputs["nn_text_logits.1"]
    augmented = inputs["nn_text_logits.2"], inputs["nn_text_logits.3"]
    near = torch.stack([torch.cat([a, b], dim=1) for a, b in zip(found, augmented, strict=True)])
    return inputs, {
        "contrastive": info_nce(images[0], texts[0], image_keys[0], text_keys[0], 1.0),
        "multi_view": multi_view(images, texts, image_keys, text_keys, 1.0),
        "simsiam": negative_cosine(*(inputs[f"simsiam_features.{i}"] for i in range(4))),
        "nearest_neighbor": neighbor_contrast(near, blocks(size, 2), 1.0),
        "masked_language": inputs["text_self_supervised"],
    }


def weights_of(name, text_views):
    """Their weights by our terms: "clip" is the mean over the pairings of views."""
    clip, pairings = 0.6 if "88m" in name else 0.4, 2 * text_views
    others = dict.fromkeys(("simsiam", "nearest_neighbor", "masked_language"), 0.2)
    return {"contrastive": clip / pairings, "multi_view": clip * (pairings - 1) / pairings, **others}


@pytest.mark.golden
@pytest.mark.parametrize(
    "name",
    loss_cases("declip_total", "declip_total_ws4", "declip_total_only_image_two_view", "declip_total_88m_weights"),
)
def test_declip(golden, name):
    case = golden(name)
    text_views = 2 if "grad/logits_aug.0" in case else 1
    _, terms = declip_terms(case, text_views)
    pairings = 2 * text_views
    ranks = case["world_size_used_for_scaling"]
    weights = {term: weight / ranks for term, weight in weights_of(name, text_views).items()}
    logged = {
        "clip_losses": (terms["contrastive"] + (pairings - 1) * terms["multi_view"]) / pairings / ranks,
        "simsiam_losses": terms["simsiam"] / ranks,
        "clip_nn_text_losses": terms["nearest_neighbor"] / ranks,
        "text_mlm_losses": terms["masked_language"] / ranks,
    }
    check(case, sum(weights[term] * terms[term] for term in weights), logged)


@pytest.mark.golden
@pytest.mark.parametrize("name", loss_cases("defilip_total"))
def test_defilip(golden, name):
    case, weights = golden(name), weights_of(name, 2)
    inputs, terms = declip_terms(case, 2)
    keys = torch.eye(len(inputs["filip.0"]))
    late = info_nce(inputs["filip.0"], inputs["filip.1"], keys, keys, 1.0)
    total = sum(weights[term] * terms[term] for term in weights) + 0.2 * late
    check(case, total, {"filip_losses": late, "clip_nn_text_losses": terms["nearest_neighbor"]})


@pytest.mark.golden
@pytest.mark.parametrize("name", loss_cases("slip_total"))
def test_slip(golden, name):
    case = golden(name)
    inputs = {name.removeprefix("in/"): x.requires_grad_() for name, x in case.items() if name.startswith("in/")}
    keys = torch.eye(len(inputs["logits.0"]))
    contrastive = info_nce(inputs["logits.0"], inputs["logits.1"], keys, keys, 1.0)
    z1, keys1, z2, keys2 = (inputs[f"sim_features.{i}"] for i in range(4))
    views = nt_xent(z1, z2, keys1, keys2)
    check(case, contrastive + views, {"clip_losses": contrastive, "simclr_losses": views})


@pytest.mark.golden
@pytest.mark.parametrize("name", loss_cases("filip_total"))
def test_filip(golden, name):
    case = golden(name)
    inputs = {name.removeprefix("in/"): x.requires_grad_() for name, x in case.items() if name.startswith("in/")}
    keys = torch.eye(len(inputs["logits.0"]))
    contrastive = info_nce(inputs["logits.0"], inputs["logits.1"], keys, keys, 1.0)
    late = info_nce(inputs["dense_logits.0"], inputs["dense_logits.1"], keys, keys, 1.0)
    check(case, 0 * contrastive + late, {"clip_losses": contrastive, "clip_dense_losses": late})
