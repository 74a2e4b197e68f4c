"""The heads of the official models against their own values, from the tower outputs in the golden files."""

import pytest
import torch
import torch.nn.functional as F

from declip.supervision.late_interaction import select_tokens, similarity
from declip.supervision.masked_language import chosen_rows, cross_entropy
from golden_cases import Case, model_cases

pytestmark = pytest.mark.golden


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", model_cases("declip", "defilip"))
def test_projector_and_predictor_equal_the_official_ones(name):
    case = Case(name)
    simsiam = case.read()[1].terms["simsiam"].train()
    dense = ".0" if "step1/image_raw_0.0" in case.arrays else ""
    z = [simsiam.projector(case.value(f"image_raw_{view}{dense}")) for view in (0, 1)]
    p = [simsiam.predictor(projection) for projection in z]
    for i, found in enumerate((*p, *z)):
        assert_close(found, case.value(f"out/simsiam_features.{i}"))
    assert simsiam.projector.norm3.num_batches_tracked == 2


@pytest.mark.parametrize("name", model_cases("slip"))
def test_simclr_head_equals_the_official_one(name):
    """Theirs also holds a third batch norm, which it never uses: ours has none."""
    case = Case(name)
    head = case.read()[1].terms["simclr"].head.train()
    for view, output in ((1, 0), (2, 2)):
        assert_close(head(case.value(f"image_raw_{view}.1")), case.value(f"out/sim_features.{output}"))


@pytest.mark.parametrize("name", model_cases("declip", "defilip"))
def test_masked_language_head_on_the_chosen_rows_gives_the_official_loss(name):
    case = Case(name)
    head = case.read()[1].terms["masked_language"].head
    words, labels = case.value("words_main"), case.ours(case.value("labels_main"))
    rows, targets = chosen_rows(words, labels)
    assert 0 < len(rows) < labels.numel() / 4
    loss = cross_entropy(head(rows), targets)
    assert loss.item() == pytest.approx(case.value("out/text_self_supervised").item(), rel=1e-5)
    everywhere = cross_entropy(head(words).flatten(0, 1), labels.flatten())
    assert loss.item() == pytest.approx(everywhere.item(), rel=1e-6)


@pytest.mark.parametrize("name", model_cases("filip", "defilip"))
def test_token_projections_lead_to_the_official_dense_logits(name):
    case = Case(name)
    term = case.read()[1].terms["late_interaction"]
    logits = "filip" if "step1/out/filip.0" in case.arrays else "dense_logits"
    patches = F.normalize(term.patch_projection(case.value("image_raw_0.1")), dim=-1)
    words = F.normalize(term.word_projection(case.value("words_main")), dim=-1)
    word_keys, _ = select_tokens(words, patches, 16)
    patch_keys, _ = select_tokens(patches, words, 16)
    scale = term.logit_scale.exp()
    assert_close(scale * similarity(patches, word_keys), case.value(f"out/{logits}.0"))
    assert_close(scale * similarity(words, patch_keys), case.value(f"out/{logits}.1"))
