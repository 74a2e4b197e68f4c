"""Weights of a model that is not built yet, and reading tensors from files of strangers.

No code in a file runs, and reading one takes no more memory than its size explains.
"""

import pickle
import re
import socket
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import constants
from pydantic import BaseModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from declip.errors import UserError
from declip.models.dual_encoder import DualEncoder
from declip.models.hf_encoder import TextEncoder, encoder_kept_in
from declip.models.layers import IMAGE, TEXT
from declip.models.lora import Adapters, adapted
from declip.models.wrapped import WrappedModel
from declip.recipe.schema import LogitScale, Recipe
from declip.recipe.yaml_text import read_yaml
from declip.supervision.objective import for_sigmoid, without_run_state

T = TypeVar("T")

LAYER_KEY = re.compile(r"(layers|depths?|blocks)$")
"""Keys of numbers of layers in configurations of declip, timm, open_clip and transformers."""

MAX_GROWTH = 4
"""Largest size of the tensors, in sizes of their file. Weights hardly compress, and tied ones count twice."""


@dataclass(frozen=True)
class Weights:
    """Weights of a model that is not built yet."""

    recipe: Recipe
    tensors: Mapping[str, Tensor]  # by the names of `DualEncoder`, on the CPU; with the adapters of a run that has some
    origin: str  # the file, folder or name, as the user gave it
    heads: Mapping[str, Tensor] = field(default_factory=dict)  # by the names of `Objective`

    @property
    def whole(self) -> bool:
        """Whether both towers are there; else the image tower is alone."""
        return any(name.startswith(TEXT) for name in self.tensors)

    @property
    def encoder(self) -> TextEncoder | WrappedModel | None:
        """The Hugging Face text encoder, or the wrapped model, that the weights are of."""
        return encoder_kept_in(self.tensors, self.recipe, Path(self.origin)) if self.whole else None

    def check(self) -> "Weights":
        """Compare the tensors with the recipe."""
        self._check_layers()
        with torch.device("meta"):  # the recipe may be a stranger's: nothing is allocated for sizes that no file backs
            model, _ = self._empty()
        if difference := first_difference(model.state_dict(), self.tensors):
            raise UserError(f"The weights in '{self.origin}' do not fit their recipe: {difference}.")
        return self

    def build(self) -> DualEncoder:
        """Build the model, in training mode, on the CPU; adapters are merged."""
        with torch.random.fork_rng(devices=[]):
            model, adapters = self._empty()
        if difference := first_difference(model.state_dict(), self.tensors):
            raise UserError(
                f"'{self.origin}' is not a complete model ({difference}), but training can start from it: "
                f"declip finetune PAIRS --from {self.origin}"
            )
        model.load_state_dict(self.tensors)
        return adapters.merge() if adapters is not None else model

    def as_start(self) -> "Weights":
        """Leave out what another training cannot use: the queue, and the projection of an image tower alone."""
        tensors = self.build().state_dict() if adapted(self.tensors) else self.tensors
        if not self.whole:  # the projection leads into the space of a text tower
            tensors = {n: t for n, t in tensors.items() if n.startswith(IMAGE) and not n.startswith(f"{IMAGE}proj.")}
        return replace(self, tensors=tensors, heads=without_run_state(self.heads))

    def fit(self, recipe: Recipe) -> Recipe:
        """Put the weights' towers into a recipe: architecture, image statistics, tokenizer, activation, logit scale.

        How the towers are trained stays the recipe's, and so do the image size and statistics and the length of
        captions that its user gave.
        Without a text tower the recipe's own and its width of the shared space stay. Weights with a bias of the logits
        are trained with a sigmoid loss, unless the user gave losses.
        """
        own = (name for name in ("size", "mean", "std") if f"image.{name}" in recipe.given)
        keep = {name: getattr(recipe.image, name) for name in ("freeze_patch_embed", "patch_dropout", *own)}
        changed: dict[str, Any] = {"image": self.recipe.image.model_copy(update=keep)}
        if self.whole:
            init, limits = float(self.tensors["logit_scale"]), recipe.logit_scale
            scale = limits.model_copy(update={"init": init, "max": max(limits.max, init)})
            if "logit_bias" in self.tensors:
                changed["logit_bias"] = float(self.tensors["logit_bias"])
                if not any(key.startswith("loss_weights") for key in recipe.given):
                    changed["loss_weights"] = for_sigmoid(recipe.loss_weights)
            if any(".proj.mlp." in name for name in self.tensors):
                changed["finetune"] = recipe.finetune.model_copy(update={"head": "mlp"})
            text = self.recipe.text
            if "text.context_length" in recipe.given:
                text = text.model_copy(update={"context_length": recipe.text.context_length})
            changed |= {"text": text, "embed_dim": self.recipe.embed_dim, "logit_scale": scale}
        fitted = recipe.model_copy(update=changed)
        overruled = []
        for key in sorted(recipe.given):
            asked, becomes = _value(recipe, key), _value(fitted, key)
            # Every recipe that was written out has the scale's default.
            if asked != becomes and (key != "logit_scale.init" or asked != LogitScale().init):
                overruled.append(f"{key}={asked} (becomes {becomes})")
        if overruled:
            raise UserError(f"The weights of '{self.origin}' overrule keys; leave them out: {', '.join(overruled)}.")
        return fitted

    def _check_layers(self) -> None:
        encoder, parts = self.encoder, [self.recipe.image.model_dump()]
        if self.whole:
            stored = encoder.sections if isinstance(encoder, WrappedModel) else getattr(encoder, "config", None)
            parts.append(stored or self.recipe.text.model_dump())
        check_layers(parts, len(self.tensors), f"The model in '{self.origin}'")

    def _empty(self) -> tuple[DualEncoder, Adapters | None]:
        model = empty(self.recipe, self.encoder, self.whole)
        lora, towers = self.recipe.finetune.lora, adapted(self.tensors)
        return model, Adapters(model, lora, towers) if lora is not None and towers else None


def empty(recipe: Recipe, encoder: TextEncoder | WrappedModel | None = None, text: bool = True) -> DualEncoder:
    """Build the model of a recipe that came with weights, with random weights."""
    try:
        return DualEncoder.from_recipe(recipe, encoder, text)
    except UserError:
        raise
    except Exception as error:  # sizes that no one meant fail anywhere in torch and timm
        raise UserError(f"A model of these sizes cannot be built: {one_line(error)}") from error


def check_layers(config: Any, tensors: int, where: str) -> None:
    """Refuse a configuration with more layers than tensors: building these would take minutes and gigabytes."""
    layers = sum(_layers(config))
    if layers > tensors:
        raise UserError(f"{where} has {layers:,} layers, but the weights hold {tensors:,} tensors.")


def check_memory(modules: Iterable[nn.Module], size: int, where: str) -> None:
    """Refuse modules, built on the meta device, that take much more memory than their weights of `size` bytes."""
    memory = sum(parameter.numel() * 4 for module in modules for parameter in module.parameters())
    if memory > MAX_GROWTH * size:
        raise UserError(f"{where} takes {memory:,} bytes, but the weights hold {size:,}.")


def _layers(config: Any, key: str = "") -> Iterator[int]:
    """Numbers of layers anywhere in a configuration, by the usual names of their keys."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            yield from _layers(value, str(name))
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _layers(value, key)
    elif isinstance(config, int) and LAYER_KEY.search(key):
        yield max(config, 0)


def read_recipe(text: str, origin: str) -> Recipe:
    """Read the recipe that came with weights, perhaps a stranger's."""
    try:
        return Recipe.model_validate(read_yaml(text))
    except Exception as error:  # YAML's tags and pydantic's checks each have errors of their own
        raise UserError(f"The recipe in '{origin}' cannot be read by this version: {one_line(error)}") from error


def first_difference(expected: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """Say what differs first between two sets of named tensors, and how many more differ; None where nothing does."""
    problems = [f"'{name}' is missing" for name in expected if name not in given]
    problems += [f"'{name}' belongs to another model" for name in given if name not in expected]
    for name, tensor in expected.items():
        other = given.get(name, tensor)
        if other.shape != tensor.shape:
            problems.append(f"'{name}' has shape {tuple(other.shape)} instead of {tuple(tensor.shape)}")
        elif tensor.is_floating_point() and not other.is_floating_point():
            problems.append(f"'{name}' holds {other.dtype} instead of {tensor.dtype}")
    more = f", and {len(problems) - 1:,} more differ" if len(problems) > 1 else ""
    return problems[0] + more if problems else None


def one_line(error: Exception, longest: int = 300) -> str:
    """The message of another library's error on one line, or its class where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= longest else f"{text[:longest]} …"


def _value(recipe: Recipe, key: str) -> Any:
    """The value of a dotted key; None where image.model_kwargs lacks it."""
    value: Any = recipe
    for name in key.split("."):
        value = getattr(value, name) if isinstance(value, BaseModel) else value.get(name)
    return value


def read_tensors(path: Path) -> Any:
    """Read a file of torch's or a safetensors file onto the host."""
    if not path.is_file() or path.suffix == ".onnx":
        raise UserError(f"'{path}' is no file of weights. Give a path of one, as torch.save or safetensors write it.")
    try:
        return load_file(path) if path.suffix == ".safetensors" else _load(path)
    except UserError:
        raise
    except Exception as error:  # a file can be wrong in any way
        raise UserError(f"Cannot read weights from '{path}': {reason(error)} Download the file again.") from error


def unwrapped(content: Any, *keys: str) -> Mapping[str, Any]:
    """The weights in a checkpoint's content, under the first of the keys that it has, or all of it."""
    content = content if isinstance(content, Mapping) else {}
    return next((content[key] for key in keys if isinstance(content.get(key), Mapping)), content)


def check_file(path: Path) -> int | None:
    """Check a file that another library will read, and count its tensors; those of torch's archives are mapped."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:  # reads the header, which says no more than the file holds
            return len(file.keys())
    if path.suffix in {".npy", ".npz"}:  # NumPy unpickles nothing by default
        return None
    return sum(1 for _ in _tensors(_load(path, mmap=True)))


def fetch(given: str, get: Callable[[bool], T], local: str) -> T:
    """Fetch a model by its name with `get(offline)`, where offline allows only files in the cache.

    Args:
        local: How weights on this machine are named instead, for the message.
    """
    offline = not online()
    try:
        return get(offline)
    except Exception as error:  # hub, network and disk have errors of their own
        reason = f"no connection to {constants.ENDPOINT}" if offline else one_line(error, 180).rstrip(".")
        raise UserError(
            f"Cannot fetch '{given}': {reason}. Check the network and the name. Weights on this machine are given as "
            f"{local}; builtin:lite0-minilm needs no network."
        ) from error


def online(seconds: float = 5.0) -> bool:
    """Whether the Hub can be reached; without this check its client retries for about a minute."""
    if constants.HF_HUB_OFFLINE:
        return False
    address, connected = urlsplit(constants.ENDPOINT), list[bool]()
    if getproxies():  # the proxy connects, and may do so even if this machine cannot
        return True

    def connect() -> None:
        port = address.port or (443 if address.scheme == "https" else 80)
        with suppress(OSError), socket.create_connection((address.hostname or "", port), seconds):
            connected.append(True)

    # In a thread, because looking up a name has no time limit of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(connected)


def reason(error: Exception, longest: int = 300) -> str:
    """Say why a file cannot be read; torch's own message advises `weights_only=False`, which would run its code."""
    if isinstance(error, pickle.UnpicklingError):
        return "it is no file of tensors, or it holds more than tensors."
    text = one_line(error, longest)
    return text if text.endswith((".", "…")) else f"{text}."


def _load(path: Path, mmap: bool = False) -> Any:
    with path.open("rb") as file:
        archive = file.read(4) == b"PK\x03\x04"  # by which torch knows its archives
    if archive:
        with zipfile.ZipFile(path) as opened:
            entries = opened.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise UserError(
                f"'{path}' is a TorchScript archive, a program, which is not run here. Take OpenAI's weights by their "
                "tag, as in 'open_clip:ViT-B-32/openai'; of your own program save the `state_dict()`."
            )
        _refuse_growth(path, sum(entry.file_size for entry in entries))
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=(mmap and archive) or None)
    # A tensor can repeat one number a million times a million times; whatever copies it would take the memory.
    _refuse_growth(path, sum(tensor.nbytes for tensor in _tensors(content)))
    return content


def _tensors(content: Any) -> Iterator[Tensor]:
    """All tensors in nested dictionaries and lists, each once: these may hold each other, and themselves."""
    left, seen = [content], set[int]()
    while left:
        item = left.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping | list | tuple | set):
            left.extend(item.values() if isinstance(item, Mapping) else item)


def _refuse_growth(path: Path, unpacked: int) -> None:
    size = path.stat().st_size
    if unpacked > MAX_GROWTH * size:
        raise UserError(
            f"'{path}' has {size:,} bytes but says that {unpacked:,} come out of it. Save the weights again."
        )
