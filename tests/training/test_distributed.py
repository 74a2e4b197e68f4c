"""Many processes learn what one learns from the whole batch: losses, every gradient, batch norm, queue, in float64."""

import functools
from dataclasses import replace
from functools import partial
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist

from conftest import TINY, WEIGHTS, in_processes, refuses
from data.fakes import Noise
from declip.data.batch import PairBatch
from declip.data.plan import plan_views
from declip.data.text.tokenizer import Tokenizer
from declip.models.dual_encoder import DualEncoder
from declip.models.image_tower import ImageTower
from declip.recipe.schema import Recipe
from declip.supervision.objective import TERMS, Objective, needs_of
from declip.training import distributed
from declip.training.distributed import StepSync
from declip.training.optimizer import build_optimizer, named_trainable
from declip.training.parallel import SharedBatchNorm, build_learner, full_tensor, grad_cache_chunk
from declip.training.step import training_step
from supervision.conftest import NoDeviceReads

BATCH, LENGTH = 8, 16
CAPTIONS = "one image, two captions"
SOFT = "soft targets"
CASES = {
    "slip": WEIGHTS["slip"],
    "defilip": WEIGHTS["defilip"],
    "sigmoid": {"sigmoid": 1.0},
    CAPTIONS: {"contrastive": 0.4, "multi_view": 0.4, "nearest_neighbor": 0.2},
    SOFT: {"contrastive": 0.4, "multi_view": 0.2, "nearest_neighbor": 0.4},
}
SECTIONS = {SOFT: {"contrastive": {"label_smoothing": 0.1, "duplicates": "mask"}}}
AS_THEY_ARE = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
EXACT = {**TINY["train"], "grad_clip_norm": 1.0, "precision": "fp32"}
# As wide as the text tower: FSDP plans each operation on each shape once
OPTIONS = {"layer norm": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}}
TOWERS = {"layer norm": "declip_vit_tiny", "batch norm": "declip_conv_tiny"}


def test_every_loss_has_a_case():
    assert {name for weights in CASES.values() for name in weights} == TERMS.keys()


def random_batch(recipe, seed):
    generator = torch.Generator().manual_seed(seed)
    tokenizer = Tokenizer(context=recipe.text.context_length, merges=recipe.text.bpe_merges)
    texts = torch.randint(1, 500, (2, BATCH, LENGTH), generator=generator)
    for row, end in enumerate(torch.randint(4, LENGTH, (BATCH,), generator=generator).tolist()):
        texts[:, row, end], texts[:, row, end + 1 :] = tokenizer.end, 0
    masked, labels = texts[0].clone(), torch.full((BATCH, LENGTH), -100)
    # Ranks hold different numbers of masked words
    for row, count in enumerate((1, 0, 2, 1, 0, 3, 1, 1)):
        labels[row, 1 : 1 + count], masked[row, 1 : 1 + count] = (
            texts[0, row, 1 : 1 + count],
            tokenizer.mask,
        )
    texts[:, BATCH - 1] = texts[:, 0]  # of different ranks
    images = torch.randn(3, BATCH, 3, 32, 32, generator=generator, dtype=torch.float64)
    views = {
        spec.name: pixels
        for spec, pixels in zip(plan_views(recipe, needs_of(recipe)).views, images, strict=False)
    }
    same = torch.arange(2 * BATCH).view(BATCH, 2)
    same[7, 0], same[1:6, 1] = (
        same[0, 0],
        2**63 - 1,
    )  # a caption of two ranks; a group, whose bits are no number
    return PairBatch(
        views, texts, masked, labels, torch.arange(BATCH) + BATCH * seed, duplicate_ids=same
    )


def cropped(batch):
    """Texts as long as the longest caption of this part of a batch."""
    n = int((batch.texts != 0).sum(dim=2).max())
    return replace(
        batch, texts=batch.texts[..., :n], masked=batch.masked[:, :n], labels=batch.labels[:, :n]
    )


def two_steps(name, tower, counts, **train):
    """What two steps give: mean losses, every gradient of the second, every weight, running statistic and queue row."""
    image = {
        "model": TOWERS[tower],
        "size": 32,
        "model_kwargs": OPTIONS.get(tower, {}),
        **AS_THEY_ARE,
    }
    tree = {
        **TINY,
        "loss_weights": {**WEIGHTS, **CASES}[name],
        "image": image,
        **SECTIONS.get(name, {}),
    }
    tree |= {"views": {"image_second": name != CAPTIONS}, "train": {**EXACT, **train}}
    recipe = Recipe.model_validate(tree)
    torch.manual_seed(0)
    model = DualEncoder(recipe).double()
    objective = Objective(recipe, model)
    objective.prepare(Noise(8), model)
    objective.double()
    learner = build_learner(model, objective)
    named = named_trainable(model, objective)
    optimizer = build_optimizer(named, recipe.train)
    model.train(), objective.train()
    sync, found = StepSync(counts, stop=False), {}
    for step in range(2):
        part = random_batch(recipe, step).rows(
            sync.offset, sync.offset + counts[distributed.rank()]
        )
        for name_, value in training_step(learner, optimizer, cropped(part), sync).items():
            found[f"{name_} at {step}"] = distributed.average(value.clone())
    assert all(parameter.grad is not None for _, parameter in named) or name == "filip"
    found |= {
        f"gradient of {n}": full_tensor(p.grad).clone() for n, p in named if p.grad is not None
    }
    for module in (model, objective):
        found |= {n: full_tensor(t).clone() for n, t in module.state_dict().items()}
    return found


def some_recipes(names, counts, tower, train):
    return {name: two_steps(name, tower, counts, **train) for name in names}


def compare(one, many):
    for name, mine in one.items():
        assert mine.keys() == many[name].keys()
        for key, value in mine.items():
            scale = value.abs().max().item() if value.is_floating_point() and value.numel() else 0.0
            # The gradient of a bias before a batch norm is rounding alone, which AdamW divides by its own size.
            atol = (1e-12 if key.startswith("gradient") else 1e-9) + 1e-9 * scale
            where = (name, key)
            torch.testing.assert_close(
                many[name][key], value, rtol=1e-9, atol=atol, msg=lambda m, at=where: f"{at}: {m}"
            )


one_process = functools.cache(partial(two_steps, counts=(BATCH,)))


def alone(names, tower="layer norm", **train):
    """What one process learns of each recipe; computed once."""
    return {name: one_process(name, tower, **train) for name in names}


BY_RANKS = {
    "every loss": (list(CASES), "layer norm", (5, 3), {}),
    "four ranks": (["defilip", CAPTIONS], "layer norm", (2, 2, 2, 2), {}),
    "batch norm": (["declip", CAPTIONS], "batch norm", (5, 3), {}),
    "sharded, channels last, activations computed twice": (
        ["declip"], "batch norm", (4, 4), {"strategy": "fsdp", "channels_last": True, "grad_checkpointing": True},
    ),
    "chunks": (["declip", "filip"], "layer norm", (5, 3), {"grad_cache_chunk": 2}),
    "Muon, sharded": (["slip"], "layer norm", (5, 3), {"optimizer": "muon", "strategy": "fsdp"}),
    "SGD, sharded": (["clip"], "layer norm", (5, 3), {"optimizer": "sgd", "strategy": "fsdp"}),
}  # fmt: skip
"""Recipes, towers, pairs of each rank and keys; one process learns the same without those of how it is computed."""


def every_case(world):
    """What a rank learns of each case of this number of ranks."""
    cases = {name: case for name, case in BY_RANKS.items() if len(case[2]) == world}
    return {
        name: some_recipes(names, counts, tower, keys)
        for name, (names, tower, counts, keys) in cases.items()
    }


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_learn_what_one_process_learns(tmp_path, world):
    for theirs in in_processes(every_case, world, tmp_path, world):
        for case, found in theirs.items():
            names, tower, _, keys = BY_RANKS[case]
            compare(
                alone(names, tower, **{key: keys[key] for key in {"optimizer"} & keys.keys()}),
                found,
            )


def whole_and_parts():
    """A batch with a large mean, of which the first process has five rows and the second three; a gradient."""
    generator = torch.Generator().manual_seed(0)
    values = 30 + torch.randn(8, 4, 5, 5, generator=generator)
    return values, torch.randn(8, 4, 5, 5, generator=generator)


def normed(make, rows):
    """What a batch norm gives for some rows: values, gradients and running statistics."""
    values, gradient = (tensor[rows] for tensor in whole_and_parts())
    norm = torch.nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, -2.0, 3.0]))
    norm, values = make(norm), values.requires_grad_()
    with NoDeviceReads():
        out = norm(values)
        out.backward(gradient)
    return (
        out.detach(),
        values.grad,
        norm.weight.grad,
        norm.bias.grad,
        norm.running_mean,
        norm.running_var,
    )


def normed_here():
    rows = slice(0, 5) if distributed.rank() == 0 else slice(5, 8)
    with (
        patch.object(dist, "all_gather", wraps=dist.all_gather) as gathers,
        patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sums,
    ):
        found = normed(SharedBatchNorm, rows)
    assert (gathers.call_count, sums.call_count) == (1, 1), "one collective in each direction"
    return found


def test_batch_norm_over_two_processes_is_torchs_and_waits_for_no_device(tmp_path):
    expected = normed(lambda norm: norm, slice(0, 8))
    first, second = in_processes(normed_here, 2, tmp_path)
    joined = [torch.cat(pair) for pair in zip(first[:2], second[:2], strict=True)]
    added = [a + b for a, b in zip(first[2:4], second[2:4], strict=True)]
    for mine, theirs in zip([*joined, *added, *second[4:]], expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-5 * theirs.abs().max().item())
    torch.testing.assert_close(first[4:], second[4:], rtol=0, atol=0)


def test_duplicates_are_no_negatives_of_any_loss(monkeypatch):
    masked = alone([SOFT])[SOFT]
    monkeypatch.setitem(SECTIONS, SOFT, {"contrastive": {"label_smoothing": 0.1}})
    plain = two_steps(SOFT, "layer norm", (BATCH,))
    assert all(masked[f"{name} at 1"] < plain[f"{name} at 1"] - 0.05 for name in CASES[SOFT])


def test_fewer_pairs_than_processes_are_refused(monkeypatch):
    recipe = Recipe.model_validate({**TINY, "loss_weights": WEIGHTS["clip"]})
    model = DualEncoder(recipe)
    monkeypatch.setattr(distributed, "world_size", lambda: BATCH + 1)
    refuses(
        r"train\.batch_size=8 .* 9 processes",
        build_learner,
        model,
        Objective(recipe, model),
    )


def test_chunks_give_every_gradient_of_the_whole_batch():
    compare(
        alone(list(CASES)),
        some_recipes(list(CASES), (BATCH,), "layer norm", {"grad_cache_chunk": 3}),
    )


def test_the_towers_see_a_chunk_at_a_time_and_batch_norm_is_told(monkeypatch, caplog):
    forward = Mock(wraps=ImageTower.forward)
    monkeypatch.setattr(ImageTower, "forward", lambda *given: forward(*given))
    found = two_steps("clip", "batch norm", (BATCH,), grad_cache_chunk=3)
    assert "sees each chunk alone" in caplog.text
    assert [len(call.args[1]) for call in forward.call_args_list] == [3, 3, 2] * 4, (
        "two passes in each of two steps"
    )
    counts = [int(value) for name, value in found.items() if name.endswith("num_batches_tracked")]
    assert set(counts) == {6}, "the first pass leaves the running statistics alone"


def test_dropout_draws_the_same_in_both_passes(monkeypatch):
    options = {"proj_drop_rate": 0.5, "patch_drop_rate": 0.5}
    monkeypatch.setitem(OPTIONS, "layer norm", OPTIONS["layer norm"] | options)
    expected = {"declip": two_steps("declip", "layer norm", (BATCH,))}
    compare(
        expected, {"declip": two_steps("declip", "layer norm", (BATCH,), grad_cache_chunk=BATCH)}
    )


@pytest.mark.parametrize(
    ("ranks", "chunk", "expected"), [(1, 4, 4), (1, 8, None), (2, 4, None), (2, 3, 3), (3, 2, 2)]
)
def test_a_chunk_that_holds_all_pairs_of_a_process_is_none(monkeypatch, ranks, chunk, expected):
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    train = Recipe.model_validate({**TINY, "train": {**EXACT, "grad_cache_chunk": chunk}}).train
    assert grad_cache_chunk(train) == expected
