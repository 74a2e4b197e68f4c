"""What all sections of a recipe share, and the section of the training pairs."""

import os
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
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
Column = Literal["image", "caption", "group"]
COLUMNS: dict[Column, str] = {"image": "image", "caption": "caption"}
Tracker = Literal["auto", "tensorboard", "wandb", "mlflow", "trackio"]
Trackers = Annotated[tuple[Tracker, ...], OneOrMore]

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


class Data(Section):
    """The training pairs and how they are read."""

    source: Place | tuple[Place, ...] = Field(
        "builtin:emoji", description="table, folder, shards or built-in set, or a list of these"
    )
    columns: dict[Column, str] = Field(
        COLUMNS, description="columns of a table: image, caption, and group, whose equal cells show one thing"
    )
    image_root: Place | None = Field(None, description="folder of a table's image paths; default: the table's folder")
    max_pairs: int | None = Field(None, ge=2, description="train on this many pairs only, chosen by the seed")
    shuffle_buffer: int | None = Field(None, ge=1, description="pairs shuffled together; default: all; remote: 50,000")
    workers: Count | Literal["auto"] = Field("auto", description="loader processes; auto: 1 per free core, at most 8")
    max_broken_fraction: Fraction = Field(0.05, description="fraction of broken pairs above which a run stops")

    @field_validator("source", mode="before")
    @classmethod
    def _one_or_several(cls, given: Any) -> Any:
        several = isinstance(given, list | tuple) and given and all(isinstance(name, str) for name in given)
        if not (isinstance(given, str) or several):  # pydantic's own message would name both types that this may have
            raise ValueError(f"data.source is {given!r}; give one source, or a list of sources")
        return given

    @field_validator("columns", mode="before")
    @classmethod
    def _with_usual_names(cls, given: Any) -> Any:
        return {**COLUMNS, **given} if isinstance(given, dict) else given

    @property
    def label(self) -> str:
        """The source, or the sources, in one line."""
        return self.source if isinstance(self.source, str) else " + ".join(self.source)
