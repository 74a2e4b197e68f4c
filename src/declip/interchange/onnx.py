"""ONNX export: one file per tower, with preprocessing and tokenizer next to them."""

import io
import json
import os
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from declip.data.text.tokenizer import WrappedTokenizer
from declip.errors import UserError
from declip.interchange.layouts import Refusal, Reread, backend
from declip.io.progress import quiet
from declip.io.text import one_line
from declip.models.dual_encoder import DualEncoder, has_text

LIBRARY = "onnx"
OPSET = 18
IMAGE, TEXT, ABOUT, TOKENIZER = "image.onnx", "text.onnx", "declip_onnx.json", "tokenizer.json"
ROWS, LENGTH = 2, 4
"""Sizes of the traced example; a size of 1 would be exported as fixed."""


class TowerModule(nn.Module):
    """One of a model's two encoders as a module."""

    def __init__(self, model: DualEncoder, encode: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.forward = model, encode
        self.eval()


def express(model: DualEncoder) -> None:
    """Accept every tower; `write` fails if torch cannot trace it."""
    if isinstance(model.tokenizer, WrappedTokenizer) and model.tokenizer.stored["zeroed"] is not None:
        raise Refusal("its tokenizer replaces one id by 0, which tokenizer.json cannot represent")


def write(model: DualEncoder, folder: Path) -> None:
    """Write image.onnx, text.onnx, tokenizer.json and declip_onnx.json, which describes their inputs.

    Images are (batch, 3, S, S) float32, normalized; texts (batch, length) int64 with padding after the end, length at
    most the context. Outputs are (batch, d) float32 of length 1. Batch and length are dynamic.
    """
    assert model.recipe is not None, "a model without one was refused"
    express(model)
    image, batch, squash = model.recipe.image, torch.export.Dim("batch"), model.preprocessor.squash
    # Inputs and preprocessing, for readers without declip
    about: dict[str, Any] = {
        "opset": OPSET,
        "embed_dim": model.recipe.embed_dim,
        "logit_scale": model.logit_scale.exp().item(),
        "logit_bias": None if model.logit_bias is None else model.logit_bias.item(),
        "image": {
            **{"file": IMAGE, "input": "pixel_values", "output": "image_embeds"},
            **{"size": image.size, "squash": squash, "interpolation": model.preprocessor.filter.name.lower()},
            "resize": "both sides to size" if squash else "shorter side to size; the longer side is rounded down",
            "crop": "none" if squash else "center; half a pixel is rounded to even",
            "mode": "RGB, transparency over white",
            **{"scale": "1/255", "mean": list(image.mean), "std": list(image.std)},
        },
    }
    # Image tower
    pixels = torch.zeros(ROWS, 3, image.size, image.size, device=model.device)
    _export(TowerModule(model, model.encode_image), pixels, {0: batch}, folder, about["image"])
    if has_text(model):
        # Text tower, with a tokenizer of the `tokenizers` library
        tokenizer = model.tokenizer
        names = {"file": TEXT, "input": "input_ids", "output": "text_embeds", "tokenizer": TOKENIZER}
        about["text"] = names | {name: getattr(tokenizer, name) for name in ("context", "start", "end", "padding")}
        clip = getattr(tokenizer, "clip", None) is not None  # whose tokenizer.json includes the cleaning
        about["text"]["clean"] = "" if clip else getattr(tokenizer, "stored", {}).get("clean", "")
        tokens = torch.zeros(ROWS, LENGTH, dtype=torch.int64, device=model.device)
        tokens[:, -1] = tokenizer.end
        sizes = {0: batch, 1: torch.export.Dim("length", max=tokenizer.context)}
        _export(TowerModule(model, model.encode_text), tokens, sizes, folder, about["text"])
        backend(tokenizer).save(str(folder / TOKENIZER))
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def reread(folder: Path) -> Reread:
    """Load the files with onnxruntime."""
    import onnxruntime

    def session(name: str, given: str) -> Callable[[Tensor], Tensor]:
        opened = onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
        return lambda batch: torch.from_numpy(opened.run(None, {given: batch.numpy()})[0])

    text = session(TEXT, "input_ids") if (folder / TEXT).is_file() else None
    return Reread(f"onnxruntime {onnxruntime.__version__}", session(IMAGE, "pixel_values"), text)


def _export(module: nn.Module, example: Tensor, sizes: dict[int, Any], folder: Path, about: dict[str, Any]) -> None:
    path = folder / about["file"]
    options: dict[str, Any] = {f"{kind}_names": [about[kind]] for kind in ("input", "output")}
    options |= {"dynamo": True, "dynamic_shapes": (sizes,), "opset_version": OPSET, "verbose": False}
    unchecked = mock.patch.dict(os.environ, TRANSFORMERS_DISABLE_TORCH_CHECK="1")  # ONNX has no operator for its checks
    try:
        # The exporter warns and prints.
        with warnings.catch_warnings(action="ignore"), quiet("torch.onnx"), redirect_stdout(io.StringIO()), unchecked:
            program = torch.onnx.export(module, (example,), **options)
            assert program is not None
            program.save(path)
    except ImportError as error:
        raise UserError(f"Exporting onnx needs {error.name}. Install it: pip install 'declip[onnx]'.") from error
    except OSError:
        raise
    except Exception as error:  # the exporter has its own
        reason = one_line(error, 200)
        raise UserError(f"torch cannot export this tower to {path.name}: {reason} Use safetensors.") from error
