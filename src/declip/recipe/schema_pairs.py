"""The recipe's sections about pairs: which they are, and what a model sees of each."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator


class Section(BaseModel):
    """A part of the recipe; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True)


class WeightedSource(Section):
    """One source of a mixture, and how often an epoch shows each of its pairs."""

    source: str = Field(description="as `data.source`")
    weight: float = Field(1.0, gt=0, le=1000, description="how often its pairs are shown, beside the others")


class Data(Section):
    """Which pairs teach, and which measure."""

    source: str | tuple[WeightedSource, ...] = Field(
        "builtin:emoji", description="a table, folder, shards, a built-in set, or a list of sources with weights"
    )
    image_column: str = Field("image", description="of a table: its images' paths, or the images")
    caption_column: str = Field("caption", description="of a table")
    image_root: str | None = Field(
        None, description="folder that a table's paths are relative to; None: the table's own"
    )
    pairs: int | None = Field(None, ge=2, description="use only this many pairs, chosen by the seed")
    shuffle_buffer: int | None = Field(
        None, ge=1, description="pairs shuffled at a time, shard after shard; None: all, or 50,000 of remote shards"
    )
    resample: bool = Field(False, description="each step draws its pairs anew instead of each once an epoch")
    scaled_decode: bool = Field(
        True, description="decode a JPEG at 1/2, 1/4 or 1/8 where its crops still have the view's size"
    )
    shard_cache_gb: float = Field(50.0, ge=0, description="remote shards kept as copies, 10^9 bytes")
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        0, description="processes that make batches; auto: one, and more while steps wait and processors are free"
    )
    max_broken_fraction: float = Field(0.05, ge=0, le=1, description="broken pairs beyond this share end the run")

    @field_validator("source", mode="before")
    @classmethod
    def _one_or_weighted(cls, given: Any) -> Any:
        """Read a list of sources here: an error of pydantic's would name both kinds that a source may be."""
        if isinstance(given, str):
            return given
        known = ", ".join(WeightedSource.model_fields)
        if not isinstance(given, list | tuple) or not given:
            raise ValueError(f"data.source is {given!r}; give one source, or a list of them, each with {known}")
        found = []
        for number, each in enumerate(given):
            try:
                found.append(WeightedSource.model_validate({"source": each} if isinstance(each, str) else each))
            except ValidationError as error:
                problem = error.errors()[0]
                place = ".".join(["data.source", str(number), *map(str, problem["loc"])])
                raise ValueError(f"{place}={problem['input']!r}: {problem['msg']}; keys: {known}") from error
        return tuple(found)

    @property
    def label(self) -> str:
        """The source, or the sources with their weights, in a few words."""
        if isinstance(self.source, str):
            return self.source
        return " + ".join(e.source if e.weight == 1 else f"{e.weight:g} × {e.source}" for e in self.source)


class ImageView(Section):
    """MoCo v2's augmentation (Chen et al. 2020, arXiv 2003.04297), as DeCLIP uses it."""

    scale: tuple[float, float] = Field((0.2, 1.0), description="share of the picture's area, at least and at most")
    ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="of width to height")
    jitter: tuple[float, float, float, float] = Field(
        (0.4, 0.4, 0.4, 0.1), description="strengths: brightness, contrast, saturation, hue"
    )
    color_jitter_prob: float = Field(0.8, ge=0, le=1, description="how often")
    grayscale_prob: float = Field(0.2, ge=0, le=1, description="how often without color")
    blur_prob: float = Field(0.5, ge=0, le=1, description="how often")
    blur_sigma: tuple[float, float] = Field((0.1, 2.0), description="pixels of the view")
    hflip_prob: float = Field(0.5, ge=0, le=1, description="how often mirrored")


class TextView(Section):
    """EDA (Wei and Zou 2019) and which words a caption is made of."""

    eda_alpha: float = Field(0.1, ge=0, le=1, description="share of the words that each of EDA's operations changes")
    keyword_append_prob: float = Field(0.0, ge=0, le=1, description="how often keywords follow the caption")
    keyword_only_prob: float = Field(0.0, ge=0, le=1, description="how often keywords stand in the caption's place")
    second: Literal["eda", "caption", "keywords", "same"] = Field(
        "eda", description="the second text view: EDA of the first, another caption, keywords, or the first again"
    )


class Views(Section):
    """What the model sees of a pair."""

    image: ImageView = ImageView()
    text: TextView = TextView()
    base: ImageView | None = Field(None, description="a milder first view for `contrastive`; the others stay (SLIP)")
    image_count: Literal[1, 2] = Field(
        2, description="image views of the terms that compare views; 1: one image meets both captions, for less time"
    )
