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
from declip.training.parallel import build_learner, whole_model


@pytest.fixture(scope="module")
def classified(rows, tmp_path_factory):
    """A table with classes and captions, of which one image is missing."""
    labeled = [{**row, "label": row["caption"][0]} for row in rows]
    labeled[2]["image"] = "missing.png"
    return write_rows(tmp_path_factory.mktemp("classified") / "pairs.jsonl", labeled)


def measured(path, losses, how):
    """The results by this process, as rows, and how many images and texts it encoded."""
    train = {**TINY["train"], "strategy": how.pop("strategy", "ddp")}
    recipe = Recipe.model_validate(tiny_tree(path, loss_weights=losses, train=train))
    torch.manual_seed(0)
    model = DualEncoder(recipe)
    objective = Objective(recipe, model)
    objective.attach(model)
    whole = whole_model(build_learner(model, objective))
    encoded = Counter()

    def count(tower, given, _):
        encoded[type(tower).__name__] += len(given[0])

    for tower in (whole.image_tower, whole.text_tower):
        tower.register_forward_hook(count)
    options = Options(**{"batch_size": 5, **how}, progress=False, share=HostGroup())
    dataset = open_dataset(path, label_column="label")
    results = evaluate_all(whole, dataset, ("zero-shot", "retrieval"), options)
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    return [result.to_dict() for result in results], encoded, sharded


CASES = {
    "own process": ("late_interaction", {"workers": 0}),
    "workers": ("contrastive", {"workers": 1}),
    "towers in parts": ("late_interaction", {"strategy": "fsdp"}),
    "fewer batches than processes": ("contrastive", {"strategy": "fsdp", "batch_size": 99}),
}


def measured_in_each_case(path):
    return {name: measured(path, {loss: 1.0}, dict(how)) for name, (loss, how) in CASES.items()}


def test_processes_share_the_images_and_find_what_one_finds(classified, tmp_path):
    found = in_processes(measured_in_each_case, 2, tmp_path, classified)
    for case, (expected, encoded, _) in measured_in_each_case(classified).items():
        first, second = (each[case] for each in found)
        assert first[0] == second[0] == expected, case
        assert first[1] + second[1] == encoded, case
        assert len(encoded) == 2
        is_sharded = "strategy" in CASES[case][1]
        assert (first[2], second[2]) == (is_sharded, is_sharded), case


def refused(path):
    """How an evaluation ends whose second process cannot encode its images."""
    recipe = Recipe.model_validate(tiny_tree(path))
    model = DualEncoder(recipe)
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
