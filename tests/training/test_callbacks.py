"""Hooks of `declip.train` in Python: callbacks and terms of the caller."""

import os
import signal
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

import declip
from conftest import refuses, tiny_tree
from declip.errors import UserError
from declip.recipe.schema import Recipe
from declip.reports.run import loss_charts
from declip.runs.checkpoint import list_checkpoints, load_checkpoint
from declip.runs.folder import EVALUATIONS, METRICS, read_rows
from declip.supervision import objective
from declip.supervision.objective import extra_terms
from declip.supervision.term import Term
from declip.training.sinks import Sink
from training.starts import same_end


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


def stop_after_five(step, values):
    if step == 4:
        os.kill(os.getpid(), signal.SIGUSR1)  # the run saves and stops after the next step


def rows_of(method):
    """The rows that a sink's method received."""
    return [{"step": call.args[0], **call.args[1]} for call in method.call_args_list]


def recipe_of(table):
    sections = {"loss_weights": {"contrastive": 1.0, "mine": 0.5}, "evaluation": {"retrieval": [str(table)]}}
    return Recipe.model_validate(tiny_tree(table, **sections))


def test_a_run_with_callbacks_and_a_term_resumes_bit_exactly(table, tmp_path):
    recipe, terms, sink = recipe_of(table), {"mine": Mine}, Mock(Sink)
    sink.log.side_effect = stop_after_five
    whole = declip.train(recipe, out=tmp_path / "whole", quiet=True, report=False, terms=terms)
    run = declip.train(recipe, out=tmp_path / "run", quiet=True, terms=terms, callbacks=[sink])
    assert (run.finished, run.step, sink.close.call_count) == (False, 5, 1)
    with pytest.raises(UserError, match=r"loss_weights\.mine"):  # it is needed again
        declip.train(recipe, out=tmp_path / "run", resume=True, quiet=True)
    more = {"resume": True, "quiet": True, "report": False}
    run = declip.train(recipe, out=tmp_path / "run", **more, terms=terms, callbacks=[sink])
    same_end(whole.folder, run.folder)
    training = load_checkpoint(list_checkpoints(run.folder)[-1]).training
    assert training["objective.terms.mine.steps"] == 8
    assert training["objective.terms.mine.head.weight"].shape == (4, 16)
    rows, results = rows_of(sink.log), rows_of(sink.evaluation)
    assert rows == read_rows(run.folder / METRICS)
    assert [(row["step"], *row["losses"]) for row in rows] == [(step, "contrastive", "mine") for step in (2, 4, 6, 8)]
    assert [row["step"] for row in read_rows(run.folder / EVALUATIONS)] == [row["step"] for row in results] == [8]
    assert [call.args[0].start for call in sink.start.call_args_list] == [0, 5]
    assert "mine" not in objective.TERMS
    with extra_terms(terms):  # it has no title
        assert [chart["title"] for chart in loss_charts(whole)][-1] == "mine"
    declip.load(run.folder, device="cpu")


@pytest.mark.parametrize(
    ("terms", "said"),
    [({"contrastive": Mine}, "name 'contrastive'"), ({"a.b": Mine}, "'a.b'"), ({"mine": nn.Linear}, "subclass of")],
)
def test_wrong_terms_and_callbacks_are_refused(terms, said, table, tmp_path):
    refuses(said, declip.train, recipe_of(table), out=tmp_path / "run", quiet=True, terms=terms)
    with pytest.raises(UserError, match=r"callbacks has .*print.*declip\.Sink"):
        declip.train(recipe_of(table), out=tmp_path / "run", quiet=True, callbacks=[print])
    assert not list(tmp_path.iterdir())
