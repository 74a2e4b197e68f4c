"""The official models read as ours, step by step; their files exported and imported, whole and image towers alone."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image
from safetensors.torch import load_file

import declip
from conftest import refuses
from declip.data.images.decode import open_image
from declip.evaluation.datasets import Dataset
from declip.interchange import official
from declip.interchange.declip_file import FILE, write_declip_file
from declip.interchange.official import UNUSED
from declip.interchange.read import read_start
from declip.runs.checkpoint import without_prefix
from declip.training.pretrained import apply_pretrained
from evaluation.conftest import WORDS, PaintedSource
from golden_cases import GOLDEN, TERMS, Case, model_cases, read_official, read_state, with_heads
from interchange.test_export import features, run_card
from interchange.towers import EXACT, largest, pictures
from training.starts import quiet_train, recipe_for

CASES = model_cases()


def expected_terms(case):
    """Their logged terms under our names, of those that have a weight."""
    theirs = case.step["loss_terms"]
    found = {TERMS[name]: value for name, value in theirs.items() if name in TERMS}
    if "clip_i1_t" in theirs:  # their "clip" is the mean over the pairings of views
        found["contrastive"] = theirs["clip_i1_t"]
        pairings = {name for name in theirs if name.startswith("clip_")} - {"clip_i1_t"}
        found["multi_view"] = sum(theirs[name] for name in pairings) / len(pairings)
    return {term: found[term] for term in case.weights} | {"loss": case.step["loss_total"]}


def values(terms):
    return {term: value.item() for term, value in terms.items()}


def gradients(case, modules, step):
    """Names of their parameters, their norms and our gradients, of those that are used and not mere noise."""
    noise = case.about["fp64_check"]["grad_norm_rel"][step]["essentially_zero"]
    norms = case.step["grad_norm"].items()
    used = {name: norm for name, norm in norms if not UNUSED.match(name) and name not in noise}
    found = [(name, norm, case.parameter(modules, name).grad) for name, norm in used.items()]
    assert len(found) > len(case.step["grad_norm"]) / 2
    return found


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
def test_terms_and_gradients_equal_the_official_ones(name):
    """In float64: theirs are float32, exact to 3e-6; ours in float32 would differ by 3e-5 behind batch norms."""
    case = Case(name, dtype=torch.float64)
    model, objective = case.read()
    terms = objective(model, case.batch())
    assert values(terms) == pytest.approx(expected_terms(case), rel=1e-5, abs=1e-6)
    terms["loss"].backward()
    modules = {"model": model, "objective": objective}
    for theirs, norm, gradient in gradients(case, modules, 0):
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-5), theirs
        spread = norm * math.sqrt(gradient.numel())
        total = pytest.approx(case.step["grad_sum"][theirs], abs=1e-5 * spread)
        assert gradient.sum().item() == total, theirs
        if f"step1/grad/{theirs}" in case.arrays and "label_predictor" not in theirs:
            expected = case.value(f"grad/{theirs}")
            if expected.shape == gradient.shape:
                torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-5 * norm)
    for theirs in case.step["grad_none"]:
        if not UNUSED.match(theirs):
            parameter = case.parameter(modules, theirs)
            assert parameter is None or parameter.grad is None, theirs


def official_adamw(case, modules):
    """AdamW with their groups, at the rate of their first step."""
    theirs, groups = case.about["optimizer"], {True: [], False: []}
    for name in case.state:
        parameter = None if UNUSED.match(name) else case.parameter(modules, name)
        if parameter is not None:
            groups[name not in theirs["no_decay"]].append(parameter)
    decay = theirs["weight_decay"]
    parts = [{"params": each, "weight_decay": decay * on} for on, each in groups.items()]
    options = {"lr": case.step["lr"], "betas": tuple(theirs["betas"]), "eps": theirs["eps"]}
    return torch.optim.AdamW(parts, **options)


@pytest.mark.golden
@pytest.mark.parametrize("name", [name for name in CASES if len(Case(name).about["steps"]) > 1])
def test_training_continues_from_a_file_to_the_official_second_step(name, tmp_path):
    """Their first step, written as a file and started from again: terms and gradients of the second are theirs.

    In float64: AdamW's first update turns rounding into whole rates, up to 3e-3 of a norm in float32.
    """
    case = Case(name, dtype=torch.float64)
    model, objective = case.read()
    optimizer = official_adamw(case, {"model": model, "objective": objective})
    terms = objective(model, case.batch())
    assert values(terms) == pytest.approx(expected_terms(case), rel=1e-5, abs=1e-6)
    objective.after_step(model)  # they clamp after the forward pass, and after the update
    terms["loss"].backward()
    optimizer.step()
    objective.after_step(model)
    heads = {n: t for n, t in objective.state_dict().items() if "queue" not in n}
    write_declip_file(model, tmp_path / FILE, heads)

    model, objective = case.read()
    apply_pretrained(read_start(str(tmp_path / FILE)), model, objective)
    if "nearest_neighbor" in objective.terms:
        objective.terms["nearest_neighbor"].queue.push(case.value("bank_before", "step2/").T)
    case.step = case.about["steps"][1]
    terms = objective(model, case.batch("step2/"))
    assert values(terms) == pytest.approx(expected_terms(case), rel=1e-4, abs=1e-5)
    terms["loss"].backward()
    for theirs, norm, gradient in gradients(case, {"model": model, "objective": objective}, 1):
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-3), theirs


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
def test_features_equal_the_official_ones(name):
    """In evaluation, and with the batch statistics of training."""
    case = Case(name)
    model, objective = case.read()
    model.eval()
    with torch.no_grad():
        images = model.encode_image(next(iter(case.batch().views.values())).pixels)
        texts = model.encode_text(model.tokenize(case.step["captions"]))
        outputs = objective.run_towers(model.train(), case.batch())
    raw = [key for key in case.arrays if key.startswith("step1/image_raw_")]
    views = sorted(key for key in raw if not key.endswith(".1"))
    assert len(views) == len(outputs.images) or case.kind == "filip"
    found = [("eval_init/image_features", images), ("eval_init/text_features", texts)]
    found += [("step1/text_raw_main", outputs.texts[0]), *zip(views, outputs.images, strict=False)]
    for key, own in found:
        expected = F.normalize(case.value(key, step=""), dim=-1)
        torch.testing.assert_close(F.normalize(own, dim=-1), expected, rtol=0, atol=1e-5)


@pytest.mark.golden
@pytest.mark.parametrize("name", model_cases("declip", "defilip"))
def test_queue_after_a_step_holds_the_official_rows_and_the_tail_that_they_drop(name):
    case = Case(name)
    before, after = case.value("bank_before").T, case.value("bank_after").T
    size, start = len(before), case.step["bank_ptr_before"]
    model, objective = case.read(queue_size=size)
    objective.terms["nearest_neighbor"].queue.pointer = start
    batch = case.batch()
    objective(model, batch)
    objective.after_step(model)
    queue = objective.terms["nearest_neighbor"].queue
    texts = torch.cat([case.value(f"text_raw_{view}") for view in ("aug", "main")])
    newest = queue.features.roll(-queue.pointer, dims=0)[-2 * len(batch) :]
    torch.testing.assert_close(newest, F.normalize(texts, dim=-1))
    assert queue.pointer == (start + 2 * len(batch)) % size
    theirs = after[(after != before).any(dim=1)]
    distance = (theirs.unsqueeze(1) - queue.features).abs().amax(dim=2).min(dim=1).values
    assert distance.max() < 1e-5
    tail = 2 * len(batch) - len(theirs)  # what does not fit behind the pointer is dropped there
    assert 0 <= tail < 2 * len(batch)


def full_size(file, model=None):
    about = json.loads((GOLDEN / file).read_text())
    if model:
        return on_meta(about[model]["shapes"])
    return on_meta({name: key["shape"] for name, key in about["keys"].items()})


def on_meta(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.golden
@pytest.mark.parametrize(
    ("file", "model", "recipe", "embed_dim"),
    [
        ("keys_vitb32.json", None, "declip-yfcc15m-vitb32", 512),
        ("keys_r50.json", None, "declip-yfcc15m-r50", 1024),
        ("keys_other.json", "clip_vitb32", "clip-yfcc15m-vitb32", 512),
        ("keys_other.json", "slip_vitb32", "slip-yfcc15m-vitb32", 512),
        ("keys_other.json", "filip_vitb32", "filip-yfcc15m-vitb32", 768),
        ("keys_other.json", "defilip_vitb32", "defilip-yfcc15m-vitb32", 512),
    ],
)
def test_full_size_models_have_the_shapes_of_our_recipes(file, model, recipe, embed_dim):
    """On the meta device: names and shapes only."""
    with torch.device("meta"):
        found, objective = read_official(full_size(file, model))
        expected = declip.load_recipe(recipe, {"embed_dim": embed_dim})
        built = type(found)(expected)
        built_objective = type(objective)(expected, built)
    assert objective.weights == built_objective.weights
    for ours, theirs in ((found, built), (objective, built_objective)):
        shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
        assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    own = objective.recipe
    for section in ("text", "late_interaction", "simclr"):
        assert getattr(own, section) == getattr(expected, section)
    assert own.image.size == expected.image.size == 224
    if expected.image.model.startswith("vit"):
        assert own.image.model_kwargs["num_heads"] == 12


@pytest.mark.parametrize("name", ["clip_vit_tiny", "declip_resnet_tiny"])
def test_files_are_preprocessed_as_by_the_authors(name, tmp_path):
    """From image files to features: Resize(256 / 224 of the crop), CenterCrop and ImageNet's statistics."""
    model = Case(name).read()[0].eval()
    size = model.recipe.image.size
    # Bilinear, torchvision's default
    crop = [T.Resize(size * 256 // 224), T.CenterCrop(size), T.ToTensor()]
    theirs = T.Compose([*crop, T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    images = []
    for number, picture in enumerate(pictures()):
        picture.save(tmp_path / f"{number}.png")
        images.append(Image.open(tmp_path / f"{number}.png").convert("RGB"))
    expected = model.encode_image(torch.stack([theirs(image) for image in images]))
    assert largest(model.encode_image(model.preprocess(images)), expected) <= EXACT
    of, paths = model.preprocessor, sorted(tmp_path.iterdir())
    lazy = torch.stack([of.fast(open_image(path, "x")) for path in paths])
    # Of Pillow: a level apart
    assert largest(model.encode_image(of.normalize(lazy)), expected) <= 0.02


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("clip_vit_tiny", math.log(100)),
        ("declip_resnet_tiny", math.log(100)),
        ("defilip_vit_tiny", math.log(100)),
        ("slip_vit_tiny", 5.3),
        ("filip_vit_tiny", 5.3),
    ],
)
def test_a_logit_scale_is_cut_off_where_theirs_is(name, expected):
    model, _ = read_official(read_state(name) | {"logit_scale": torch.tensor([5.3])})
    assert model.logit_scale.shape == ()
    assert model.logit_scale.item() == pytest.approx(expected, rel=1e-6)


def official_file(folder, state):
    """A checkpoint as the official code saves it."""
    path = folder / "ckpt.pth.tar"
    model = {f"module.{name}": tensor.float() for name, tensor in state.items()}
    torch.save({"last_iter": 2, "model": model, "optimizer": {"state": {}}}, path)
    return path


@pytest.mark.golden
@pytest.mark.parametrize("name", model_cases())
def test_official_models_come_in_whole(name, tmp_path, command):
    file, out = official_file(tmp_path, Case(name).state), tmp_path / "out"
    printed = command("export", file, "--format", "safetensors", "--out", out).out
    assert f"Written: {out}" in printed.replace("\n", "")
    expected, objective = read_official(file)
    read = declip.load(out, device="cpu")
    for found, own in zip(features(read), features(expected.eval()), strict=True):
        assert torch.equal(found, own)
    kept = without_prefix("objective", load_file(out / FILE))
    heads = {part: t for part, t in objective.state_dict().items() if ".queue." not in part}
    assert kept.keys() >= heads.keys()
    assert all(torch.equal(kept[part], heads[part]) for part in heads)
    assert "ckpt.pth.tar`" in (out / "README.md").read_text(encoding="utf-8")


def test_home_is_expanded_wherever_a_folder_is_given(table, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = official_file(tmp_path, read_state("defilip_vit_tiny"))
    assert declip.export(file, "safetensors", "~/imported").folder == tmp_path / "imported"
    tuned = recipe_for(table, "clip", {"finetune": {"pretrained": "~/imported"}}, steps=1)
    quiet_train(tuned, "~/run")
    assert declip.export("~/run", "safetensors", "~/exported").folder == tmp_path / "exported"


def backbone_of(state, prefix):
    return {prefix + name: tensor for name, tensor in without_prefix("visual", state).items()}


@pytest.mark.golden
@pytest.mark.parametrize("prefix", ["visual.", ""])
@pytest.mark.parametrize("name", model_cases("declip"))
def test_an_image_tower_alone_gives_image_features(name, prefix, tmp_path):
    case = Case(name)
    file = official_file(tmp_path, backbone_of(case.state, prefix))
    whole, images = case.read()[0].eval(), case.batch().views["first"].pixels
    alone = with_heads(official.read(str(file)), *case.heads).build().eval()
    assert largest(alone.encode_image(images), whole.encode_image(images)) <= EXACT
    assert largest(alone.encode_backbone(images), whole.encode_backbone(images)) <= EXACT
    refuses(r"image tower alone.*--task linear", alone.tokenize, ["a cat"])
    refuses("image tower alone", alone.encode_text, torch.zeros(1, 4, dtype=torch.int64))


def test_probes_of_an_image_tower_alone_work_and_zero_shot_says_why_not(
    tmp_path, monkeypatch, capfd
):
    file = official_file(tmp_path, backbone_of(read_state("defilip_vit_tiny"), "visual."))
    model = declip.load(file, device="cpu")
    source = PaintedSource(WORDS * 4, classes=WORDS)
    data = Dataset("painted", {"train": lambda: source, "test": lambda: source})
    assert declip.evaluate(model, data, "linear").n == 28
    refuses("image tower alone", declip.evaluate, model, data, "zero-shot")
    refuses("no text tower.*safetensors", declip.export, model, "open_clip", tmp_path / "out")
    declip.export(model, "safetensors", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "image tower alone" in card
    assert "image-feature-extraction" in card
    assert "torch.Size([1, 64]) torch.Size([1, 64])" in run_card(
        tmp_path / "out", monkeypatch, capfd
    )
