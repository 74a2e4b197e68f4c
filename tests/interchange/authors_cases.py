"""The authors' tiny models of the golden files, and what their training step saw and gave."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from declip.data.batch import PairBatch
from declip.interchange import read_declip_authors
from declip.interchange.declip_authors import our_name, token_order

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = ["clip", "slip", "filip", "declip", "defilip"]
CASES = [*(f"{model}_vit_tiny" for model in MODELS), "declip_resnet_tiny"]


class Case:
    """One of the authors' tiny models and the first step of its training, in our tokens."""

    def __init__(self, name, weights_of=None, dtype=torch.float32):
        self.state = load_file(GOLDEN / f"{weights_of or name}.safetensors")
        self.about = json.loads((GOLDEN / f"{name}.json").read_text())
        self.step = self.about["steps"][0]
        self.arrays = np.load(GOLDEN / f"{name}.npz")
        self.dtype = dtype

    def value(self, name, step="step1/"):
        found = torch.tensor(self.arrays[step + name])
        return found.to(self.dtype) if found.is_floating_point() else found

    def ours(self, tokens):
        """Their ids as ours; -100 stays."""
        order = token_order(self.about["vocab_size"])
        return torch.where(tokens < 0, tokens, order.argsort()[tokens.clamp(min=0)])

    def batch(self, step="step1/"):
        images = (self.value("images_u8", step).to(self.dtype) / 64 - 2).unflatten(1, (-1, 3)).transpose(0, 1)
        names = [name for name in ("tokens_clean", "tokens_aug") if f"{step}{name}" in self.arrays]
        masks = {}
        if f"{step}labels_main" in self.arrays:
            given = {"masked": "tokens_main_masked", "labels": "labels_main"}
            masks = {ours: self.ours(self.value(theirs, step)) for ours, theirs in given.items()}
        texts = torch.stack([self.ours(self.value(name, step)) for name in names])
        return PairBatch(images=images, texts=texts, **masks)

    def read(self, **options):
        model, objective = read_declip_authors(self.state, text_heads=2, **options)
        if objective.queue is not None:
            objective.queue.fill(self.value("bank_before").T)
        return model.to(self.dtype), objective.to(self.dtype)

    def parameter(self, modules, name):
        place, _, path = our_name(name, self.state).partition(".")
        parameters = dict(modules[place].named_parameters())
        return parameters.get(path)
