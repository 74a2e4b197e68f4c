"""The heads against the authors' values, from the tower outputs in the golden files."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from declip.models.heads import predictor, projector, simclr_head
from declip.supervision.late_interaction import select_tokens, similarity
from declip.supervision.masked_language import chosen_rows, cross_entropy
from golden_cases import GOLDEN, model_cases

THREE_LAYERS = {"linear1": "linear1", "norm1": "bn1", "linear2": "linear2", "norm2": "bn2", "linear3": "linear3"}


class Authors:
    """One of the authors' models: its weights before the first step, and values from within that step."""

    def __init__(self, model):
        self.weights = {name: w.float() for name, w in load_file(GOLDEN / f"{model}.safetensors").items()}
        self.arrays = np.load(GOLDEN / f"{model}.npz")

    def value(self, name):
        return torch.tensor(self.arrays[f"step1/{name}"])

    def width(self, layer):
        return len(self.weights[f"{layer}.bias"])

    def layer(self, name):
        return {part: self.weights[f"{name}.{part}"] for part in ("weight", "bias")}

    def load(self, head, prefix, names):
        """Put the authors' weights into a head; `names` maps our layers to theirs. Nothing may be left over."""
        prefixes = {f"{prefix}.{theirs}.": f"{ours}." for ours, theirs in names.items()}
        state = {
            mine + key.removeprefix(other): weight
            for key, weight in self.weights.items()
            for other, mine in prefixes.items()
            if key.startswith(other)
        }
        head.load_state_dict(state)
        return head.train()


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.golden
@pytest.mark.parametrize("model", model_cases("declip", "defilip"))
def test_projector_and_predictor_equal_the_authors(model):
    authors = Authors(model)
    dense = ".0" if "step1/image_raw_0.0" in authors.arrays else ""
    views = [f"image_raw_{view}{dense}" for view in (0, 1)]
    width, out = authors.width("predictor.linear1"), authors.width("projector.linear3")
    embed = authors.weights["projector.linear1.weight"].shape[1]
    project = projector(embed, authors.width("projector.linear1"), out)
    project = authors.load(project, "projector", THREE_LAYERS | {"norm3": "bn3"})
    names = {"linear1": "linear1", "norm1": "bn1", "linear2": "layer2"}
    predict = authors.load(predictor(out, width, out), "predictor", names)
    z = [project(authors.value(view)) for view in views]
    p = [predict(projection) for projection in z]
    for i, found in enumerate((*p, *z)):
        assert_close(found, authors.value(f"out/simsiam_features.{i}"))
    assert project.norm3.num_batches_tracked == 2


@pytest.mark.golden
@pytest.mark.parametrize("model", model_cases("slip"))
def test_simclr_head_equals_the_authors(model):
    """They also hold a third batch norm, which they never use: ours has none."""
    authors = Authors(model)
    hidden, out = authors.width("predictor_sim.linear1"), authors.width("predictor_sim.linear3")
    width = authors.weights["predictor_sim.linear1.weight"].shape[1]
    head = authors.load(simclr_head(width, hidden, out), "predictor_sim", THREE_LAYERS)
    for view, output in ((1, 0), (2, 2)):
        found = head(authors.value(f"image_raw_{view}.1"))
        assert_close(found, authors.value(f"out/sim_features.{output}"))


@pytest.mark.golden
@pytest.mark.parametrize("model", model_cases("declip", "defilip"))
def test_masked_language_head_on_the_chosen_rows_equals_the_authors_loss(model):
    authors = Authors(model)
    layer = authors.layer("text_label_predictor")
    head = torch.nn.Linear(layer["weight"].shape[1], len(layer["bias"]))
    head.load_state_dict(layer)
    words, labels = authors.value("words_main"), authors.value("labels_main")
    rows, targets = chosen_rows(words, labels)
    assert 0 < len(rows) < labels.numel() / 4
    loss = cross_entropy(head(rows), targets)
    assert loss.item() == pytest.approx(authors.value("out/text_self_supervised").item(), rel=1e-5)
    everywhere = cross_entropy(head(words).flatten(0, 1), labels.flatten())
    assert loss.item() == pytest.approx(everywhere.item(), rel=1e-6)


@pytest.mark.golden
@pytest.mark.parametrize("model", model_cases("filip", "defilip"))
def test_token_projections_lead_to_the_authors_dense_logits(model):
    authors = Authors(model)
    logits = "filip" if "step1/out/filip.0" in authors.arrays else "dense_logits"
    tokens = []
    for name, value in (("image_mapping", "image_raw_0.1"), ("text_mapping", "words_main")):
        layer = authors.layer(name)
        projection = torch.nn.Linear(layer["weight"].shape[1], len(layer["bias"]))
        projection.load_state_dict(layer)
        tokens.append(F.normalize(projection(authors.value(value)), dim=-1))
    patches, words = tokens
    scale = authors.weights["logit_scale_dense"].exp()
    word_keys, _ = select_tokens(words, patches, 16)
    patch_keys, _ = select_tokens(patches, words, 16)
    assert_close(scale * similarity(patches, word_keys), authors.value(f"out/{logits}.0"))
    assert_close(scale * similarity(words, patch_keys), authors.value(f"out/{logits}.1"))
