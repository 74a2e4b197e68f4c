"""CLIP_benchmark (Cherti and Beaumont, github.com/LAION-AI/CLIP_benchmark) on every model that `declip.load` reads.

    python -m declip.interchange.clip_benchmark eval --model runs/demo --dataset wds/pets --dataset_root /data --no_amp

is the benchmark's own command with one more model type, "declip", as the default. Arguments and numbers are the
benchmark's; one function of version 1.6.2 that NumPy 2.4 no longer runs is replaced.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from declip.errors import UserError

if TYPE_CHECKING:
    from declip.interchange.read import Model

NAME = "declip"
DEFAULTS = ["--model_type", NAME, "--pretrained", NAME, "--output", "{dataset}_{task}.json"]
"""Put before the user's arguments. The benchmark's own would record laion400m_e32 as the weights of every model, and
make a run's path part of a file name."""


class Transform:
    """A model's preprocessing for one image; it can be pickled, for workers."""

    def __init__(self, model: "Model") -> None:
        self.preprocessor = model.preprocessor

    def __call__(self, image: Image.Image) -> Tensor:
        """An image → (3, S, S) float32."""
        return self.preprocessor([image])[0]


def load(
    model_name: str, pretrained: str = "", cache_dir: str | None = None, device: str | torch.device = "cpu"
) -> tuple[Any, Transform, Any]:
    """Load a model as CLIP_benchmark asks for it; `pretrained` and `cache_dir` are not used.

    Args:
        model_name: What `declip.load` takes.

    Returns:
        The model, its transform of an image, and its tokenizer.
    """
    from declip.interchange.read import load as load_model

    model = load_model(model_name, str(device))
    return model, Transform(model), model.tokenizer


def register() -> None:
    """Make "declip" one of CLIP_benchmark's model types, in this process."""
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

        _fix_accuracy()
        if sys.argv[1:2] == ["eval"]:
            sys.argv[2:2] = DEFAULTS
        cli.main()
    except UserError as error:
        sys.exit(f"Error: {error}")


def _fix_accuracy() -> None:
    """Replace its `accuracy` where it fails: it makes a number of an array of one, which NumPy 2.4 refuses."""
    from clip_benchmark.metrics import zeroshot_classification as metrics

    try:
        metrics.accuracy(torch.eye(2), torch.arange(2))
    except TypeError:
        metrics.accuracy = _accuracy


def _accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[float]:
    """(n, C) logits, (n,) classes → for each k the fraction of rows whose class is among the k highest."""
    right = output.topk(max(topk)).indices == target[:, None]
    return [float(right[:, :k].any(1).double().mean()) for k in topk]


if __name__ == "__main__":
    main()
