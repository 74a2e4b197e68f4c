"""Base class of the formats that models are exported to."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from declip.errors import UserError
from declip.evaluation.results import Result
from declip.io.text import percent, round_two_digits
from declip.models.dual_encoder import DualEncoder


class Refusal(UserError):
    """A format cannot hold a model; the message says why, and which settings of training it can hold."""


@dataclass(frozen=True)
class ModelRecord:
    """A model to export, with what is recorded of its origin."""

    model: DualEncoder
    step: int | None = None  # number of steps; None without a checkpoint
    pairs: int | None = None  # number of distinct training pairs
    # cross_validation.json, if projections are in closed form
    fitted: Mapping[str, Any] = field(default_factory=dict)
    results: Sequence[Result] = ()  # after that step
    origin: str | None = None  # description of the weights' origin, unless that is a run
    # Of losses, by the names of `Objective`
    heads: Mapping[str, Tensor] = field(default_factory=dict)


class ReadBack(NamedTuple):
    """An exported model as loaded by the library of its format."""

    by: str  # the library and its version
    # Normalized pixels (n, 3, S, S) → (n, d) features of any length
    encode_image: Callable[[Tensor], Tensor]
    # Token ids of declip (n, L) → (n, d) features of any length
    encode_text: Callable[[Tensor], Tensor] | None


class Format(ABC):
    """A format of exported models: a folder that a library reads."""

    name: str  # value of --format
    library: str  # the library that reads it, by its name on the Hub
    linear = False  # whether projections must be linear maps

    @abstractmethod
    def holds(self, model: DualEncoder) -> None:
        """Raise a `Refusal` with the reason if the format cannot hold a model."""

    @abstractmethod
    def write(self, record: ModelRecord, folder: Path, repo: str | None) -> None:
        """Write a float32 model on the CPU into an empty folder.

        `repo`, if given, is OWNER/NAME on the Hub, where the folder will be uploaded.
        """

    @abstractmethod
    def read_back(self, folder: Path) -> ReadBack:
        """Load an exported folder with the library; raises `ImportError` if that is not installed."""

    def card(self, model: DualEncoder, repo: str | None) -> str:
        """Python code for the model card, which computes features with the folder, or with `repo` on the Hub.

        It prepares an image as declip does, and prints the probabilities of captions: see the folder templates.
        """
        return render(f"{self.name}.jinja", model=model, repo=repo)

    def limits(self, model: DualEncoder, repo: str | None) -> str:
        """Describe what the export lacks, and what that changes; "" if it has everything."""
        return ""


def render(template: str, **values: Any) -> str:
    """Render a file of the folder templates."""
    environment = Environment(
        loader=PackageLoader("declip.interchange"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "round_two_digits": round_two_digits}
    return environment.get_template(template).render(values)
