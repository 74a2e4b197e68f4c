"""What a model of one's own must have, and what is made up for it."""

import numpy as np
import pytest
import torch
from torch import nn

from conftest import refuses
from declip.models.encoder import PlainEncoder, as_encoder
from declip.models.fingerprint import fingerprint


class Least:
    """A model without weights, texts and modules."""

    def preprocess(self, images):
        return torch.zeros(len(images), 3, 2, 2)

    def encode_image(self, images):
        return images.mean((2, 3)) + 1


class Whole(Least, nn.Module):
    """A model with all that is used."""

    def __init__(self):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    preprocessor = Least.preprocess
    encode_backbone = Least.encode_image

    def tokenize(self, texts):
        return torch.zeros(len(texts), 1, dtype=torch.int64)

    def encode_text(self, tokens):
        return tokens.float().expand(-1, 3)


def test_what_an_object_lacks_is_made_up():
    encoder = as_encoder(Least())
    assert (encoder.class_name, encoder.device.type, list(encoder.modules())) == (
        "Least",
        "cpu",
        [],
    )
    for name in ("recipe", "tokenizer", "logit_scale", "token_scorer", "encode_backbone"):
        assert getattr(encoder, name) is None
    assert encoder.preprocessor([None]).shape == (1, 3, 2, 2)
    refuses("Least has no `encode_text`", encoder.encode_text, torch.zeros(1, 1))
    refuses("Least has no `encode_text` and `tokenize`", encoder.tokenize, ["a"])
    refuses("Least has no `state_dict`", encoder.state_dict)


def test_what_an_object_has_is_used():
    model = Whole()
    encoder = as_encoder(model)
    assert next(encoder.modules()) is model
    assert list(encoder.parameters()) == [model.logit_scale]
    assert encoder.state_dict().keys() == {"logit_scale"}
    assert encoder.logit_scale == 2.0
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    assert encoder.logit_scale == 3.0, "as it is now"
    assert encoder.encode_backbone(torch.ones(1, 3, 2, 2)).shape == (1, 3)
    assert encoder.encode_text(encoder.tokenize(["a"])).shape == (1, 3)


WRONG = {
    "numpy": ("encode_image", np.zeros((2, 3)), "returned numpy.ndarray of shape .2, 3."),
    "map": ("encode_image", torch.zeros(2, 3, 4), "float32 of shape .2, 3, 4.*of shape .2, d."),
    "mean": ("encode_image", torch.zeros(2), "a tensor of float32 of shape .2,."),
    "one row": ("encode_text", torch.zeros(1, 3), "of shape .1, 3."),
    "integers": ("encode_text", torch.zeros(2, 3, dtype=torch.int64), "a tensor of int64"),
    "nothing": ("encode_text", None, "returned NoneType"),
    "list": ("tokenize", [[1], [2]], "returned list. It must return a torch.Tensor of 2 rows"),
    "one text": ("tokenize", torch.zeros(2, dtype=torch.int64), "of int64 of shape .2,."),
    "pixels": ("preprocess", torch.zeros(3, 2, 2), "of shape .3, 2, 2."),
    "pixels of workers": ("preprocessor", [torch.zeros(3, 2, 2)], "`preprocess` of Whole"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_method_that_returns_something_else_is_refused(case):
    method, result, message = WRONG[case]
    model = Whole()
    setattr(model, method, lambda inputs: result)
    refuses(message, getattr(as_encoder(model), method), torch.zeros(2, 3, 2, 2))


def test_a_wrong_tokenizer_is_no_model_without_texts():
    model = Whole()
    model.tokenize = lambda texts: [[1]]
    refuses("`tokenize` of Whole returned list", fingerprint, as_encoder(model))


def test_a_complete_encoder_stays():
    encoder = as_encoder(Least())
    assert isinstance(encoder, PlainEncoder)
    assert as_encoder(encoder) is encoder


@pytest.mark.parametrize(
    ("given", "missing"), [(3, "encode_image"), (nn.Identity(), "encode_image")]
)
def test_another_object_is_refused(given, missing):
    refuses(f"`declip.load`.*{type(given).__name__} has no `{missing}`", as_encoder, given)
