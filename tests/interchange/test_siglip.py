"""SigLIP with transformers' own towers: read, fitted, trained, saved and exported; wrong folders."""

import json
import re
import shutil
import string
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors

import declip
from conftest import refuses
from declip.interchange import declip_file
from declip.interchange.read import read
from declip.interchange.weights import Uninitialized
from declip.models.hf_encoder import ENTRY
from declip.models.layers import IMAGE, TEXT, blocks, depths
from declip.models.siglip import SiglipImageTower, SiglipTextTower
from declip.runs.folder import read_rows
from declip.training.assemble import assemble
from interchange.families import unigram
from interchange.test_cards import features as features_of_card
from interchange.test_families import tuned, with_heads
from interchange.test_from_huggingface import edit, sets
from interchange.towers import EXACT, export_exactly, largest, pictures, spread
from text_encoders import transformers
from training.starts import resumes_exactly

CAPTIONS = [
    "a red circle",
    "Square painted in BLUE on white_paper!",
    "it's two  cats, &amp; asleep",
    "日本語 and 😀 ",
    "a blue sofa " * 12,
    "",
]
LENGTH = 16
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
SIDE = 32


def gemma(folder):
    """A tokenizer like that of SigLIP 2: bytes, letters and two merges, with an end behind a text."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{n:02X}>" for n in range(256))]
    names += [*string.ascii_letters, "▁", "re", "red"]
    tokenizer = transformers.GemmaTokenizer(
        vocab={name: number for number, name in enumerate(names)},
        merges=[("r", "e"), ("re", "d")],
        padding_side="right",
        add_eos_token=True,
    )
    tokenizer.save_pretrained(folder)
    return len(names)


def first(folder):
    """A tokenizer like that of SigLIP 1, in the form that transformers does not read."""
    unigram(folder)
    settings = {"tokenizer_class": "SiglipTokenizer", "pad_token": {"content": "<eos>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return 60


def their_folder(folder, tokenizer=gemma, **vision):
    """As transformers itself makes it, with random weights; the widths of MLPs differ."""
    folder.mkdir(parents=True)
    words = tokenizer(folder)
    text = {"vocab_size": words, "max_position_embeddings": LENGTH, "intermediate_size": 48}
    vision = {"image_size": SIDE, "patch_size": 8, "intermediate_size": 80, **vision}
    config = transformers.SiglipConfig(
        text_config={**SIZES, **text, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1},
        vision_config={**SIZES, **vision, "num_attention_heads": 4},
    )
    torch.manual_seed(3)
    model = spread(transformers.SiglipModel(config))
    with torch.no_grad():
        model.logit_scale.fill_(4.0)
        model.logit_bias.fill_(-9.0)
    model.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    transformers.SiglipImageProcessor(size=size, resample=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return their_folder(tmp_path_factory.mktemp("siglip") / "theirs")


def embeddings(model, pixels=None):
    """Features of pictures and captions, (n, d)."""
    pixels = model.preprocess(pictures()) if pixels is None else pixels
    with torch.no_grad():
        return torch.cat([model.encode_image(pixels), model.encode_text(model.tokenize(CAPTIONS))])


def features(theirs, pixels, tokens):
    """transformers' own features of images and captions, of length 1."""
    with torch.no_grad():
        images = theirs.get_image_features(pixel_values=pixels).pooler_output
        texts = theirs.get_text_features(input_ids=tokens).pooler_output
    return torch.nn.functional.normalize(torch.cat([images, texts]), dim=-1)


def padded(library, captions):
    """Token ids of the `tokenizers` library, padded by the end, 1."""
    library.enable_truncation(LENGTH)
    library.enable_padding(length=LENGTH, pad_id=1)
    return torch.tensor([each.ids for each in library.encode_batch(captions)])


def test_pixels_tokens_and_features_are_those_of_transformers(folder):
    theirs = transformers.SiglipModel.from_pretrained(folder).eval()
    processor = transformers.SiglipImageProcessorPil.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(
        CAPTIONS, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    ).input_ids
    rgb = [picture.convert("RGB") for picture in pictures()]
    pixels = processor(rgb, return_tensors="pt").pixel_values
    model = declip.load(folder, device="cpu")
    assert isinstance(model.image_tower, SiglipImageTower)
    assert isinstance(model.text_tower, SiglipTextTower)
    assert torch.equal(model.tokenize(CAPTIONS), tokens)
    assert largest(model.preprocess(pictures()), pixels) < 1e-6
    assert largest(embeddings(model), features(theirs, pixels, tokens)) <= EXACT
    assert (model.logit_scale.item(), model.logit_bias.item()) == (4.0, -9.0)
    assert model.recipe.logit_bias == -9.0
    one = model.tokenize(CAPTIONS[:1])
    short = one[:, :12]
    assert (one[:, 12:] == model.tokenizer.padding).all()
    torch.testing.assert_close(model.encode_text(short), model.encode_text(one))


def test_captions_of_siglip_1_are_cleaned_as_transformers_does(tmp_path):
    folder = their_folder(tmp_path / "first", first)
    model = declip.load(folder, device="cpu")
    cleaned = []
    for caption in CAPTIONS:
        bare = caption.lower().translate(str.maketrans("", "", string.punctuation))
        cleaned.append(re.sub(r"\s+", " ", bare).strip())
    expected = padded(Tokenizer.from_file(str(folder / "tokenizer.json")), cleaned)
    assert torch.equal(model.tokenize(CAPTIONS), expected)
    theirs = transformers.SiglipModel.from_pretrained(folder).eval()
    pixels = model.preprocess(pictures())
    assert largest(embeddings(model), features(theirs, pixels, expected)) <= EXACT


def test_captions_are_lower_case_if_the_tokenizer_says_so(folder, tmp_path):
    lower = Path(shutil.copytree(folder, tmp_path / "lower"))
    edit(lower / WORDS, sets(do_lower_case=True))
    model, usual = declip.load(lower, device="cpu"), declip.load(folder, device="cpu")
    tokens = model.tokenize(CAPTIONS)
    assert torch.equal(tokens, usual.tokenize([caption.lower() for caption in CAPTIONS]))
    assert not torch.equal(tokens, usual.tokenize(CAPTIONS))
    # In the export it is a part of tokenizer.json, which transformers reads
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        export_exactly(model, "huggingface", tmp_path / "out")
    )
    ids = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ids, tokens)


def test_every_parameter_has_a_gradient_and_a_layer(folder):
    model = read(str(folder)).check().build()
    images = model.encode_image(torch.randn(6, 3, SIDE, SIDE)) * torch.arange(6)[:, None]
    (images + model.encode_text(CAPTIONS)).sum().backward()
    without = [name for name, tensor in model.named_parameters() if tensor.grad is None]
    assert without == ["logit_scale", "logit_bias"]
    layers = depths(model)
    assert layers.keys() == {n for n, _ in model.named_parameters() if not n.startswith("logit_")}
    assert (blocks(layers, IMAGE), blocks(layers, TEXT)) == (2, 2)
    stem = {name for name, depth in layers.items() if depth == 0}
    assert {name.split("embeddings.")[1] for name in stem} == {
        *("patch_embedding.weight", "patch_embedding.bias"),
        *("token_embedding.weight", "position_embedding.weight"),
    }
    ends = {name for name, depth in layers.items() if depth == 3}
    assert {"text_tower.text_projection.weight", "image_tower.trunk.head.probe"} < ends


def test_a_run_trains_every_parameter_resumes_and_goes_back(folder, table, tmp_path):
    start = read(str(folder)).tensors
    after = resumes_exactly(tuned(table, str(folder)), tmp_path, step=1)
    assert [*read_rows(tmp_path / "whole" / "metrics.jsonl")[0]["losses"]] == ["sigmoid"]
    learned = [name for name, tensor in start.items() if tensor.is_floating_point()]
    assert [n for n in learned if torch.equal(after.weights[f"model.{n}"], start[n])] == []
    # The run without the folder that it started from
    model = declip.load(tmp_path / "whole", device="cpu")
    out = export_exactly(model, "huggingface", tmp_path / "out")
    theirs = transformers.SiglipModel.from_pretrained(out).eval()
    processor = transformers.AutoProcessor.from_pretrained(out)
    tokens = processor.tokenizer(
        CAPTIONS, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    assert torch.equal(tokens, model.tokenize(CAPTIONS))
    assert (
        largest(features(theirs, model.preprocess(pictures()), tokens), embeddings(model)) <= EXACT
    )
    assert torch.equal(theirs.logit_scale, model.logit_scale[None])
    assert torch.equal(theirs.logit_bias, model.logit_bias[None])
    again = declip.load(out, device="cpu")
    assert torch.equal(again.tokenize(CAPTIONS), tokens)
    assert largest(embeddings(again), embeddings(model)) <= EXACT


def test_the_code_of_a_card_computes_the_same_features(folder, tmp_path):
    model = declip.load(folder, device="cpu")
    out = export_exactly(model, "huggingface", tmp_path / "out")
    path = tmp_path / "picture.png"
    pictures()[0].save(path)
    short = ["a red circle", "a dog"]  # than the context
    images, texts = features_of_card(out, path, short, out)
    assert largest(images, model.encode_image(str(path))) <= EXACT
    assert largest(texts, model.encode_text(short)) <= EXACT


def test_sizes_of_images_and_captions_can_change(folder, table, tmp_path):
    keys = {"image.size": 48, "text.context_length": 12}
    model = assemble(tuned(table, str(folder), **keys), tmp_path / "run").model.eval()
    assert model.preprocess(pictures()).shape[2:] == (48, 48)
    assert model.tokenize(CAPTIONS).shape[1] == 12
    start, own = read(str(folder)).tensors, model.state_dict()
    changed = [n for n, t in start.items() if n != ENTRY and not torch.equal(own[n], t)]
    name = "trunk.embeddings.position_embedding.weight"
    assert changed == [f"image_tower.{name}", f"text_tower.{name}"]
    # All cells of the grid are averaged, and none of them is a class token
    grid, finer = start[changed[0]].view(4, 4, -1), own[changed[0]].view(6, 6, -1)
    torch.testing.assert_close(finer.flip(0, 1), _finer(grid.flip(0, 1)))
    torch.testing.assert_close(finer.mean(dim=(0, 1)), grid.mean(dim=(0, 1)), atol=0.02, rtol=0)
    assert torch.equal(own[changed[1]], start[changed[1]][:12])
    out = export_exactly(model, "huggingface", tmp_path / "out")
    assert largest(embeddings(declip.load(out, device="cpu")), embeddings(model)) <= EXACT


def _finer(grid):
    channels = grid.permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(
        channels, (6, 6), mode="bicubic", antialias=True, align_corners=False
    )
    return resized[0].permute(1, 2, 0)


def test_frozen_towers_are_fitted_and_the_file_needs_no_folder(folder, table, tmp_path):
    gone = shutil.copytree(folder, tmp_path / "gone")
    run = declip.finetune(table, gone, None, tmp_path / "run", freeze="both", progress=False)
    fitted = embeddings(declip.load(run, device="cpu"))
    shutil.rmtree(gone)
    exported = run.folder / "exported" / "safetensors"
    assert largest(embeddings(declip.load(exported, device="cpu")), fitted) <= EXACT


def test_heads_of_a_fit_are_held_by_formats_that_have_a_projection_of_images(folder, tmp_path):
    fitted = with_heads(read(str(folder)), 1)
    pixels = fitted.base.model.preprocess(pictures())
    expected = embeddings(fitted, pixels)
    assert largest(expected, embeddings(fitted.base.model, pixels)) > 0.1
    model = fitted.merged()
    out = export_exactly(model, "safetensors", tmp_path / "out")
    assert largest(embeddings(declip.load(out, device="cpu"), pixels), expected) <= EXACT
    refuses(
        "huggingface: .*projection of images", declip.export, model, "huggingface", tmp_path / "no"
    )


def test_open_clip_has_other_activations(folder, tmp_path):
    model = declip.load(folder, device="cpu")
    refuses(
        "open_clip: .*activation.*onnx and huggingface",
        declip.export,
        model,
        "open_clip",
        tmp_path / "no",
    )


def test_onnx_gives_the_same_features(folder, one_registry, tmp_path):
    model = declip.load(folder, device="cpu")
    del model.image_tower.trunk.encoder.layers[1:], model.text_tower.trunk.encoder.layers[1:]
    out = export_exactly(model, "onnx", tmp_path / "out")
    library = Tokenizer.from_file(str(out / "textual/tokenizer.json"))
    tokens = model.tokenize(CAPTIONS)
    for caption, row in zip(CAPTIONS, tokens.tolist(), strict=True):
        ids = library.encode(caption).ids
        assert ids == row[: len(ids)]


def test_no_random_numbers_are_drawn_for_weights_that_will_be_loaded(folder):
    """But for those of transformers' constructors; torch draws some again until they are in bounds."""
    stored = read(str(folder)).encoder
    with Uninitialized(), torch.random.fork_rng(devices=[]):
        assert torch.equal(torch.full((9,), 1e30).normal_(), torch.zeros(9))
        torch.manual_seed(0)
        stored.build(SIDE)
        state = torch.get_rng_state()
        torch.manual_seed(0)
        for shape in ((1, 1, 32), (1,), (1,)):  # probe, scale, bias
            torch.randn(shape)
        assert torch.equal(torch.get_rng_state(), state)


HEAD = "text_model.head.weight"
CONFIG, PICTURES, WORDS = "config.json", "preprocessor_config.json", "tokenizer_config.json"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (CONFIG, sets(model_type="siglip2"), "'siglip2'.*NaFlex.*supported: clip, and siglip"),
        (CONFIG, sets(model_type="blip"), "'blip'.*supported: clip, and siglip.*hf-hub:timm"),
        (CONFIG, sets("vision_config", num_hidden_layers=10**9), "1,000,000,002 layers"),
        (CONFIG, sets("vision_config", num_hidden_layers=3), "layers.2.*missing"),
        (CONFIG, sets("vision_config", image_size=10**9), "size is .*1000000000"),
        (CONFIG, sets("vision_config", image_size=[32, 32]), r"image_size is \[32, 32\]"),
        (CONFIG, sets("vision_config", patch_size=16), "patch_embedding.* has shape"),
        (CONFIG, sets("vision_config", patch_size=0), "zero"),
        (CONFIG, sets("text_config", num_attention_heads=3), "divisible"),
        (CONFIG, sets("text_config", hidden_act="exec"), "exec"),
        (CONFIG, sets("text_config", vocab_size=10**12), "token_embedding.* has shape"),
        (CONFIG, sets("text_config", vocab_size=20), "316 ids.*vocab_size is 20"),
        (CONFIG, sets("text_config", max_position_embeddings=10**9), "position_embedding.* has shape|context_length"),
        (CONFIG, sets("text_config", projection_size=24), "projection_size is 24.*32"),
        (CONFIG, sets(text_config=[1]), "projection_size is 768"),
        (PICTURES, sets(size={"height": 32, "width": 48}), "size is .*48"),
        (PICTURES, sets(size={"shortest_edge": 32}), "size is .*shortest_edge"),
        (PICTURES, sets(do_center_crop=True), "do_center_crop is True"),
        (PICTURES, sets(resample=1), r"resample is 1; supported: 2 or 3"),
        (PICTURES, sets(image_processor_type="CLIPImageProcessor"), "CLIPImage.*Siglip"),
        (PICTURES, dict.clear, "preprocessor_config.json"),
        (WORDS, sets(padding_side="left"), 'left.*"padding_side": "right"'),
        (WORDS, sets(pad_token=None), "pad_token"),
        (WORDS, sets(tokenizer_class="SiglipTokenizer", pad_token="<none>"), "<none>"),
        ("tokenizer.json", sets(model={"vocab": {"a": 0}}), "tokenizer"),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_read_is_told_by_what_differs(file, change, message, folder, tmp_path):
    wrong = Path(shutil.copytree(folder, tmp_path / "wrong"))
    edit(wrong / file, change)
    refuses(rf"cannot be read as transformers' (SiglipM|m)odel: .*{message}", declip.load, wrong)


def test_an_end_token_of_siglip_1_must_be_put_behind_a_text(tmp_path):
    folder = their_folder(tmp_path / "first", first)
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.post_processor = processors.Sequence([])
    library.save(str(folder / "tokenizer.json"))
    refuses("one end token", declip.load, folder)


def test_files_that_are_missing_or_damaged(folder, tmp_path):
    wrong = Path(shutil.copytree(folder, tmp_path / "wrong"))
    weights = wrong / "model.safetensors"
    tensors = load_file(folder / weights.name)
    for name, tensor, message in (
        (HEAD, torch.ones(32, 32, dtype=torch.int8), f"'{HEAD}' holds torch.int8"),
        (HEAD, torch.ones(16, 32), f"'{HEAD}' has shape"),
        (HEAD, torch.full((32, 32), torch.nan), f"'{HEAD}' .*finite"),
        ("logit_bias", torch.zeros(3), "'logit_bias' has shape"),
    ):
        save_file({**tensors, name: tensor}, weights)
        refuses(message, declip.load, wrong)
    save_file({name: t for name, t in tensors.items() if name != "logit_bias"}, weights)
    refuses("'logit_bias' is missing", declip.load, wrong)
    weights.unlink()
    refuses("there is no model.safetensors", declip.load, wrong)
    shutil.copy(folder / weights.name, weights)
    (wrong / "tokenizer.json").rename(wrong / "spiece.model")
    refuses("spiece.model.*tokenizer.json.*hf-hub:timm/ViT-B-16-SigLIP", declip.load, wrong)


def test_a_strangers_file_names_only_sizes(folder, tmp_path):
    path = tmp_path / "stranger.safetensors"
    model = declip.load(folder, device="cpu")
    config = model.text_tower.wrapped.config
    config["text_config"]["_attn_implementation"] = "stranger/code"
    config["auto_map"] = {"AutoModel": "stranger--code.Model"}
    tower = model.text_tower
    tower.stored = tower.wrapped.to_tensor()
    declip_file.write_declip_file(model, path)
    assert largest(embeddings(declip.load(path, device="cpu")), embeddings(model)) <= EXACT
    config["vision_config"]["num_hidden_layers"] = 10**9
    tower.stored = tower.wrapped.to_tensor()
    declip_file.write_declip_file(model, path)
    refuses("1,000,000,002 layers", declip.load, path)
