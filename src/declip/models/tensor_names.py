"""Named tensors, selected by how their names begin."""

from collections.abc import Mapping

from torch import Tensor

Prefix = str | tuple[str, ...]
"""A prefix, or several of which one has to fit."""


def named_below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    own = only(prefix, tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in own.items()}


def add_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with a prefix before their names."""
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def only(prefix: Prefix, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def all_but(prefix: Prefix, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names do not begin with a prefix."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
