"""Each file in examples/ runs for three steps, or on a few pairs; losses equal a plain loop; a plugin has names."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import declip
from conftest import TINY, draw, in_processes, refuses, write_rows
from declip.data.sources.open import open_source
from declip.io.plugins import load_plugin, plugins
from declip.models.dual_encoder import DualEncoder
from declip.models.image_tower import ImageTower
from declip.recipe.load import load_recipe, recipe_names
from declip.recipe.schema import Recipe
from declip.runs.checkpoint import list_checkpoints, load_checkpoint
from declip.runs.folder import read_rows
from declip.supervision import objective
from training.starts import UNCOLORED, last, moved, quiet_train

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = {path.stem: runpy.run_path(str(path)) for path in sorted(FOLDER.glob("*.py"))}
SMALL = {
    "train.steps": 3,
    "train.batch_size": 8,
    "train.lr": 0.001,
    "train.log_every": 1,
    "train.device": "cpu",
}
SMALL |= {f"views.image.{key}": value for key, value in UNCOLORED["image"].items()}
SMALL |= {"data.workers": 0, "image.size": 32, "text.width": 32, "text.layers": 1}
SMALL |= {"train.precision": "fp32", "image.model": "declip_vit_tiny"}
SMALL |= {"image.model_kwargs": {"patch_size": 8, "embed_dim": 64, "depth": 1}}

DOORS = {"optimizer", "augmentation", "evaluation"}  # examples that train with CLIP's loss
NOT_TRAINING = {"heat_map", "own_encoder", "images_without_captions", "shards", "caption_neighbor"}


@pytest.mark.parametrize("name", sorted(EXAMPLES.keys() - DOORS - NOT_TRAINING))
def test_an_example_trains_for_three_steps(name, table, tmp_path):
    EXAMPLES[name]["main"](str(table), str(tmp_path / "run"), **SMALL)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["losses"][name] > 0 for row in rows[1:])  # a queue is empty at first


@pytest.fixture(scope="module")
def plain(table, tmp_path_factory):
    """A run of CLIP's loss that no example changes."""
    out = tmp_path_factory.mktemp("plain") / "run"
    return quiet_train("demo-clip", out, overrides=SMALL, data=str(table)).folder


@pytest.mark.parametrize(
    ("name", "keys"), [("optimizer", {}), ("augmentation", {}), ("evaluation", {"every": 2})]
)
def test_an_example_changes_only_what_it_says(name, keys, plain, table, tmp_path, capsys):
    EXAMPLES[name]["main"](str(table), str(tmp_path / "changed"), **keys, **SMALL)
    assert (not moved(last(plain), last(tmp_path / "changed"))) == (name == "evaluation")
    assert ("step 2: R@1" in capsys.readouterr().out) == (name == "evaluation")


def teach(table, out, given):
    EXAMPLES["momentum_teacher"]["main"](str(table), str(out), **given)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_momentum_teacher_follows_resumes_and_is_exported(table, tmp_path, capsys, processes):
    example = EXAMPLES["momentum_teacher"]
    given = {**SMALL, "train.lr": 0.01, "train.checkpoint_every": 1}
    if processes == 1:
        teach(table, tmp_path / "run", given)
        assert "step 3: R@1 of the teacher" in capsys.readouterr().out
    else:
        sharded = {**given, "train.strategy": "fsdp", "train.steps": 2}
        in_processes(teach, 2, tmp_path / "meet", table, tmp_path / "run", sharded)
    saved = [load_checkpoint(path) for path in list_checkpoints(tmp_path / "run")]
    before, after = saved[-2:]
    exported = declip.load(tmp_path / "run" / "teacher").state_dict()
    for name, weight in after.weights.items():
        if not weight.is_floating_point():
            continue
        key = name.removeprefix("model.")
        was, now = (
            each.training[f"objective.terms.momentum_teacher.teacher.{key}"]
            for each in (before, after)
        )
        torch.testing.assert_close(now, 0.99 * was + 0.01 * weight)
        assert torch.equal(exported[key], now)
    if processes > 1:
        return
    # A run that was stopped after two steps ends with the same teacher.
    for path in list_checkpoints(tmp_path / "run")[-1:]:
        shutil.rmtree(path)
    overrides = {"loss_weights": {"contrastive": 0.5, "momentum_teacher": 0.5}, **given}
    terms = {"momentum_teacher": example["MomentumTeacher"]}
    options = {"overrides": overrides, "data": str(table), "terms": terms}
    quiet_train("demo-clip", tmp_path / "run", resume=True, **options)
    again = load_checkpoint(list_checkpoints(tmp_path / "run")[-1])
    assert again.step == 3
    assert all(torch.equal(again.training[name], each) for name, each in after.training.items())


def test_images_without_captions_train_the_weights_that_the_pairs_start_from(
    table, tmp_path, caplog
):
    EXAMPLES["images_without_captions"]["main"](
        str(table.parent), str(table), str(tmp_path / "run"), **SMALL
    )
    for folder, loss in (("run-images", "simclr"), ("run", "contrastive")):
        rows = read_rows(tmp_path / folder / "metrics.jsonl")
        assert [list(row["losses"]) for row in rows] == [[loss]] * 3
    assert f"Weights of '{tmp_path / 'run-images'}'" in caplog.text
    assert "new: nothing" in caplog.text


def test_shards_have_the_training_pairs_at_their_size(tmp_path, monkeypatch):
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path / "cache"))
    rows = [("large.png", (300, 200), "train"), ("gone.png", None, "train")]
    rows += [("a.png", (60, 90), "test"), ("small.png", (40, 80), "train")]
    for name, size, _ in rows:
        if size:
            Image.new("RGB", size).save(tmp_path / name)
    pairs = [{"image": name, "caption": [name, "ünï\n"], "split": split} for name, _, split in rows]
    source = open_source(write_rows(tmp_path / "t.jsonl", pairs))
    EXAMPLES["shards"]["main"](source, tmp_path / "shards", 100, pairs=2, workers=0)
    (tmp_path / "shards/000000002.tar").unlink()
    first = (tmp_path / "shards/000000000.tar").stat().st_mtime_ns
    EXAMPLES["shards"]["main"](source, tmp_path / "shards", 100, pairs=2, workers=2)
    assert (tmp_path / "shards/000000000.tar").stat().st_mtime_ns == first
    read = [*map(open_source(tmp_path / "shards").__getitem__, range(2))]
    assert [pair.open().size for pair in read] == [(150, 100), (40, 80)]
    assert [pair.captions() for pair in read] == [("large.png", "ünï"), ("small.png", "ünï")]


HEAT_TOWERS = {
    "declip_conv_tiny": {},
    # Channels last
    "swin_tiny_patch4_window7_224": {"depths": [1, 1], "embed_dim": 24, "num_heads": [1, 2]},
    "vit_small_patch16_224": {"depth": 1, "global_pool": "avg", "fc_norm": False},
}


@pytest.mark.parametrize("name", HEAT_TOWERS)
def test_the_embedding_of_an_image_is_the_mean_of_its_cells(name):
    tower = ImageTower(name, 64, 8, HEAT_TOWERS[name]).eval()
    images = torch.randn(2, 3, 64, 64)
    cells = EXAMPLES["heat_map"]["encode_cells"](tower, images)
    assert cells.shape[1] > 1
    torch.testing.assert_close(cells.mean(1), tower(images).pooled, rtol=1e-5, atol=1e-5)


def test_cells_behind_a_class_token_are_projected_as_it_is():
    tower, images = ImageTower("declip_vit_tiny", 32, 8).eval(), torch.randn(2, 3, 32, 32)
    expected = tower.proj(tower.norm(tower(images).tokens))
    torch.testing.assert_close(EXAMPLES["heat_map"]["encode_cells"](tower, images), expected)


def test_the_mean_of_a_heat_map_is_the_cosine_of_image_and_text():
    recipe = Recipe.model_validate({**TINY, "image": {"model": "declip_conv_tiny", "size": 64}})
    model = DualEncoder(recipe).eval()
    picture = draw("red", "square").resize((8, 8))  # as many pixels as cells: none is interpolated
    found = EXAMPLES["heat_map"]["similarity_map"](model, picture, "red")
    image, text = model.encode_image(picture), model.encode_text("red")
    assert found.shape == (8, 8)
    torch.testing.assert_close(found.mean(), (image @ text.mT)[0, 0])


def test_a_heat_map_is_drawn_over_an_image(tmp_path):
    model = DualEncoder(Recipe.model_validate(TINY)).eval()
    declip.export(model, "safetensors", tmp_path / "model")
    draw("red", "square", 40).save(tmp_path / "photo.png")
    words = [str(tmp_path / "model"), str(tmp_path / "photo.png"), "red", str(tmp_path / "map.png")]
    EXAMPLES["heat_map"]["main"](*words)
    assert Image.open(tmp_path / "map.png").size == (40, 40)


def test_the_nearest_other_caption_equals_a_plain_loop(monkeypatch):
    nearest_captions = EXAMPLES["caption_neighbor"]["nearest_captions"]
    monkeypatch.setitem(nearest_captions.__globals__, "COSINES_AT_ONCE", 40)  # blocks of a few rows
    features = F.normalize(torch.randn(17, 4), dim=1)
    same = torch.tensor([0, 0, 1, 2, 1, *range(3, 15)])

    def nearest(i):
        others = [j for j in range(17) if same[j] != same[i]]
        return max(others, key=lambda j: float(features[i] @ features[j]))

    assert nearest_captions(features, same).tolist() == [nearest(i) for i in range(17)]
    assert nearest_captions(features[:2], same[:2]).tolist() == [0, 1], "no other caption"


def test_neighbors_are_those_of_the_encoder(plain, table, tmp_path):
    source, model = open_source(table), declip.load(plain)
    captions = [list(source[index].captions()) for index in range(len(source))]
    means = torch.stack([model.encode_text(texts).mean(dim=0) for texts in captions])
    cosines = F.cosine_similarity(means[:, None], means[None], dim=2).fill_diagonal_(-1)
    EXAMPLES["caption_neighbor"]["main"](str(table), str(tmp_path / "run"), str(plain), **SMALL)
    state = load_checkpoint(list_checkpoints(tmp_path / "run")[-1]).training
    prefix = "objective.terms.caption_neighbor."
    assert state[f"{prefix}neighbors"].tolist() == cosines.argmax(dim=1).tolist()
    lengths = state[f"{prefix}features_of"].norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(24))
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert all(set(row["losses"]) == {"contrastive", "caption_neighbor"} for row in rows)


def test_word_classification_is_the_plain_loop():
    example = EXAMPLES["word_classification"]
    token_columns, word_targets = example["token_columns"], example["word_targets"]
    word_cross_entropy = example["word_cross_entropy"]
    texts = torch.tensor([[[90, 7, 3, 7, 91, 3], [90, 5, 91, 0, 0, 0]]]).repeat(2, 1, 1)
    word_ids = torch.tensor([0, 3, 5, 7])
    idf = torch.tensor([0.7, 0.1, 0.2, 0.9], dtype=torch.float64)
    logits = (9 * torch.randn(2, 2, 4, dtype=torch.float64)).requires_grad_()
    targets = word_targets(token_columns(texts, word_ids, 91).transpose(0, 1).flatten(1), idf)
    found, losses = word_cross_entropy(logits, targets), []
    # Both text views together; 0 and 3 are padding behind the end
    expected_targets = [[0, 0.1, 0, 0.9], [0, 0, 1, 0]]
    for weights, views in zip(expected_targets, logits, strict=True):
        for view in views:
            terms = zip(weights, view - view.logsumexp(0), strict=True)
            losses.append(-sum(weight * x for weight, x in terms))
    torch.testing.assert_close(targets, torch.tensor(expected_targets, dtype=torch.float64))
    torch.testing.assert_close(found, torch.stack(losses).mean(), rtol=1e-12, atol=0)
    nothing = torch.full((2, 2), 4)
    assert word_cross_entropy(logits, word_targets(nothing, idf)).item() == 0


def test_distillation_is_the_plain_loop_and_needs_no_gradient_of_the_teacher():
    relational_distillation = EXAMPLES["distillation"]["relational_distillation"]
    shapes = (2, 4), (3, 4), (2, 5), (3, 5)
    drawn = [torch.randn(*shape, dtype=torch.float64) for shape in shapes]
    rows, keys, *teacher = (F.normalize(each, dim=-1).requires_grad_() for each in drawn)
    found = relational_distillation((rows, keys, 3.0), (*teacher, 9.0))
    total = 0.0
    for b in range(2):
        p, q = ((s * x[b] @ y.T).softmax(0) for x, y, s in ((*teacher, 9.0), (rows, keys, 3.0)))
        total += sum(p[n].detach() * (p[n].detach().log() - q[n].log()) for n in range(3))
    torch.testing.assert_close(found, total / 2)
    found.backward()
    assert [x.grad is None for x in (rows, keys, *teacher)] == [False, False, True, True]


def test_a_loss_that_reads_pixels_sees_all_of_them_in_chunks(table, tmp_path):
    rows, chunks = [], {"train.grad_cache_chunk": 3}
    teacher = str(tmp_path / "whole-teacher")
    for name, trained, keys in (("whole", None, {}), ("chunks", teacher, chunks)):
        out = tmp_path / name
        EXAMPLES["distillation"]["main"](str(table), str(out), trained, **SMALL, **keys)
        rows.append(read_rows(out / "metrics.jsonl")[-1]["losses"])
    assert rows[1] == pytest.approx(rows[0], rel=1e-4)


PLUGIN = Path(__file__).parents[2] / "examples" / "plugin"


def test_a_plugin_is_used_by_its_names(tmp_path, command, monkeypatch):
    packages = str(tmp_path / "packages")
    options = ["-q", "--no-deps", "--no-build-isolation", "--no-index", "--target", packages]
    install = [sys.executable, "-m", "pip", "install", *options, str(PLUGIN)]
    subprocess.run(install, check=True)
    monkeypatch.syspath_prepend(packages)
    monkeypatch.chdir(tmp_path)
    assert "sketch" in recipe_names()
    assert load_recipe("sketch").data.source == "circles:256"
    steps = ["train.steps=3", "train.log_every=1", "text.width=32", "data.workers=0"]
    for resume in ([], ["--resume"]):
        done = command("train", "sketch", *steps, "--out", "run", "--quiet", *resume)
        assert done.status == 0, done.err
    logged = Path("run/lines.txt").read_text().splitlines()
    assert [line.split()[0] for line in logged] == ["1", "2", "3"]
    assert Path("run/metrics.jsonl").read_text().count('"alignment"') == 3
    refused = command("train", "sketch", "--data", "circles:few", "--out", "other")
    assert (refused.status, "circles:few" in refused.err) == (2, True)
    assert "alignment" not in objective.TERMS


def test_damaged_plugins_are_named(tmp_path, monkeypatch):
    for package in ("one", "two"):
        about = tmp_path / f"{package}-1.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
        points = f"[declip.losses]\nsame = {package}_missing:Loss\n[declip.trackers]\n{package} = one_missing:X\n"
        (about / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(tmp_path))
    refuses(r"'same': (one and two|two and one)", plugins, "losses")
    refuses("'one' of the package one cannot be imported", load_plugin, "trackers", "one")
