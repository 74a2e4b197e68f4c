"""Models of open_clip's against open_clip itself: features, preparation, measures, and every wrong name or file."""

import copy
import io
import json
import logging
import pickle
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import declip
from conftest import COLOURS, SHAPES, draw
from declip.data.pairs import Pair
from declip.errors import UserError
from declip.interchange import open_clip as ours

open_clip = pytest.importorskip("open_clip")
from open_clip import factory, pretrained  # noqa: E402

TEXT = {"context_length": 12, "width": 32, "heads": 2, "layers": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny-vit": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": TEXT,
    },
    "tiny-resnet": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": TEXT,
    },
    "tiny-coca": {
        "embed_dim": 16,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8,
            "attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4, "output_tokens": True,
        },
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2},
    },
    "tiny-mapped": {  # as SigLIP: pooled by attention without a projection, a bias, text not causal, pooled at its end
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": {
            **TEXT, "context_length": 20, "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
            "tokenizer_kwargs": {"clean": "canonicalize"},
        },
    },
    "tiny-convnext": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"},
        "text_cfg": TEXT,
    },
    "tiny-classifier": {  # as MobileCLIP: the trunk's classifier is the projection
        "embed_dim": 16,
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": None},
        "text_cfg": TEXT,
    },
}  # fmt: skip
WORDS = ["a red circle", "Two GREEN squares, on white!", "", "nought " * 40]


@pytest.fixture(autouse=True, scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The tiny configurations, known to open_clip for the time of this file."""
    paths, configs = list(factory._MODEL_CONFIG_PATHS), dict(factory._MODEL_CONFIGS)
    folder = tmp_path_factory.mktemp("configs")
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
    open_clip.add_model_config(folder)
    yield
    factory._MODEL_CONFIG_PATHS[:] = paths
    factory._MODEL_CONFIGS = configs


def random_model(name: str, seed: int = 5) -> Any:
    """open_clip's own model in evaluation mode, no weight left at its start."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.create_model(name)
        with torch.no_grad():
            for weight in model.parameters():
                weight.nan_to_num_()  # CoCa's decoder leaves a weight as the memory was
                weight.add_(0.05 * torch.randn_like(weight))
    return model.eval()


def saved(model: torch.nn.Module, path: Path) -> Path:
    """Its weights in a file, by open_clip's ways: a bare state dict, or a checkpoint of its training."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif path.name == "epoch_1.pt":
        checkpoint = {"epoch": 1, "name": "run", "state_dict": {f"module.{name}": w for name, w in state.items()}}
        torch.save(checkpoint, path)
    else:
        torch.save(state, path)
    return path


def folder_of(model: torch.nn.Module, folder: Path, name: str, preprocess: dict[str, Any]) -> Path:
    """A folder of the schema local-dir."""
    folder.mkdir()
    config = {"model_cfg": CONFIGS[name], "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    saved(model, folder / "open_clip_model.safetensors")
    return folder


def pictures() -> list[Image.Image]:
    """Wide, high, and smaller and larger than what a tower takes."""
    noise = np.random.default_rng(3).integers(0, 256, (50, 90, 3), np.uint8)
    return [
        draw("red", "bar", 20),
        Image.fromarray(noise),
        Image.fromarray(noise).resize((70, 400)),
        draw("blue", "circle", 300),
    ]


def same_weights(ours_: ours.OpenClip, theirs: torch.nn.Module) -> bool:
    state = theirs.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in ours_.model.state_dict().items())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("file", ["weights.pt", "weights.safetensors"])
def test_features_are_open_clips(name: str, file: str, tmp_path: Path) -> None:
    theirs = random_model(name)
    model = declip.load(f"open_clip:{name}/{saved(theirs, tmp_path / file)}", device="cpu")
    transform = open_clip.create_model_and_transforms(name)[2]
    tokens = open_clip.get_tokenizer(name)(WORDS)
    pixels = torch.stack([transform(picture) for picture in pictures()])
    with torch.no_grad():
        assert torch.equal(model.preprocess(pictures()), pixels)
        assert torch.equal(model.tokenize(WORDS), tokens)
        images, texts = model.encode_image(pixels), model.encode_text(tokens)
        torch.testing.assert_close(images, theirs.encode_image(pixels, normalize=True), atol=1e-6, rtol=0)
        torch.testing.assert_close(texts, theirs.encode_text(tokens, normalize=True), atol=1e-6, rtol=0)
    assert images.shape == (4, CONFIGS[name]["embed_dim"])
    assert tokens.shape == (4, CONFIGS[name]["text_cfg"]["context_length"])
    assert (images.dtype, model.training, model.device) == (torch.float32, False, torch.device("cpu"))
    torch.testing.assert_close(images.norm(dim=-1), torch.ones(4))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_backbone_is_what_the_projection_takes(name: str, tmp_path: Path) -> None:
    theirs = random_model(name)
    model = declip.load(f"open_clip:{name}/{saved(theirs, tmp_path / 'weights.pt')}", device="cpu")
    tower, pixels = theirs.visual, model.preprocess(pictures())
    project = {
        "tiny-vit": lambda hidden: hidden @ tower.proj,
        "tiny-resnet": lambda hidden: tower.attnpool.c_proj(hidden),
        "tiny-coca": lambda hidden: hidden @ tower.proj,
        "tiny-mapped": lambda hidden: hidden,
        "tiny-convnext": lambda hidden: tower.head(hidden),
        "tiny-classifier": lambda hidden: tower.trunk.get_classifier()(hidden),
    }
    width = {"tiny-resnet": 256, "tiny-coca": 16, "tiny-vit": 32}.get(name, 64)
    with torch.no_grad():
        hidden = model.encode_backbone(pixels)
        expected = theirs.encode_image(pixels, normalize=False)
        torch.testing.assert_close(project[name](hidden), expected, atol=1e-5, rtol=1e-5)
        assert hidden.shape == (4, width)
        # nothing of the model is left changed
        torch.testing.assert_close(model.encode_image(pixels), torch.nn.functional.normalize(expected, dim=-1))
    assert same_weights(model, theirs)


def test_a_tower_that_pools_and_projects_in_one_has_no_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    config = copy.deepcopy(CONFIGS["tiny-convnext"])
    config["vision_cfg"] |= {"timm_pool": "rot_attn", "timm_proj": None}
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny-rotary", config)
    model = declip.load("open_clip:tiny-rotary/none", device="cpu")
    pixels = model.preprocess(draw("red", "circle"))
    with torch.no_grad():
        assert model.encode_image(pixels).shape == (1, 16)
        with pytest.raises(UserError, match="no pooled feature before its projection"):
            model.encode_backbone(pixels)


def test_a_checkpoint_of_its_training(tmp_path: Path) -> None:
    theirs = random_model("tiny-vit")
    assert same_weights(declip.load(f"open_clip:tiny-vit/{saved(theirs, tmp_path / 'epoch_1.pt')}"), theirs)


def test_paths_from_here_and_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = random_model("tiny-vit")
    saved(theirs, tmp_path / "openai")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for spelling in ("./openai", "openai", "~/openai"):
        assert same_weights(declip.load(f"open_clip:tiny-vit/{spelling}", device="cpu"), theirs)


def test_a_folder_brings_its_own_preparation(tmp_path: Path) -> None:
    theirs = random_model("tiny-mapped")
    how = {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.5, 0.6], "resize_mode": "squash", "interpolation": "bilinear"}
    folder = folder_of(theirs, tmp_path / "model", "tiny-mapped", how)
    model = declip.load(f"open_clip:local-dir:{folder}", device="cpu")
    transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")[2]
    assert same_weights(model, theirs)
    assert torch.equal(model.preprocess(pictures()), torch.stack([transform(picture) for picture in pictures()]))
    assert model.tokenize("red bar").shape == (1, 20)


def test_a_tag_is_fetched_and_brings_its_preparation_and_activation(tmp_path: Path, monkeypatch) -> None:
    config = copy.deepcopy(CONFIGS["tiny-vit"])
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny-vit-quickgelu", config | {"quick_gelu": True})
    theirs = random_model("tiny-vit-quickgelu")
    file = str(saved(theirs, tmp_path / "tagged.safetensors"))
    tag = {"file": file, "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.3, 0.4), "resize_mode": "squash", "quick_gelu": True}
    for name in ("tiny-vit", "tiny-vit-quickgelu"):
        monkeypatch.setitem(pretrained._PRETRAINED, name, {"first_tag": tag})
    transform = open_clip.create_model_and_transforms("tiny-vit-quickgelu", "first_tag")[2]
    pixels = torch.stack([transform(picture) for picture in pictures()])
    for given in ("tiny-vit/first_tag", "tiny-vit/First-Tag", "tiny-vit-quickgelu/first_tag"):
        model = declip.load(f"open_clip:{given}", device="cpu")
        assert torch.equal(model.preprocess(pictures()), pixels)
        with torch.no_grad():
            expected = theirs.encode_image(pixels, normalize=True)
            torch.testing.assert_close(model.encode_image(pixels), expected, atol=1e-6, rtol=0)
            text = open_clip.get_tokenizer("tiny-vit")(WORDS)
            torch.testing.assert_close(model.encode_text(text), theirs.encode_text(text, normalize=True))


def test_random_weights_are_always_the_same_and_leave_the_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = declip.load("open_clip:tiny-vit/none", device="cpu")
    assert torch.equal(torch.rand(3), expected)
    second = declip.load("open_clip:tiny-vit/none", device="cpu")
    assert same_weights(first, second.model)


def test_open_clip_leaves_the_root_logger_alone(monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    declip.load("open_clip:tiny-vit/none", device="cpu")
    assert logging.root.handlers == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_the_preprocessor_survives_pickling(mode: str) -> None:
    prepare = ours.Preprocess({"size": 32, "resize_mode": mode})
    assert torch.equal(pickle.loads(pickle.dumps(prepare))(pictures()), prepare(pictures()))
    assert prepare(pictures()).shape == (4, 3, 32, 32)
    assert prepare([]).shape == (0, 3, 32, 32)
    assert torch.equal(prepare(draw("red", "bar")), prepare([draw("red", "bar")]))


def test_a_very_long_picture_takes_little_memory_and_changes_nothing() -> None:
    prepare = ours.Preprocess({"size": 32})
    ramp = np.linspace(0, 255, 900).astype(np.uint8)
    long = Image.fromarray(np.broadcast_to(ramp[None, :, None], (20, 900, 3)).copy())
    for picture in (long, long.transpose(Image.Transpose.ROTATE_90)):
        expected = prepare.transform(picture)
        torch.testing.assert_close(prepare(picture)[0], expected, atol=0.02, rtol=0)
    squash = ours.Preprocess({"size": 32, "resize_mode": "squash"})
    assert torch.equal(squash(long)[0], squash.transform(long))
    resized = []
    prepare.transform.transforms.insert(1, lambda image: resized.append(image.size) or image)
    prepare(Image.new("RGB", (1, 100_000)))
    assert resized == [(32, 320)]


class Shapes:
    """Coloured shapes, labelled by colour."""

    name = "shapes"
    class_names = COLOURS

    def __init__(self) -> None:
        self.rows = [(colour, shape) for colour in COLOURS for shape in SHAPES]
        self.labels = np.array([COLOURS.index(colour) for colour, _ in self.rows])

    def __len__(self) -> int:
        return len(self.rows)

    def captions(self, index: int) -> tuple[str, ...]:
        colour, shape = self.rows[index]
        return (f"a {colour} {shape}", f"{shape}, {colour}")

    def __getitem__(self, index: int) -> Pair:
        return Pair(str(index), draw(*self.rows[index]), self.captions(index))


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-coca", "tiny-mapped"])
def test_zero_shot_and_retrieval_equal_open_clips_own_features(name: str, tmp_path: Path) -> None:
    theirs = random_model(name)
    model = declip.load(f"open_clip:{name}/{saved(theirs, tmp_path / 'weights.pt')}", device="cpu")
    source, transform = Shapes(), open_clip.create_model_and_transforms(name)[2]
    tokenizer = open_clip.get_tokenizer(name)
    templates = ["a drawing of {}", "{} on white"]
    with torch.no_grad():
        pixels = torch.stack([transform(source[index].image) for index in range(len(source))])
        images = theirs.encode_image(pixels, normalize=True).double().numpy()
        words = [caption for index in range(len(source)) for caption in source.captions(index)]
        texts = theirs.encode_text(tokenizer(words), normalize=True).double().numpy()
        classes = open_clip.build_zero_shot_classifier(theirs, tokenizer, COLOURS, templates).double().numpy()
    order = np.argsort(-(images @ classes), axis=1)
    top1 = np.mean(order[:, 0] == source.labels)
    top5 = np.mean([label in row[:5] for label, row in zip(source.labels, order, strict=True)])
    result = declip.evaluate(model, source, templates=templates, progress=False)
    assert (result.top1, result.top5, result.n) == (pytest.approx(top1), pytest.approx(top5), 24)

    result = declip.evaluate(model, source, "retrieval", progress=False)
    scores = images @ texts.T
    for k, text_to_image, image_to_text in (
        (1, result.text_to_image.r1, result.image_to_text.r1),
        (5, result.text_to_image.r5, result.image_to_text.r5),
        (10, result.text_to_image.r10, result.image_to_text.r10),
    ):
        found = [text // 2 in np.argsort(-scores[:, text])[:k] for text in range(48)]
        assert text_to_image == pytest.approx(np.mean(found))
        found = [image in np.argsort(-scores[image])[:k] // 2 for image in range(24)]
        assert image_to_text == pytest.approx(np.mean(found))


def test_evaluate_by_command_with_workers(table: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from declip.cli import app

    file, out = saved(random_model("tiny-vit"), tmp_path / "weights.pt"), tmp_path / "result.json"
    words = ["evaluate", f"open_clip:tiny-vit/{file}", "--on", str(table), "--protocol", "retrieval"]
    done = CliRunner().invoke(app, [*words, "--device", "cpu", "--json", str(out)])
    assert done.exit_code == 0, done.output
    measured = json.loads(out.read_text())
    expected = declip.evaluate(declip.load(words[1], device="cpu"), str(table), "retrieval", workers=1, progress=False)
    assert measured == json.loads(json.dumps(expected.to_dict()))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("ViT-B-31/openai", "Unknown open_clip model 'ViT-B-31'. Did you mean 'ViT-B-32'"),
        ("ViT-B/32/openai", "Unknown open_clip model 'ViT-B'. Did you mean 'ViT-B-32'"),
        ("", "Unknown open_clip model ''"),
        ("ViT-B-32", r"does not say which weights.*ViT-B-32/none for random.*Tags: openai, .*laion2b_s34b_b79k"),
        ("tiny-vit", r"does not say which weights.*Tags: no\."),
        ("ViT-B-32/opneai", "Unknown tag or file .*'opneai'. Did you mean 'openai'.*laion2b_s34b_b79k.*none"),
        ("tiny-vit/openai", "Unknown tag or file .*Known: none"),
        ("tiny-vit/./missing.pt", "no file 'missing.pt'"),
        ("tiny-vit//missing/weights", "no file '/missing/weights'"),
        ("tiny-vit/missing.safetensors", "no file 'missing.safetensors'"),
        ("local-dir:/missing", "'/missing' is no folder"),
    ],
)
def test_wrong_names(given: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        declip.load(f"open_clip:{given}")
    assert "\n" not in str(caught.value)


def test_wrong_files(tmp_path: Path) -> None:
    whole = saved(random_model("tiny-vit"), tmp_path / "weights.pt").read_bytes()
    safe = saved(random_model("tiny-vit"), tmp_path / "weights.safetensors").read_bytes()
    plain, state = io.BytesIO(), random_model("tiny-vit").state_dict()
    torch.save([1, 2], plain)
    contents = {
        "cut.pt": whole[: len(whole) // 2],
        "cut.safetensors": safe[: len(safe) // 2],
        "empty.pt": b"",
        "text.pt": b"no weights",
        "list.pt": plain.getvalue(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    torch.save({}, tmp_path / "none.pt")
    torch.save(state | {"visual.proj": torch.zeros(7, 7)}, tmp_path / "shape.pt")
    torch.save({name: tensor for name, tensor in state.items() if name != "visual.proj"}, tmp_path / "lacking.pt")
    for name in (*contents, "none.pt", "shape.pt", "lacking.pt"):
        with pytest.raises(UserError, match=f"Cannot load 'open_clip:tiny-vit/.*{name}'.*must be those of") as caught:
            declip.load(f"open_clip:tiny-vit/{tmp_path / name}")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 800
    with pytest.raises(UserError, match=r"size mismatch.*visual\.proj|visual\.proj.*size mismatch"):
        declip.load(f"open_clip:tiny-vit/{tmp_path / 'shape.pt'}")
    with pytest.raises(UserError, match="Cannot load"):  # weights of another model
        declip.load(f"open_clip:tiny-resnet/{tmp_path / 'weights.pt'}")


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    torch.save({"state_dict": random_model("tiny-vit").state_dict(), "name": Trap(sprung)}, tmp_path / "trap.pt")
    with pytest.raises(UserError, match="holds more than tensors") as caught:
        declip.load(f"open_clip:tiny-vit/{tmp_path / 'trap.pt'}")
    assert "weights_only" not in str(caught.value)
    assert not sprung.exists()


def test_a_torchscript_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "program.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("torch.jit.load was called"))
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny-vit", {"first_tag": {"file": str(file)}})
    for given in (f"open_clip:tiny-vit/{file}", "open_clip:tiny-vit/first_tag", str(file)):
        with pytest.raises(UserError, match=r"TorchScript archive.*open_clip:ViT-B-32/openai"):
            declip.load(given)


def test_wrong_folders(tmp_path: Path) -> None:
    folder = folder_of(random_model("tiny-vit"), tmp_path / "model", "tiny-vit", {})
    weights, config = folder / "open_clip_model.safetensors", folder / "open_clip_config.json"
    given = f"open_clip:local-dir:{folder}"
    with pytest.raises(UserError, match=f"folder of open_clip's. Load it as {given}"):
        declip.load(folder)
    stored = json.loads(config.read_text())
    for trust in (True, 1, "yes"):
        changed = copy.deepcopy(stored)
        changed["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": trust}
        config.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=r"run code of its own \(trust_remote_code\)"):
            declip.load(given)
    for text in ("{", "[]", '{"model_cfg": {}}', '{"model_cfg": {"embed_dim": 8}}', '{"preprocess_cfg": {}}'):
        config.write_text(text)
        with pytest.raises(UserError, match="Cannot load"):
            declip.load(given)
    config.write_text(json.dumps(stored))
    weights.rename(folder / "weights.pt")
    with pytest.raises(UserError, match=r"holds no weights: open_clip looks for \*\.safetensors"):
        declip.load(given)
    config.unlink()
    with pytest.raises(UserError, match=r"has no open_clip_config\.json"):
        declip.load(given)


@pytest.mark.parametrize("given", ["open_clip:ViT-B-32/openai", "open_clip:hf-hub:owner/name"])
def test_without_network(given: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        logging.getLogger("huggingface_hub").warning("Retrying in 1s")
        raise OSError("Name or service\nnot known")

    shown: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", shown.append)
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", [handler])
    monkeypatch.setattr(pretrained, "hf_hub_download", unreachable)
    monkeypatch.setattr(pretrained, "download_pretrained_from_url", unreachable)
    with pytest.raises(UserError, match=f"Cannot fetch '{given}': .*not known.*Check the network") as caught:
        declip.load(given)
    assert "\n" not in str(caught.value)
    assert (capfd.readouterr(), shown) == (("", ""), [])
    logging.getLogger("huggingface_hub").warning("as before")
    assert len(shown) == 1


def test_a_hub_repository_is_read_like_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = random_model("tiny-vit")
    folder = folder_of(theirs, tmp_path / "model", "tiny-vit", {"mean": [0.5, 0.5, 0.5]})

    def from_folder(repo_id: str, filename: str, **_: Any) -> str:
        assert repo_id == "owner/name"
        return str(folder / filename)

    monkeypatch.setattr(pretrained, "hf_hub_download", from_folder)
    model = declip.load("open_clip:hf-hub:owner/name", device="cpu")
    assert same_weights(model, theirs)
    assert tuple(model.preprocessor.config.mean) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("there", [".json", ".safetensors"])
def test_half_a_hub_repository_is_no_random_model(there: str, tmp_path: Path, monkeypatch) -> None:
    folder = folder_of(random_model("tiny-vit"), tmp_path / "model", "tiny-vit", {})

    def half(repo_id: str, filename: str, **_: Any) -> str:
        if filename.endswith(there):
            return str(folder / filename)
        raise OSError("no such entry")

    monkeypatch.setattr(pretrained, "hf_hub_download", half)
    with pytest.raises(UserError, match=r"Cannot fetch .*no such entry"):
        declip.load("open_clip:hf-hub:owner/name", device="cpu")


def test_a_file_of_a_model_that_is_published_with_another_preparation(tmp_path: Path, monkeypatch, caplog) -> None:
    file = saved(random_model("tiny-vit"), tmp_path / "weights.pt")
    tags: dict[str, Any] = {}
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny-vit", tags)

    def warned() -> bool:
        caplog.clear()
        declip.load(f"open_clip:tiny-vit/{file}", device="cpu")
        return any(
            row.name == "declip" and "otherwise for the published tiny-vit" in row.message for row in caplog.records
        )

    assert not warned()
    tags["first_tag"] = {"resize_mode": "squash"}
    assert warned()
    tags["second_tag"] = {"resize_mode": "shortest"}
    assert not warned()


def test_the_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs the package transformers\. Install it: pip install transformers"):
        declip.load("open_clip:ViT-B-16-SigLIP/none")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match=r"needs open_clip.*pip install 'declip\[open_clip\]'"):
        declip.load("open_clip:tiny-vit/none")


@pytest.mark.parametrize("file", ["open_clip.py", "load.py"])
def test_open_clip_is_imported_only_when_asked_for(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    runpy.run_path(str(Path(ours.__file__).with_name(file)))


def test_features_are_float32_whatever_the_tower_computes_in() -> None:
    model = declip.load("open_clip:tiny-vit/none", device="cpu").to(torch.bfloat16)
    pixels: Tensor = model.preprocess(pictures()).to(torch.bfloat16)
    with torch.no_grad():
        for features in (model.encode_image(pixels), model.encode_text(model.tokenize(WORDS))):
            assert features.dtype == torch.float32
            torch.testing.assert_close(features.norm(dim=-1), torch.ones(4))
        assert model.encode_backbone(pixels).dtype == torch.float32
