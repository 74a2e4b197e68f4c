"""Read models of open_clip, and write models as folders that open_clip loads as ``local-dir:FOLDER``."""

import copy
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

from declip.errors import UserError
from declip.interchange import layouts, starter
from declip.interchange.format import Format, ModelRecord, ReadBack, Refusal, render
from declip.interchange.json_files import read_json, write_json
from declip.interchange.open_clip_model import (
    CONFIG,
    FOLDER,
    HERE,
    TEXTUAL,
    VISUAL,
    OpenClipModel,
    bias_key,
    encoder_from,
    load_open_clip,
    matches,
    preprocessing_keys,
    scalars,
    wrap_open_clip,
)
from declip.interchange.tokenizer_files import clip_tokenizer, write_tokenizer
from declip.interchange.weights import Weights, first_difference, uninitialized
from declip.io.atomic import save_tensors
from declip.io.text import one_line
from declip.models import hf_encoder
from declip.models.dual_encoder import DualEncoder
from declip.models.hf_encoder import HuggingfaceTextTower
from declip.models.image_tower import ImageTower
from declip.models.siglip import SiglipTextTower
from declip.models.tensor_names import add_prefix, all_but, only
from declip.models.wrapped import WrappedOpenClip, WrappedTextTower, library_state
from declip.recipe.load import load_recipe

__all__ = ["OpenClip", "matches", "read"]

log = logging.getLogger("declip")

WEIGHTS = "open_clip_model.safetensors"
CLOSE = 1e-4  # tolerance for features of length 1, between a model here and in open_clip
CAPTIONS = ("a red circle", "Two CATS &amp; a dog, asleep on a sofa", "")

ENCODERS = ("bert", "roberta", "xlm-roberta")
"""Text encoder architectures that open_clip builds too."""

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # NAME or OWNER/NAME, not a path

POOLERS = {"cls": "cls_last_hidden_state_pooler", "mean": "mean_pooler"}

Section = tuple[dict[str, Any], layouts.TensorLayout]
"""A section of open_clip's configuration, or keys of a recipe, and the layout of the tensors."""

Expressed = tuple[dict[str, Any], dict[str, Tensor]]
"""open_clip's configuration and tensors of a model."""


def read(where: str) -> Weights:
    """Read a model by its name, ``open_clip:…``, or from a folder that open_clip wrote.

    CLIP's ViT, CLIP's ResNet and timm towers with a linear projection, with CLIP's text tower and tokenizer, are
    converted; other towers are wrapped as they are. The features are compared with those of open_clip.
    """
    opened = load_open_clip(where)
    try:
        weights = _convert_equal(opened, where)
        if weights is None:
            weights = wrap_open_clip(opened, where)
            _compare(weights, opened)
        return weights
    except Exception as error:  # a tower that is not known
        raise UserError(
            f"This model of open_clip cannot be read: {one_line(error).rstrip('.')}."
        ) from error


def _convert_equal(opened: OpenClipModel, where: str) -> Weights | None:
    """The model with the towers of declip, or None if these have other tensors or compute other features."""
    from open_clip import CLIP

    if type(opened.model) is not CLIP:
        return None
    if not _crops_a_square(opened) or not _tokenizes_as_clip(opened):
        return None
    try:
        weights = _convert(opened, where)
        _compare(weights, opened)
    except Exception as error:  # other settings, which may fail anywhere
        log.debug("'%s' keeps the towers of open_clip: %s", where, error)
        return None
    return weights


def _crops_a_square(opened: OpenClipModel) -> bool:
    """Whether images are prepared as CLIP's: the shorter side is resized, and the center is cropped."""
    size = opened.preprocess.size
    square = isinstance(size, int) or len(set(size)) == 1
    return square and opened.preprocess.resize_mode == "shortest"


def _tokenizes_as_clip(opened: OpenClipModel) -> bool:
    """Whether captions are cleaned and split as CLIP's, with its vocabulary or the first merges of it."""
    from open_clip import SimpleTokenizer

    is_clips = isinstance(opened.tokenizer, SimpleTokenizer)
    options = opened.config["text_cfg"].get("tokenizer_kwargs") or {}
    usual = "lower" if is_clips else "whitespace"
    if options.get("clean", usual) != "lower":
        return False
    if is_clips:
        return True
    vocabulary = opened.tokenizer.tokenizer.get_vocab()
    if layouts.merges_key(len(vocabulary)) is None:  # all of CLIP's, as a file
        return False
    return clip_tokenizer(vocabulary) is not None


def _convert(opened: OpenClipModel, origin: str) -> Weights:
    """Convert the towers to those of declip."""
    tensors = opened.model.state_dict()
    tensors |= scalars(tensors)
    keys, layout = _keys(opened, tensors)
    recipe = load_recipe("few-clip", {"name": "from-open-clip", **keys})
    return layouts.from_layout(recipe, layout, tensors, origin)


def _keys(opened: OpenClipModel, state: Mapping[str, Tensor]) -> Section:
    """Recipe keys of declip's towers, and the layout of open_clip's tensors."""
    tower = opened.model.visual
    activation = "quick_gelu" if opened.config.get("quick_gelu") else "gelu"
    if hasattr(tower, "trunk"):
        image = {"image.model": tower.trunk.default_cfg["architecture"]}
        image_layout = layouts.TIMM
    else:
        attention = getattr(tower, "attnpool", None)
        if attention is None:  # a ViT
            attention = tower.transformer.resblocks[0].attn
        image = layouts.image_keys(state, attention.num_heads, activation)
        image_layout = layouts.image_layout(state)
    if "text_projection" in state:
        embed_dim = state["text_projection"].shape[1]
        text_layout = layouts.CLIP_TEXT
    else:
        embed_dim = len(state["text_projection.weight"])
        text_layout = layouts.CLIP_TEXT_WITH_BIAS
    size = opened.preprocess.size
    keys = {
        **image,
        **preprocessing_keys(opened, size if isinstance(size, int) else size[0]),
        **layouts.text_keys(state, "", opened.model.transformer.resblocks[0].attn.num_heads),
        "text.activation": activation,
        "embed_dim": embed_dim,
        **bias_key(state),
    }
    return keys, image_layout + text_layout


@torch.no_grad()
def _compare(weights: Weights, opened: OpenClipModel) -> None:
    """Raise a `UserError` if open_clip computes other features."""
    from open_clip.transform import image_transform_v2

    ours = weights.build().eval()
    theirs = opened.model
    transform = image_transform_v2(opened.preprocess, False)
    if opened.resize is not None:
        transform.transforms[0].size = opened.resize
    # Odd sizes, so that resizing and cropping are compared too.
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (57, 91, 3), dtype=np.uint8))
    images = [noise, noise.resize((40, 333))]
    pixels = torch.stack([transform(image) for image in images])
    expected = theirs.encode_image(pixels, normalize=True)
    _refuse_difference("images", ours.encode_image(ours.preprocess(images)), expected)
    tokens = opened.tokenizer(list(CAPTIONS))
    expected = theirs.encode_text(tokens, normalize=True)
    _refuse_difference("captions", ours.encode_text(ours.tokenize(CAPTIONS)), expected)


def _refuse_difference(kind: str, ours: Tensor, theirs: Tensor) -> None:
    difference = float((ours - theirs).abs().max())
    if not difference <= CLOSE:  # NaN too
        raise UserError(f"its features of {kind} differ by {difference:.1e}")


class OpenClip(Format):
    """Folders that open_clip loads as ``local-dir:FOLDER``."""

    name = library = "open_clip"
    linear = True

    def holds(self, model: DualEncoder) -> None:
        """Refuse what open_clip's configuration cannot express."""
        _express(model, HERE)

    def write(self, record: ModelRecord, folder: Path, repo: str | None) -> None:
        """Write open_clip_config.json, weights and, for a vocabulary other than CLIP's, a Hugging Face tokenizer.

        open_clip finds a text encoder by its name on the Hub, by that of the repository, or by a path: that of the
        folder is an argument in the code of the card, so that the folder can be moved.
        """
        model = record.model
        config, tensors = _express(model, repo or HERE)
        text_config = config["model_cfg"]["text_cfg"]
        # open_clip has CLIP's own tokenizer; others are files, as are configurations of text encoders.
        needs_file = "hf_model_name" in text_config or "tokenizer_kwargs" in text_config
        if isinstance(model.text_tower, WrappedTextTower):
            needs_file = model.text_tower.wrapped.tokenizer["definition"] is not None
        encoder = text_encoder(model)
        if encoder is not None:
            write_json(folder / hf_encoder.CONFIG, encoder)
        if needs_file:
            # open_clip reads the tokenizer of a folder from that folder, and of a repository by its name.
            text_config["hf_tokenizer_name"] = repo or "tokenizer.json"
            write_tokenizer(model.tokenizer, folder)
        write_json(folder / CONFIG, config)
        save_tensors(tensors, folder / WEIGHTS, {"format": "pt"})

    def read_back(self, folder: Path) -> ReadBack:
        """Load the folder with open_clip."""
        import open_clip

        model_config = read_json(folder / CONFIG)["model_cfg"]
        encoder = encoder_from(folder, model_config["text_cfg"])
        with uninitialized():
            model: Any = open_clip.create_model(f"{FOLDER}{folder}", weights_only=True, **encoder)
        model.eval()

        def encode_text(tokens: Tensor) -> Tensor:
            if not encoder:  # CLIP's text tower has a mask of one size
                tokens = F.pad(tokens, (0, int(model.context_length) - tokens.shape[1]))
            return model.encode_text(tokens)

        return ReadBack(f"open_clip {open_clip.__version__}", model.encode_image, encode_text)

    def card(self, model: DualEncoder, repo: str | None) -> str:
        """Usage by open_clip."""
        has_encoder = text_encoder(model) is not None
        return render("open_clip.jinja", model=model, repo=repo, encoder=has_encoder)

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
    if given.startswith(hf_encoder.PREFIX):
        return given.removeprefix(hf_encoder.PREFIX)
    return None


def text_encoder(model: DualEncoder) -> Mapping[str, Any] | None:
    """Configuration of the model's Hugging Face text encoder, if it has one."""
    tower = model.text_tower
    if isinstance(tower, HuggingfaceTextTower):
        return tower.encoder_config
    if isinstance(tower, WrappedTextTower):
        return tower.wrapped.encoder
    return None


def _express(model: DualEncoder, repo: str) -> Expressed:
    """Build open_clip's configuration and tensors; `repo` is the repository of the files, or `HERE`."""
    layouts.refuse_one_tower(model)
    if isinstance(model.text_tower, SiglipTextTower):
        raise Refusal(
            "open_clip builds SigLIP's image tower by timm's name, most of them with another activation than "
            "transformers; the formats onnx and huggingface hold its towers, and open_clip those of "
            "--from open_clip:ViT-B-16-SigLIP2/webli"
        )
    encoder_name = hub_encoder(model) or repo
    # Towers of open_clip go back as they came; CLIP's are renamed.
    if isinstance(model.text_tower, WrappedTextTower):
        config, tensors = _express_wrapped(model, model.text_tower.wrapped, encoder_name)
    else:
        config, tensors = _express_renamed(model, encoder_name)
    return {"model_cfg": config, "preprocess_cfg": layouts.preprocess_config(model)}, tensors


def _express_renamed(model: DualEncoder, encoder_name: str) -> Expressed:
    """CLIP's text tower or an encoder of transformers, with CLIP's image tower or a timm model."""
    recipe = model.recipe
    keys = layouts.clip_keys(model.image_tower)
    if isinstance(model.text_tower, HuggingfaceTextTower):
        activation = layouts.activation_of(keys) if keys else "gelu"
        text_config, text = _text_encoder(model.text_tower, encoder_name)
    else:
        activation = recipe.text.activation
        text_config, text = _text_config(model)
    vision_config, visual = _vision_config(model, keys, activation)
    config = {
        "embed_dim": recipe.embed_dim,
        "quick_gelu": activation == "quick_gelu",
        "vision_cfg": {"image_size": recipe.image.size, **vision_config},
        "text_cfg": text_config,
    }
    if model.logit_bias is not None:
        config["init_logit_bias"] = model.logit_bias.item()
    state = all_but(hf_encoder.ENTRY, model.state_dict())
    return config, (visual + text).write(state)


def _express_wrapped(model: DualEncoder, stored: WrappedOpenClip, encoder_name: str) -> Expressed:
    """Towers of open_clip."""
    image: Any = model.image_tower
    text: Any = model.text_tower
    tensors = add_prefix(VISUAL, library_state(image, image.state_dict()))
    tensors |= add_prefix(TEXTUAL, library_state(text, text.state_dict()))
    tensors |= only("logit_", model.state_dict())
    config = copy.deepcopy(dict(stored.config)) | {"custom_text": True}
    if stored.encoder is not None:
        config["text_cfg"] |= {"hf_model_name": encoder_name, "hf_model_pretrained": False}
    if model.logit_bias is not None:
        config.setdefault("init_logit_bias", -10)
    vision = config["vision_cfg"]
    vision["image_size"] = model.preprocessor.size
    if vision.get("timm_proj") == "none" and isinstance(image.proj, nn.Linear):  # by a fit
        vision |= {"timm_proj": "linear", "timm_proj_bias": image.proj.bias is not None}
    for section in ("vision_cfg", "text_cfg"):
        config[section].pop("output_tokens", None)
    return config, tensors


def _text_config(model: DualEncoder) -> Section:
    """CLIP's text tower."""
    tower = layouts.clip_text_tower(model)
    text = model.recipe.text
    config: dict[str, Any] = {
        "context_length": text.context_length,
        "width": text.width,
        "heads": text.heads,
        "layers": text.layers,
        "vocab_size": model.tokenizer.vocabulary - 1,
        "proj_bias": text.projection_bias,
    }
    if text.bpe_merges is not None:
        config["tokenizer_kwargs"] = {"clean": "lower"}
    if tower.text_projection.bias is None:
        return config, layouts.CLIP_TEXT
    return config, layouts.CLIP_TEXT_WITH_BIAS


def _text_encoder(tower: HuggingfaceTextTower, name: str) -> Section:
    """A text encoder of transformers, with its configuration on the Hub or in the folder, `HERE`."""
    kind = tower.encoder_config["model_type"]
    has_bias = tower.text_projection.bias is not None
    if kind not in ENCODERS or tower.pooling not in POOLERS or has_bias:
        raise Refusal(
            f"its text encoder is a {kind}, with {tower.pooling} pooling and {'a' if has_bias else 'no'} bias after "
            f"its projection; open_clip supports {', '.join(ENCODERS)}, text.pooling={' or '.join(POOLERS)}, no bias"
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
    if keys is None:
        return _timm_config(model, layouts.TO_CLIP_VIT)
    sizes = keys["image.model_kwargs"]
    if "depths" in sizes:
        width = round(64 * sizes["width_factor"])
        return {"layers": sizes["depths"], "width": width, "patch_size": None}, layouts.CLIP_RESNET
    own_activation = layouts.activation_of(keys)
    if own_activation != activation:
        return _timm_config(model, f"train with text.activation={own_activation}")
    width = sizes["embed_dim"]
    config = {
        "layers": sizes["depth"],
        "width": width,
        "head_width": width // sizes["num_heads"],
        "patch_size": sizes["patch_size"],
        "mlp_ratio": sizes["mlp_ratio"],
    }
    return config, layouts.CLIP_VIT


def _timm_config(model: DualEncoder, way_out: str) -> Section:
    """A timm model by name, or a `Refusal` with a way out if that is another network."""
    name = model.recipe.image.model
    difference = _difference_to_timm(model.image_tower, name)
    if difference:
        raise Refusal(
            "its image tower is neither CLIP's ViT with the activation of the text tower nor CLIP's ResNet, and "
            f"open_clip builds other towers by timm's name, which is another network than '{name}' at "
            f"{model.preprocessor.size} px ({difference}); {way_out}"
        )
    config = {
        "timm_model_name": name,
        "timm_pool": "",
        "timm_proj": "linear",
        "timm_proj_bias": model.image_tower.proj.bias is not None,
    }
    return config, layouts.TIMM


def _difference_to_timm(tower: ImageTower, name: str) -> str | None:
    """The first difference of a tower from timm's model of a name, None if there is none."""
    import timm

    # open_clip does not import models that others registered
    if not timm.is_model(name) or not timm.model_entrypoint(name).__module__.startswith("timm."):
        return "timm does not know it"
    with torch.device("meta"), uninitialized():
        trunk = timm.create_model(name, num_classes=0)
    own = tower.trunk.state_dict() | add_prefix("norm.", tower.norm.state_dict())
    return first_difference(trunk.state_dict(), own)
