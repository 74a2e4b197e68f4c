"""The official code's values (tests/golden/README.md): the cases, and one case read in our tokens.

Tests that compare with them carry the marker `golden`.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from declip.data.batch import PairBatch
from declip.interchange import official
from declip.interchange.layouts import rename
from declip.interchange.official import token_order
from declip.interchange.weights import Weights
from declip.supervision.objective import Objective

GOLDEN = Path(__file__).parent / "golden"

TERMS = {
    "clip": "contrastive",
    "simsiam": "simsiam",
    "mlm": "masked_language",
    "nn": "nearest_neighbor",
    "simclr": "simclr",
    "dense": "late_interaction",
    "filip": "late_interaction",
}
"""Our names of the official terms."""


def read_json(name):
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def read_state(name):
    """The state dict of a model before its first step; matrices are stored as multiples of 1/512."""
    packed = {
        key: torch.from_numpy(array)
        for key, array in np.load(GOLDEN / f"{name}_weights.npz").items()
    }
    return {
        key: (t.float() / 512).half() if t.dtype in (torch.int8, torch.int16) else t
        for key, t in packed.items()
    }


def model_cases(*kinds):
    """The models with recorded training steps, all kinds or some, by name."""
    found = []
    for path in sorted(GOLDEN.glob("*.json")):
        about = json.loads(path.read_text(encoding="utf-8"))
        if "steps" in about and (not kinds or about["kind"] in kinds):
            found.append(path.stem)
    return found


def loss_cases(*groups):
    """The names of the cases of single losses, such as "infonce/0"."""
    names = {"/".join(key.split("/")[:2]) for key in np.load(GOLDEN / "loss_cases.npz")}
    return sorted(name for name in names if name.split("/")[0] in groups)


def with_heads(weights, text, image):
    """Weights with numbers of attention heads, which no tensor shows: by default one for 64 channels."""
    recipe = weights.recipe
    changes = {"text": recipe.text.model_copy(update={"heads": text})}
    if image is not None:
        options = {"model_kwargs": {**recipe.image.model_kwargs, "num_heads": image}}
        changes["image"] = recipe.image.model_copy(update=options)
    return replace(weights, recipe=recipe.model_copy(update=changes))


def read_official(source, loss_weights=None, queue_size=65_536, heads=None):
    """The model and the objective of a checkpoint's file or content, with its recipe or other weights of the losses."""
    weights = (
        official.weights_of(source, "the state dict")
        if isinstance(source, dict)
        else official.read(source)
    )
    weights = weights if heads is None else with_heads(weights, *heads)
    queue = weights.recipe.nearest_neighbor.model_copy(update={"queue_size": queue_size})
    active = weights.recipe.loss_weights if loss_weights is None else loss_weights
    recipe = weights.recipe.model_copy(
        update={"loss_weights": dict(active), "nearest_neighbor": queue}
    )
    model = Weights(recipe, weights.tensors, weights.origin).build()
    objective = Objective(recipe, model)
    terms = tuple(f"terms.{name}." for name in objective.terms)
    own = {name for name in objective.state_dict() if ".queue." not in name}
    kept = {name: tensor for name, tensor in weights.heads.items() if name.startswith(terms)}
    assert kept.keys() == own
    objective.load_state_dict(kept, strict=False)
    return model, objective


class Case:
    """One of the official models and the first step of its training, in our tokens."""

    def __init__(self, name, dtype=torch.float32):
        self.about = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
        self.kind = self.about["kind"]
        self.state = read_state(self.about.get("state_dict", name).removesuffix(".safetensors"))
        self.step = self.about["steps"][0]
        self.arrays = np.load(GOLDEN / f"{name}.npz")
        self.dtype = dtype

    @property
    def weights(self):
        """Their weights under our terms: their "clip" is the mean over all pairings of views."""
        pairings = sum(term.startswith("clip_") for term in self.step["loss_terms"]) or 1
        ours = {TERMS[name]: weight for name, weight in self.about["weights"].items()}
        if pairings > 1:
            ours["multi_view"] = ours["contrastive"] * (pairings - 1) / pairings
            ours["contrastive"] /= pairings
        return {term: weight for term, weight in ours.items() if weight}

    def value(self, name, step="step1/"):
        found = torch.tensor(self.arrays[step + name])
        return found.to(self.dtype) if found.is_floating_point() else found

    def ours(self, tokens):
        """Their ids as ours; -100 stays."""
        order = token_order(self.about["vocab_size"])
        return torch.where(tokens < 0, tokens, order.argsort()[tokens.clamp(min=0)])

    def batch(self, step="step1/"):
        images = (
            (self.value("images_u8", step).to(self.dtype) / 64 - 2)
            .unflatten(1, (-1, 3))
            .transpose(0, 1)
        )
        names = [name for name in ("tokens_clean", "tokens_aug") if f"{step}{name}" in self.arrays]
        masks = {}
        if f"{step}labels_main" in self.arrays:
            given = {"masked": "tokens_main_masked", "labels": "labels_main"}
            masks = {ours: self.ours(self.value(theirs, step)) for ours, theirs in given.items()}
        texts = torch.stack([self.ours(self.value(name, step)) for name in names])
        names = ("contrastive", "first", "second") if len(images) == 3 else ("first", "second")
        return PairBatch(views=dict(zip(names, images, strict=False)), texts=texts, **masks)

    @property
    def heads(self):
        image, text = self.about["config"]["image_encode"], self.about["config"]["text_encode"]
        return text["transformer_heads"], image["heads"] if "patch_size" in image else None

    def read(self, weights=None, **options):
        model, objective = read_official(
            self.state, weights or self.weights, heads=self.heads, **options
        )
        if "nearest_neighbor" in objective.terms:
            objective.terms["nearest_neighbor"].queue.push(self.value("bank_before").T)
        return model.to(self.dtype), objective.to(self.dtype)

    def parameter(self, modules, name):
        name = name.replace("text_encoder.", "encode_text.")
        head, tower = (
            rename(name, table, back=True)
            for table in (official.HEADS, official.layout_of(self.state).names)
        )
        parameters = dict(modules["model" if head == name else "objective"].named_parameters())
        return parameters.get(tower if head == name else head)
