"""Reading folders of transformers' `CLIPModel`: its own, exported ones, and wrong ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import declip
from conftest import refuses
from declip.data.text.tokenizer import Tokenizer, clean
from declip.interchange.tokenizer_files import backend
from interchange.test_export import features, same_until_the_end
from interchange.towers import CAPTIONS, EXACT, build, largest, pictures, spread
from text_encoders import transformers


def their_folder(out):
    """As transformers itself makes it: CLIP's first words, its own tokenizer class, weights at random."""
    words = json.loads(backend(Tokenizer(16, 1000)).to_str())["model"]
    tokenizer = transformers.CLIPTokenizer(
        words["vocab"], [tuple(merge) for merge in words["merges"]]
    )
    tokenizer.model_max_length = 16
    statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 2}
    pixels = transformers.CLIPImageProcessor(
        size={"shortest_edge": 57}, crop_size={"height": 48, "width": 48}, **statistics
    )
    transformers.CLIPProcessor(pixels, tokenizer).save_pretrained(out)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={
            **sizes, "vocab_size": 1514, "hidden_size": 32, "intermediate_size": 128, "max_position_embeddings": 16,
            "hidden_act": "gelu", "eos_token_id": 2,
        },
        vision_config={**sizes, "hidden_size": 112, "intermediate_size": 976, "image_size": 48, "patch_size": 12},
        projection_dim=24,
    )  # fmt: skip
    torch.manual_seed(3)
    spread(transformers.CLIPModel(config)).save_pretrained(out)
    return out


def test_clip_models_of_transformers_come_in(tmp_path):
    """Unlike widths, an activation for each tower, the first releases' end token."""
    folder = their_folder(tmp_path / "theirs")
    theirs = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPProcessor.from_pretrained(folder, backend="pil")
    read = declip.load(folder, device="cpu")
    captions = [clean(caption).replace("<|endoftext|>", "") for caption in CAPTIONS]
    inputs = processor(
        text=captions, images=pictures(), padding=True, truncation=True, return_tensors="pt"
    )
    assert same_until_the_end(inputs["input_ids"], read.tokenize(captions), read.tokenizer.end)
    pixels = read.preprocess(pictures())
    resized = [
        [int(57 * side / min(picture.size)) for side in picture.size] for picture in pictures()
    ]
    rows = [
        row for row, sides in enumerate(resized) if not any((side - 48) % 4 == 3 for side in sides)
    ]
    assert 5 < len(rows) < len(pixels), (
        "the crop of the others begins one pixel earlier, as docs/interchange.md says"
    )
    assert largest(pixels[rows], inputs["pixel_values"][rows]) <= EXACT
    found = theirs(**{**inputs, "pixel_values": pixels})
    assert largest(read.encode_image(pixels), found.image_embeds) <= EXACT
    assert largest(read.encode_text(read.tokenize(captions)), found.text_embeds) <= EXACT
    assert torch.equal(read.logit_scale, theirs.logit_scale)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("huggingface") / "theirs"
    declip.export(build("vit"), "huggingface", folder)
    return folder


def edit(file, change):
    """Change a JSON file in place."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_the_first_releases_files_are_read(exported, tmp_path):
    """Sizes as numbers, a second name for a configuration, half precision, a buffer too many."""
    expected = declip.load(exported, device="cpu")
    folder = Path(shutil.copytree(exported, tmp_path / "old"))

    def older(pictures):
        pictures["feature_extractor_type"] = pictures.pop("image_processor_type").replace(
            "ImageProcessor", "X"
        )
        pictures.update(size=32, crop_size=32)
        del pictures["do_rescale"], pictures["rescale_factor"], pictures["do_normalize"]

    edit(folder / "preprocessor_config.json", older)
    edit(
        folder / "config.json",
        lambda it: it.update(text_config_dict=it["text_config"], text_config={}),
    )
    tensors = {name: t.half() for name, t in load_file(exported / "model.safetensors").items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(tensors, folder / "model.safetensors")
    read = declip.load(folder, device="cpu")
    assert read.logit_scale.dtype == torch.float32
    for own, other in zip(features(read), features(expected), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=2e-3)


FIRST = "vision_model.post_layernorm.weight"


def sets(*sections, **values):
    """A change of a JSON file, or of a section in it."""
    return lambda content: (content[sections[0]] if sections else content).update(values)


CONFIG, PICTURES, WORDS = "config.json", "preprocessor_config.json", "tokenizer.json"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (CONFIG, sets("vision_config", layer_norm_eps=1e-6), r"vision_config.*eps is 1e-06"),
        (CONFIG, sets("text_config", intermediate_size=96), "intermediate_size is 96.*128"),
        (CONFIG, sets("text_config", eos_token_id=5), "eos_token_id is 5.*813 or 2"),
        (
            CONFIG,
            sets("vision_config", num_hidden_layers=10**9),
            "1,000,000,002 layers.*78 tensors",
        ),
        (CONFIG, sets("vision_config", patch_size=16), r"position_embedding.* has shape \(17, 64"),
        (CONFIG, sets(text_config=[1]), "AttributeError"),
        (PICTURES, sets(size={"height": 32, "width": 32}), r"size is \{.* 32"),
        (PICTURES, sets(size={"shortest_edge": 31}), r"shortest_edge of 32 or more"),
        (PICTURES, sets(size={"shortest_edge": 10**9}), r"image.crop_pct"),
        (PICTURES, sets(resample=1), r"resample is 1; supported: 2 or 3"),
        (PICTURES, sets(image_processor_type="ViTImageProcessor"), "ViTImage"),
        (PICTURES, dict.clear, "preprocessor_config.json"),
        (WORDS, lambda it: it["model"]["vocab"].update({"ab": 0, "!": 5}), "tokenizer.json"),
        (WORDS, sets(normalizer=None), "tokenizer.json"),
        (WORDS, sets(model={"vocab": {"a": 0}}), "tokenizer.json"),
    ],
)
def test_a_folder_that_ours_cannot_be_is_told_by_what_differs_first(
    file, change, message, exported, tmp_path
):
    folder = Path(shutil.copytree(exported, tmp_path / "wrong"))
    edit(folder / file, change)
    refuses(rf"CLIPModel: .*{message}", declip.load, folder)


def test_files_that_are_missing_or_damaged(exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "wrong"))
    weights = folder / "model.safetensors"
    tensors = load_file(exported / weights.name)  # the other is written over
    save_file(tensors | {FIRST: torch.ones(64, dtype=torch.int8)}, weights)
    refuses(f"'{FIRST}' holds torch.int8", declip.load, folder)
    save_file(tensors | {FIRST: torch.full((64,), torch.inf)}, weights)
    refuses(f"'{FIRST}' .*finite", declip.load, folder)
    weights.write_bytes(weights.read_bytes()[:1000])
    refuses("SafetensorError", declip.load, folder)
    weights.unlink()
    refuses("there is no model.safetensors", declip.load, folder)
    (folder / "config.json").write_text("{")
    refuses("JSONDecodeError", declip.load, folder)
