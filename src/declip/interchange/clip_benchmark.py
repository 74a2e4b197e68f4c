"""CLIP_benchmark (Cherti and Beaumont, github.com/LAION-AI/CLIP_benchmark) on every model that `declip.load` reads.

    python -m declip.interchange.clip_benchmark eval --model runs/demo --dataset wds/pets --dataset_root /data --no_amp

is the benchmark's own command with one more model type, "declip", as the default. Arguments and numbers are the
benchmark's; one function of version 1.6.2 that NumPy 2.4 no longer runs is replaced.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from declip.errors import UserError

NAME = "declip"
DEFAULTS = ["--model_type", NAME, "--pretrained", NAME, "--output", "{dataset}_{task}.json"]
"""Put before the user's arguments. The benchmark's own would record laion400m_e32 as the weights of every model, and
make a run's path part of a file name."""


def load(
    model_name: str, pretrained: str = "", cache_dir: str | None = None, device: str | torch.device = "cpu"
) -> tuple[Any, Callable[[Image.Image], Tensor], Any]:
    """Load a model by what `declip.load` takes, with its transform of an image and its tokenizer."""
    from declip.interchange.read import load as load_model

    model = load_model(model_name, str(device))
    return model, partial(_transform, model.preprocessor), model.tokenizer


def main() -> None:
    """Run CLIP_benchmark's command; a user's mistake ends with its message."""
    try:
        from clip_benchmark import cli, models
        from clip_benchmark.metrics import zeroshot_classification
    except ImportError as error:
        sys.exit(f"Error: This needs CLIP_benchmark ({error}). Install it: pip install 'declip[clip_benchmark]'.")
    models.TYPE2FUNC[NAME] = load
    models.MODEL_TYPES.append(NAME)
    zeroshot_classification.accuracy = _accuracy  # its own makes a number of an array, which NumPy 2.4 refuses
    if sys.argv[1:2] == ["eval"]:
        sys.argv[2:2] = DEFAULTS
    try:
        cli.main()
    except UserError as error:
        sys.exit(f"Error: {error}")


def _transform(preprocess: Callable[[list[Image.Image]], Tensor], image: Image.Image) -> Tensor:
    return preprocess([image])[0]


def _accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[float]:
    """(n, C) logits, (n,) classes → for each k the fraction of rows whose class is among the k highest."""
    right = output.topk(max(topk)).indices == target[:, None]
    return [float(right[:, :k].any(1).double().mean()) for k in topk]


if __name__ == "__main__":
    main()
