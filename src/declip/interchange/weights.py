"""Weights of a model that is not built yet, and reading tensors from files of strangers.

No code in a file runs, and reading one takes no more memory than its size explains.
"""

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from declip.errors import UserError
from declip.interchange.classes import Classes
from declip.io.text import one_line
from declip.io.yaml_dialect import read_yaml
from declip.models.dual_encoder import DualEncoder, PublishedHeads, Towers
from declip.models.hf_encoder import TextEncoder
from declip.models.layers import IMAGE, PROJECTIONS, TEXT, adapted, add_adapters, merge_adapters
from declip.models.stored import encoder_kept_in
from declip.models.tensor_names import all_but, named_below, only
from declip.models.token_scorer import TokenHead, TokenScorer
from declip.models.wrapped import WrappedModel
from declip.recipe.schema import Recipe

LAYER_KEY = re.compile(r"(layers|depths?|blocks)$")
"""Keys of numbers of layers in configurations of declip, timm, open_clip and transformers."""

MAX_GROWTH = 4
"""Largest size of the tensors, in sizes of their file. Weights hardly compress, and tied ones count twice."""

DRAWING = {Tensor.normal_, Tensor.uniform_}
RANDOM = {"normal_", "uniform_", "kaiming_normal_", "kaiming_uniform_"}
"""Methods, and names of functions, that fill a tensor in place with random numbers and return it; transformers has
functions of its own in place of torch's."""

RESCALING = {Tensor.add_, Tensor.clamp_, Tensor.erfinv_, Tensor.mul_}
"""What makes random numbers normal and truncated, in place; slow, on the meta device too."""

PATCH_PROJECTION = "patch_projection.weight"
"""End of a tensor's name in the head of a loss that compares tokens."""


@dataclass(frozen=True)
class Weights:
    """Weights of a model, with its recipe, before it is built."""

    recipe: Recipe
    tensors: Mapping[str, Tensor]  # by the names of `DualEncoder`, on the CPU, including adapters
    origin: str  # file, folder or name from the user
    heads: Mapping[str, Tensor] = field(default_factory=dict)  # by the names of `Objective`
    classes: Classes | None = None  # of the image tower's classifier, if it came with one
    step: int | None = None  # of the run
    # What determines the weights, if projections are computed from published files
    published: str = ""
    fingerprint: str = ""  # of the complete model, where this is a part of it

    @property
    def has_image(self) -> bool:
        """Whether there is an image tower."""
        return any(name.startswith(IMAGE) for name in self.tensors)

    @property
    def has_text(self) -> bool:
        """Whether there is a text tower."""
        return any(name.startswith(TEXT) for name in self.tensors)

    @property
    def projected(self) -> bool:
        """Whether there are projections into a shared space, as a CLIP has."""
        return any(name.startswith(PROJECTIONS) for name in self.tensors)

    @property
    def encoder(self) -> TextEncoder | WrappedModel | None:
        """Configuration of the Hugging Face text encoder or the wrapped model, if it is one."""
        if not self.has_text or self.recipe.text.hf_model is None:
            return None
        return encoder_kept_in(self.tensors, Path(self.origin))

    @property
    def encoder_to_fill(self) -> TextEncoder | WrappedModel | None:
        """`encoder` for a model that loads its weights: built without transformers, whose import takes seconds."""
        encoder = self.encoder
        if isinstance(encoder, TextEncoder):
            return replace(encoder, filled_later=True)
        return encoder

    def named_classes(self, file: str | None = None, required: bool = False) -> Classes | None:
        """Return the classes if they have names, or those in a file; a `UserError` without, if given or required."""
        classes = self.classes
        if classes is not None and file is not None:
            classes = classes.with_names(file)
        if classes is not None and classes.names:
            return classes
        if not required and file is None:
            return None
        raise UserError(
            f"'{self.origin}' has no classifier with names: set finetune.class_names or finetune.class_pairs=false."
        )

    def check(self) -> "Weights":
        """Compare names and shapes of the tensors with the recipe, and return the weights."""
        sizes = [self.recipe.image.model_dump()]
        if self.has_text:
            sizes.append(vars(self.encoder or self.recipe.text))
        check_layers(sizes, len(self.tensors), f"The model in '{self.origin}'")
        # The recipe may be a stranger's: no memory is allocated for its sizes.
        with torch.device("meta"), Uninitialized():
            model, _ = self._empty()
        if difference := first_difference(model.state_dict(), self.tensors):
            raise UserError(
                f"The weights in '{self.origin}' do not fit their recipe: {difference}."
            )
        return self

    @property
    def text(self) -> "Weights | None":
        """The weights without the image tower, whose `build` imports no timm; None where the towers share something."""
        if not self.has_text or adapted(self.tensors) or isinstance(self.encoder, WrappedModel):
            return None
        return replace(self, tensors=all_but(IMAGE, self.tensors))

    def build(self) -> DualEncoder:
        """Build the model in training mode, on the CPU, with merged adapters."""
        with uninitialized():
            model, adapters = self._empty()
        if difference := first_difference(model.state_dict(), self.tensors):
            if self.has_text and not self.projected:
                difference = "no projections, nor a classifier with known names of its classes to fit them to"
            raise UserError(
                f"'{self.origin}' is not a complete model ({difference}), but training can start from it: "
                f"declip finetune PAIRS --from {self.origin}"
            )
        model.load_state_dict(self.tensors)
        if self.published:
            model.published = PublishedHeads(self.published, only(PROJECTIONS, self.tensors))
        if self.fingerprint:
            model.float32_fingerprint = self.fingerprint
        merge_adapters(adapters)
        model.token_scorer = self._token_scorer(model)
        return model

    def as_start(self) -> "Weights":
        """Merge adapters; remove the projection of an image tower alone, which belongs to the missing text tower."""
        tensors = self.tensors
        if adapted(tensors):
            tensors = self.build().state_dict()
        if not self.has_text:
            tensors = all_but(PROJECTIONS, only(IMAGE, tensors))
        return replace(self, tensors=tensors)

    def _token_scorer(self, model: DualEncoder) -> TokenScorer | None:
        """Restore what compares tokens, for a model whose embeddings are not trained."""
        section = model.recipe.token_scoring
        first = next((name for name in self.heads if name.endswith(PATCH_PROJECTION)), None)
        if section is None or first is None or not (model.has_image and model.has_text):
            return None
        prefix = first.removesuffix(PATCH_PROJECTION)
        with torch.device("meta"):  # the sizes may be a stranger's
            head = TokenHead(model.image_tower.token_width, model.text_tower.width, section.width)
        try:
            head.load_state_dict(named_below(prefix, self.heads), assign=True)
        except RuntimeError as error:
            problem = f"The head {prefix.rstrip('.')} in '{self.origin}' does not fit its recipe"
            raise UserError(f"{problem}: {one_line(error)}") from error
        return TokenScorer(prefix, head.float(), model, section.include_padding)

    def _empty(self) -> tuple[DualEncoder, list[Any]]:
        """Build the model without its weights, and its adapters."""
        model = empty(self.recipe, self.encoder_to_fill, self._towers)
        if model.has_image:
            model.image_tower.match_projection(self.tensors)
        if model.has_text:
            model.text_tower.match_projection(self.tensors)
        lora = self.recipe.finetune.lora
        towers = adapted(self.tensors)
        if lora is None or not towers:
            return model, []
        return model, add_adapters(model, lora, towers)

    @property
    def _towers(self) -> Towers:
        if not self.has_text:
            return "image"
        return "both" if self.has_image else "text"


class Uninitialized(TorchFunctionMode):
    """Draw no random numbers, where weights are loaded afterwards; other values, as of buffers, are computed."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DRAWING:
            args[0].detach().zero_()  # a loop that draws until all are in bounds ends
            return args[0]
        if func.__name__ in RANDOM:
            return args[0] if args else kwargs["tensor"]
        if func in RESCALING and isinstance(args[0], nn.Parameter):
            return args[0]
        return func(*args, **kwargs)


@contextmanager
def uninitialized() -> Iterator[None]:
    """Build modules with neither random numbers nor a change of torch's generator."""
    with torch.random.fork_rng(devices=[]), Uninitialized():
        yield


def empty(
    recipe: Recipe, encoder: TextEncoder | WrappedModel | None = None, towers: Towers = "both"
) -> DualEncoder:
    """Build the model of a recipe that came with weights, with random weights."""
    try:
        return DualEncoder(recipe, encoder, towers)
    except UserError:
        raise
    except Exception as error:  # invalid sizes fail anywhere in torch and timm
        raise UserError(f"A model of these sizes cannot be built: {one_line(error)}") from error


def check_layers(config: Any, tensors: int, where: str) -> None:
    """Refuse a configuration with more layers than tensors: building these would take minutes and gigabytes."""
    layers = _layers(config)
    if layers > tensors:
        raise UserError(f"{where} has {layers:,} layers, but the weights hold {tensors:,} tensors.")


def refuse_growth(where: str, memory: int, size: int) -> None:
    """Refuse what takes much more memory than its weights of `size` bytes."""
    if memory > MAX_GROWTH * size:
        raise UserError(
            f"{where} takes {memory:,} bytes of memory, but its weights have {size:,}. Save them again."
        )


def memory_of(*modules: nn.Module) -> int:
    """Bytes of the parameters of modules in float32, which may be on the meta device."""
    return sum(parameter.numel() * 4 for module in modules for parameter in module.parameters())


def _layers(config: Any, key: str = "") -> int:
    """Number of layers anywhere in a configuration, by the usual names of their keys."""
    if isinstance(config, Mapping):
        return sum(_layers(value, str(name)) for name, value in config.items())
    if isinstance(config, list | tuple):
        return sum(_layers(value, key) for value in config)
    if isinstance(config, int) and LAYER_KEY.search(key):
        return max(config, 0)
    return 0


def read_recipe(text: str, origin: str) -> Recipe:
    """Read the recipe of weights, which may be a stranger's."""
    try:
        return Recipe.model_validate(read_yaml(text))
    except Exception as error:  # YAML has its own errors
        keys = []
        if isinstance(error, ValidationError):
            keys = [".".join(map(str, problem["loc"])) for problem in error.errors()]
        what = ", ".join(keys[:3]) or one_line(error)
        raise UserError(
            f"The recipe in '{origin}' is damaged, or another version's: {what}. Train again."
        ) from error


def first_difference(expected: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """Describe the first difference of two sets of named tensors, with the number of others; None if equal."""
    problems = [f"'{name}' is missing" for name in expected if name not in given]
    problems += [f"'{name}' belongs to another model" for name in given if name not in expected]
    for name, tensor in expected.items():
        other = given.get(name, tensor)
        if other.shape != tensor.shape:
            problems.append(
                f"'{name}' has shape {tuple(other.shape)} instead of {tuple(tensor.shape)}"
            )
        elif tensor.is_floating_point() and not other.is_floating_point():
            problems.append(f"'{name}' holds {other.dtype} instead of {tensor.dtype}")
    more = f", and {len(problems) - 1:,} more differ" if len(problems) > 1 else ""
    return problems[0] + more if problems else None


def read_tensors(path: Path) -> Any:
    """Read a torch or safetensors file into host memory."""
    if not path.is_file() or path.suffix == ".onnx":
        raise UserError(
            f"'{path}' is not a file of weights. Give one that torch.save or safetensors wrote."
        )
    try:
        return load_file(path) if path.suffix == ".safetensors" else _load(path)
    except UserError:
        raise
    except Exception as error:  # a damaged file raises any class
        raise UserError(
            f"Cannot read weights from '{path}': {reason(error)} Download the file again."
        ) from error


def unwrapped(content: Any, *keys: str) -> dict[str, Tensor]:
    """Tensors in the content of a checkpoint, without "module.": below the first of the keys that it has, or all."""
    if not isinstance(content, Mapping):
        return {}
    inner = [content[key] for key in keys if isinstance(content.get(key), Mapping)]
    state = inner[0] if inner else content
    return {
        str(name).removeprefix("module."): tensor
        for name, tensor in state.items()
        if isinstance(tensor, Tensor)
    }


def check_file(path: Path) -> int:
    """Check a file that another library will read, and count its tensors; those of torch's archives are mapped."""
    if path.suffix == ".safetensors":
        # This reads the header, which says no more than the file holds
        with safe_open(path, "pt") as file:
            return len(file.keys())
    content = _load(path, mmap=True)
    return sum(1 for _ in _tensors(content))


def reason(error: Exception, longest: int = 300) -> str:
    """Format why a file cannot be read; torch's message would advise `weights_only=False`, which runs its code."""
    if isinstance(error, pickle.UnpicklingError):
        return "it is not a file of tensors, or it contains other objects."
    text = one_line(error, longest)
    return text if text.endswith((".", "…")) else f"{text}."


def _load(path: Path, mmap: bool = False) -> Any:
    size = path.stat().st_size
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"  # torch's own test for archives
    if is_archive:
        with zipfile.ZipFile(path) as opened:
            entries = opened.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise UserError(
                f"'{path}' is a TorchScript archive, whose code is not run. Load OpenAI's weights by tag, such as "
                "open_clip:ViT-B-32/openai; of your own models save the `state_dict()`."
            )
        refuse_growth(f"'{path}'", sum(entry.file_size for entry in entries), size)
    mapped = True if mmap and is_archive else None
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    # An expanded tensor can repeat one number 10^12 times, and a copy of it would take the memory.
    refuse_growth(f"'{path}'", sum(tensor.nbytes for tensor in _tensors(content)), size)
    return content


def _tensors(content: Any) -> Iterator[Tensor]:
    """All tensors in nested dictionaries and lists, each once; containers may contain themselves."""
    left = [content]
    seen = set[int]()
    while left:
        item = left.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping):
            left.extend(item.values())
        elif isinstance(item, list | tuple | set):
            left.extend(item)
