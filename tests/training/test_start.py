"""Training that starts from weights: what it can start from, what is taken over, mixtures, and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

import declip
from conftest import TINY, draw
from declip.api import train
from declip.errors import UserError
from declip.interchange import interpolate as mixing
from declip.interchange.declip_file import write_declip_file
from declip.interchange.provenance import repository, without_folders
from declip.interchange.read import read_start
from declip.models.layers import IMAGE, TEXT
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe
from declip.runs.checkpoint import list_checkpoints, load_checkpoint, part
from declip.runs.folder import read_rows
from declip.training.trainer import Trainer
from interchange.test_export import features
from interchange.towers import build
from text_encoders import bert
from training.starts import STATISTICS, last, moved, state, tuned


def test_a_run_gives_towers_heads_tokenizer_statistics_and_scale(table: Path, tmp_path: Path, start: Path) -> None:
    trainer = Trainer(tuned(table, start), tmp_path, quiet=True)
    checkpoint = load_checkpoint(list_checkpoints(start)[-1])
    given, heads = part("model", checkpoint.weights), part("objective", checkpoint.training)
    assert not moved(given, state(trainer))
    own = trainer.objective.state_dict()
    for name in (name for name, _ in trainer.objective.named_parameters()):
        assert torch.equal(heads[name], own[name]), name
    recipe = trainer.recipe
    assert (recipe.text.layers, recipe.text.bpe_merges, recipe.text.activation) == (3, 400, "gelu")
    assert (recipe.image.mean, recipe.embed_dim) == (STATISTICS["mean"], 24)
    assert trainer.model.tokenizer.vocabulary == declip.load(start).tokenizer.vocabulary  # type: ignore[attr-defined]
    assert trainer.model.preprocessor.mean == pytest.approx(STATISTICS["mean"])
    assert trainer.model.logit_scale.item() == pytest.approx(recipe.logit_scale.init)
    assert len(trainer.objective.queue or ()) == 0


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"image.size": 64}, r"image\.size=64.*becomes 32.*finetune\.image_size=64"),
        ({"text.context_length": 77, "embed_dim": 8}, r"embed_dim=8.*24.*text\.context_length=77.*20"),
        ({"image.model": "declip_conv_tiny"}, r"image\.model=.*leave it out"),
        ({"logit_scale.init": 3.0}, r"logit_scale\.init=3\.0"),
    ],
)
def test_a_key_that_the_weights_overrule_is_refused(
    keys: dict[str, Any], said: str, start: Path, table: Path, tmp_path: Path
) -> None:
    for recipe in ("finetune", "clip"):
        with pytest.raises(UserError, match=said):
            read_start(str(start)).fit(load_recipe(recipe, {"finetune.pretrained": str(start), **keys}))
    given = {"finetune.pretrained": str(start), "data.source": str(table), **keys}
    with pytest.raises(UserError, match=said):
        train("finetune", given, out=tmp_path / "run", quiet=True, report=False)
    assert not (tmp_path / "run").exists()


def test_keys_that_hold_beside_weights(start: Path, table: Path, tmp_path: Path) -> None:
    """Those of shipped recipes give way, equal ones are no matter, statistics are the user's where they are given."""
    found = read_start(str(start))
    keys = {
        "finetune.pretrained": str(start),
        "text.context_length": 20,
        "image.size": 32,
        "data.source": str(table),
        "train.batch_size": 8,
    }
    for recipe in ("finetune", "clip", "declip-yfcc15m-vitb32"):
        assert found.fit(load_recipe(recipe, keys)).image.mean == STATISTICS["mean"]
    given = load_recipe("clip", keys | {"image.mean": [0.1, 0.2, 0.3], "finetune.image_size": 48, "image.size": 48})
    trainer = Trainer(given, tmp_path / "run", quiet=True)
    assert trainer.recipe.image.model_dump(include={"mean", "std", "size"}) == {
        "mean": (0.1, 0.2, 0.3), "std": STATISTICS["std"], "size": 48,
    }  # fmt: skip
    assert trainer.model.preprocessor.mean.tolist() == pytest.approx([0.1, 0.2, 0.3])
    (tmp_path / "resolved.yaml").write_text(trainer.recipe.to_yaml())
    again = load_recipe(tmp_path / "resolved.yaml")
    assert found.fit(again) == trainer.recipe
    assert found.fit(load_recipe(start / "recipe.yaml", {"finetune.pretrained": str(start)})).text.context_length == 20


def test_heads_are_taken_whole_or_not_at_all(table: Path, tmp_path: Path, start: Path) -> None:
    """The start's language head has its vocabulary; a projector of another width is new, all of it."""
    keys = tuned(table, start).model_dump(mode="json") | {"simsiam": {"hidden": 16, "out": 16, "predictor_hidden": 6}}
    trainer = Trainer(Recipe.model_validate(keys), tmp_path, quiet=True)
    heads = part("objective", load_checkpoint(list_checkpoints(start)[-1]).training)
    own = trainer.objective.state_dict()
    taken = {name for name, _ in trainer.objective.named_parameters() if torch.equal(own[name], heads[name])}
    new = {name for name, _ in trainer.objective.named_parameters()} - taken
    assert {".".join(name.split(".")[:3]) for name in new} == {"terms.simsiam.predictor"}
    assert trainer.pretrained is not None
    assert "new: simsiam.predictor" in trainer.pretrained.summary


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
    recipe = tuned(table, f"timm:test_vit/{file}", freeze_image_blocks="all", image_size=32)
    trainer = Trainer(recipe, tmp_path / "r", quiet=True)
    tower = trainer.model.image_tower
    expected = timm.create_model("test_vit", pretrained=False, num_classes=0, img_size=32)
    weights = {name: tensor for name, tensor in published.state_dict().items() if not name.startswith("head.")}
    weights["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"], [2, 2], num_prefix_tokens=1)
    expected.load_state_dict(weights)
    pictures = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        hidden = expected.eval().forward_head(expected.forward_features(pictures), pre_logits=True)
        torch.testing.assert_close(tower.eval()(pictures).pre_logits, hidden)
    assert trainer.recipe.image.mean == pytest.approx(published.pretrained_cfg["mean"])
    assert trainer.recipe.text.width == TINY["text"]["width"]  # type: ignore[index]
    before = state(trainer)
    trainer.train()
    changed = moved(before, last(tmp_path / "r"))
    assert {name for name in changed if name.startswith(IMAGE)} == {"image_tower.proj.weight"}
    assert {name for name in changed if name.startswith(TEXT)} == {name for name in before if name.startswith(TEXT)}
    assert read_rows(tmp_path / "r" / "evaluations.jsonl") == []
    with pytest.raises(UserError, match="nothing to mix with"):
        mixing.ends_of(tmp_path / "r")


@pytest.mark.parametrize("kind", ["vit-gelu", "resnet"])
def test_open_clips_models_are_a_start(kind: str, table: Path, tmp_path: Path) -> None:
    model = build(kind, **{"text.bpe_merges": None})
    declip.export(model, "open_clip", tmp_path / "folder")
    trainer = Trainer(tuned(table, tmp_path / "folder", {"steps": 1}), tmp_path / "run", quiet=True)
    for found, given in zip(features(trainer.model.eval()), features(model), strict=True):
        torch.testing.assert_close(found, given, rtol=0, atol=1e-5)
    named = read_start(f"open_clip:local-dir:{tmp_path / 'folder'}")
    assert named.whole
    assert named.recipe.text.bpe_merges is None


def test_a_text_encoder_and_its_run_are_a_start(table: Path, tmp_path: Path) -> None:
    """An encoder's weights can be frozen beside an image tower's; its run starts another without the folder."""
    pytest.importorskip("transformers")
    folder = bert(tmp_path / "bert")
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    tree = tuned(
        table,
        f"timm:test_vit/{tmp_path / 'vit.safetensors'}",
        {"steps": 2},
        freeze_text_blocks=1,
        layer_decay=0.5,
        image_size=32,
    ).model_dump(mode="json") | {"text": {"hf_model": str(folder), "context_length": 24}}
    first = Trainer(Recipe.model_validate(tree), tmp_path / "first", quiet=True)
    before = state(first)
    first.train()
    moving = moved(before, last(tmp_path / "first"))
    assert moving >= {name for name in before if name.startswith(IMAGE)}
    assert not {name for name in moving if ".layer.0." in name}
    shutil.rmtree(folder)
    second = Trainer(tuned(table, tmp_path / "first", {"steps": 2}), tmp_path / "second", quiet=True)
    assert not moved(last(tmp_path / "first"), state(second))
    second.train()
    mixing.ends_of(tmp_path / "second", "cpu")


def test_the_start_is_measured_once(table: Path, tmp_path: Path, start: Path) -> None:
    keys = tuned(table, start, {"steps": 4}).model_dump(mode="json") | {
        "evaluation": {"retrieval": [str(table)], "final_retrieval": [str(table)]}
    }
    recipe = Recipe.model_validate(keys)
    trainer = Trainer(recipe, tmp_path, quiet=True)
    (tmp_path / "evaluations.jsonl").write_text(
        '{"step": 0, "task": "retrieval", "dataset": "of a run that was killed"}\n'
    )
    trainer.train()
    rows = read_rows(tmp_path / "evaluations.jsonl")
    assert [(row["step"], row["dataset"]) for row in rows] == [(0, str(table)), (4, str(table))]
    expected = declip.evaluate(declip.load(start), str(table), "retrieval").to_dict()
    assert rows[0]["image_to_text_r1"] == expected["image_to_text_r1"]


def test_mixtures_are_the_line_between_start_and_end(table: Path, tmp_path: Path, start: Path) -> None:
    train(tuned(table, start), out=tmp_path / "run", quiet=True, report=False)
    first, final = mixing.ends_of(tmp_path / "run", "cpu")
    assert not moved(first.state_dict(), last(start))
    half = mixing.interpolate(first, final, 0.25).state_dict()
    for name, tensor in half.items():
        expected = 0.75 * first.state_dict()[name].double() + 0.25 * final.state_dict()[name].double()
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)
    assert not moved(mixing.interpolate(first, final, 0).state_dict(), first.state_dict())
    assert not moved(mixing.interpolate(first, final, 1).state_dict(), final.state_dict())
    out = tmp_path / "mixed"
    mixing.write_mixture(tmp_path / "run", 0.25, out)
    assert not moved(declip.load(out, device="cpu").state_dict(), half)  # type: ignore[attr-defined]
    assert "WiSE-FT" in (out / "README.md").read_text()


def test_the_card_says_what_was_fine_tuned_and_from_what(
    table: Path, tmp_path: Path, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declip.export(start, "safetensors", tmp_path / "secret" / "base", license="mit")
    recipe = tuned(table, tmp_path / "secret" / "base", {"steps": 1})
    evaluation = {"retrieval": (str(table),)}
    recipe = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update=evaluation)})
    train(recipe, out=tmp_path / "run", quiet=True, report=False)

    def card(**keys: Any) -> tuple[dict[str, Any], str]:
        declip.export(tmp_path / "run", "safetensors", tmp_path / "out", overwrite=True, **keys)
        text = (tmp_path / "out" / "README.md").read_text()
        return yaml.safe_load(text.split("---")[1]), text

    head, text = card()
    assert (head["license"], "base_model" in head) == ("unknown", False)
    assert "Fine-tuned on 24 pairs of `shapes.jsonl`" in text
    assert "from the weights `base`" in text
    assert "secret" not in text
    assert str(table.parent) not in text
    assert card(license="apache-2.0")[0]["license"] == "apache-2.0"
    assert "weights `base`, from which it was fine-tuned, have a license of their own" in text
    monkeypatch.setattr("declip.interchange.model_card.repository", lambda _: "a/b")
    head = card()[0]
    assert (head["base_model"], head["base_model_relation"]) == ("a/b", "finetune")
    mixing.write_mixture(tmp_path / "run", 0.5, tmp_path / "mixed")
    assert yaml.safe_load((tmp_path / "mixed" / "README.md").read_text().split("---")[1])["base_model"] == "a/b"


def test_a_start_of_the_hub_is_named_by_its_repository() -> None:
    pytest.importorskip("open_clip")
    for where, hub in (
        ("huggingface:openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
        ("open_clip:hf-hub:laion/CLIP-ViT-B-32", "laion/CLIP-ViT-B-32"),
        ("open_clip:ViT-B-32/laion2b_s34b_b79k", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
        ("timm:vit_small_patch16_224.dino", "timm/vit_small_patch16_224.dino"),
        ("timm:test_vit/somewhere/vit.safetensors", None),
        ("open_clip:ViT-B-32/somewhere/vit.pt", None),
        ("open_clip:local-dir:/somewhere/model", None),
    ):
        assert repository(where) == hub
        assert "somewhere" not in without_folders(where)


def test_wrong_mixtures_are_refused(start: Path) -> None:
    with pytest.raises(UserError, match="from 0 to 1"):
        mixing.interpolate(build("vit"), build("vit"), 1.5)
    with pytest.raises(UserError, match="'image_tower"):
        mixing.interpolate(build("vit"), build("conv"), 0.5)
    with pytest.raises(UserError, match="no fine-tuned run"):
        mixing.ends_of(start)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"freeze_image_blocks": 4}, "hold 3 blocks"),
        ({"freeze_text_blocks": 9}, "Give 0 to 3, or all"),
        ({"lora": {"rank": 2}, "freeze_image_blocks": 1}, "0 or all"),
        ({"lora": {"rank": 2}, "layer_decay": 0.5}, "layer_decay"),
        ({"lora": {"rank": 2}, "train_keys": {"ema_decay": 0.9}}, "train.ema_decay=0.9"),
        ({"lora": {"rank": 2}, "train_keys": {"strategy": "fsdp"}}, "train.strategy=fsdp"),
        ({"pretrained": "nowhere"}, "no model at 'nowhere'"),
        ({"weights": "timm:no_such_tower"}, "no_such_tower"),
        ({"weights": "timm:test_vit/nowhere.pt"}, "no file"),
        ({"weights": "timm:test_vit.no_such_tag"}, "tag"),
    ],
)
def test_what_cannot_be_is_said_before_a_folder_is_made(
    table: Path, tmp_path: Path, start: Path, keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        train(tuned(table, **{"weights": start, **keys}), out=tmp_path / "run", quiet=True, report=False)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"finetune\.image_lr_scale .* finetune\.pretrained"):
        Recipe.model_validate({**TINY, "finetune": {"image_lr_scale": 0.1}})


def test_wrong_files_are_no_start(table: Path, tmp_path: Path) -> None:
    other, vit, program = (tmp_path / name for name in ("other.safetensors", "vit.safetensors", "p.pt"))
    save_file(timm.create_model("test_convnext").state_dict(), other)
    save_file(timm.create_model("test_vit").state_dict(), vit)
    program.write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    relpos = {"depth": 1, "embed_dim": 32, "num_heads": 2, "rel_pos_type": "bias"}
    model = build("vit", **{"image.model": "vit_relpos_small_patch16_224", "image.model_kwargs": relpos})
    write_declip_file(model, tmp_path / "relpos.safetensors")
    keys: dict[str, Any]
    for where, keys, message in (
        (f"timm:test_vit/{other}", {}, "test_vit"),
        (f"timm:test_vit/{program}", {}, "no file of tensors"),
        (f"timm:test_vit/{vit}", {"freeze_text_blocks": 1}, "hold 0 blocks of the text_tower"),
        (tmp_path / "relpos.safetensors", {"image_size": 64}, r"rel_pos.*Leave finetune\.image_size out"),
    ):
        with pytest.raises(UserError, match=message):
            train(tuned(table, where, **keys), out=tmp_path / "run", quiet=True, report=False)
        assert not (tmp_path / "run").exists()


def test_the_recipe_for_fine_tuning_warms_heads_up_for_a_quarter_at_most() -> None:
    assert load_recipe("finetune", {"train.steps": 100}).head_warmup == 25
    assert load_recipe("finetune").head_warmup == 200
