"""Every export is read back by the library that it is for: tokens, pixels, features."""

import json
import logging
import os
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

import declip
from conftest import Lazy, refuses
from declip.interchange.declip_file import FILE, DeclipFile
from declip.interchange.export import FORMATS
from declip.models.wrapped import WrappedImageTower
from interchange.towers import CAPTIONS, EXACT, build, export_exactly, largest, pictures
from text_encoders import bert, distilbert, roberta, transformers
from training.starts import recipe_for, trainer_of

open_clip = Lazy("open_clip")


def run_card(folder, monkeypatch, capfd):
    """Run the Python of the model card; what it prints."""
    monkeypatch.chdir(folder)
    exec(re.findall(r"```python\n(.*?)```", card(folder), re.DOTALL)[0], {})
    return capfd.readouterr().out


def card(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def about(folder):
    """The card's metadata."""
    return yaml.safe_load(card(folder).split("---")[1])


def features(model):
    """Of the shared pictures and captions: pixels, their features, tokens, their features."""
    with torch.no_grad():
        pixels, tokens = model.preprocess(pictures()), model.tokenize(CAPTIONS)
        return pixels, model.encode_image(pixels), tokens, model.encode_text(tokens)


def transformed(transform):
    """The shared pictures by a transform of open_clip."""
    return torch.stack([transform(picture) for picture in pictures()])


def same_until_the_end(theirs, ours, end):
    """Whether token ids agree up to and with the end token; what pads them is no one's matter."""
    upto = (ours == end).int().argmax(dim=1) + 1
    return all(
        row[:n].tolist() == own[:n].tolist() for row, own, n in zip(theirs, ours, upto, strict=True)
    )


def assert_features(images, texts, expected):
    """Compare features of the shared pictures and captions with a model's."""
    _, own_images, _, own_texts = expected
    assert max(largest(images, own_images), largest(texts, own_texts)) <= EXACT


def assert_same_model(read, model, expected):
    """Compare a model that was written and read again; its mask's row is the mean of the vocabulary's others."""
    assert not read.training
    _, images, tokens, texts = features(read)
    assert_features(images, texts, expected)
    assert torch.equal(tokens, expected[2])
    assert torch.equal(read.logit_scale, model.logit_scale)
    assert read.recipe.text.activation == model.recipe.text.activation
    torch.testing.assert_close(read.preprocessor.mean, model.preprocessor.mean)
    embeddings = read.text_tower.token_embedding.weight
    torch.testing.assert_close(embeddings[-1], embeddings[:-1].mean(dim=0))


@pytest.mark.parametrize("kind", ["vit-bias", "vit-clip-words", "resnet", "timm-vit"])
def test_open_clip_reads_what_was_written_and_so_do_we(kind, tmp_path):
    model, out = build(kind), tmp_path / "out"
    export_exactly(model, "open_clip", out)
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{out}")
    pixels, _, tokens, _ = expected = features(model)
    their_pixels = transformed(transform)
    their_tokens = open_clip.get_tokenizer(f"local-dir:{out}")(CAPTIONS)
    assert largest(their_pixels, pixels) * model.preprocessor.std.max().item() <= 1 / 255
    # open_clip reads the words <end_of_text> in a caption as the token, ours and <|endoftext|> are spelled out
    assert same_until_the_end(their_tokens, tokens, model.tokenizer.end)
    images = theirs.eval().encode_image(their_pixels, normalize=True)
    assert_features(images, theirs.encode_text(their_tokens, normalize=True), expected)
    assert torch.equal(theirs.logit_scale, model.logit_scale)
    weights = load_file(out / "open_clip_model.safetensors")
    assert len(weights["token_embedding.weight"]) == model.tokenizer.vocabulary - 1
    assert_same_model(declip.load(out, device="cpu"), model, expected)
    assert about(out)["library_name"] == "open_clip"


@pytest.mark.parametrize("kind", ["vit-mixed", "vit-clip-words"])
def test_transformers_reads_what_was_written_and_so_do_we(kind, tmp_path):
    model, out = build(kind), tmp_path / "out"
    export_exactly(model, "huggingface", out)
    theirs = transformers.CLIPModel.from_pretrained(out).eval()
    processor = transformers.CLIPProcessor.from_pretrained(out, backend="pil")
    pixels, images, tokens, texts = expected = features(model)
    options = {"padding": True, "truncation": True, "return_tensors": "pt"}
    read = processor(text=CAPTIONS, images=pictures(), **options)
    assert same_until_the_end(read["input_ids"], tokens, model.tokenizer.end)
    given = {name: read[name] for name in ("input_ids", "attention_mask")}
    found = theirs(**given, pixel_values=pixels)
    alone = theirs(input_ids=tokens, pixel_values=pixels)
    for answer in (found, alone):
        assert_features(answer.image_embeds, answer.text_embeds, expected)
    logits = model.logit_scale.exp() * images @ texts.T
    torch.testing.assert_close(found.logits_per_image, logits, rtol=0, atol=1e-4)
    words = model.tokenizer.vocabulary - 1
    assert theirs.config.text_config.vocab_size == len(processor.tokenizer) == words
    assert_same_model(declip.load(out, device="cpu"), model, expected)
    assert about(out)["library_name"] == "transformers"
    assert about(out)["license"] == "unknown"
    assert all(part in card(out) for part in ("unknown: set it", "Not recorded"))


class Shifted(DeclipFile):
    """A format whose library computes slightly other features of images or texts."""

    def __init__(self, side, by):
        self.side, self.by = side, by

    def read_back(self, folder):
        read = super().read_back(folder)
        right = getattr(read, self.side)

        def encode(inputs):
            features = right(inputs)
            features[:, 0] += self.by
            return features

        return read._replace(**{self.side: encode})


@pytest.mark.parametrize("side", ["encode_image", "encode_text"])
def test_an_export_whose_features_differ_is_refused(side, tmp_path, monkeypatch):
    model = build("vit")
    monkeypatch.setitem(FORMATS, "safetensors", Shifted(side, 1e-6))
    assert 1e-7 < declip.export(model, "safetensors", tmp_path / "close").difference < 1e-5
    monkeypatch.setitem(FORMATS, "safetensors", Shifted(side, 1e-3))
    refuses("computes other features", declip.export, model, "safetensors", tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["close"]


@pytest.mark.parametrize("kind", ["vit", "conv"])
def test_one_file_holds_everything(kind, tmp_path):
    """A model in lower precision is written in float32."""
    model = build(kind).bfloat16()
    declip.export(model, "safetensors", tmp_path / kind)
    alone = (tmp_path / kind / FILE).rename(tmp_path / f"{kind}.safetensors")
    read = declip.load(alone, device="cpu")
    assert {weight.dtype for weight in read.parameters()} == {torch.float32}
    assert (read.recipe.model_dump(), read.training) == (model.recipe.model_dump(), False)
    for own, other in zip(features(model.float()), features(read), strict=True):
        assert torch.equal(own, other)


def test_a_run_is_exported_with_its_data_steps_and_results(
    table, tmp_path, monkeypatch, capfd, command
):
    sections = {"name": "shapes", "evaluation": {"retrieval": [str(table)]}}
    trainer = trainer_of(recipe_for(table, sections=sections, steps=4), tmp_path / "run")
    trainer.train()
    out = tmp_path / "out"
    words = ["--format", "safetensors", "--out", out, "--license", "cc-by-4.0"]
    assert "Read back by declip" in command("export", tmp_path / "run", *words).out
    trained, tokens = trainer.state.model.eval(), trainer.state.model.tokenize("a red circle")
    read = declip.load(out, device="cpu")
    assert torch.equal(read.encode_text(tokens), trained.encode_text(tokens))
    text = card(out)
    assert about(out)["license"] == "cc-by-4.0"
    assert about(out)["pipeline_tag"] == "zero-shot-image-classification"
    assert f"`{table.name}`, 24 distinct pairs; 32 pairs seen in 4 steps of 8" in text
    assert re.search(
        r"\| .*shapes.* \| retrieval \| text → image R@1 \| [\d.]+ % \| [\d.]+ % \|", text
    )
    assert str(table.parent) not in text
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["train"]["steps"] == 4
    assert "tensor" in run_card(out, monkeypatch, capfd)


@pytest.mark.parametrize(
    ("kind", "form", "reason"),
    [
        ("conv", "huggingface", "vision transformer only.*safetensors"),
        ("conv", "open_clip", "timm does not know.*image.model=vit.*safetensors"),
        ("vit-mixed", "open_clip", "text.activation=quick_gelu.*safetensors"),
        ("resnet", "huggingface", "ByobNet.*image.model=vit.*safetensors"),
        ("timm-vit-32", "open_clip", "'test_vit' at 32 px.*pos_embed"),
        ("vit-bias", "huggingface", "text.projection_bias=false.*safetensors"),
    ],
)
def test_what_a_format_cannot_say_is_refused_with_the_reason(kind, form, reason, tmp_path):
    refuses(reason, declip.export, build(kind), form, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_tower_that_another_package_registered_with_timm_is_not_open_clips(tmp_path, monkeypatch):
    def own(pretrained=False, **options):
        return timm.create_model("test_convnext", **options)

    monkeypatch.setitem(timm.models._registry._model_entrypoints, "own", own)
    model = build("timm-convnext", **{"image.model": "own"})
    refuses(
        "timm does not know it.*safetensors", declip.export, model, "open_clip", tmp_path / "out"
    )
    declip.export(model, "safetensors", tmp_path / "out")


def test_every_format_is_in_the_help_and_in_the_documentation(command):
    page = (Path(__file__).parents[2] / "docs" / "interchange.md").read_text(encoding="utf-8")
    usage = " ".join(command("export", "--help").out.split())
    listed = re.search(r"open_clip, .*? or\W+\w+", usage)[0]
    for name in FORMATS:
        assert f"- `{name}`: " in page
        assert f'"{name}"' in declip.export.__doc__
        assert name in listed


def test_a_bias_of_the_logits_is_kept_or_refused(tmp_path):
    model = build("vit", logit_bias=-10.0)
    declip.export(model, "open_clip", tmp_path / "out")
    read = declip.load(tmp_path / "out", device="cpu")
    assert torch.equal(read.logit_bias, model.logit_bias)
    assert_same_model(read, model, features(model))
    refuses("logit bias.*safetensors", declip.export, model, "huggingface", tmp_path / "other")


def test_without_the_library_the_export_says_that_it_was_not_read_back(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    exported = declip.export(build("vit"), "huggingface", tmp_path / "out")
    assert exported.difference is None
    assert "transformers is not installed" in str(exported)
    assert str(exported) in card(tmp_path / "out")
    assert caplog.text == "", "`declip finetune` exports to libraries that nobody asked for"


def test_wrong_words_and_folders_in_use(tmp_path):
    model = build("vit")
    out, write = tmp_path / "out", partial(declip.export, model, "safetensors")
    said = r"export format 'openclip'. Did you mean 'open_clip'\?.*huggingface, onnx"
    refuses(said, declip.export, model, "openclip", out)
    refuses("This Identity cannot be exported", declip.export, torch.nn.Identity(), "onnx", out)
    out.mkdir()
    write(out)
    (out / "more.txt").write_text("mine")
    refuses(r"has other files.*--overwrite", write, out)
    refuses("'more.txt'", write, out, overwrite=True)
    assert (out / "more.txt").read_text() == "mine"
    (out / "more.txt").unlink()
    write(out, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", FILE]
    for name, inner in (("photos", "a.jpg"), ("run", "README.md"), ("run/checkpoints", "step")):
        (tmp_path / name).mkdir()
        (tmp_path / name / inner).write_text("mine")
    for name in ("photos", "run"):
        refuses("--overwrite does not replace it", write, tmp_path / name, overwrite=True)
    (tmp_path / "file").write_text("mine")
    refuses("is not a folder", write, tmp_path / "file", overwrite=True)


@pytest.mark.skipif(os.name != "posix", reason="/dev/full")
def test_a_full_disk_and_a_place_that_cannot_be_written_are_one_line(tmp_path, monkeypatch):
    class Full(DeclipFile):
        def write(self, record, folder, repo):
            (folder / "weights").symlink_to("/dev/full")
            (folder / "weights").write_text("x" * 100_000)

    write = partial(declip.export, build("vit"), "safetensors")
    said = r"Cannot write '/proc/none/out': .*give another folder as --out"
    assert "DECLIP_CACHE" not in refuses(said, write, Path("/proc/none/out"))
    monkeypatch.setitem(FORMATS, "safetensors", Full())
    refuses(r"No room left on the disk to write '.*out'", write, tmp_path / "out")
    assert not list(tmp_path.iterdir())


PLAIN = [
    "a red circle",
    "Two GREEN squares, on white!",
    "日本語 and 😀 [SEP]",
    "!",
    " ".join(["nought"] * 40),
]
"""Captions that open_clip's cleaning leaves as they are."""


@pytest.mark.parametrize("repo", ["owner/name", None])
def test_a_repository_named_by_its_owner_loads_from_the_hub_too(repo, tmp_path, caplog):
    """Of a folder open_clip takes the tokenizer that lies there; of a repository the one that the name says."""
    model, out = build("vit"), tmp_path / "out"
    with caplog.at_level(logging.INFO, logger="declip"):
        declip.export(model, "open_clip", out, repo=repo)
    assert text_config(out)["hf_tokenizer_name"] == (repo or "tokenizer.json")
    assert ("--repo OWNER/NAME" in card(out)) == (repo is None)
    assert caplog.text == ""
    found = open_clip.get_tokenizer(f"local-dir:{out}")(CAPTIONS)
    assert same_until_the_end(found, model.tokenize(CAPTIONS), model.tokenizer.end)


def text_config(folder):
    """open_clip's configuration of a text tower."""
    return json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]


def with_encoder(encoder, folder, kind="vit", **keys):
    """A model with a text encoder of transformers."""
    made = str(encoder(folder / "encoder"))
    return build(kind, **{"text.hf_model": made, "text.context_length": 16, **keys})


@pytest.mark.parametrize(
    ("encoder", "kind", "pooling"), [(bert, "timm-vit", "cls"), (roberta, "vit", "mean")]
)
def test_open_clip_reads_a_text_encoder_of_transformers(
    encoder, kind, pooling, tmp_path, monkeypatch
):
    """As its CustomTextCLIP, from the folder alone: the encoder's own folder is gone."""
    model = with_encoder(encoder, tmp_path, kind, **{"text.pooling": pooling})
    out = tmp_path / "out"
    shutil.rmtree(tmp_path / "encoder")
    export_exactly(model, "open_clip", out)
    monkeypatch.chdir(out)
    theirs, _, transform = open_clip.create_model_and_transforms("local-dir:.")
    assert type(theirs).__name__ == "CustomTextCLIP"
    theirs_tokens = open_clip.get_tokenizer(f"local-dir:{out}")(PLAIN)
    tokens = model.tokenize(PLAIN)
    assert torch.equal(theirs_tokens[:, : tokens.shape[1]], tokens)
    texts = model.encode_text(tokens)
    found = theirs.eval().encode_image(transformed(transform), normalize=True)
    assert largest(found, model.encode_image(model.preprocess(pictures()))) <= EXACT
    assert largest(theirs.encode_text(theirs_tokens, normalize=True), texts) <= EXACT
    read = declip.load(out, device="cpu")
    # [SEP] open_clip's own tokenizers spell out
    kept = [row for row, caption in enumerate(PLAIN) if "[SEP]" not in caption]
    again = read.encode_text(read.tokenize([PLAIN[row] for row in kept]))
    assert largest(again, texts[kept]) <= EXACT


@pytest.mark.parametrize(
    ("encoder", "keys", "reason"),
    [
        (bert, {"text.pooling": "eos"}, "eos pooling"),
        (bert, {"text.projection_bias": True}, "a bias after its projection"),
        (distilbert, {}, "is a distilbert"),
    ],
)
def test_a_text_encoder_that_open_clip_has_no_words_for_is_refused(encoder, keys, reason, tmp_path):
    model = with_encoder(encoder, tmp_path, **keys)
    tower = "text tower is a HuggingfaceTextTower.*text.hf_model"
    for form, words in (("open_clip", reason), ("huggingface", tower)):
        said = f"as {form}: .*{words}.*safetensors"
        refuses(said, declip.export, model, form, tmp_path / "out")


def rename_encoder(model, name):
    """Give the text encoder of a model another name in its recipe."""
    text = model.recipe.text.model_copy(update={"hf_model": name})
    model.recipe = model.recipe.model_copy(update={"text": text})


def test_a_text_encoder_of_the_hub_keeps_its_name(tmp_path):
    """The name leads to the configuration; where the encoder has none, the repository's own does."""
    model = with_encoder(bert, tmp_path)

    def written(repo):
        declip.export(model, "open_clip", tmp_path / "out", repo=repo, overwrite=True)
        return text_config(tmp_path / "out")["hf_model_name"]

    assert written(None) == "."
    assert written("owner/name") == "owner/name"
    rename_encoder(model, "huggingface:google-bert/bert-base-uncased")
    assert written("owner/name") == "google-bert/bert-base-uncased"


def test_an_export_of_the_built_in_text_encoder_loads_from_any_folder(tmp_path, monkeypatch):
    """By the encoder's name on the Hub, or without a network by the path that the card says to set."""
    model = with_encoder(bert, tmp_path)
    rename_encoder(model, "builtin:lite2-minilm")
    out = tmp_path / "out"
    exported = declip.export(model, "open_clip", out)
    assert text_config(out)["hf_model_name"] == "sentence-transformers/all-MiniLM-L6-v2"
    for said in (str(exported), card(out)):
        assert "sentence-transformers/all-MiniLM-L6-v2" in said
        assert '"hf_model_name" in open_clip_config.json to the absolute path' in said
    # --- what the card says, from another working folder
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = json.loads((out / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_model_name"] = str(out)
    (out / "open_clip_config.json").write_text(json.dumps(config))
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{out}")
    tokens = open_clip.get_tokenizer(f"local-dir:{out}")(PLAIN)
    found = theirs.eval().encode_image(transformed(transform), normalize=True)
    assert largest(found, model.encode_image(model.preprocess(pictures()))) <= EXACT
    texts = theirs.encode_text(tokens, normalize=True)
    assert largest(texts, model.encode_text(model.tokenize(PLAIN))) <= EXACT


def test_a_clip_with_other_ids_of_words_keeps_open_clips_modules(tmp_path):
    declip.export(build("vit"), "open_clip", tmp_path / "theirs")
    file = tmp_path / "theirs" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a</w>"], vocabulary["b</w>"] = vocabulary["b</w>"], vocabulary["a</w>"]
    file.write_text(json.dumps(content))
    model = declip.load(tmp_path / "theirs")
    theirs = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'theirs'}")
    assert isinstance(model.image_tower, WrappedImageTower)
    assert torch.equal(model.tokenize(PLAIN[:2]), theirs(PLAIN[:2]))


def test_a_folder_of_open_clip_with_another_preprocessing_or_activation(tmp_path):
    declip.export(build("vit-clip-words"), "open_clip", tmp_path / "theirs")
    config = tmp_path / "theirs" / "open_clip_config.json"
    plain = json.loads(config.read_text())

    def load(part, **change):
        config.write_text(json.dumps({**plain, part: {**plain[part], **change}}))
        return declip.load(tmp_path / "theirs")

    refuses("resized longest", load, "preprocess_cfg", resize_mode="longest")
    refuses("AssertionError", load, "preprocess_cfg", mode="L")
    assert load("model_cfg", quick_gelu=False).recipe.text.activation == "gelu"
