"""Tiny models of open_clip with random weights: one for each class of tower in folders, and CLIP's own in files."""

import copy
import json
import shutil

import timm
import torch
from safetensors.torch import save_file
from timm.models import register_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from conftest import Lazy
from interchange import towers
from text_encoders import bert, roberta

open_clip = Lazy("open_clip")
CAPTIONS = [
    "a red circle",
    "Square painted in BLUE on white_paper!",
    "it&#39;s two cats,  asleep",
    "",
]
TEXT = {"context_length": 12, "width": 32, "heads": 2, "layers": 2}
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SIZES = {
    "vit_base_patch16_siglip_224": SMALL,
    "eva02_base_patch16_clip_224": {**SMALL, "ref_feat_shape": (4, 4)},
    "vit_pe_core_tiny_patch16_384": {**SMALL, "ref_feat_shape": (4, 4), "attn_pool_num_heads": 2},
    "fastvit_mci0": {"layers": (1, 1, 1, 1), "embed_dims": (8, 8, 16, 32), "pos_embs": None},
}


def _register(base):
    """Let timm know a tower in a small size."""

    def build(pretrained=False, **options):
        for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            options.pop(name, None)
        return timm.create_model(base, **{**SIZES[base], **options})

    build.__name__ = f"declip_test_{base}"
    if not timm.is_model(build.__name__):
        register_model(build)


for name in SIZES:
    _register(name)


def _timm(base, pool, proj):
    name = f"declip_test_{base}"
    return {"image_size": 32, "timm_model_name": name, "timm_pool": pool, "timm_proj": proj}


def _config(vision, text=TEXT, **others):
    return {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, **others}


VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
POOLED = {
    "attentional_pool": True,
    "attn_pooler_heads": 2,
    "attn_pooler_queries": 4,
    "output_tokens": True,
}
SIGLIP_TEXT = {
    **TEXT, "vocab_size": 60, "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "hf_tokenizer_name": "x",
    "tokenizer_kwargs": {"clean": "canonicalize"}, "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"},
}  # fmt: skip
COCA_TEXT = {**TEXT, "embed_cls": True, "output_tokens": True}
BERT = {
    "context_length": 16, "hf_tokenizer_name": "x", "hf_proj_type": "mlp",
    "hf_pooler_type": "cls_last_hidden_state_pooler",
}  # fmt: skip
ROBERTA = {"context_length": 16, "hf_tokenizer_name": "x", "hf_pooler_type": "mean_pooler"}
OPEN_CLIP = {
    "siglip2": _config(
        _timm("vit_base_patch16_siglip_224", "map", "none"),
        SIGLIP_TEXT,
        embed_dim=32,
        init_logit_bias=-10,
    ),
    "mobileclip2": _config(_timm("fastvit_mci0", "avg", None), {**TEXT, "no_causal_mask": True}),
    "eva": _config(_timm("eva02_base_patch16_clip_224", "token", None)),
    "pe-core": _config(_timm("vit_pe_core_tiny_patch16_384", "map", None)),
    "coca": _config({**VIT, **POOLED}, COCA_TEXT, multimodal_cfg={**TEXT, "attn_pooler_heads": 2}),
    "biomedclip": _config(_timm("eva02_base_patch16_clip_224", "", "linear"), BERT),
    "xlm-roberta": _config(VIT, ROBERTA),
}
ENCODERS = {"biomedclip": bert, "xlm-roberta": lambda folder: roberta(folder, kind="XLMRoberta")}
PREPARED = {
    "siglip2": {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "resize_mode": "squash",
    },
    "mobileclip2": {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear"},
    "pe-core": {"interpolation": "bilinear", "resize_mode": "squash"},
}
FAMILIES = tuple(OPEN_CLIP)


def saved(family, folder):
    """Write a family's folder; give the name by which it is loaded, and the library's model."""
    torch.manual_seed(5)
    config = copy.deepcopy(OPEN_CLIP[family])
    folder.mkdir(parents=True)
    if family in ENCODERS:
        config["text_cfg"]["hf_model_name"] = str(ENCODERS[family](folder / "encoder"))
        for file in (folder / "encoder").iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, folder)
    elif "hf_tokenizer_name" in config["text_cfg"]:
        unigram(folder)
    kind = open_clip.CoCa if family == "coca" else open_clip.CustomTextCLIP
    model = towers.spread(
        kind(**{**config, "text_cfg": {**config["text_cfg"], "hf_model_pretrained": False}})
    )
    _save(model, folder, {"custom_text": True, **config}, PREPARED.get(family, {}))
    return f"open_clip:local-dir:{folder}", model


def _save(model, folder, config, prepared):
    stored = {"model_cfg": config, "preprocess_cfg": prepared}
    (folder / "open_clip_config.json").write_text(json.dumps(stored), encoding="utf-8")
    weights_file(model, folder / "open_clip_model.safetensors")


def unigram(folder):
    """A unigram tokenizer like SigLIP's, which puts its end behind a text and pads with another id."""
    library = Tokenizer(models.Unigram())
    library.normalizer = normalizers.Replace(" ", "▁")
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<pad>", "<eos>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=specials, unk_token="<unk>", show_progress=False
    )
    library.train_from_iterator(
        ["a red circle square painted in blue on white paper cats asleep its two"] * 3, trainer
    )
    library.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    library.save(str(folder / "tokenizer.json"))
    names = {f"{special[1:-1]}_token": special for special in specials}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def features(model, pixels, tokens):
    """The library's own features of images and captions."""
    with torch.no_grad():
        return model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)


SHORT = {**TEXT, "layers": 1}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
CONVNEXT = {
    "image_size": 160,
    "timm_model_name": "test_convnext",
    "timm_pool": "",
    "timm_proj": "linear",
}
CONFIGS = {
    "tiny-vit": _config({**VIT, "layers": 1}, SHORT),
    "tiny-resnet": _config(RESNET, SHORT),
    "tiny-convnext": _config(CONVNEXT, SHORT),
}
WORDS = ["a red circle", "Two GREEN squares, on white!", "", "nought " * 40]


def random_model(name, seed=5):
    """open_clip's own model in evaluation mode, no weight left at its start."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return towers.spread(open_clip.create_model(name))


def weights_file(model, path):
    """Its weights in a file: bare tensors, or a checkpoint of open_clip's training."""
    state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(
            {
                "epoch": 1,
                "state_dict": {f"module.{name}": tensor for name, tensor in state.items()},
            },
            path,
        )
    return path


def folder_of(model, folder, name):
    """A folder of the schema local-dir."""
    folder.mkdir()
    _save(model, folder, CONFIGS[name], {})
    return folder


def pictures():
    """Four wide and high ones."""
    return towers.pictures()[1:5]


def same(model, theirs):
    """Whether a model of declip has the features of open_clip's, for its pixels and open_clip's tokens."""
    pixels, tokens = model.preprocess(pictures()), open_clip.tokenize(WORDS, context_length=12)
    with torch.no_grad():
        images = model.encode_image(pixels) - theirs.encode_image(pixels, normalize=True)
        texts = model.encode_text(model.tokenize(WORDS)) - theirs.encode_text(
            tokens, normalize=True
        )
    return bool(max(images.abs().max(), texts.abs().max()) <= 1e-6)
