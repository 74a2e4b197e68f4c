"""What all sections of a recipe share, and the section of the training pairs."""

import os
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)


def _expand_user(given: str) -> str:
    """Expand a leading `~`, also after the name of a set, as in `pets:~/data`."""
    kind, colon, path = given.rpartition(":")
    return kind + colon + os.path.expanduser(path) if path.startswith("~") else given


Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Width = Annotated[int, Field(ge=1)]
Spread = Annotated[float, Field(ge=1e-6, le=1)]
Portion = Annotated[float, Field(gt=0, le=1)]
Strength = Annotated[float, Field(ge=0)]
RGB = tuple[Fraction, Fraction, Fraction]
Place = Annotated[str, AfterValidator(_expand_user)]
OneOrMore = BeforeValidator(lambda given: (given,) if isinstance(given, str) else given)
Places = Annotated[tuple[Place, ...], OneOrMore]
Column = Literal["image", "caption", "keywords", "group"]
COLUMNS: dict[Column, str] = {"image": "image", "caption": "caption", "keywords": "keywords"}
Trackers = Annotated[tuple[Literal["auto", "tensorboard", "wandb", "mlflow", "trackio"], ...], OneOrMore]

NUMBERS = (int, float, int | None, float | None, int | Literal["auto"], int | Literal["all"])


class Section(BaseModel):
    """Base class of the recipe's sections; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_yes_for_a_number(cls, given: Any, info: ValidationInfo) -> Any:
        if isinstance(given, bool) and cls.model_fields[info.field_name or ""].annotation in NUMBERS:
            raise ValueError(f"{info.field_name} is {str(given).lower()}; give a number")
        return given


class WeightedSource(Section):
    """One source of a mixture and its weight."""

    source: Place = Field(description="table, folder, shards or built-in set, as in data.source")
    weight: float = Field(1.0, gt=0, le=1000, description="how often an epoch shows each pair of this source")


class Data(Section):
    """The training pairs and how they are read."""

    source: Place | tuple[WeightedSource, ...] = Field(
        "builtin:emoji", description="table, folder, shards, built-in set, or a list of sources with weights"
    )
    columns: dict[Column, str] = Field(
        COLUMNS, description="columns of a table: image, caption, keywords, and group, whose equal cells mean the same"
    )
    image_root: Place | None = Field(None, description="folder of a table's image paths; default: the table's folder")
    max_pairs: int | None = Field(None, ge=2, description="train on this many pairs only, chosen by the seed")
    shuffle_buffer: int | None = Field(None, ge=1, description="pairs shuffled together; default: all; remote: 50,000")
    workers: Count | Literal["auto"] = Field("auto", description="loader processes; auto: one a free core, at most 8")
    max_broken_fraction: Fraction = Field(0.05, description="fraction of broken pairs above which a run stops")

    @field_validator("source", mode="before")
    @classmethod
    def _one_or_weighted(cls, given: Any) -> Any:
        # Read here: pydantic's own message would name both kinds that a source may be.
        if isinstance(given, str):
            return given
        known = ", ".join(WeightedSource.model_fields)
        if not isinstance(given, list | tuple) or not given:
            raise ValueError(f"data.source is {given!r}; give one source, or a list of them, each with {known}")
        entries = [{"source": entry} if isinstance(entry, str) else entry for entry in given]
        try:
            return TypeAdapter(tuple[WeightedSource, ...]).validate_python(entries)
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(map(str, problem["loc"]))
            raise ValueError(f"data.source.{place}={problem['input']!r}: {problem['msg']}; keys: {known}") from error

    @field_validator("columns", mode="before")
    @classmethod
    def _with_usual_names(cls, given: Any) -> Any:
        return {**COLUMNS, **given} if isinstance(given, dict) else given

    @property
    def label(self) -> str:
        """The source, or the sources with their weights, in one line."""
        if isinstance(self.source, str):
            return self.source
        return " + ".join(e.source if e.weight == 1 else f"{e.weight:g} × {e.source}" for e in self.source)
