"""Evaluation by several processes, each of which encodes a share: the results of one process."""

from collections import Counter

import pytest
import torch
from torch.distributed.tensor import DTensor

from conftest import TINY, in_processes, tiny_tree, write_rows
from declip.errors import UserError
from declip.evaluation.datasets import open_dataset
from declip.evaluation.protocols import Options, evaluate_all
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.supervision.objective import Objective
from declip.training.distributed import HostGroup
from declip.training.parallel import build_learner, unwrap


@pytest.fixture(scope="module")
def classified(rows, tmp_path_factory):
    """A table with classes and captions, of which one image is missing."""
    labeled = [{**row, "label": row["caption"][0]} for row in rows]
    labeled[2]["image"] = "missing.png"
    return write_rows(tmp_path_factory.mktemp("classified") / "pairs.jsonl", labeled)


def measured(path, losses, workers):
    """The results by this process, as rows, and how many images and texts it encoded."""
    recipe = Recipe.model_validate(tiny_tree(path, loss_weights=losses))
    torch.manual_seed(0)
    model = DualEncoder.from_recipe(recipe)
    Objective(recipe, model).attach(model)
    encoded = Counter()

    def count(tower, given, _):
        encoded[type(tower).__name__] += len(given[0])

    for tower in (model.image_tower, model.text_tower):
        tower.register_forward_hook(count)
    options = Options(batch_size=5, workers=workers, progress=False, share=HostGroup())
    dataset = open_dataset(path, label_column="label")
    results = evaluate_all(model, dataset, ("zero-shot", "retrieval"), options)
    return [result.to_dict() for result in results], encoded


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("losses", [{"contrastive": 1.0}, {"late_interaction": 1.0}])
def test_processes_share_the_images_and_find_what_one_finds(classified, tmp_path, losses, workers):
    expected, encoded = measured(classified, losses, workers)
    found = in_processes(measured, 2, tmp_path, classified, losses, workers)
    assert [results for results, _ in found] == [expected, expected]
    first, second = (each for _, each in found)
    assert first + second == encoded
    assert first.keys() == second.keys() == encoded.keys()
    assert len(encoded) == 2


def sharded(path):
    """The results by a process that holds a part of each tensor, or all of it where it is alone."""
    recipe = Recipe.model_validate(tiny_tree(path, train={**TINY["train"], "strategy": "fsdp"}))
    torch.manual_seed(0)
    model = DualEncoder.from_recipe(recipe)
    learner = build_learner(recipe, model, Objective(recipe, model))
    dataset = open_dataset(path, label_column="label")
    options = Options(batch_size=5, progress=False)
    parts = sum(isinstance(parameter, DTensor) for parameter in model.parameters())
    results = evaluate_all(model, dataset, ("zero-shot", "retrieval"), options)
    return [result.to_dict() for result in results], unwrap(learner).sharded, parts > 0


def test_processes_that_hold_parts_of_the_towers_find_what_one_finds(classified, tmp_path):
    expected, *alone = sharded(classified)
    found = in_processes(sharded, 2, tmp_path, classified)
    assert (alone, found) == ([False, False], [(expected, True, True)] * 2)


def refused(path):
    """How an evaluation ends whose second process cannot encode its images."""
    recipe = Recipe.model_validate(tiny_tree(path))
    model = DualEncoder.from_recipe(recipe)
    if torch.distributed.get_rank() == 1:
        model.image_tower.register_forward_pre_hook(lambda _, given: (given[0] * torch.nan,))
    options = Options(batch_size=3, progress=False, share=HostGroup())
    try:
        evaluate_all(model, path, ("retrieval",), options)
    except UserError as error:
        return str(error)
    except SystemExit as ended:
        return ended.code


def test_the_error_of_any_process_ends_all(table, tmp_path):
    message, status = in_processes(refused, 2, tmp_path, table)
    assert "not finite" in message
    assert status == 2
