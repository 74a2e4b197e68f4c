"""What the tests of runs share: a run to start from, recipes, stopping and resuming, and what has changed."""

import torch

from conftest import TINY, tiny_tree
from declip.api import train
from declip.recipe.schema import Recipe
from declip.runs.checkpoint import list_checkpoints, load_checkpoint, without_prefix
from declip.runs.folder import read_rows
from declip.training.assemble import assemble
from declip.training.signals import StopRequest
from declip.training.sinks import Sink
from declip.training.state import Extensions
from declip.training.trainer import Trainer

CLOCK = ("seconds", "samples_per_second")
"""Keys of a logged row that differ from run to run."""

SMALL = {"width": 48, "layers": 3, "heads": 2, "context_length": 20, "bpe_merges": 400}
VIT = {
    "model": "declip_vit_tiny",
    "size": 32,
    "model_kwargs": {"patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2},
}
CONV = {"model": "declip_conv_tiny", "size": 32}
UNCOLORED = {"image": {"color_jitter_prob": 0, "grayscale_prob": 0, "blur_prob": 0}}
"""Views that are cropped and flipped alone; colors and blur take a quarter of a run."""
STATISTICS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


def recipe_for(table, name="declip", sections=None, **train_keys):
    """A tiny recipe on a table, with some sections in place of its own."""
    train = {**TINY["train"], **train_keys}
    tree = tiny_tree(table, name, name=name, train=train, views=UNCOLORED)
    return Recipe.model_validate({**tree, **(sections or {})})


def quiet_train(recipe, out, **options):
    """Train without a bar and a report."""
    return train(recipe, out=out, progress=False, report=False, **options)


def start_from(table, out, image=VIT, name="declip"):
    """A run of other sizes than `TINY`, that a run of ours can start from."""
    sections = {"image": {**image, **STATISTICS}, "text": {**SMALL, "activation": "gelu"}}
    sections["views"] = UNCOLORED
    tree = tiny_tree(
        table, name, name=name, embed_dim=24, train={**TINY["train"], "steps": 2}, **sections
    )
    quiet_train(Recipe.model_validate(tree), out)
    return out


def tuned(table, weights, train_keys=None, **keys):
    """A recipe of four steps that starts from weights; `keys` are of finetune, but for two sizes."""
    train = {**TINY["train"], "steps": 4, "lr": 1e-2, **(train_keys or {})}
    tree = tiny_tree(table, "declip", name="tuned", train=train, views=UNCOLORED)
    given = set()
    for key, section, name in (
        ("image_size", "image", "size"),
        ("context_length", "text", "context_length"),
    ):
        if key in keys:
            tree[section] = {**TINY[section], name: keys.pop(key)}
            given.add(f"{section}.{name}")
    return Recipe.model_validate(
        {**tree, "finetune": {"pretrained": str(weights), **keys}}, context={"given": given}
    )


class StopBefore(Sink):
    """Asks a run to stop after a step, when it has taken the one before."""

    step: int
    request: StopRequest

    def start(self, info):
        self.advance(info.start)

    def log(self, step, values):
        self.advance(step)

    def advance(self, step):
        self.request.asked = step + 1 >= self.step


def trainer_of(recipe, folder, resume=False, **options):
    return Trainer(assemble(recipe, folder, resume, Extensions(**options)), progress=False)


def stop_at(recipe, folder, step):
    """Train until a step, as if a signal had come then."""
    sink = StopBefore()
    trainer = trainer_of(recipe, folder, callbacks=[sink])
    sink.step, sink.request = step, trainer.stop
    run = trainer.train()
    assert (run.step, run.finished) == (step, False)


def same_end(one, other):
    """Weights, heads, queue, moments, random states and metrics of two runs are equal bit for bit."""
    first, second = (load_checkpoint(list_checkpoints(folder)[-1]) for folder in (one, other))
    assert first.step == second.step
    for mine, theirs in ((first.weights, second.weights), (first.training, second.training)):
        assert mine.keys() == theirs.keys()
        assert not moved(mine, theirs)
    rows = [
        [{**row, **dict.fromkeys(CLOCK)} for row in read_rows(f / "metrics.jsonl")]
        for f in (one, other)
    ]
    assert rows[0] == rows[1]


def resumes_exactly(recipe, folder, step, meanwhile=lambda: None):
    """Compare a run in `whole` with one in `parts` that was stopped and resumed; give the last checkpoint."""
    quiet_train(recipe, folder / "whole")
    stop_at(recipe, folder / "parts", step)
    meanwhile()
    assert quiet_train(recipe, folder / "parts", resume=True).finished
    same_end(folder / "whole", folder / "parts")
    return load_checkpoint(folder / "whole" / "checkpoints" / "last")


def trained(recipe, folder, resume=False):
    """Train in one of several processes: the step at the end, and whether all are done."""
    run = trainer_of(recipe, folder, resume=resume).train()
    return run.step, run.finished


def ended(recipe, folder):
    """Train as `trained`, and give the model's tensors too."""
    trainer = trainer_of(recipe, folder)
    run = trainer.train()
    return run.step, run.finished, trainer.state.model.state_dict()


def losses(run):
    """The logged losses."""
    return [row["loss"] for row in read_rows(run / "metrics.jsonl")]


def state(trainer):
    return {name: tensor.clone() for name, tensor in trainer.state.model.state_dict().items()}


def last(run):
    return without_prefix("model", load_checkpoint(list_checkpoints(run)[-1]).weights)


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}
