"""Read models of open_clip, and write models as folders that open_clip loads as ``local-dir:FOLDER``."""

import copy
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from declip.data.text.tokenizer import Tokenizer
from declip.errors import UserError
from declip.interchange import layouts, starter
from declip.interchange.format import Format, ReadBack, Refusal, Traced, render
from declip.interchange.open_clip_model import (
    CONFIG,
    FOLDER,
    HERE,
    PREFIXES,
    OpenClipModel,
    encoder_from,
    image_keys,
    load_open_clip,
    matches,
    wrap_open_clip,
)
from declip.interchange.weights import Uninitialized, Weights, first_difference
from declip.io.atomic import save_tensors
from declip.io.text import one_line
from declip.models import hf_encoder
from declip.models.dual_encoder import DualEncoder
from declip.models.hf_encoder import HuggingfaceTextTower
from declip.models.siglip import SiglipTextTower
from declip.models.wrapped import WrappedOpenClip, WrappedTextTower, library_state
from declip.recipe.load import load_recipe

__all__ = ["OpenClip", "matches", "read"]

log = logging.getLogger("declip")

WEIGHTS = "open_clip_model.safetensors"
CLOSE = 1e-4  # tolerance for features of length 1, between a model here and in open_clip
CAPTIONS = ("a red circle", "Two CATS &amp; a dog, asleep on a sofa", "")

ENCODERS = (
    "bert",
    "roberta",
    "xlm-roberta",
)  # text encoder architectures that open_clip builds too
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # NAME or OWNER/NAME, not a path

POOLERS = {"cls": "cls_last_hidden_state_pooler", "mean": "mean_pooler"}

Section = tuple[dict[str, Any], layouts.TensorLayout]
"""A section of open_clip's configuration, or keys of a recipe, and the layout of the tensors."""


def read(where: str) -> Weights:
    """Read a model by its name, ``open_clip:…``, or from a folder that open_clip wrote.

    CLIP's ViT, CLIP's ResNet and timm towers with a linear projection, with CLIP's text tower and tokenizer, are
    converted; other towers are wrapped as they are. The features are compared with those of open_clip.
    """
    opened = load_open_clip(where)
    try:
        converted = _converted(opened, where)
        return converted or _compared(wrap_open_clip(opened, where), opened)
    except Exception as error:  # a tower that is not known
        raise UserError(
            f"This model of open_clip cannot be read: {one_line(error).rstrip('.')}."
        ) from error


def _converted(opened: OpenClipModel, where: str) -> Weights | None:
    """The model with the towers of declip, or None if these have other tensors or compute other features."""
    from open_clip import CLIP

    if type(opened.model) is not CLIP or not (
        _crops_a_square(opened) and _tokenizes_as_clip(opened)
    ):
        return None
    try:
        return _compared(_convert(opened, where), opened)
    except Exception as error:  # other settings, which may fail anywhere
        log.debug("'%s' keeps the towers of open_clip: %s", where, error)
        return None


def _crops_a_square(opened: OpenClipModel) -> bool:
    """Whether images are prepared as CLIP's: the shorter side is resized, and the center is cropped."""
    size = opened.preprocess.size
    square = isinstance(size, int) or len(set(size)) == 1
    return square and opened.preprocess.resize_mode == "shortest"


def _tokenizes_as_clip(opened: OpenClipModel) -> bool:
    """Whether captions are cleaned and split as CLIP's, with its vocabulary or the first merges of it."""
    from open_clip import SimpleTokenizer

    simple = isinstance(opened.tokenizer, SimpleTokenizer)
    options = opened.config["text_cfg"].get("tokenizer_kwargs") or {}
    if options.get("clean", "lower" if simple else "whitespace") != "lower":
        return False
    if simple:
        return True
    vocabulary = opened.tokenizer.tokenizer.get_vocab()
    merges = len(vocabulary) - layouts.NO_MERGES
    if not 0 <= merges < layouts.CLIP_MERGES:
        return False
    return bool(vocabulary == layouts.backend(Tokenizer(merges=merges)).get_vocab())


def _convert(opened: OpenClipModel, origin: str) -> Weights:
    """Convert the towers to those of declip."""
    tensors = opened.model.state_dict()
    tensors |= {
        name: tensor.squeeze() for name, tensor in tensors.items() if name.startswith("logit_")
    }
    keys, layout = _keys(opened, tensors)
    recipe = load_recipe("few-clip", {"name": "from-open-clip", **keys})
    return layouts.from_layout(recipe, layout, tensors, origin)


def _keys(opened: OpenClipModel, state: Mapping[str, Tensor]) -> Section:
    model, size = opened.model, opened.preprocess.size
    tower, block = model.visual, model.transformer.resblocks[0]
    activation = "quick_gelu" if opened.config.get("quick_gelu") else "gelu"
    if hasattr(tower, "trunk"):
        image, layout = {"image.model": tower.trunk.default_cfg["architecture"]}, layouts.TIMM
    else:
        attention = (
            tower.attnpool if hasattr(tower, "attnpool") else tower.transformer.resblocks[0].attn
        )
        image = layouts.image_keys(state, attention.num_heads, activation)
        layout = layouts.image_layout(state)
    bare = "text_projection" in state
    keys = {
        **image,
        **layouts.text_keys(state, "", block.attn.num_heads),
        "text.activation": activation,
        **image_keys(opened, size if isinstance(size, int) else size[0]),
        "embed_dim": state["text_projection"].shape[1]
        if bare
        else len(state["text_projection.weight"]),
        "logit_bias": float(state["logit_bias"]) if "logit_bias" in state else None,
    }
    return keys, layout + (layouts.CLIP_TEXT if bare else layouts.CLIP_TEXT_WITH_BIAS)


def _compared(weights: Weights, opened: OpenClipModel) -> Weights:
    from open_clip.transform import image_transform_v2

    # Odd sizes, so that resizing and cropping are compared too.
    ours = weights.build().eval()
    theirs = opened.model
    transform = image_transform_v2(opened.preprocess, False)
    if opened.resize is not None:
        transform.transforms[0].size = opened.resize
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (57, 91, 3), dtype=np.uint8))
    images = [noise, noise.resize((40, 333))]
    pixels = torch.stack([transform(image) for image in images])
    tokens = opened.tokenizer(list(CAPTIONS))
    with torch.no_grad():
        visual = ours.encode_image(ours.preprocess(images)) - theirs.encode_image(
            pixels, normalize=True
        )
        texts = ours.encode_text(ours.tokenize(CAPTIONS)) - theirs.encode_text(
            tokens, normalize=True
        )
    # NaN fails this comparison too.
    for kind, difference in (("images", visual), ("captions", texts)):
        if not float(difference.abs().max()) <= CLOSE:
            raise UserError(f"its features of {kind} differ by {difference.abs().max():.1e}")
    return weights


class OpenClip(Format):
    """Folders that open_clip loads as ``local-dir:FOLDER``."""

    name = library = "open_clip"
    linear = True

    def holds(self, model: DualEncoder) -> None:
        """Refuse what open_clip's configuration cannot express."""
        _express(model, HERE)

    def write(self, traced: Traced, folder: Path, repo: str | None) -> None:
        """Write open_clip_config.json, weights and, for a vocabulary other than CLIP's, a Hugging Face tokenizer.

        open_clip finds a text encoder by its name on the Hub, by that of the repository, or by a path: that of the
        folder is an argument in the code of the card, so that the folder can be moved.
        """
        model = traced.model
        config, tensors = _express(model, repo or HERE)
        text_config = config["model_cfg"]["text_cfg"]
        # open_clip has CLIP's own tokenizer; others are files, as are configurations of text encoders.
        needs_file = "hf_model_name" in text_config or "tokenizer_kwargs" in text_config
        if isinstance(model.text_tower, WrappedTextTower):
            needs_file = model.text_tower.wrapped.tokenizer["definition"] is not None
        if (encoder := text_encoder(model)) is not None:
            (folder / hf_encoder.CONFIG).write_text(
                json.dumps(dict(encoder), indent=2) + "\n", encoding="utf-8"
            )
        if needs_file:
            # open_clip reads the tokenizer of a folder from that folder, and of a repository by its name.
            text_config["hf_tokenizer_name"] = repo or "tokenizer.json"
            layouts.write_tokenizer(model.tokenizer, folder)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_tensors(tensors, folder / WEIGHTS, {"format": "pt"})

    def read_back(self, folder: Path) -> ReadBack:
        """Load the folder with open_clip."""
        import open_clip

        text_config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_cfg"][
            "text_cfg"
        ]
        changes = encoder_from(folder, text_config)
        with Uninitialized():
            model: Any = open_clip.create_model(
                f"{FOLDER}{folder}", weights_only=True, **changes
            ).eval()
        context = int(model.context_length)
        return ReadBack(
            f"open_clip {open_clip.__version__}",
            model.encode_image,
            lambda tokens: model.encode_text(
                tokens if changes else F.pad(tokens, (0, context - tokens.shape[1]))
            ),
        )

    def card(self, model: DualEncoder, repo: str | None) -> str:
        """Usage by open_clip."""
        return render(
            "open_clip.jinja", model=model, repo=repo, encoder=text_encoder(model) is not None
        )

    def limits(self, model: DualEncoder, repo: str | None) -> str:
        """Describe what open_clip's configuration cannot hold, and what that changes; "" if it holds all."""
        limits = ""
        prepared = model.preprocessor
        if not prepared.squash and prepared.resize != prepared.size:
            limits += (
                f" open_clip's configuration has no resize to {prepared.resize} before the crop of {prepared.size}; "
                "the code of the card sets it. Without, features differ."
            )
        if text_encoder(model) is not None and repo is None:
            limits += _elsewhere(hub_encoder(model))
        return limits


def _elsewhere(name: str | None) -> str:
    """Say how programs that are given the folder alone find the configuration of the text encoder."""
    found = "find the text encoder's configuration in their working folder"
    if name is not None:
        found = f"fetch the text encoder's configuration, {name}, from the Hub"
    return (
        f" Programs that get no more than {FOLDER}FOLDER, such as CLIP_benchmark, {found}. For use without a network "
        f'from any folder, set "hf_model_name" in {CONFIG} to the absolute path of the export.'
    )


def hub_encoder(model: DualEncoder) -> str | None:
    """Name on the Hub of the model's Hugging Face text encoder, if it is known."""
    if isinstance(model.text_tower, WrappedTextTower):
        name = model.text_tower.wrapped.config["text_cfg"].get("hf_model_name") or ""
        return name if HUB_NAME.fullmatch(name) else None
    given = model.recipe.text.hf_model or ""
    if starter.matches(given):
        return starter.HUB_ENCODER
    return given.removeprefix(hf_encoder.PREFIX) if given.startswith(hf_encoder.PREFIX) else None


def text_encoder(model: DualEncoder) -> Mapping[str, Any] | None:
    """Configuration of the model's Hugging Face text encoder, if it has one."""
    tower = model.text_tower
    if isinstance(tower, HuggingfaceTextTower):
        return tower.encoder_config
    return tower.wrapped.encoder if isinstance(tower, WrappedTextTower) else None


def _express(model: DualEncoder, repo: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Build open_clip's configuration and tensors; `repo` is the repository of the files, or `HERE`."""
    layouts.refuse_one_tower(model)
    if isinstance(model.text_tower, SiglipTextTower):
        raise Refusal(
            "open_clip builds SigLIP's image tower by timm's name, most of them with another activation than "
            "transformers; the formats onnx and huggingface hold its towers, and open_clip those of "
            "--from open_clip:ViT-B-16-SigLIP2/webli"
        )
    recipe = model.recipe
    # Towers of open_clip go back as they came; CLIP's are renamed.
    if isinstance(model.text_tower, WrappedTextTower):
        model_config, tensors = _express_wrapped(model, model.text_tower.wrapped)
        if model.text_tower.wrapped.encoder is not None:
            model_config["text_cfg"] |= {
                "hf_model_name": hub_encoder(model) or repo,
                "hf_model_pretrained": False,
            }
    else:
        keys = layouts.clip_keys(model.image_tower)
        if isinstance(model.text_tower, HuggingfaceTextTower):
            activation = layouts.activation_of(keys) if keys else "gelu"
            text_config, text = _text_encoder(model.text_tower, hub_encoder(model) or repo)
        else:
            activation = recipe.text.activation
            text_config, text = _text_config(model)
        vision_config, visual = _vision_config(model, keys, activation)
        model_config = {
            "embed_dim": recipe.embed_dim,
            "quick_gelu": activation == "quick_gelu",
            "vision_cfg": {"image_size": recipe.image.size, **vision_config},
            "text_cfg": text_config,
        }
        if model.logit_bias is not None:
            model_config["init_logit_bias"] = model.logit_bias.item()
        state = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if not name.endswith("_extra_state")
        }
        tensors = (visual + text).write(state)
    return {"model_cfg": model_config, "preprocess_cfg": layouts.preprocess_config(model)}, tensors


def _express_wrapped(
    model: DualEncoder, stored: WrappedOpenClip
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = {
        f"{prefix}{name}": tensor
        for prefix, tower in zip(PREFIXES, (model.image_tower, model.text_tower), strict=True)
        for name, tensor in library_state(tower, tower.state_dict()).items()  # type: ignore[arg-type]  # both are wrapped
    }
    tensors |= {name: t for name, t in model.state_dict().items() if name.startswith("logit_")}
    config = copy.deepcopy(dict(stored.config)) | {"custom_text": True}
    if model.logit_bias is not None:
        config.setdefault("init_logit_bias", -10)
    vision = config["vision_cfg"]
    vision["image_size"] = model.preprocessor.size
    proj = model.image_tower.proj
    if vision.get("timm_proj") == "none" and isinstance(proj, nn.Linear):  # that a fit put there
        vision |= {"timm_proj": "linear", "timm_proj_bias": proj.bias is not None}
    for section in ("vision_cfg", "text_cfg"):
        config[section].pop("output_tokens", None)
    return config, tensors


def _text_config(model: DualEncoder) -> Section:
    tower, text = layouts.clip_text_tower(model), model.recipe.text
    config: dict[str, Any] = {
        name: getattr(text, name) for name in ("context_length", "width", "heads", "layers")
    }
    config |= {"vocab_size": model.tokenizer.vocabulary - 1, "proj_bias": text.projection_bias}
    if text.bpe_merges is not None:
        config["tokenizer_kwargs"] = {"clean": "lower"}
    return (
        config,
        layouts.CLIP_TEXT if tower.text_projection.bias is None else layouts.CLIP_TEXT_WITH_BIAS,
    )


def _text_encoder(tower: HuggingfaceTextTower, name: str) -> Section:
    """A text encoder of transformers, with its configuration on the Hub or in the folder, `HERE`."""
    kind, biased = tower.encoder_config["model_type"], tower.text_projection.bias is not None
    if kind not in ENCODERS or tower.pooling not in POOLERS or biased:
        raise Refusal(
            f"its text encoder is a {kind}, with {tower.pooling} pooling and {'a' if biased else 'no'} bias after its "
            f"projection; open_clip supports {', '.join(ENCODERS)}, text.pooling={' or '.join(POOLERS)}, no bias"
        )
    config = {
        "context_length": tower.context,
        "vocab_size": tower.encoder_config["vocab_size"],
        "hf_model_name": name,
        "hf_model_pretrained": False,  # the weights are in the folder
        "hf_proj_type": "linear",
        "hf_pooler_type": POOLERS[tower.pooling],
    }
    return config, layouts.TRANSFORMERS_TEXT


def _vision_config(model: DualEncoder, keys: Mapping[str, Any] | None, activation: str) -> Section:
    """CLIP's ViT or ResNet of any size, else a timm model by name, without options and in its own size."""
    sizes = keys["image.model_kwargs"] if keys else {}
    if keys and "depths" in sizes:
        width = round(64 * sizes["width_factor"])
        return {"layers": sizes["depths"], "width": width, "patch_size": None}, layouts.CLIP_RESNET
    if keys and layouts.activation_of(keys) == activation:
        width = sizes["embed_dim"]
        config = {
            "layers": sizes["depth"],
            "width": width,
            "head_width": width // sizes["num_heads"],
        }
        return config | {
            name: sizes[name] for name in ("patch_size", "mlp_ratio")
        }, layouts.CLIP_VIT
    import timm

    name, tower = model.recipe.image.model, model.image_tower
    difference: str | None = "timm does not know it"
    # open_clip does not import those that others registered
    if timm.is_model(name) and timm.model_entrypoint(name).__module__.startswith("timm."):
        with torch.device("meta"), Uninitialized():
            trunk = timm.create_model(name, num_classes=0)
        norm = {f"norm.{part}": tensor for part, tensor in tower.norm.state_dict().items()}
        difference = first_difference(trunk.state_dict(), {**tower.trunk.state_dict(), **norm})
    if difference:
        way_out = (
            f"train with text.activation={layouts.activation_of(keys)}"
            if keys
            else layouts.TO_CLIP_VIT
        )
        raise Refusal(
            "its image tower is neither CLIP's ViT with the activation of the text tower nor CLIP's ResNet, and "
            f"open_clip builds other towers by timm's name, which is another network than '{name}' at "
            f"{model.preprocessor.size} px ({difference}); {way_out}"
        )
    config = {"timm_model_name": name, "timm_pool": "", "timm_proj": "linear"}
    return config | {"timm_proj_bias": tower.proj.bias is not None}, layouts.TIMM
