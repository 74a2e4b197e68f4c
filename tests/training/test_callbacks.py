"""Hooks of `declip.train` in Python: callbacks and terms of the caller."""

import os
import signal
from typing import ClassVar
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

import declip
from conftest import TINY, refuses, tiny_tree
from declip.recipe.schema import Recipe
from declip.reports.run import loss_charts
from declip.runs.checkpoint import list_checkpoints, load_checkpoint
from declip.runs.folder import EVALUATIONS, METRICS, read_rows
from declip.supervision import objective
from declip.supervision.term import Term
from declip.training.sinks import Sink
from training.starts import UNCOLORED, quiet_train, same_end


class Mine(Term):
    """Log-sum-exp of a head's features against those of all ranks; it counts its steps."""

    steps: Tensor

    def __init__(self, recipe, model):
        super().__init__(recipe, model)
        self.head = nn.Linear(recipe.embed_dim, 4)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def features(self, encoded):
        return {"heads": self.head(encoded.images[-1])}

    def loss(self, own, keys, similarity, offset):
        return (own.extra["heads"] @ keys.extra["heads"].T).logsumexp(dim=1).mean()

    @torch.no_grad()
    def after_step(self, model):
        self.steps += 1


class Typed(Mine):
    """Notes the types of products in its loss and in its head."""

    dtypes: ClassVar[set] = set()

    def features(self, encoded):
        features = super().features(encoded)
        self.dtypes.add(("head", features["heads"].dtype))
        return features

    def loss(self, own, keys, similarity, offset):
        products = own.extra["heads"] @ keys.extra["heads"].T, own.images[0] @ keys.texts[0].T
        self.dtypes.update(("loss", product.dtype) for product in products)
        return super().loss(own, keys, similarity, offset)


@pytest.mark.parametrize(("precision", "head"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_heads_have_the_precision_of_the_recipe_and_losses_are_float32(
    table, tmp_path, precision, head
):
    Typed.dtypes.clear()
    recipe = recipe_of(table, precision=precision, steps=1)
    quiet_train(recipe, tmp_path / "run", terms={"mine": Typed})
    assert Typed.dtypes == {("head", head), ("loss", torch.float32)}


def stop_after_five(step, values):
    if step == 4:
        os.kill(os.getpid(), signal.SIGUSR1)  # the run saves and stops after the next step


def rows_of(method):
    """The rows that a sink's method received."""
    return [{"step": call.args[0], **call.args[1]} for call in method.call_args_list]


def recipe_of(table, **train):
    sections = {
        "loss_weights": {"contrastive": 1.0, "mine": 0.5},
        "evaluation": {"retrieval": [str(table)]},
        "views": UNCOLORED,
    }
    return Recipe.model_validate(tiny_tree(table, train={**TINY["train"], **train}, **sections))


def test_a_run_with_callbacks_and_a_term_resumes_bit_exactly(table, tmp_path):
    recipe, terms, sink = recipe_of(table), {"mine": Mine}, Mock(Sink)
    sink.log.side_effect = stop_after_five
    whole = quiet_train(recipe, tmp_path / "whole", terms=terms)
    run = declip.train(recipe, out=tmp_path / "run", progress=False, terms=terms, callbacks=[sink])
    assert (run.finished, run.step, sink.close.call_count) == (False, 5, 1)
    # It is needed again
    refuses(r"loss_weights\.mine", declip.train, recipe, out=tmp_path / "run", resume=True)
    run = quiet_train(recipe, tmp_path / "run", resume=True, terms=terms, callbacks=[sink])
    same_end(whole.folder, run.folder)
    training = load_checkpoint(list_checkpoints(run.folder)[-1]).training
    assert training["objective.terms.mine.steps"] == 8
    assert training["objective.terms.mine.head.weight"].shape == (4, 16)
    rows, results = rows_of(sink.log), rows_of(sink.evaluation)
    assert rows == read_rows(run.folder / METRICS)
    assert [(row["step"], *row["losses"]) for row in rows] == [
        (step, "contrastive", "mine") for step in (2, 4, 6, 8)
    ]
    assert (
        [row["step"] for row in read_rows(run.folder / EVALUATIONS)]
        == [row["step"] for row in results]
        == [8]
    )
    assert [call.args[0].start for call in sink.start.call_args_list] == [0, 5]
    assert "mine" not in objective.TERMS
    assert [chart["title"] for chart in loss_charts(whole)][-1] == "mine", "it has no title"
    declip.load(run.folder, device="cpu")


class Doubled(Mine):
    """Twice the loss, to tell it from another of the same name."""

    def loss(self, *given):
        return 2 * super().loss(*given)


def test_a_training_within_another_has_its_own_source_and_terms(table, rows, tmp_path):
    """Of the same names: neither is visible to the other, and both get the numbers of a run alone."""
    (tmp_path / "mine.yaml").write_text(recipe_of(table, steps=4).to_yaml())
    items = [(str(table.parent / row["image"]), row["caption"]) for row in rows]

    def run(name, data, term, **options):
        given = {"data": data, "val": [data], "terms": {"mine": term}}
        return quiet_train(tmp_path / "mine.yaml", tmp_path / name, **given, **options)

    alone = [run("first alone", items, Mine), run("second alone", items[::-1], Doubled)]
    inner, sink = [], Mock(Sink)
    sink.log.side_effect = lambda step, values: (
        inner.append(run("second", items[::-1], Doubled)) if step == 2 else None
    )
    both = [run("first", items, Mine, callbacks=[sink]), *inner]
    assert [each.recipe.data.source for each in both] == ["python:list(24)"] * 2
    for each, expected in zip(both, alone, strict=True):
        assert [row["losses"] for row in each.metrics] == [
            row["losses"] for row in expected.metrics
        ]
    assert both[0].metrics[0]["losses"] != both[1].metrics[0]["losses"]


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ({"contrastive": Mine}, "name 'contrastive'"),
        ({"a.b": Mine}, "'a.b'"),
        ({"mine": nn.Linear}, "subclass of"),
    ],
)
def test_wrong_terms_and_callbacks_are_refused(terms, said, table, tmp_path):
    refuses(said, quiet_train, recipe_of(table), tmp_path / "run", terms=terms)
    said = r"callbacks has .*print.*declip\.Sink"
    refuses(said, quiet_train, recipe_of(table), tmp_path / "run", callbacks=[print])
    assert not list(tmp_path.iterdir())
