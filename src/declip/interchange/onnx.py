"""ONNX export: a folder per tower, with preprocessing or tokenizer, under the names that Immich reads."""

import io
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from declip.data.text.tokenizer import CaptionTokenizer, WrappedTokenizer
from declip.errors import UserError
from declip.interchange.format import Format, ModelRecord, ReadBack, Refusal, render
from declip.interchange.json_files import write_json
from declip.interchange.layouts import preprocess_config
from declip.interchange.tokenizer_files import write_tokenizer
from declip.io.progress import quiet
from declip.io.text import one_line
from declip.models.dual_encoder import DualEncoder

OPSET = 18
VISUAL = "visual"
TEXTUAL = "textual"
MODEL = "model.onnx"
ABOUT = "config.json"
TENSOR_CHECKS = "TRANSFORMERS_DISABLE_TORCH_CHECK"  # variable of transformers
# Sizes of the traced example; a size of 1 would be exported as fixed
ROWS = 2
LENGTH = 4


class Onnx(Format):
    """Folders with an ONNX file per tower, which onnxruntime computes."""

    name = library = "onnx"

    def holds(self, model: DualEncoder) -> None:
        """Refuse tokenizers that tokenizer.json cannot represent."""
        if not model.has_text or not isinstance(model.tokenizer, WrappedTokenizer):
            return
        if model.tokenizer.stored["zeroed"] is not None:
            raise Refusal(
                "its tokenizer replaces one id by 0, which tokenizer.json cannot represent"
            )

    def write(self, record: ModelRecord, folder: Path, repo: str | None) -> None:
        """Write visual/ and textual/, each with a model.onnx, and config.json, which describes them.

        Images are (batch, 3, S, S) float32, normalized; texts (batch, length) int32 with padding after the end, length
        at most the context. Outputs are (batch, d) float32 of length 1. Batch and length are dynamic.
        """
        model = record.model
        prepared = preprocess_config(record.model)
        batch = torch.export.Dim("batch")
        size = model.preprocessor.size
        # Inputs and preprocessing, for readers without declip
        about: dict[str, Any] = {
            "opset": OPSET,
            "embed_dim": model.recipe.embed_dim,
            "logit_scale": model.logit_scale.exp().item(),
            "logit_bias": None if model.logit_bias is None else model.logit_bias.item(),
            "vision_cfg": {"image_size": size, "input": "image", "output": "image_embeds"},
            "preprocess_cfg": prepared,
        }
        # Image tower
        (folder / VISUAL).mkdir()
        pixels = torch.zeros(ROWS, 3, size, size)
        tower = TowerFunction(model.image_tower, model.encode_image)
        _export(tower, pixels, {0: batch}, folder / VISUAL / MODEL, about["vision_cfg"])
        write_json(folder / VISUAL / "preprocess_cfg.json", prepared)
        if model.has_text:
            # Text tower, with a tokenizer of the `tokenizers` library
            tokenizer = model.tokenizer
            about["text_cfg"] = {
                "context_length": tokenizer.context,
                "input": "text",
                "output": "text_embeds",
                "start": tokenizer.start,
                "end": tokenizer.end,
                "padding": tokenizer.padding,
                "tokenizer_kwargs": {"clean": cleaning(tokenizer)},
            }
            (folder / TEXTUAL).mkdir()
            tokens = torch.zeros(ROWS, LENGTH, dtype=torch.int32)
            tokens[:, -1] = tokenizer.end
            sizes = {0: batch, 1: torch.export.Dim("length", max=tokenizer.context)}
            tower = TowerFunction(model.text_tower, lambda tokens: model.encode_text(tokens.long()))
            _export(tower, tokens, sizes, folder / TEXTUAL / MODEL, about["text_cfg"])
            write_tokenizer(tokenizer, folder / TEXTUAL)
        write_json(folder / ABOUT, about)

    def read_back(self, folder: Path) -> ReadBack:
        """Load the files with onnxruntime."""
        import onnxruntime

        def session(tower: str, given: str) -> Callable[[Tensor], Tensor]:
            opened = onnxruntime.InferenceSession(
                folder / tower / MODEL, providers=["CPUExecutionProvider"]
            )
            return lambda batch: torch.from_numpy(opened.run(None, {given: batch.numpy()})[0])

        version = f"onnxruntime {onnxruntime.__version__}"
        encode_image = session(VISUAL, "image")
        if not (folder / TEXTUAL).is_dir():
            return ReadBack(version, encode_image, None)
        encode_ids = session(TEXTUAL, "text")
        return ReadBack(version, encode_image, lambda tokens: encode_ids(tokens.int()))

    def card(self, model: DualEncoder, repo: str | None) -> str:
        """Usage by onnxruntime and tokenizers."""
        cleaned = ""
        if model.has_text:
            cleaned = cleaning(model.tokenizer)
        return render("onnx.jinja", model=model, cleaned=cleaned)


class TowerFunction(nn.Module):
    """A function of a model as a module in evaluation mode, to trace, with the weights of the tower that it uses."""

    def __init__(self, tower: nn.Module, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.tower = tower
        self.forward = function
        self.eval()


def cleaning(tokenizer: CaptionTokenizer) -> str:
    """Name in open_clip of the cleaning that tokenizer.json does not contain, or ""."""
    if isinstance(tokenizer, WrappedTokenizer) and tokenizer.clip is None:
        return str(tokenizer.stored["clean"])
    return ""


def _export(
    module: nn.Module, example: Tensor, sizes: dict[int, Any], path: Path, about: dict[str, Any]
) -> None:
    """Write a tower of one input and one output with the dynamic sizes of its input."""
    try:
        # The exporter warns and prints.
        with (
            _without_tensor_checks(),
            warnings.catch_warnings(action="ignore"),
            quiet("torch.onnx"),
            redirect_stdout(io.StringIO()),
        ):
            program = torch.onnx.export(
                module,
                (example,),
                input_names=[about["input"]],
                output_names=[about["output"]],
                dynamic_shapes=(sizes,),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            program.save(path)
    except ImportError as error:
        raise UserError(
            f"Exporting onnx needs {error.name}. Install it: pip install 'declip[onnx]'."
        ) from error
    except OSError:
        raise
    except Exception as error:  # the exporter has its own
        reason = one_line(error, 200)
        raise UserError(
            f"torch cannot export the {path.parent.name} tower: {reason} Use safetensors."
        ) from error


@contextmanager
def _without_tensor_checks() -> Iterator[None]:
    """Leave out transformers' checks of tensors, for which ONNX has no operator."""
    before = os.environ.pop(TENSOR_CHECKS, None)
    os.environ[TENSOR_CHECKS] = "1"
    try:
        yield
    finally:
        del os.environ[TENSOR_CHECKS]
        if before is not None:
            os.environ[TENSOR_CHECKS] = before
