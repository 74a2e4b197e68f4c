"""ONNX: a file for each tower, written by torch's exporter, with preprocessing and tokenizer next to them."""

import io
import json
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from declip.errors import UserError
from declip.interchange.files import quiet
from declip.interchange.foreign import Refusal, Reread
from declip.interchange.tokenizer_files import backend
from declip.interchange.weights import one_line
from declip.models.dual_encoder import DualEncoder, has_text
from declip.models.wrapped_towers import WrappedTextTower

LIBRARY = "onnx"
OPSET = 18
IMAGE, TEXT, ABOUT, TOKENIZER = "image.onnx", "text.onnx", "declip_onnx.json", "tokenizer.json"
ROWS, LENGTH = 2, 4
"""Sizes of the example that is traced: a size of 1 would be taken as fixed."""


class TowerModule(nn.Module):
    """One of a model's two encoders as a module."""

    def __init__(self, model: DualEncoder, encode: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.forward = model, encode
        self.eval()


def express(model: DualEncoder) -> None:
    """Every model is tried; what torch cannot trace fails while it is written."""
    if isinstance(model.text_tower, WrappedTextTower):
        raise Refusal("its towers are another library's")


def write(model: DualEncoder, folder: Path, precision: str = "fp32") -> None:
    """Write image.onnx, text.onnx, tokenizer.json and declip_onnx.json, which says how their inputs are made.

    Images are (batch, 3, S, S) float32, normalized; texts (batch, length) int64 with padding after the end, length at
    most the context. Outputs are (batch, d) float32 of length 1. Batch and length are free.
    """
    assert model.recipe is not None, "a model without one was refused"
    image, batch = model.recipe.image, torch.export.Dim("batch")
    about: dict[str, Any] = {
        "opset": OPSET,
        "precision": precision,
        "embed_dim": model.recipe.embed_dim,
        "logit_scale": model.logit_scale.exp().item(),
        "image": {
            **{"file": IMAGE, "input": "pixel_values", "output": "image_embeds"},
            "size": image.size,
            "resize": "shorter side to size, bicubic (PIL); the longer side is rounded down",
            "crop": "center; half a pixel is rounded to even",
            "mode": "RGB, transparency over white",
            **{"scale": "1/255", "mean": list(image.mean), "std": list(image.std)},
        },
    }
    pixels = torch.zeros(ROWS, 3, image.size, image.size, device=model.device)
    _export(TowerModule(model, model.encode_image), pixels, {0: batch}, folder, about["image"])
    if has_text(model):
        tokenizer = model.tokenizer
        names = {"file": TEXT, "input": "input_ids", "output": "text_embeds", "tokenizer": TOKENIZER}
        about["text"] = names | {name: getattr(tokenizer, name) for name in ("context", "start", "end", "padding")}
        tokens = torch.zeros(ROWS, LENGTH, dtype=torch.int64, device=model.device)
        tokens[:, -1] = tokenizer.end
        sizes = {0: batch, 1: torch.export.Dim("length", max=tokenizer.context)}
        _export(TowerModule(model, model.encode_text), tokens, sizes, folder, about["text"])
        backend(tokenizer).save(str(folder / TOKENIZER))
    for path in folder.glob("*.onnx") if precision != "fp32" else ():
        _convert(path, precision)
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _convert(path: Path, precision: str) -> None:
    """Replace a file by the same in another precision; inputs and outputs stay float32."""
    try:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic
        from onnxruntime.transformers.float16 import convert_float_to_float16
    except ImportError as error:
        raise UserError(f"{precision} needs {error.name}. Install it: pip install 'declip[onnx]'.") from error
    try:
        with warnings.catch_warnings(action="ignore"), quiet(""):  # it logs on the root logger
            if precision == "fp16":
                onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True), path)
            else:
                # Convolutions stay float32: quantized as well, EfficientNet's features have cosines of 0.94.
                kinds = ["MatMul", "Gemm", "Gather"]
                quantize_dynamic(path, path, kinds, per_channel=True, weight_type=QuantType.QInt8)
    except OSError:
        raise
    except Exception as error:  # of either library, for operators that it does not know
        raise UserError(f"{path.name} cannot be converted to {precision}: {one_line(error, 200)} Take fp32.") from error


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
    try:
        notes = warnings.catch_warnings(action="ignore")  # on what it translates
        with notes, quiet("torch.onnx"), redirect_stdout(io.StringIO()):
            program = torch.onnx.export(module, (example,), **options)
            assert program is not None
            program.save(path)
    except ImportError as error:
        raise UserError(f"Exporting onnx needs {error.name}. Install it: pip install 'declip[onnx]'.") from error
    except OSError:
        raise
    except Exception as error:  # the exporter has errors of its own for what it cannot trace
        raise UserError(
            f"torch cannot export this tower to {path.name}: {one_line(error, 200)} The format safetensors can hold it."
        ) from error
