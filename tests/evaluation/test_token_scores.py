"""Zero-shot classification by patches and words, as the official FILIP is evaluated, for models of that loss alone."""

import numpy as np
import pytest
import torch
from PIL import Image

import declip
from conftest import TINY, refuses, tiny_tree
from declip.evaluation.encode import Batching
from declip.evaluation.zero_shot import class_tokens
from declip.interchange.declip_file import write_declip_file
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.supervision import late_interaction
from declip.supervision.objective import Objective
from evaluation.conftest import COLORS, WORDS, PaintedSource
from golden_cases import read_state
from interchange.test_official import official_file
from training.starts import stop_at

TEMPLATES = ["{}", "a rather long photo of a {} wall."]
ALONE = {"loss_weights": {"late_interaction": 1.0}}


def plain_scores(model, heads, names, pixels, count_padding):
    """Plain loops over images, classes, patches and positions, in float64; heads are (weight, bias) of both sides."""
    image_map, text_map = ((weight.double(), bias.double()) for weight, bias in heads)
    classes = []
    for name in names:
        positions = {}
        for template in TEMPLATES:
            ids = model.tokenize([template.replace("{}", name)])[0].tolist()
            ids += [0] * (model.text_tower.context - len(ids))
            out = model.text_tower(torch.tensor([ids]))
            for position, state in enumerate(out.text_tokens[0]):
                if count_padding or position < int(out.lengths[0]):
                    word = text_map[0] @ state + text_map[1]
                    positions.setdefault(position, []).append(word / word.norm())
        means = [sum(words) / len(words) for words in positions.values()]
        size = sum(float(mean @ mean) for mean in means) ** 0.5
        classes.append([mean / size for mean in means])
    rows = []
    for image in pixels:
        patches = [
            image_map[0] @ state + image_map[1]
            for state in model.image_tower(image[None].double()).tokens[0]
        ]
        patches = [patch / patch.norm() for patch in patches]
        best = [
            [max(float(patch @ word) for word in words) for patch in patches] for words in classes
        ]
        rows.append([sum(each) / len(each) for each in best])
    return torch.tensor(rows, dtype=torch.float64)


def found_scores(model, names, pixels):
    with torch.no_grad():
        classes = class_tokens(model, model.token_scorer, names, TEMPLATES, Batching(4))
        return model.token_scorer.scores(pixels, classes.to(pixels))


@pytest.mark.parametrize("padding", [True, False])
def test_scores_equal_a_plain_loop(padding):
    torch.manual_seed(0)
    tree = {
        **TINY,
        **ALONE,
        "late_interaction": {"width": 8, "include_padding": padding, "top_k": 2},
    }
    model = DualEncoder(Recipe.model_validate(tree))
    objective = Objective(model.recipe, model.double().eval()).double()
    assert model.token_scorer is None, "a constructor changes nothing but its object"
    objective.attach(model)
    term = objective.terms["late_interaction"]
    pixels = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    heads = [
        (part.weight.clone(), part.bias.clone())
        for part in (term.patch_projection, term.word_projection)
    ]
    with torch.no_grad():
        expected = plain_scores(model, heads, WORDS[:3], pixels, padding)
    torch.testing.assert_close(found_scores(model, WORDS[:3], pixels), expected, rtol=0, atol=1e-6)
    assert expected.std(dim=1).min() > 1e-3
    term.float()
    # Images of the two classes "red" are right for the first of them, as with `argmax`.
    source = PaintedSource(["red", "green", "red"], classes=["green", "red", "blue", "red"])
    source.columns["label"] = np.array([1, 0, 3])
    result = declip.evaluate(model.float(), source, templates=TEMPLATES, progress=False)
    images = model.preprocess([source[row].open().decoded() for row in range(3)])
    with torch.no_grad():
        chosen = plain_scores(
            model.double(), heads, ["green", "red", "blue"], images, padding
        ).argmax(dim=1)
    assert result.by_tokens
    assert result.top1 == pytest.approx(np.mean([chosen[0] == 1, chosen[1] == 0, False]))


def test_official_files_are_evaluated_as_by_the_authors(tmp_path):
    """FILIP by tokens, with padding; DeFILIP, whose branch for that is disabled there, by embeddings."""
    late_interaction.warn_once.cache_clear()
    source = PaintedSource(WORDS, classes=WORDS)
    state = read_state("filip_vit_tiny")
    model = declip.load(official_file(tmp_path, state), device="cpu")
    pixels = model.preprocess([source[row].open().decoded() for row in range(len(source))])[:3]
    heads = [
        (state[f"{part}.weight"], state[f"{part}.bias"])
        for part in ("image_mapping", "text_mapping")
    ]
    found = found_scores(model, WORDS[:2], pixels)
    with torch.no_grad():
        expected = plain_scores(model.double(), heads, WORDS[:2], pixels, True)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert declip.evaluate(model.float(), source, progress=False).by_tokens
    other = declip.load(official_file(tmp_path, read_state("defilip_vit_tiny")), device="cpu")
    assert not declip.evaluate(other, source, progress=False).by_tokens


def test_a_run_of_this_loss_alone_is_evaluated_by_tokens(tmp_path, caplog):
    """During training, resumed, from its folder and from exports."""
    late_interaction.warn_once.cache_clear()
    for word in WORDS:
        (tmp_path / "painted" / word).mkdir(parents=True)
        Image.new("RGB", (32, 32), COLORS[word]).save(tmp_path / "painted" / word / "0.png")
        (tmp_path / "painted" / word / "0.txt").write_text(word)
    painted, folder = f"folder:{tmp_path / 'painted'}", tmp_path / "run"
    keys = {**TINY["train"], "batch_size": 7, "lr": 6e-3, "checkpoint_every": 20, "steps": 40}
    tree = tiny_tree(tmp_path / "painted", train=keys, late_interaction={"width": 8, "top_k": 16})
    recipe = Recipe.model_validate({**tree, **ALONE, "evaluation": {"zero_shot": [painted]}})
    stop_at(recipe, folder, 20)
    run = declip.train(recipe, out=folder, resume=True, progress=False)
    last, page = run.results[-1], run.report.read_text(encoding="utf-8")
    assert "by patches and words" in page
    assert 'id="retrieval"' not in page, "embeddings are not trained"
    assert (last["by_tokens"], last["step"]) == (True, 40)
    assert last["top1"] > 0.5, "chance is 1 / 7"
    assert sum("loss_weights.contrastive=1" in record.message for record in caplog.records) == 1
    result = declip.evaluate(folder, painted, progress=False)
    assert (result.top1, result.by_tokens) == (last["top1"], True)
    declip.export(declip.load(folder), "safetensors", tmp_path / "out")
    declip.export(folder, "safetensors", tmp_path / "of_run")
    for out in ("out", "of_run"):
        assert declip.evaluate(tmp_path / out, painted, progress=False) == result


def test_heads_of_another_size_are_refused(tmp_path):
    model = DualEncoder(Recipe.model_validate({**TINY, **ALONE}))
    heads = {
        name: t[:4] if t.ndim else t
        for name, t in Objective(model.recipe, model).state_dict().items()
    }
    write_declip_file(model, tmp_path / "declip.safetensors", heads)
    refuses("late_interaction.*does not fit.*", declip.load, tmp_path)
