"""Tiny models of open_clip with random weights: one for each class of tower in folders, and CLIP's own in files."""

import json

import open_clip
import timm
import torch
from safetensors.torch import save_file
from timm.models import register_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from interchange import towers
from text_encoders import bert, roberta

CAPTIONS = ["a red circle", "Square painted in BLUE on white_paper!", "it&#39;s two cats,  asleep", ""]
TEXT = {"context_length": 12, "width": 32, "heads": 2, "layers": 2}
SIZE = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def _registered(base, **sizes):
    def build(pretrained=False, **options):
        for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            options.pop(name, None)
        return timm.create_model(base, **{**sizes, **options})

    build.__name__ = f"declip_test_{base}"
    return register_model(build) if not timm.is_model(build.__name__) else build


for given in (
    ("vit_base_patch16_siglip_224", {**SIZE, "img_size": 32, "patch_size": 8}),
    ("eva02_base_patch16_clip_224", {**SIZE, "img_size": 32, "patch_size": 8, "ref_feat_shape": (4, 4)}),
    (
        "vit_pe_core_tiny_patch16_384",
        {**SIZE, "img_size": 32, "patch_size": 8, "ref_feat_shape": (4, 4), "attn_pool_num_heads": 2},
    ),
    ("fastvit_mci0", {"layers": (1, 1, 1, 1), "embed_dims": (8, 8, 16, 32), "pos_embs": None}),
):
    _registered(given[0], **given[1])


def _timm(base, pool, proj):
    name = f"declip_test_{base}"
    return {"image_size": 32, "timm_model_name": name, "timm_pool": pool, "timm_proj": proj}


VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
SIGLIP_TEXT = {
    **TEXT, "vocab_size": 60, "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "hf_tokenizer_name": "x",
    "tokenizer_kwargs": {"clean": "canonicalize"}, "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"},
}  # fmt: skip
OPEN_CLIP = {
    "siglip2": {
        "embed_dim": 32, "init_logit_bias": -10, "custom_text": True, "text_cfg": SIGLIP_TEXT,
        "vision_cfg": _timm("vit_base_patch16_siglip_224", "map", "none"),
    },
    "mobileclip2": {
        "embed_dim": 16, "custom_text": True, "text_cfg": {**TEXT, "no_causal_mask": True},
        "vision_cfg": _timm("fastvit_mci0", "avg", None),
    },
    "eva": {
        "embed_dim": 16, "custom_text": True, "text_cfg": TEXT,
        "vision_cfg": _timm("eva02_base_patch16_clip_224", "token", None),
    },
    "pe-core": {
        "embed_dim": 16, "custom_text": True, "text_cfg": TEXT,
        "vision_cfg": _timm("vit_pe_core_tiny_patch16_384", "map", None),
    },
    "coca": {
        "embed_dim": 16, "custom_text": True,
        "vision_cfg": {
            **VIT, "attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4, "output_tokens": True,
        },
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2},
    },
    "biomedclip": {
        "embed_dim": 16,
        "vision_cfg": _timm("eva02_base_patch16_clip_224", "", "linear"),
        "text_cfg": {
            "context_length": 16, "hf_tokenizer_name": "x", "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
        },
    },
    "xlm-roberta": {
        "embed_dim": 16, "vision_cfg": VIT,
        "text_cfg": {"context_length": 16, "hf_tokenizer_name": "x", "hf_pooler_type": "mean_pooler"},
    },
}  # fmt: skip
ENCODERS = {"biomedclip": bert, "xlm-roberta": lambda folder: roberta(folder, kind="XLMRoberta")}
SIGLIP_IMAGES = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
PREPARED = {
    "siglip2": SIGLIP_IMAGES,
    "mobileclip2": {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear"},
    "pe-core": {"interpolation": "bilinear", "resize_mode": "squash"},
}
FAMILIES = tuple(OPEN_CLIP)


def _spread(model):
    """Leave no weight at its start, so that all matter."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.nan_to_num_()
            weight.add_(0.05 * torch.randn_like(weight))
        for buffer_name, buffer in model.named_buffers():
            if "running" in buffer_name:
                buffer.add_(0.3 * torch.rand_like(buffer))
    return model.eval()


def saved(family, folder):
    """Write a family's folder; give the name by which it is loaded, and the library's model."""
    torch.manual_seed(5)
    config = json.loads(json.dumps(OPEN_CLIP[family]))
    folder.mkdir(parents=True)
    if family in ENCODERS:
        ENCODERS[family](folder / "encoder")
        for file in ("config.json", *(f.name for f in (folder / "encoder").glob("*token*"))):
            (folder / file).write_bytes((folder / "encoder" / file).read_bytes())
        if family == "biomedclip":
            (folder / "vocab.txt").write_bytes((folder / "encoder" / "vocab.txt").read_bytes())
        config["text_cfg"]["hf_model_name"] = str(folder / "encoder")
    elif "hf_tokenizer_name" in config["text_cfg"]:
        _tokenizer(folder, "PreTrainedTokenizerFast")
    arguments = {key: value for key, value in config.items() if key != "custom_text"}
    kind = open_clip.CoCa if family == "coca" else open_clip.CustomTextCLIP
    text = {**arguments["text_cfg"], "hf_model_pretrained": False}
    model = _spread(kind(**{**arguments, "text_cfg": text}))
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    stored = {"model_cfg": config, "preprocess_cfg": PREPARED.get(family, {})}
    (folder / "open_clip_config.json").write_text(json.dumps(stored), encoding="utf-8")
    return f"open_clip:local-dir:{folder}", model


def _tokenizer(folder, kind):
    """A unigram tokenizer like SigLIP's, which puts its end behind a text and pads with another id."""
    library = Tokenizer(models.Unigram())
    library.normalizer = normalizers.Replace(" ", "▁")
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<pad>", "<eos>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=specials, unk_token="<unk>", show_progress=False)
    library.train_from_iterator(["a red circle square painted in blue on white paper cats asleep its two"] * 3, trainer)
    library.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    library.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": kind, "pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def features(model, pixels, tokens):
    """The library's own features of images and captions."""
    with torch.no_grad():
        return model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)


SHORT = {**TEXT, "layers": 1}
CONFIGS = {
    "tiny-vit": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": SHORT,
    },
    "tiny-resnet": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": SHORT,
    },
    "tiny-convnext": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"},
        "text_cfg": SHORT,
    },
}  # fmt: skip
WORDS = ["a red circle", "Two GREEN squares, on white!", "", "nought " * 40]


def random_model(name, seed=5):
    """open_clip's own model in evaluation mode, no weight left at its start."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.create_model(name)
        return _spread(model)


def weights_file(model, path):
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


def folder_of(model, folder, name):
    """A folder of the schema local-dir."""
    folder.mkdir()
    config = {"model_cfg": CONFIGS[name], "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    weights_file(model, folder / "open_clip_model.safetensors")
    return folder


def pictures():
    """Four wide and high ones."""
    return towers.pictures()[1:5]


def same(model, theirs):
    """Whether a model of declip has the features of open_clip's, for its pixels and open_clip's tokens."""
    pixels, tokens = model.preprocess(pictures()), open_clip.tokenize(WORDS, context_length=12)
    with torch.no_grad():
        images = model.encode_image(pixels) - theirs.encode_image(pixels, normalize=True)
        texts = model.encode_text(model.tokenize(WORDS)) - theirs.encode_text(tokens, normalize=True)
    return bool(max(images.abs().max(), texts.abs().max()) <= 1e-6)
