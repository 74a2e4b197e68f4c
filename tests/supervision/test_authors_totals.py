"""The authors' whole losses as weighted sums of our terms, from the outputs that were put into their loops.

Their outputs are logits. A term gets them back when the rows are the logits side by side and the keys pick out one
block each.
"""

import pytest
import torch

from declip.supervision.contrastive import info_nce, multi_view
from declip.supervision.nearest_neighbor import neighbor_contrast
from declip.supervision.simclr import nt_xent
from declip.supervision.simsiam import negative_cosine


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
        "nearest_neighbor": neighbor_contrast(near, near, blocks(size, 2), 1.0),
        "masked_language": inputs["text_self_supervised"],
    }


DECLIP = {
    "contrastive": 0.1,
    "multi_view": 0.3,
    "simsiam": 0.2,
    "nearest_neighbor": 0.2,
    "masked_language": 0.2,
}


@pytest.mark.parametrize(
    ("name", "weights", "text_views"),
    [
        *((f"declip_total/{i}", DECLIP, 2) for i in range(3)),
        ("declip_total_ws4/0", {term: weight / 4 for term, weight in DECLIP.items()}, 2),
        ("declip_total_only_image_two_view/0", DECLIP | {"contrastive": 0.2, "multi_view": 0.2}, 1),
        ("declip_total_88m_weights/0", DECLIP | {"contrastive": 0.15, "multi_view": 0.45}, 2),
    ],
)
def test_declip(golden, name, weights, text_views):
    case = golden(name)
    _, terms = declip_terms(case, text_views)
    pairings = 2 * text_views
    ranks = case["world_size_used_for_scaling"]
    logged = {
        "clip_losses": (terms["contrastive"] + (pairings - 1) * terms["multi_view"]) / pairings / ranks,
        "simsiam_losses": terms["simsiam"] / ranks,
        "clip_nn_text_losses": terms["nearest_neighbor"] / ranks,
        "text_mlm_losses": terms["masked_language"] / ranks,
    }
    check(case, sum(weights[term] * terms[term] for term in weights), logged)


@pytest.mark.parametrize("i", range(2))
def test_defilip(golden, i):
    case = golden(f"defilip_total/{i}")
    inputs, terms = declip_terms(case, 2)
    keys = torch.eye(len(inputs["filip.0"]))
    late = info_nce(inputs["filip.0"], inputs["filip.1"], keys, keys, 1.0)
    total = sum(DECLIP[term] * terms[term] for term in DECLIP) + 0.2 * late
    check(case, total, {"filip_losses": late, "clip_nn_text_losses": terms["nearest_neighbor"]})


def test_slip(golden):
    case = golden("slip_total/0")
    inputs = {name.removeprefix("in/"): x.requires_grad_() for name, x in case.items() if name.startswith("in/")}
    keys = torch.eye(len(inputs["logits.0"]))
    contrastive = info_nce(inputs["logits.0"], inputs["logits.1"], keys, keys, 1.0)
    z1, keys1, z2, keys2 = (inputs[f"sim_features.{i}"] for i in range(4))
    views = nt_xent(z1, z2, keys1, keys2)
    check(case, contrastive + views, {"clip_losses": contrastive, "simclr_losses": views})


def test_filip(golden):
    case = golden("filip_total/0")
    inputs = {name.removeprefix("in/"): x.requires_grad_() for name, x in case.items() if name.startswith("in/")}
    keys = torch.eye(len(inputs["logits.0"]))
    contrastive = info_nce(inputs["logits.0"], inputs["logits.1"], keys, keys, 1.0)
    late = info_nce(inputs["dense_logits.0"], inputs["dense_logits.1"], keys, keys, 1.0)
    check(case, 0 * contrastive + late, {"clip_losses": contrastive, "clip_dense_losses": late})
