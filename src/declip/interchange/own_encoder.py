"""Encoders of the user's own by a name: FILE.py:function, or with the heads of a fit FILE.py:function+FOLDER.

Opening such a name runs the file. Only names that the user gave are opened, none that a file holds.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from declip.errors import UserError, unknown
from declip.interchange.fitted import matches, read_heads
from declip.io.plugins import run_file, run_own
from declip.models.device import pick_device
from declip.models.encoder import PlainEncoder, as_encoder
from declip.models.fingerprint import fingerprint
from declip.models.layers import PROJECTIONS
from declip.models.neighbors import matching_projection
from declip.models.tensor_names import named_below
from declip.recipe.starts import OWN, is_own
from declip.runs.existing import HEADS
from declip.runs.fitted import damaged


def open_encoder(name: str, device: str = "auto", precision: str = "fp32") -> PlainEncoder:
    """Run the file of a name, and return the encoder that its function returns."""
    own = OWN.fullmatch(name)
    assert own is not None, "see `is_own`"
    path = Path(own["file"]).expanduser()
    function = own["function"]
    defined = run_file(path, "a function that returns an encoder")
    functions = {key: value for key, value in defined.items() if callable(value)}
    if function not in functions:
        raise unknown(f"function of '{path}'", function, functions)
    model = run_own(f"{function}() of '{path}' cannot be run", functions[function])
    try:
        encoder = PlainEncoder(as_encoder(model))
    except UserError as error:
        raise UserError(f"{function}() of '{path}' returns no encoder. {error}") from error
    # The code decides what is computed too, so caches and indices distinguish encoders by it
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    encoder.class_name = f"{type(model).__qualname__} of {path.name} ({digest[:12]})"
    _check_place(name, encoder, device, precision)
    if own["fit"] is None:
        return encoder
    return _with_heads(encoder, own["fit"])


def _check_place(name: str, encoder: PlainEncoder, device: str, precision: str) -> None:
    """Refuse another device or precision than the encoder's own."""
    wanted = encoder.device if device == "auto" else pick_device(device)
    if wanted.type != encoder.device.type or precision not in ("auto", "fp32"):
        raise UserError(
            f"'{name}' stays on {encoder.device} and in its precision: its function chooses both. "
            "Leave --device and --precision out."
        )


class Projected:
    """An encoder whose embeddings two projections map into one space."""

    def __init__(self, base: PlainEncoder, tensors: Mapping[str, Tensor]) -> None:
        self.base = base
        self.tensors = tensors
        self.logit_scale = tensors["logit_scale"]
        self.preprocess = base.preprocess
        self.preprocessor = base.preprocessor
        self.tokenize = base.tokenize
        self.tokenizer = base.tokenizer
        image, text = PROJECTIONS
        self.image = _projection(image, tensors, base.device)
        self.text = _projection(text, tensors, base.device)

    def encode_image(self, images: Tensor) -> Tensor:
        """(n, 3, S, S) normalized pixels → (n, d)."""
        return self._project(self.image, self.base.encode_image(images))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(m, L) token ids → (m, d)."""
        return self._project(self.text, self.base.encode_text(tokens))

    @torch.no_grad()
    def _project(self, projection: nn.Module, embeddings: Tensor) -> Tensor:
        projected: Tensor = projection(normalize(embeddings.float(), dim=-1))
        return projected

    def modules(self) -> Iterator[nn.Module]:
        """Modules of the encoder."""
        return self.base.modules()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the encoder."""
        return self.base.parameters()

    def state_dict(self) -> Mapping[str, Any]:
        """Tensors of the encoder and of the projections."""
        return {**self.base.state_dict(), **self.tensors}


def _projection(prefix: str, tensors: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """The projection whose tensors have a prefix; the embeddings stay where there are none."""
    own = named_below(prefix, tensors)
    weights = [tensor for name, tensor in own.items() if name.endswith("weight")]
    if not weights:
        return nn.Identity()
    rows, width = weights[0].shape
    projection = matching_projection(nn.Linear(width, rows, bias=False), own, width)
    projection.load_state_dict(own)
    return projection.to(device).requires_grad_(False)


def _with_heads(encoder: PlainEncoder, folder: str) -> PlainEncoder:
    """The encoder with the heads of a fit; raises `UserError` if they were fitted to another one."""
    if not matches(folder):
        raise UserError(f"'{folder}' is not the folder of a fit, which `declip finetune` writes.")
    heads = read_heads(folder)
    if not is_own(heads.base):
        raise UserError(f"'{folder}' was fitted to '{heads.base}'. Give the folder alone.")
    given = fingerprint(encoder)
    if given != heads.base_fingerprint:
        raise UserError(
            f"'{folder}' was fitted to '{heads.base}' of fingerprint {heads.base_fingerprint[:8]}; "
            f"{encoder.class_name} has {given[:8]}. Give the file as it was, or fit again. If it did not change: "
            "it must load its weights or draw them from a seed, and number texts equally in every process "
            "(`hash` does not)."
        )
    try:
        return PlainEncoder(Projected(encoder, heads.tensors))
    except Exception as error:  # shapes that belong to no projection
        raise damaged(heads.folder / HEADS, error) from error
