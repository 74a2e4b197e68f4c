"""A fine-tuning as it was asked for, checked once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from declip.data.sources.names import absolute
from declip.recipe.finetuning import read_overrides

FINETUNED = Path("runs") / "finetune"


@dataclass(frozen=True)
class Request:
    """Names of the pairs, of the weights and of the validation sets, and the recipe keys that the user set."""

    pairs: str
    weights: str | None = None
    keys: Mapping[str, Any] = field(default_factory=dict)  # see `read_overrides`
    val: tuple[str, ...] = ()
    freeze: str | None = None

    @classmethod
    def of(
        cls,
        pairs: str | Path,
        weights: str | Path | None = None,
        overrides: Mapping[str, Any] | None = None,
        val: Sequence[str | Path] = (),
        keep: Sequence[str | Path] = (),
        freeze: str | None = None,
    ) -> Self:
        """Check the keys; arguments as `declip.finetune`, with Python objects by their names."""
        given = dict(overrides or {})
        if keep:
            given["evaluation.keep"] = [absolute(name) for name in keep]
        start = None if weights is None else str(weights)
        keys = read_overrides(given, freeze)
        val_names = tuple(map(str, val))
        return cls(str(pairs), start, keys, val_names, freeze)
