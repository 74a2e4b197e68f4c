"""ONNX: a file for each tower, written by torch's exporter, with preprocessing and tokenizer next to them.

``image.onnx``: pixel_values (batch, 3, S, S) float32, normalized → image_embeds (batch, d) float32 of length 1.
``text.onnx``: input_ids (batch, length) int64, length at most the context, padding after the end token → text_embeds
(batch, d) float32 of length 1. Batch and length are free. ``declip_onnx.json`` says how images and captions become
these inputs, and ``tokenizer.json`` is the tokenizer.
"""

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from declip.errors import UserError
from declip.interchange.foreign import Reread
from declip.interchange.tokenizer_files import backend
from declip.interchange.weights import one_line
from declip.models.dual_encoder import DualEncoder
from declip.models.no_text import has_text

OPSET = 18
IMAGE, TEXT, ABOUT, TOKENIZER = "image.onnx", "text.onnx", "declip_onnx.json", "tokenizer.json"
ROWS, LENGTH = 2, 4
"""Sizes of the example that is traced: a size of 1 would be taken as fixed."""

IMAGE_USAGE = """
import json
import numpy as np, onnxruntime
from PIL import Image
from tokenizers import Tokenizer

about = json.load(open("declip_onnx.json"))
picture = Image.new("RGB", (320, 240), "orange")  # your image
size = about["image"]["size"]
width, height = (int(size * side / min(picture.size)) for side in picture.size)
left, top = round((width - size) / 2), round((height - size) / 2)
pixels = picture.convert("RGB").resize((width, height), Image.BICUBIC).crop((left, top, left + size, top + size))
pixels = (np.asarray(pixels, np.float32) / 255 - about["image"]["mean"]) / about["image"]["std"]
pixels = pixels.transpose(2, 0, 1)[None].astype(np.float32)
image = onnxruntime.InferenceSession("image.onnx").run(None, {"pixel_values": pixels})[0]
"""
USAGE = (
    IMAGE_USAGE
    + """tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a caption is words like any others
tokenizer.enable_padding(pad_id=about["text"]["padding"])
tokens = np.array([each.ids for each in tokenizer.encode_batch(["an orange square", "a cat"])])
texts = onnxruntime.InferenceSession("text.onnx").run(None, {"input_ids": tokens})[0]
logits = about["logit_scale"] * image @ texts.T
print(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())
"""
)


class Encode(nn.Module):
    """One of a model's two encoders as a module."""

    def __init__(self, model: DualEncoder, encode: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.encode = model, encode
        self.eval()

    def forward(self, batch: Tensor) -> Tensor:
        """Encode."""
        return self.encode(batch)


def write(model: DualEncoder, folder: Path) -> None:
    """Write image.onnx and declip_onnx.json, and for the text tower text.onnx and tokenizer.json."""
    size, context = model.preprocessor.size, getattr(model.tokenizer, "context", None)
    pixels = torch.zeros(ROWS, 3, size, size, device=model.device)
    batch = torch.export.Dim("batch")
    _export(Encode(model, model.encode_image), pixels, {0: batch}, ("pixel_values", "image_embeds"), folder / IMAGE)
    if has_text(model):
        tokens = torch.zeros(ROWS, LENGTH, dtype=torch.int64, device=model.device)
        length = torch.export.Dim("length", max=context)
        tokens[:, -1] = model.tokenizer.end
        names = ("input_ids", "text_embeds")
        _export(Encode(model, model.encode_text), tokens, {0: batch, 1: length}, names, folder / TEXT)
        backend(model.tokenizer).save(str(folder / TOKENIZER))
    (folder / ABOUT).write_text(json.dumps(_about(model, context), indent=2) + "\n", encoding="utf-8")


def reread(folder: Path) -> Reread:
    """Load the files with onnxruntime."""
    import onnxruntime

    def session(name: str, given: str) -> Callable[[Tensor], Tensor]:
        opened = onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
        return lambda batch: torch.from_numpy(opened.run(None, {given: batch.numpy()})[0])

    text = session(TEXT, "input_ids") if (folder / TEXT).is_file() else None
    return Reread(f"onnxruntime {onnxruntime.__version__}", session(IMAGE, "pixel_values"), text)


def _export(module: Encode, example: Tensor, sizes: dict[int, Any], names: tuple[str, str], path: Path) -> None:
    try:
        with _quietly():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                dynamic_shapes=(sizes,),
                input_names=[names[0]],
                output_names=[names[1]],
                opset_version=OPSET,
                verbose=False,
            )
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


def _about(model: DualEncoder, context: int | None) -> dict[str, Any]:
    preprocessor = model.preprocessor
    about: dict[str, Any] = {
        "opset": OPSET,
        "embed_dim": model.image_tower.proj.out_features,
        "logit_scale": model.logit_scale.exp().item(),
        "image": {
            "file": IMAGE,
            "input": "pixel_values",
            "output": "image_embeds",
            "size": preprocessor.size,
            "resize": "shorter side to size, bicubic (PIL); the longer side is rounded down",
            "crop": "center; half a pixel is rounded to even",
            "mode": "RGB, transparency over white",
            "scale": "1/255",
            "mean": [round(value, 8) for value in preprocessor.mean.tolist()],
            "std": [round(value, 8) for value in preprocessor.std.tolist()],
        },
    }
    if context is not None:
        ids = {name: getattr(model.tokenizer, name) for name in ("start", "end")}
        about["text"] = {
            "file": TEXT,
            "input": "input_ids",
            "output": "text_embeds",
            "tokenizer": TOKENIZER,
            "context": context,
            **ids,
            "padding": model.tokenizer.padding,
        }
    return about


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the exporter's notes on what it translates from the terminal."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
