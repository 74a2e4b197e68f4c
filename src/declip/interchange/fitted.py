"""A fitted model as two matrices: heads.safetensors, with the name and fingerprint of its base.

The base is read again by its name, so that the folder of a fit is small.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from safetensors.torch import load_file
from torch import Tensor, nn

import declip
from declip.data.sources.names import resolve, stored_path
from declip.errors import UserError
from declip.interchange.architecture import load_tensors
from declip.interchange.weights import Weights, read_recipe, uninitialized
from declip.io.atomic import save_tensors
from declip.models.dual_encoder import DualEncoder
from declip.models.fingerprint import hash_tensors
from declip.models.layers import PROJECTIONS
from declip.models.tensor_names import all_but, only
from declip.recipe.schema import Recipe
from declip.runs.fitted import (
    BASE_FINGERPRINT_KEY,
    BASE_KEY,
    EXPORTS,
    FINGERPRINT_KEY,
    HEADS,
    RECIPE_KEY,
    damaged,
    read_metadata,
)

REPLACED = (*PROJECTIONS, "logit_")  # prefixes of a base's tensors that heads replace


@dataclass(frozen=True)
class StoredHeads:
    """The heads of a folder, before its base is read."""

    folder: Path
    base: str  # what `declip.load` opens
    base_fingerprint: str
    fingerprint: str  # of the fitted model
    recipe: Recipe  # of the fitted model
    tensors: Mapping[str, Tensor]  # projections and logit scale, by the names of `DualEncoder`

    @classmethod
    def of(cls, folder: Path, base: Weights, fitted: Weights, fingerprint: str) -> Self:
        """The heads in the weights of a fitted model, with the fingerprint of that model."""
        return cls(
            folder=folder,
            base=base.origin,
            base_fingerprint=base_fingerprint(base),
            fingerprint=fingerprint,
            recipe=fitted.recipe,
            tensors=only(REPLACED, fitted.tensors),
        )

    def on(self, base: Weights) -> Weights:
        """The weights of the fitted model; raises `UserError` for another base."""
        given = base_fingerprint(base)
        if given != self.base_fingerprint:
            raise UserError(
                f"'{self.folder}' was fitted to '{self.base}' of fingerprint "
                f"{self.base_fingerprint[:8]}, but that is now {given[:8]}. {self._ways_out}"
            )
        tensors = base.tensors
        # Position embeddings may have to be resampled
        if _sizes(base.recipe) != _sizes(self.recipe):
            tensors = base_model(base, self.recipe).state_dict()
        tensors = {**all_but(REPLACED, tensors), **self.tensors}
        return Weights(self.recipe, tensors, str(self.folder)).check()

    def missing(self, error: UserError) -> UserError:
        """The error where the base cannot be read."""
        return UserError(
            f"'{self.folder}' was fitted to '{self.base}' (fingerprint "
            f"{self.base_fingerprint[:8]}), which cannot be read: {error} {self._ways_out}"
        )

    @property
    def _ways_out(self) -> str:
        export = self.folder / EXPORTS / "safetensors"
        return f"Put it back, or use '{export}', which has all weights."


def matches(where: str) -> bool:
    """Whether a path is the folder of a fit."""
    return (Path(where).expanduser() / HEADS).is_file()


def read_heads(where: str) -> StoredHeads:
    """Read the heads of a folder; raises `UserError` if they are damaged."""
    folder = Path(where).expanduser()
    path = folder / HEADS
    known = read_metadata(path)
    try:
        stored_base = known[BASE_KEY]
        of_base = known[BASE_FINGERPRINT_KEY]
        of_fitted = known[FINGERPRINT_KEY]
        stored_recipe = known[RECIPE_KEY]
        tensors = load_file(path)
    except Exception as error:  # safetensors has its own classes
        raise damaged(path, error) from error
    base = resolve(stored_base, folder)
    recipe = read_recipe(stored_recipe, str(path))
    return StoredHeads(folder, base, of_base, of_fitted, recipe, tensors)


def write_heads(path: Path, heads: StoredHeads) -> None:
    """Write heads.safetensors of a fitted model, whose folder need not exist yet."""
    metadata = {
        BASE_KEY: stored_path(heads.base, heads.folder) or heads.base,
        BASE_FINGERPRINT_KEY: heads.base_fingerprint,
        FINGERPRINT_KEY: heads.fingerprint,
        RECIPE_KEY: heads.recipe.to_yaml(),
        "declip.version": declip.__version__,
        "format": "pt",
    }
    save_tensors(heads.tensors, path, metadata)


def base_fingerprint(base: Weights) -> str:
    """SHA-256, in hexadecimal, of what heads are fitted to: the towers below their projections."""
    kept = all_but(REPLACED, base.tensors)
    digest = hashlib.sha256()
    hash_tensors(digest, dict(sorted(kept.items())))
    return digest.hexdigest()


def base_model(weights: Weights, recipe: Recipe) -> DualEncoder:
    """The model of weights in the sizes of a recipe; projections that the weights lack are zeros."""
    with uninitialized():
        model = DualEncoder(recipe, weights.encoder_to_fill)
    for name, parameter in model.named_parameters():
        if name.startswith(PROJECTIONS):
            nn.init.zeros_(parameter)
    model.image_tower.refuse_size(recipe.image.model, recipe.image.size)
    load_tensors(weights, model)
    return model.eval()


def _sizes(recipe: Recipe) -> tuple[int, int]:
    return recipe.image.size, recipe.text.context_length
