"""Configuration of models whose towers are open_clip's or transformers' own modules, kept with their weights.

No code from a configuration is run, and no file or address in it is opened.
"""

import json
import re
import tempfile
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from declip.data.text.wrapped_tokenizer import WrappedTokenizer
from declip.errors import UserError


@dataclass(frozen=True)
class WrappedModel:
    """A model of another library without its weights."""

    library: str  # "open_clip" or "transformers"
    config: Mapping[str, Any]  # open_clip's "model_cfg", or transformers' config.json
    image: Mapping[str, Any]  # "interpolation" and "squash", see `declip.data.images.preprocess.Preprocess`
    tokenizer: Mapping[str, Any]  # arguments of `WrappedTokenizer`
    encoder: Mapping[str, Any] | None = None  # configuration of a Hugging Face text encoder inside open_clip's model

    def to_tensor(self) -> Tensor:
        """All of it as bytes of JSON, (n,) uint8."""
        return torch.frombuffer(bytearray(json.dumps(asdict(self)), "utf-8"), dtype=torch.uint8)

    @classmethod
    def from_tensor(cls, stored: Tensor) -> "WrappedModel":
        """Read the result of `to_tensor`; raises exceptions of any kind where the bytes are something else."""
        return cls(**json.loads(stored.numpy().tobytes()))

    def with_context(self, length: int) -> "WrappedModel":
        """Give the same model for captions of another length in tokens."""
        if length == self.tokenizer["context"]:
            return self
        keys = {"open_clip": ("text_cfg", "context_length"), "transformers": ("text_config", "max_position_embeddings")}
        section, key = keys[self.library]
        config = {**self.config, section: {**self.config[section], key: length}}
        return replace(self, config=config, tokenizer={**self.tokenizer, "context": length})

    @property
    def sections(self) -> list[Any]:
        """Sections of the configuration that describe towers."""
        return [{name: part for name, part in self.config.items() if name.endswith(("_cfg", "_config"))}, self.encoder]

    @property
    def kinds(self) -> tuple[str, str]:
        """Kinds of the image module (timm, resnet, vit, siglip) and of the text module (clip, hf, siglip)."""
        if self.library == "transformers":
            return "siglip", "siglip"
        vision, text = self.config["vision_cfg"], self.config["text_cfg"]
        resnet = isinstance(vision.get("layers"), list | tuple)
        image = "timm" if vision.get("timm_model_name") else "resnet" if resnet else "vit"
        return image, "hf" if self.encoder is not None or text.get("hf_model_name") else "clip"

    def build_tokenizer(self) -> WrappedTokenizer:
        """Build the tokenizer."""
        return WrappedTokenizer(**self.tokenizer)

    def build(self, size: int) -> tuple[nn.Module, nn.Module]:
        """Build the library's image and text modules for an image size, with random weights."""
        try:
            return self._open_clip(size) if self.library == "open_clip" else self._transformers(size)
        except ImportError as error:
            extra = "open_clip" if self.library == "open_clip" else "hf"
            raise UserError(f"This model needs {error.name}. Install it: pip install 'declip[{extra}]'.") from error

    def _open_clip(self, size: int) -> tuple[nn.Module, nn.Module]:
        import timm
        from open_clip import CustomTextCLIP

        config = deepcopy(dict(self.config))
        vision, text = config["vision_cfg"], config["text_cfg"]
        name = vision.get("timm_model_name")
        if name is not None and (":" in name or not timm.is_model(name)):
            raise UserError(f"The configuration names '{name}', which is no model of timm {timm.__version__}.")
        native = vision.get("image_size")
        text.pop("hf_model_name", None)  # it would be looked up, here or on the Hub
        vision |= {"timm_model_pretrained": False} if name else {"image_size": size}
        with tempfile.TemporaryDirectory() as folder:
            if self.encoder is not None:
                (Path(folder) / "config.json").write_text(json.dumps(plain(self.encoder)), encoding="utf-8")
                text |= {"hf_model_name": folder, "hf_model_pretrained": False}
            model: Any = CustomTextCLIP(config["embed_dim"], vision, text, bool(config.get("quick_gelu")))
        if name and size != native:
            model.visual.set_input_size(size)
        for tower in (model.visual, model.text):
            if hasattr(tower, "output_tokens"):
                tower.output_tokens = True
        return model.visual, model.text

    def _transformers(self, size: int) -> tuple[nn.Module, nn.Module]:
        import transformers

        config = plain(self.config)
        vision = transformers.SiglipVisionConfig(**{**config["vision_config"], "image_size": size})
        text = transformers.SiglipTextConfig(**config["text_config"])
        options: Any = {"dtype": torch.float32, "attn_implementation": "sdpa"}
        image_module = transformers.SiglipVisionModel._from_config(vision, **options)
        return image_module, transformers.SiglipTextModel._from_config(text, **options)


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers, texts and sections of a configuration, without the keys by which transformers reads files or code."""
    kept = bool | int | float | str | list | Mapping | None
    left_out = "_|auto_map|quantization_config|.*attn_implementation"
    return {
        name: plain(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if isinstance(name, str) and isinstance(value, kept) and not re.match(left_out, name)
    }
