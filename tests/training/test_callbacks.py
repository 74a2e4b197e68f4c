"""Hooks of `declip.train` in Python: callbacks and terms of the caller."""

import os
import signal

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


class Kept(Sink):
    """Everything that a callback gets."""

    def __init__(self):
        self.starts, self.rows, self.results, self.closed = [], [], [], 0

    def start(self, info):
        self.starts.append(info.start)

    def log(self, step, values):
        self.rows.append({"step": step, **values})
        if step == 4:
            os.kill(os.getpid(), signal.SIGUSR1)  # the run saves and stops after the next step

    def evaluation(self, step, values):
        self.results.append({"step": step, **values})

    def close(self):
        self.closed += 1


def recipe_of(table):
    sections = {"loss_weights": {"contrastive": 1.0, "mine": 0.5}, "evaluation": {"retrieval": [str(table)]}}
    return Recipe.model_validate(tiny_tree(table, **sections))


def test_a_run_with_callbacks_and_a_term_resumes_bit_exactly(table, tmp_path):
    recipe, terms, kept = recipe_of(table), {"mine": Mine}, Kept()
    whole = declip.train(recipe, out=tmp_path / "whole", quiet=True, report=False, terms=terms)
    run = declip.train(recipe, out=tmp_path / "run", quiet=True, terms=terms, callbacks=[kept])
    assert (run.finished, run.step, kept.closed) == (False, 5, 1)
    with pytest.raises(UserError, match=r"loss_weights\.mine"):  # it is needed again
        declip.train(recipe, out=tmp_path / "run", resume=True, quiet=True)
    more = {"resume": True, "quiet": True, "report": False}
    run = declip.train(recipe, out=tmp_path / "run", **more, terms=terms, callbacks=[kept])
    same_end(whole.folder, run.folder)
    training = load_checkpoint(list_checkpoints(run.folder)[-1]).training
    assert training["objective.terms.mine.steps"] == 8
    assert training["objective.terms.mine.head.weight"].shape == (4, 16)
    assert kept.rows == read_rows(run.folder / METRICS)
    assert [row["step"] for row in kept.rows] == [2, 4, 6, 8]
    assert all(row["losses"].keys() == {"contrastive", "mine"} for row in kept.rows)
    assert [row["step"] for row in read_rows(run.folder / EVALUATIONS)] == [row["step"] for row in kept.results] == [8]
    assert kept.starts == [0, 5]
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
