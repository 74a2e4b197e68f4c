"""Training that starts from weights: what it can start from, what is taken over, mixtures, and what is refused."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

import declip
from conftest import TINY, refuses, write_rows
from declip.api import train
from declip.finetuning.wise_ft import ends_of, interpolate
from declip.interchange.architecture import _resize
from declip.interchange.card import without_folders
from declip.interchange.declip_file import write_declip_file
from declip.interchange.read import is_published, read_start
from declip.interchange.timm_weights import class_start, encode_texts
from declip.models.layers import IMAGE, TEXT
from declip.recipe.load import load_recipe
from declip.recipe.resolve import Facts, resolve
from declip.recipe.schema import Recipe
from declip.runs.checkpoint import list_checkpoints, load_checkpoint, without_prefix
from declip.runs.folder import read_rows
from declip.training.assemble import assemble
from declip.training.pretrained import load_pretrained
from interchange.towers import build, unprojected
from training.starts import STATISTICS, VIT, last, moved, quiet_train, state, trainer_of, tuned


def test_a_run_gives_towers_heads_tokenizer_statistics_and_scale(table, tmp_path, start):
    trainer = trainer_of(tuned(table, start), tmp_path)
    checkpoint = load_checkpoint(list_checkpoints(start)[-1])
    given = without_prefix("model", checkpoint.weights)
    heads = without_prefix("objective", checkpoint.training)
    assert not moved(given, state(trainer))
    own = dict(trainer.state.objective.named_parameters())
    assert not moved(own, heads)
    recipe = trainer.state.recipe
    assert (recipe.text.layers, recipe.text.bpe_merges, recipe.text.activation) == (3, 400, "gelu")
    assert (recipe.image.mean, recipe.embed_dim) == (STATISTICS["mean"], 24)
    assert trainer.state.model.tokenizer.vocabulary == declip.load(start).tokenizer.vocabulary
    assert trainer.state.model.preprocessor.mean == pytest.approx(STATISTICS["mean"])
    assert trainer.state.model.logit_scale.item() == pytest.approx(recipe.logit_scale.init)
    assert len(trainer.state.objective.terms["nearest_neighbor"].queue) == 0


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"text.layers": 2, "embed_dim": 8}, r"embed_dim=8.*24.*text\.layers=2.*3"),
        ({"image.model": "declip_conv_tiny"}, r"leave them out: image\.model="),
        ({"logit_scale.init": 3.0}, r"logit_scale\.init=3\.0"),
    ],
)
def test_a_key_that_the_weights_overrule_is_refused(keys, said, start, table, tmp_path):
    for recipe in ("finetune", "few-clip"):
        asked = load_recipe(recipe, {"finetune.pretrained": str(start), **keys})
        refuses(said, resolve, asked, Facts(read_start(str(start))))
    given = {"finetune.pretrained": str(start), "data.source": str(table), **keys}
    refuses(said, train, "finetune", given, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_keys_that_hold_beside_weights(start, table, tmp_path):
    """Those of shipped recipes give way, equal ones are no matter, statistics are the user's where they are given."""
    found = read_start(str(start))
    keys = {
        "finetune.pretrained": str(start),
        "text.context_length": 20,
        "image.size": 32,
        "data.source": str(table),
    }
    for recipe in ("finetune", "few-clip", "declip-yfcc15m-vitb32"):
        resolved = resolve(load_recipe(recipe, keys), Facts(found))
        assert resolved.image.mean == STATISTICS["mean"]
    given = keys | {"image.mean": [0.1, 0.2, 0.3], "image.size": 48, "train.batch_size": 8}
    given |= {"image.interpolation": "bilinear", "image.crop_pct": 0.75}
    given |= {"image.model_kwargs": {"patch_drop_rate": 0.5}}
    recipe = assemble(load_recipe("few-clip", given), tmp_path / "run").recipe
    assert (recipe.image.mean, recipe.image.size) == ((0.1, 0.2, 0.3), 48)
    assert recipe.image.std == STATISTICS["std"]
    assert (recipe.image.interpolation, recipe.image.resize) == ("bilinear", 64)
    assert recipe.image.model_kwargs == {**VIT["model_kwargs"], "patch_drop_rate": 0.5}
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    again = resolve(load_recipe(tmp_path / "resolved.yaml"), Facts(found))
    assert again.model_dump() == recipe.model_dump()


def test_heads_are_taken_whole_or_not_at_all(table, tmp_path, start):
    """The start's language head has its vocabulary; a projector of another width is new, all of it."""
    keys = tuned(table, start).model_dump(mode="json") | {"simsiam": {"widths": [16, 16, 6]}}
    trainer = trainer_of(Recipe.model_validate(keys), tmp_path)
    heads = without_prefix("objective", load_checkpoint(list_checkpoints(start)[-1]).training)
    new = moved(dict(trainer.state.objective.named_parameters()), heads)
    assert {".".join(name.split(".")[:3]) for name in new} == {"terms.simsiam.predictor"}
    assert "new: simsiam.predictor" in trainer.state.pretrained.summary


def test_positions_are_resized_as_timm_does(table, tmp_path, start):
    trainer = trainer_of(tuned(table, start, image_size=48), tmp_path / "vit-run")
    name, given, own = "image_tower.trunk.pos_embed", last(start), state(trainer)
    torch.testing.assert_close(own.pop(name), resample_abs_pos_embed(given[name], [6, 6], [4, 4]))
    assert not moved(own, given)
    assert trainer.state.model.preprocessor.size == trainer.state.recipe.image.size == 48
    # With a pool of attention
    write_declip_file(model := build("resnet"), tmp_path / "resnet.safetensors")
    trainer = trainer_of(
        tuned(table, tmp_path / "resnet.safetensors", image_size=96), tmp_path / "run"
    )
    given, own = model.state_dict(), state(trainer)
    [name] = [name for name in given if given[name].shape != own[name].shape]
    expected = resample_abs_pos_embed(given.pop(name)[None], [3, 3], [2, 2], num_prefix_tokens=1)[0]
    torch.testing.assert_close(own[name], expected)
    assert not moved(given, own)


def test_positions_without_rows_for_tokens_are_resized_as_timm_does():
    small, large = (
        timm.create_model("test_vit", no_embed_class=True, reg_tokens=4, img_size=s)
        for s in (64, 96)
    )
    model = SimpleNamespace(image_tower=SimpleNamespace(trunk=large))
    found = _resize(f"{IMAGE}trunk.pos_embed", small.pos_embed, large.pos_embed, model)
    assert found.shape == large.pos_embed.shape
    torch.testing.assert_close(
        found, resample_abs_pos_embed(small.pos_embed, [6, 6], [4, 4], num_prefix_tokens=0)
    )


@pytest.mark.parametrize(("length", "form"), [(33, "open_clip"), (8, "huggingface")])
def test_a_length_of_captions_stretches_or_cuts_the_positions(table, tmp_path, length, form):
    given, name = build("vit"), "text_tower.positional_embedding"
    write_declip_file(given, tmp_path / "source")
    trainer = trainer_of(
        tuned(table, tmp_path / "source", {"steps": 1}, context_length=length), tmp_path / "run"
    )
    model, own, old = trainer.state.model.eval(), state(trainer), given.state_dict()[name].clone()
    expected = own[name].clone()
    for row in range(length):
        at = row * 15 / (length - 1) if length > 16 else row
        below = min(int(at), 14)
        expected[row] = (1 - at + below) * old[below] + (at - below) * old[below + 1]
    torch.testing.assert_close(own[name], expected, rtol=0, atol=1e-6)
    assert moved(given.state_dict(), own) == {name}
    tokens = model.tokenize(["a red circle", "blue", "red " * 50])
    assert tokens.shape[1] == length
    with torch.no_grad():
        given.text_tower.positional_embedding[: min(length, 16)] = expected[:16]
        short = tokens[:2, :8]
        found, expected = model.encode_text(tokens)[:2], given.encode_text(short)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert trainer.train().finished
    assert ends_of(tmp_path / "run", "cpu")[0].text_tower.context == length
    expected = declip.load(tmp_path / "run", device="cpu").encode_text(tokens)
    declip.export(tmp_path / "run", form, tmp_path / form)
    found = declip.load(tmp_path / form, device="cpu").encode_text(tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_timm_weights_start_the_image_tower_alone(table, tmp_path):
    torch.manual_seed(5)
    published = timm.create_model("test_vit", num_classes=0)
    save_file(weights := published.state_dict(), tmp_path / "vit.safetensors")
    where = f"timm:test_vit/{tmp_path / 'vit.safetensors'}"
    trainer = trainer_of(
        tuned(table, where, freeze_image_blocks="all", image_size=32), tmp_path / "r"
    )
    small = timm.create_model("test_vit", num_classes=0, img_size=32)
    pictures = torch.randn(2, 3, 32, 32)
    positions = resample_abs_pos_embed(weights["pos_embed"], [2, 2], num_prefix_tokens=1)
    small.load_state_dict({**weights, "pos_embed": positions})
    with torch.no_grad():
        hidden = small.eval().forward_head(small.forward_features(pictures), pre_logits=True)
        torch.testing.assert_close(
            trainer.state.model.image_tower.eval()(pictures).pre_logits, hidden
        )
    assert trainer.state.recipe.image.mean == pytest.approx(published.pretrained_cfg["mean"])
    assert trainer.state.recipe.text.width == TINY["text"]["width"]
    before = state(trainer)
    trainer.train()
    changed = moved(before, last(tmp_path / "r"))
    assert {name for name in changed if name.startswith(IMAGE)} == {"image_tower.proj.weight"}
    assert {name for name in changed if name.startswith(TEXT)} == {
        name for name in before if name.startswith(TEXT)
    }
    assert read_rows(tmp_path / "r" / "evaluations.jsonl") == []


def test_the_start_is_measured_once(table, tmp_path, start):
    sets = {"evaluation": {"retrieval": [str(table)], "final_retrieval": [str(table)]}}
    recipe = Recipe.model_validate(tuned(table, start, {"steps": 1}).model_dump(mode="json") | sets)
    trainer = trainer_of(recipe, tmp_path)
    write_rows(
        tmp_path / "evaluations.jsonl",
        [{"step": 0, "task": "retrieval", "dataset": "of a killed run"}],
    )
    trainer.train()
    rows = read_rows(tmp_path / "evaluations.jsonl")
    assert [(row["step"], row["dataset"]) for row in rows] == [(0, str(table)), (1, str(table))]
    expected = declip.evaluate(declip.load(start), str(table), "retrieval").to_dict()
    assert rows[0]["image_to_text_r1"] == expected["image_to_text_r1"]


def test_mixtures_are_the_line_between_start_and_end(table, tmp_path, conv_start):
    """Of running statistics too."""
    quiet_train(tuned(table, conv_start, {"steps": 1}), tmp_path / "run")
    first, final = ends_of(tmp_path / "run", "cpu")
    given, learned = first.state_dict(), final.state_dict()
    assert not moved(given, last(conv_start))
    floats = {name for name, tensor in given.items() if tensor.is_floating_point()}
    half = interpolate(first, final, 0.25).state_dict()
    for name in floats:
        expected = 0.75 * given[name].double() + 0.25 * learned[name].double()
        torch.testing.assert_close(half[name].double(), expected, rtol=0, atol=1e-6)
    for fraction, end in ((0, given), (1, learned)):
        assert not moved(interpolate(first, final, fraction).state_dict(), end) & floats


def test_the_card_says_what_was_fine_tuned_and_from_what(table, tmp_path, start):
    declip.export(start, "safetensors", tmp_path / "secret" / "base", license="mit")
    recipe = tuned(table, tmp_path / "secret" / "base", {"steps": 1})
    recipe = recipe.with_keys({"evaluation.retrieval": (str(table),)})
    quiet_train(recipe, tmp_path / "run")

    def card(**keys):
        declip.export(tmp_path / "run", "safetensors", tmp_path / "out", overwrite=True, **keys)
        text = (tmp_path / "out" / "README.md").read_text()
        return yaml.safe_load(text.split("---")[1]), text

    head, text = card()
    assert head["license"] == "unknown"
    assert "Fine-tuned on 24 pairs of `shapes.jsonl`" in text
    assert "from the weights `base`" in text
    assert not any(words in text for words in ("secret", str(table.parent)))
    assert card(license="apache-2.0")[0]["license"] == "apache-2.0"


def test_names_of_published_weights_and_names_without_folders():
    for where in (
        "open_clip:hf-hub:laion/CLIP-ViT-B-32",
        "hf-hub:owner/name@v1",
        "timm:test_vit/somewhere/vit.safetensors",
        "open_clip:local-dir:/somewhere/model",
    ):
        assert is_published(where) == where.endswith("@v1")
        assert "somewhere" not in without_folders(where)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"freeze_image_blocks": 4}, "hold 3 blocks"),
        ({"lora": {"rank": 2}, "freeze_image_blocks": 1}, "0 or all"),
        ({"lora": {"rank": 2}, "layer_decay": 0.5}, "layer_decay"),
        ({"lora": {"rank": 2}, "train_keys": {"strategy": "fsdp"}}, "train.strategy=fsdp"),
        ({"pretrained": "nowhere"}, "model 'nowhere'"),
        ({"weights": "timm:no_such_tower"}, "no_such_tower"),
        ({"weights": "timm:test_vit.no_such_tag"}, "tag"),
    ],
)
def test_what_cannot_be_is_said_before_a_folder_is_made(table, tmp_path, start, keys, said):
    with pytest.raises(ValueError, match=said):
        quiet_train(tuned(table, **{"weights": start, **keys}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"finetune\.lr_scale .* finetune\.pretrained"):
        Recipe.model_validate({**TINY, "finetune": {"lr_scale": 0.1}})


def test_wrong_files_are_no_start(table, tmp_path):
    other, vit = tmp_path / "other.safetensors", tmp_path / "vit.safetensors"
    save_file(timm.create_model("test_convnext").state_dict(), other)
    save_file(timm.create_model("test_vit").state_dict(), vit)
    relpos = {"depth": 1, "embed_dim": 32, "num_heads": 2, "rel_pos_type": "bias"}
    model = build(
        "vit", **{"image.model": "vit_relpos_small_patch16_224", "image.model_kwargs": relpos}
    )
    write_declip_file(model, tmp_path / "relpos.safetensors")
    for where, keys, message in (
        (f"timm:test_vit/{other}", {}, "test_vit"),
        (f"timm:test_vit/{vit}", {"freeze_text_blocks": 1}, "hold 0 blocks of the text_tower"),
        (tmp_path / "relpos.safetensors", {"image_size": 64}, r"rel_pos.*Leave image\.size out"),
    ):
        refuses(message, quiet_train, tuned(table, where, **keys), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_run_on_one_pair_is_resumed(conv_start, rows, tmp_path):
    one = write_rows(tmp_path / "one.jsonl", rows[:1])
    keys = {"train.steps": 2, "train.report_to": [], "data.workers": 0}
    for resume in (False, True):
        run = declip.finetune(
            one, conv_start, keys, tmp_path / "run", resume, progress=False, freeze="none"
        )
        assert (run.finished, run.recipe.data.source) == (True, (str(one), str(one)))


def test_other_names_of_classes_are_another_start(tmp_path, monkeypatch):
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path / "cache"))
    weights, names = replace(unprojected(), published="a file"), tmp_path / "names.txt"
    names.write_text("\n".join(f"thing {number}" for number in range(len(weights.classes.names))))
    frozen = dict.fromkeys(("freeze_image_blocks", "freeze_text_blocks"), "all")
    tune = {"pretrained": "timm:NAME/FILE", "class_names": str(names), **frozen}
    tree = {**TINY, "data": {"source": "pairs.csv"}, "finetune": tune}
    other = load_pretrained(Recipe.model_validate(tree).finetune, tmp_path, False, weights)
    first, second = (
        class_start(each, encode_texts(each, list(each.classes.names))) for each in (weights, other)
    )
    assert not torch.equal(first.text, second.text)
