"""CLIP_benchmark (Cherti and Beaumont, github.com/LAION-AI/CLIP_benchmark) on every model that `declip.load` reads.

    python -m declip.interchange.clip_benchmark eval --model runs/demo --dataset wds/pets --dataset_root /data --no_amp

is its own command with one more model type, "declip", which is then the default. Its arguments and numbers are its own,
but for one function of version 1.6.2 that NumPy no longer runs.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from declip.errors import UserError

if TYPE_CHECKING:
    from declip.interchange.load import Model

NAME = "declip"
DEFAULTS = ["--model_type", NAME, "--output", "{dataset}_{task}.json"]
"""Put before what is given. A run's path is no part of a file name, as the benchmark's own default would have it."""


class Transform:
    """A model's preprocessing for one picture; it can be pickled, for workers."""

    def __init__(self, model: "Model") -> None:
        self.preprocessor = model.preprocessor

    def __call__(self, picture: Image.Image) -> Tensor:
        """A picture → (3, S, S) float32."""
        return self.preprocessor([picture])[0]


def load(
    model_name: str, pretrained: str = "", cache_dir: str | None = None, device: str | torch.device = "cpu"
) -> tuple[Any, Transform, Any]:
    """Load a model as CLIP_benchmark wants it.

    Args:
        model_name: What `declip.load` takes.
        pretrained: Not used: the name says it all.
        cache_dir: Not used.
        device: Where the model goes.

    Returns:
        The model, its transform of a picture, and its tokenizer.

    Raises:
        UserError: as `declip.load`.
    """
    from declip.interchange.load import load as load_model

    model = load_model(model_name, str(device))
    return model, Transform(model), model.tokenizer


def register() -> None:
    """Make "declip" one of CLIP_benchmark's model types, in this process.

    Raises:
        UserError: it is not installed.
    """
    try:
        from clip_benchmark import models
    except ImportError as error:
        raise UserError(
            f"This needs CLIP_benchmark ({error}). Install it: pip install 'declip[clip_benchmark]'."
        ) from error
    models.TYPE2FUNC[NAME] = load
    if NAME not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(NAME)


def main() -> None:
    """Run CLIP_benchmark's command; a user's mistake ends with its message."""
    try:
        register()
        from clip_benchmark import cli

        _mend_accuracy()
        if sys.argv[1:2] == ["eval"]:
            sys.argv[2:2] = DEFAULTS
        cli.main()
    except UserError as error:
        sys.exit(f"Error: {error}")


def _mend_accuracy() -> None:
    """Its `accuracy` makes a number of an array of one, which NumPy 2.4 refuses; where it works it stays."""
    from clip_benchmark.metrics import zeroshot_classification as metrics

    try:
        metrics.accuracy(torch.eye(2), torch.arange(2))
    except TypeError:
        metrics.accuracy = _accuracy


def _accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[float]:
    """(n, C) logits, (n,) classes → for each k the share of rows whose class is among the k highest."""
    right = output.topk(max(topk)).indices == target[:, None]
    return [float(right[:, :k].any(1).double().mean()) for k in topk]


if __name__ == "__main__":
    main()
