"""Training that starts from weights: what is taken over, what is frozen, how fast each part learns, and resuming."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

import declip
from conftest import TINY, WEIGHTS, draw
from declip.config import Recipe
from declip.errors import UserError
from declip.interchange import interpolate as mixing
from declip.interchange.declip_file import write_declip_file
from declip.interchange.start import read_start
from declip.models.depths import IMAGE, TEXT, blocks, depths
from declip.training.checkpoint import list_checkpoints, load_checkpoint, part
from declip.training.monitor import read_rows
from declip.training.optimizer import Pace
from declip.training.schedule import learning_rate, paced
from declip.training.start import KEPT
from declip.training.trainer import Trainer, train
from interchange.test_export import features
from interchange.test_import import command
from interchange.towers import build
from processes import in_processes
from text_encoders import bert
from training.test_trainer import same_end

SMALL = {"width": 48, "layers": 3, "heads": 2, "context": 20, "merges": 400}
VIT = {"name": "declip_vit_tiny", "size": 32, "options": {"patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2}}
CONV = {"name": "declip_conv_tiny", "size": 32}
STATISTICS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


def start_from(table: Path, out: Path, image: dict[str, Any] = VIT, name: str = "declip") -> Path:
    """A run of other sizes than `TINY`, that a run of ours can start from."""
    tree = {**TINY, "name": name, "data": {"source": str(table)}, "weights": WEIGHTS[name], "embed_dim": 24}
    tree |= {"image": {**image, **STATISTICS}, "text": {**SMALL, "activation": "gelu"}}
    train(Recipe.model_validate(tree), out=out, quiet=True, report=False)
    return out


@pytest.fixture(scope="module")
def start(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start_from(table, tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def conv_start(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start_from(table, tmp_path_factory.mktemp("conv"), CONV)


def tuned(table: Path, weights: object, train_keys: dict[str, Any] | None = None, **keys: Any) -> Recipe:
    tree = {**TINY, "name": "tuned", "data": {"source": str(table)}, "weights": WEIGHTS["declip"]}
    tree["train"] = {**TINY["train"], "lr_peak": 1e-2, **(train_keys or {})}
    return Recipe.model_validate({**tree, "finetune": {"weights": str(weights), **keys}})


def state(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def last(run: Path) -> dict[str, Tensor]:
    return part("model", load_checkpoint(list_checkpoints(run)[-1]).weights)


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_a_run_gives_towers_heads_tokenizer_statistics_and_scale(table: Path, tmp_path: Path, start: Path) -> None:
    trainer = Trainer(tuned(table, start), tmp_path, quiet=True)
    checkpoint = load_checkpoint(list_checkpoints(start)[-1])
    given, heads = part("model", checkpoint.weights), part("objective", checkpoint.training)
    assert not moved(given, state(trainer))
    own = trainer.objective.state_dict()
    for name in (name for name, _ in trainer.objective.named_parameters()):
        same = torch.equal(heads[name], own[name]) if heads[name].shape == own[name].shape else False
        assert same == name.startswith(("predictor", "projector.linear2", "projector.linear3", "language")) or (
            name.startswith("projector")
        )
    recipe = trainer.recipe
    assert (recipe.text.layers, recipe.text.merges, recipe.text.activation) == (3, 400, "gelu")
    assert (recipe.image.mean, recipe.embed_dim) == (STATISTICS["mean"], 24)
    assert trainer.model.tokenizer.vocabulary == declip.load(start).tokenizer.vocabulary  # type: ignore[attr-defined]
    assert trainer.model.preprocessor.mean == pytest.approx(STATISTICS["mean"])
    assert trainer.model.logit_scale.item() == pytest.approx(recipe.logit_scale.start)
    assert len(trainer.objective.queue or ()) == 0


def test_heads_are_taken_whole_or_not_at_all(table: Path, tmp_path: Path, start: Path) -> None:
    """The start's language head has its vocabulary; a projector of another width is new, all of it."""
    keys = tuned(table, start).model_dump(mode="json") | {"simsiam": {"hidden": 16, "out": 16, "predictor_hidden": 6}}
    trainer = Trainer(Recipe.model_validate(keys), tmp_path, quiet=True)
    heads = part("objective", load_checkpoint(list_checkpoints(start)[-1]).training)
    own = trainer.objective.state_dict()
    taken = {name for name, _ in trainer.objective.named_parameters() if torch.equal(own[name], heads[name])}
    new = {name for name, _ in trainer.objective.named_parameters()} - taken
    assert {name.split(".")[0] for name in new} == {"predictor"}
    assert trainer.begun is not None
    assert "new: objective.predictor" in trainer.begun.story


def test_towers_wait_while_new_heads_warm_up(table: Path, tmp_path: Path, start: Path) -> None:
    file = tmp_path / "towers.safetensors"
    write_declip_file(declip.load(start, device="cpu"), file)  # type: ignore[arg-type]
    given = load_file(file)
    recipe = tuned(table, file, {"checkpoint_every": 1, "keep": 9}, warmup_heads=4)
    trainer = Trainer(recipe, tmp_path / "run", quiet=True)
    heads = {name: tensor.clone() for name, tensor in trainer.objective.named_parameters()}
    trainer.train(report=False)
    paths = {int(path.name.split("-")[1]): path for path in list_checkpoints(tmp_path / "run")}
    for step in (1, 4):
        found = load_checkpoint(paths[step])
        assert not moved(part("model", given), part("model", found.weights)), step
        assert moved(heads, part("objective", found.training)) == set(heads), step
    assert len(moved(part("model", given), part("model", load_checkpoint(paths[5]).weights))) > 40


@pytest.mark.parametrize(("image", "text"), [(2, 0), (0, 3), ("all", 1), ("all", "all")])
def test_what_is_frozen_stays_to_the_bit_and_the_rest_learns(
    table: Path, tmp_path: Path, start: Path, image: Any, text: Any
) -> None:
    trainer = Trainer(tuned(table, start, freeze_image=image, freeze_text=text), tmp_path, quiet=True)
    before, places = state(trainer), depths(trainer.model)
    trainer.train(report=False)
    frozen = {
        name
        for name, depth in places.items()
        for tower, asked in ((IMAGE, image), (TEXT, text))
        if name.startswith(tower) and (asked == "all" or (asked and depth <= asked))
    }
    assert {name for name in before if name not in moved(before, last(tmp_path))} == frozen
    assert len(frozen) > 10


def test_frozen_batch_norm_keeps_its_statistics(table: Path, tmp_path: Path, conv_start: Path) -> None:
    trainer = Trainer(tuned(table, conv_start, freeze_image=1), tmp_path / "a", quiet=True)
    before = state(trainer)
    trainer.train(report=False)
    still = {name for name in before if name not in moved(before, last(tmp_path / "a"))}
    assert {name for name in still if "running" in name} == {
        name for name in before if "running" in name and ("stem" in name or "stages.0." in name)
    }
    assert trainer.model.image_tower.has_batch_norm
    whole = Trainer(tuned(table, conv_start, freeze_image="all"), tmp_path / "b", quiet=True)
    assert not whole.model.image_tower.has_batch_norm
    before = state(whole)
    whole.train(report=False)
    assert not {name for name in moved(before, last(tmp_path / "b")) if name.startswith(IMAGE)}


def test_depths_count_stem_blocks_and_what_follows() -> None:
    for kind, image_blocks in (("vit", 2), ("resnet", 5), ("timm-convnext", 9), ("conv", 3)):
        model = build(kind)
        found = depths(model)
        assert found.keys() == {name for name, _ in model.named_parameters() if name != "logit_scale"}
        assert blocks(found, TEXT) == 2
        assert blocks(found, IMAGE) == image_blocks, kind
        assert found["text_tower.token_embedding.weight"] == found["text_tower.positional_embedding"] == 0
        assert found["text_tower.transformer.resblocks.1.mlp.c_fc.bias"] == 2
        assert found["text_tower.ln_final.weight"] == found["text_tower.text_projection.weight"] == 3
        assert found["image_tower.proj.weight"] == image_blocks + 1
    assert depths(build("vit"))["image_tower.trunk.pos_embed"] == 0
    assert depths(build("vit"))["image_tower.norm.weight"] == 3


def test_each_layer_has_its_rate(table: Path, tmp_path: Path, start: Path) -> None:
    recipe = tuned(table, start, image_lr=0.5, text_lr=0.1, layer_decay=0.7)
    trainer = Trainer(recipe, tmp_path, quiet=True)
    rates: dict[int, float] = {}
    meet = trainer.council.meet

    def look(step: int, *rest: Any) -> Any:
        if step == 5:
            rates.update({id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]})
        return meet(step, *rest)

    trainer.council.meet = look  # type: ignore[method-assign]
    trainer.train(report=False)
    base = learning_rate(4, recipe.train)
    places = depths(trainer.model)
    for name, parameter in trainer.model.named_parameters():
        factor = 1.0 if name == "logit_scale" else (0.5 if name.startswith(IMAGE) else 0.1) * 0.7 ** (4 - places[name])
        assert rates[id(parameter)] == pytest.approx(base * factor, rel=1e-9), name
    assert all(rates[id(p)] == base for p in trainer.objective.parameters())


def test_what_waits_stands_still_and_then_warms_up() -> None:
    recipe = Recipe.model_validate(TINY)
    shares = [paced(1.0, step, Pace(0.5, waits=True), 3, recipe.train) for step in range(7)]
    assert shares == [0, 0, 0, 0.25, 0.5, 0.5, 0.5]
    assert paced(1.0, 0, Pace(0.5), 3, recipe.train) == 0.5


@pytest.mark.parametrize(
    "keys",
    [
        {"image_lr": 0.5, "layer_decay": 0.8, "warmup_heads": 3, "freeze_text": 1},
        {"lora": {"rank": 2}, "warmup_heads": 2},
        {"image_size": 48},
        {"freeze_image": 1, "image_lr": 0.1, "warmup_heads": 2},
    ],
    ids=["paced", "lora", "resized", "image-alone"],
)
def test_a_resumed_run_equals_one_never_stopped_though_its_source_is_gone(
    table: Path, tmp_path: Path, start: Path, keys: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    source = tmp_path / "source"
    shutil.copytree(start, source)
    weights = str(source)
    if "image-alone" in request.node.name:
        save_file(timm.create_model("test_vit").state_dict(), source / "vit.safetensors")
        weights, keys = f"timm:test_vit/{source / 'vit.safetensors'}", {**keys, "image_size": 32}
    recipe = tuned(table, weights, {} if "lora" in keys else {"ema": 0.9}, **keys)
    train(recipe, out=tmp_path / "whole", quiet=True, report=False)
    stopped = Trainer(recipe, tmp_path / "parts", quiet=True)
    save = stopped.save

    def save_and_stop() -> Path:
        stopped.stop_asked = True
        return save()

    stopped.save = save_and_stop  # type: ignore[method-assign]
    assert not stopped.train(report=False).finished
    shutil.rmtree(source)
    assert train(recipe, out=tmp_path / "parts", resume=True, quiet=True, report=False).finished
    same_end(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(UserError, match=r"no weights to start from|no file"):
        train(recipe, out=tmp_path / "anew", quiet=True)


@pytest.mark.parametrize("image", [VIT, CONV], ids=["vit", "conv"])
def test_adapters_alone_learn_and_are_merged_when_the_run_is_loaded(
    table: Path, tmp_path: Path, start: Path, conv_start: Path, image: dict[str, Any]
) -> None:
    source = start if image is VIT else conv_start
    trainer = Trainer(tuned(table, source, {"steps": 4}, lora={"rank": 2, "alpha": 4}), tmp_path, quiet=True)
    before = state(trainer)
    trainer.train(report=False)
    changed = moved(before, last(tmp_path))
    assert {name for name in changed if ".lora_" not in name} == {"logit_scale"}
    assert changed - {"logit_scale"} == {name for name in before if ".lora_" in name}
    assert any("in_proj" in name or ".attn.lora_" in name for name in changed)
    loaded = declip.load(tmp_path, device="cpu")
    assert not any("lora" in name for name in loaded.state_dict())  # type: ignore[attr-defined]
    for found, trained in zip(features(loaded), features(trainer.model.eval()), strict=True):
        torch.testing.assert_close(found, trained, rtol=0, atol=1e-5)
    given = features(declip.load(source, device="cpu"))
    assert not any(torch.equal(found, own) for found, own in zip(features(loaded)[1::2], given[1::2], strict=True))


def test_lora_with_a_frozen_tower_leaves_it_without_adapters(table: Path, tmp_path: Path, start: Path) -> None:
    trainer = Trainer(tuned(table, start, lora={"rank": 2}, freeze_text="all"), tmp_path, quiet=True)
    names = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert names == {"logit_scale"} | {name for name in names if name.startswith(IMAGE) and ".lora_" in name}
    assert len(names) > 10
    trainer.train(report=False)
    declip.load(tmp_path, device="cpu")


def test_positions_are_resized_as_timm_does(table: Path, tmp_path: Path, start: Path) -> None:
    trainer = Trainer(tuned(table, start, image_size=48), tmp_path, quiet=True)
    given = last(start)["image_tower.trunk.pos_embed"]
    own = state(trainer)
    assert own["image_tower.trunk.pos_embed"].shape[1] == 1 + 6 * 6
    torch.testing.assert_close(own.pop("image_tower.trunk.pos_embed"), resample_abs_pos_embed(given, [6, 6], [4, 4]))
    assert not moved(own, last(start))
    assert trainer.model.preprocessor.size == trainer.recipe.image.size == 48
    assert trainer.model.encode_image(trainer.model.preprocess(draw("red", "bar"))).shape == (1, 24)


def test_an_attention_pool_is_resized_too(table: Path, tmp_path: Path) -> None:
    model = build("resnet")
    write_declip_file(model, tmp_path / "resnet.safetensors")
    trainer = Trainer(tuned(table, tmp_path / "resnet.safetensors", image_size=96), tmp_path / "run", quiet=True)
    given, own = model.state_dict(), state(trainer)
    resized = moved({n: t for n, t in given.items() if t.shape == own[n].shape}, own)
    assert not resized
    [name] = [name for name in given if given[name].shape != own[name].shape]
    expected = resample_abs_pos_embed(given[name][None], [3, 3], [2, 2], num_prefix_tokens=1)[0]
    torch.testing.assert_close(own[name], expected)


def test_timm_weights_start_the_image_tower_alone(table: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    published = timm.create_model("test_vit", pretrained=False)
    file = tmp_path / "vit.safetensors"
    save_file(published.state_dict(), file)
    trainer = Trainer(
        tuned(table, f"timm:test_vit/{file}", freeze_image="all", image_size=32), tmp_path / "r", quiet=True
    )
    tower = trainer.model.image_tower
    expected = timm.create_model("test_vit", pretrained=False, num_classes=0, img_size=32)
    expected.load_state_dict(
        {
            **{n: t for n, t in published.state_dict().items() if not n.startswith("head.")},
            "pos_embed": resample_abs_pos_embed(published.state_dict()["pos_embed"], [2, 2], num_prefix_tokens=1),
        }
    )
    pictures = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        hidden = expected.eval().forward_head(expected.forward_features(pictures), pre_logits=True)
        torch.testing.assert_close(tower.eval()(pictures).hidden, hidden)
    assert trainer.recipe.image.mean == pytest.approx(published.pretrained_cfg["mean"])
    assert trainer.recipe.text.width == TINY["text"]["width"]  # type: ignore[index]
    before = state(trainer)
    trainer.train(report=False)
    changed = moved(before, last(tmp_path / "r"))
    assert {name for name in changed if name.startswith(IMAGE)} == {"image_tower.proj.weight"}
    assert {name for name in changed if name.startswith(TEXT)} == {name for name in before if name.startswith(TEXT)}
    assert read_rows(tmp_path / "r" / "evaluations.jsonl") == []
    with pytest.raises(UserError, match="nothing to mix with"):
        mixing.ends_of(tmp_path / "r")


@pytest.mark.parametrize("kind", ["vit-gelu", "resnet"])
def test_open_clips_models_are_a_start(kind: str, table: Path, tmp_path: Path) -> None:
    model = build(kind, **{"text.merges": None})
    declip.export(model, "open_clip", tmp_path / "folder")
    trainer = Trainer(tuned(table, tmp_path / "folder", {"steps": 1}), tmp_path / "run", quiet=True)
    for found, given in zip(features(trainer.model.eval()), features(model), strict=True):
        torch.testing.assert_close(found, given, rtol=0, atol=1e-5)
    named = read_start(f"open_clip:local-dir:{tmp_path / 'folder'}")
    assert named.whole
    assert named.recipe.text.merges is None


def test_a_text_encoder_and_its_run_are_a_start(table: Path, tmp_path: Path) -> None:
    """An encoder's weights can be frozen beside an image tower's; its run starts another without the folder."""
    pytest.importorskip("transformers")
    folder = bert(tmp_path / "bert")
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    tree = tuned(
        table,
        f"timm:test_vit/{tmp_path / 'vit.safetensors'}",
        {"steps": 2},
        freeze_text=1,
        layer_decay=0.5,
        image_size=32,
    ).model_dump(mode="json") | {"text": {"encoder": str(folder), "context": 24}}
    first = Trainer(Recipe.model_validate(tree), tmp_path / "first", quiet=True)
    before, places = state(first), depths(first.model)
    assert blocks(places, TEXT) == 2
    first.train(report=False)
    still = before.keys() - moved(before, last(tmp_path / "first"))
    assert {name for name in still if name.startswith(TEXT)} - {"text_tower._extra_state"} == {
        name for name, depth in places.items() if name.startswith(TEXT) and depth <= 1
    }
    assert not {name for name in still if name.startswith(IMAGE)}
    shutil.rmtree(folder)
    second = Trainer(tuned(table, tmp_path / "first", {"steps": 2}), tmp_path / "second", quiet=True)
    assert not moved(last(tmp_path / "first"), state(second))
    second.train(report=False)
    mixing.ends_of(tmp_path / "second", "cpu")


def test_the_start_is_measured_once_and_the_report_says_what_changed(table: Path, tmp_path: Path, start: Path) -> None:
    keys = tuned(table, start, {"steps": 4}).model_dump(mode="json") | {
        "evaluation": {"retrieval": [str(table)], "final_retrieval": [str(table)]}
    }
    recipe = Recipe.model_validate(keys)
    trainer = Trainer(recipe, tmp_path, quiet=True)
    (tmp_path / "evaluations.jsonl").write_text(
        '{"step": 0, "protocol": "retrieval", "on": "of a run that was killed"}\n'
    )
    trainer.train()
    rows = read_rows(tmp_path / "evaluations.jsonl")
    assert [(row["step"], row["on"]) for row in rows] == [(0, table.name), (4, table.name)]
    expected = declip.evaluate(declip.load(start), str(table), "retrieval").to_dict()
    assert rows[0]["image_to_text_r1"] == expected["image_to_text_r1"]
    page = (tmp_path / "report.html").read_text()
    points = 100 * (rows[1]["image_to_text_r1"] - rows[0]["image_to_text_r1"])
    assert "Won and forgotten" in page
    assert f"{points:+.1f}".replace("-", "−") in page


def test_mixtures_are_the_line_between_start_and_end(
    table: Path, tmp_path: Path, start: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    train(tuned(table, start), out=tmp_path / "run", quiet=True, report=False)
    first, final = mixing.ends_of(tmp_path / "run", "cpu")
    assert not moved(first.state_dict(), last(start))
    half = mixing.interpolate(first, final, 0.25).state_dict()
    for name, tensor in half.items():
        expected = 0.75 * first.state_dict()[name].double() + 0.25 * final.state_dict()[name].double()
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)
    assert not moved(mixing.interpolate(first, final, 0).state_dict(), first.state_dict())
    assert not moved(mixing.interpolate(first, final, 1).state_dict(), final.state_dict())
    run, picture, out = str(tmp_path / "run"), tmp_path / "curve.png", tmp_path / "mixed"
    words = ["interpolate", run, "--on", str(table), "--protocol", "retrieval", "--figure", str(picture)]
    assert command(words, monkeypatch) == 0
    shown = capfd.readouterr().out
    assert all(f"{share:g}" in shown for share in (0, 0.25, 0.5, 0.75, 1))
    assert picture.stat().st_size > 5000
    assert command(["interpolate", run, "--share", "0.25", "--out", str(out)], monkeypatch) == 0
    assert not moved(declip.load(out, device="cpu").state_dict(), half)  # type: ignore[attr-defined]
    assert "WiSE-FT" in (out / "README.md").read_text()


def test_wrong_mixtures_are_refused(
    tmp_path: Path, start: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="from 0 to 1"):
        mixing.interpolate(build("vit"), build("vit"), 1.5)
    with pytest.raises(UserError, match="'image_tower"):
        mixing.interpolate(build("vit"), build("conv"), 0.5)
    with pytest.raises(UserError, match="no fine-tuned run"):
        mixing.ends_of(start)
    for words, said in (
        (["interpolate", str(start)], "--on SET"),
        (["interpolate", str(start), "--out", "x"], "Give one"),
        (["interpolate", str(start), "--share", "0.5", "--out", str(tmp_path / "x"), "--figure", "y"], "--on SET"),
    ):
        assert command(words, monkeypatch) == 2
        assert said in capfd.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"freeze_image": 4}, "has 3 blocks"),
        ({"freeze_text": 9}, "Give 0 to 3, or all"),
        ({"lora": {"rank": 2}, "freeze_image": 1}, "0 or all"),
        ({"lora": {"rank": 2}, "layer_decay": 0.5}, "layer_decay"),
        ({"lora": {"rank": 2}, "train_keys": {"ema": 0.9}}, "goes without train.ema=0.9"),
        ({"lora": {"rank": 2}, "train_keys": {"parallel": "fsdp"}}, "goes without train.parallel=fsdp"),
        ({"weights": "nowhere"}, "no weights to start from at 'nowhere'"),
        ({"weights": "timm:no_such_tower"}, "no_such_tower"),
        ({"weights": "timm:test_vit/nowhere.pt"}, "no file"),
        ({"weights": "timm:test_vit.no_such_tag"}, "tag"),
    ],
)
def test_what_cannot_be_is_said_before_a_folder_is_made(
    table: Path, tmp_path: Path, start: Path, keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        train(tuned(table, **{"weights": start, **keys}), out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"finetune\.image_lr .* give finetune\.weights too"):
        Recipe.model_validate({**TINY, "finetune": {"image_lr": 0.1}})


def test_files_of_another_model_and_pickles_are_no_start(table: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file(timm.create_model("test_convnext").state_dict(), other)
    with pytest.raises(UserError, match="test_vit"):
        train(tuned(table, f"timm:test_vit/{other}"), out=tmp_path / "run", quiet=True)
    program = tmp_path / "program.pt"
    program.write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    with pytest.raises(UserError, match="no file of tensors"):
        train(tuned(table, f"timm:test_vit/{program}"), out=tmp_path / "run", quiet=True)
    (tmp_path / "half.pt").write_bytes(b"PK\x03\x04half")
    with pytest.raises(UserError, match=r"half\.pt"):
        train(tuned(table, tmp_path / "half.pt"), out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_tower_that_cannot_change_its_size_says_so(table: Path, tmp_path: Path) -> None:
    image = {
        "image.name": "vit_relpos_small_patch16_224",
        "image.options": {"depth": 1, "embed_dim": 32, "num_heads": 2, "rel_pos_type": "bias"},
    }
    write_declip_file(build("vit", **image), tmp_path / "relpos.safetensors")
    recipe = tuned(table, tmp_path / "relpos.safetensors", image_size=64)
    with pytest.raises(UserError, match=r"rel_pos.*Leave finetune\.image_size out"):
        train(recipe, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_an_image_tower_alone_has_no_text_to_freeze(table: Path, tmp_path: Path) -> None:
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(UserError, match="hold no text_tower"):
        train(
            tuned(table, f"timm:test_vit/{tmp_path / 'vit.safetensors'}", freeze_text=1), out=tmp_path / "r", quiet=True
        )


def trained_by_ranks(recipe: dict[str, Any], folder: str) -> bool:
    return Trainer(Recipe.model_validate(recipe), Path(folder), quiet=True).train(report=False).finished


@pytest.mark.parametrize(
    ("keys", "parallel"),
    [
        ({"freeze_image": 2, "layer_decay": 0.8}, "ddp"),
        ({"freeze_image": 2, "layer_decay": 0.8}, "fsdp"),
        ({"lora": {"rank": 2}}, "ddp"),
    ],
    ids=["frozen", "frozen-sharded", "lora"],
)
def test_two_processes_tune_as_one(
    table: Path, tmp_path: Path, start: Path, keys: dict[str, Any], parallel: str
) -> None:
    recipe = tuned(table, start, {"parallel": parallel, "patience": 60, "steps": 4, "log_every": 1}, **keys)
    train(recipe, out=tmp_path / "one", quiet=True, report=False)
    tree = json.loads(recipe.model_dump_json())
    assert in_processes(trained_by_ranks, 2, tmp_path / "ranks", tree, str(tmp_path / "two")) == [True, True]
    one, two = ([row["total"] for row in read_rows(tmp_path / run / "metrics.jsonl")] for run in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-3)
    given, first, second = (
        declip.load(run, device="cpu").state_dict() for run in (start, tmp_path / "one", tmp_path / "two")
    )  # type: ignore[attr-defined]
    still = given.keys() - moved(given, first)
    assert still == given.keys() - moved(given, second)
    assert len(still) > 10
    assert (tmp_path / "two" / KEPT).is_file()
