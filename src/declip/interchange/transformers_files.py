"""Files of a folder of transformers: configuration, image processor."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from declip.errors import UserError
from declip.interchange.json_files import read_json
from declip.recipe.schema import ImageTowerConfig

CONFIG, FILE = "config.json", "model.safetensors"
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

RESAMPLE = {"bilinear": 2, "bicubic": 3}


def expect(key: str, value: Any, *allowed: Any) -> None:
    """Refuse a value that is neither allowed nor close to an allowed number."""
    if value in allowed:
        return
    if isinstance(value, float) and any(
        math.isclose(value, near, rel_tol=1e-4) for near in allowed
    ):
        return
    raise UserError(f"{key} is {value!r}; supported: {' or '.join(map(repr, allowed))}")


def image_settings(folder: Path, kind: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the image processor, which must be of a kind, with the defaults of transformers."""
    # Like transformers 5, prefer processor_config.json to the older file.
    given = read_json(folder / PROCESSOR).get("image_processor")
    given = given or read_json(folder / PREPROCESSOR)
    if not given:
        raise UserError(f"there is neither {PREPROCESSOR} nor an image_processor in {PROCESSOR}")
    named = given.get("image_processor_type") or given.get("feature_extractor_type") or kind
    if not named.startswith(kind):
        raise UserError(f"its image processor is a {named}, not {kind}'s")
    return {**defaults, **given}


def expect_settings(
    given: Mapping[str, Any], defaults: Mapping[str, Any], allowed: Mapping[str, Iterable[Any]]
) -> None:
    """Refuse settings of an image processor that are neither allowed nor defaults, except of its normalization."""
    for key, default in defaults.items():
        if not key.startswith("image_"):
            expect(f"image preprocessing: {key}", given[key], *allowed.get(key, [default]))


def image_processor(
    kind: str, settings: Mapping[str, Any], image: ImageTowerConfig
) -> dict[str, Any]:
    """Content of preprocessor_config.json: settings of a kind, such as "CLIP", with a model's normalization."""
    return {
        "image_processor_type": f"{kind}ImageProcessor",
        "processor_class": f"{kind}Processor",
        "do_convert_rgb": True,
        **settings,
        "resample": RESAMPLE[image.interpolation],
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }


def preprocessing_keys(side: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Recipe keys of an image processor's normalization and interpolation, and of the image size."""
    names = {number: name for name, number in RESAMPLE.items()}
    return {
        "image.size": side,
        "image.mean": given["image_mean"],
        "image.std": given["image_std"],
        "image.interpolation": names[given["resample"]],
    }
