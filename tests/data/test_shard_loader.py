"""Loaders over shards and mixtures of them: the same batches from any step on, and every pair once an epoch."""

import itertools
import pickle
from pathlib import Path

import pytest
import torch

from data.fakes import Words, make_loader
from declip.data.pair import PairSource
from declip.data.sources.mixture import Mixture
from declip.data.sources.shards import ShardSource
from declip.data.sources.subset import take

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def folder(shard_folder: Path) -> Path:
    return shard_folder


def load(source: PairSource, count: int, start: int = 0, **options) -> list[list[torch.Tensor]]:
    with make_loader(source, context=16, batch_size=4, start_step=start, **options) as loader:
        batches = list(itertools.islice(loader, count))
        assert all(
            Words(16).encode(loader.words(int(number), 0)) == [i for i in text.tolist() if i]
            for batch in batches for number, text in zip(batch.sample_ids, batch.texts[0], strict=True)
        )  # fmt: skip
    return [
        [view.pixels for view in b.views.values()]
        + [b.texts, b.masked, b.labels, b.sample_ids, b.views["first"].photometric.hue]
        for b in batches
    ]


def mixed(folder: Path) -> Mixture:
    return Mixture([(ShardSource(f"{folder}/{{00000..00002}}.tar"), 1.5), (ShardSource(f"{folder}/00003.tar"), 2)])


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize(
    ("kind", "buffer", "resample"),
    [("shards", 8, False), ("mixture", 8, False), ("mixture", None, False), ("part", 8, True), ("mixture", None, True)],
)
def test_batches_are_the_same_for_any_workers_and_start(folder, kind, buffer, resample):
    opened = {"shards": lambda: ShardSource(str(folder)), "mixture": lambda: mixed(folder),
              "part": lambda: take(ShardSource(str(folder)), 13, seed=0)}[kind]  # fmt: skip
    options = {"shuffle_buffer": buffer, "resample": resample}
    whole = load(opened(), 10, **options)
    tags = torch.cat([batch[5] for batch in whole])
    assert len(set(tags.tolist())) == 40
    for start, workers in ((5, 0), (2, 3)):
        again = load(pickle.loads(pickle.dumps(opened())), 10 - start, start, workers=workers, **options)
        assert all(torch.equal(a, b) for old, new in zip(whole[start:], again, strict=True) for a, b in zip(old, new))  # noqa: B905


def test_copies_in_a_mixture_get_views_of_their_own(folder):
    source = Mixture([(ShardSource(f"{folder}/00002.tar"), 2)])
    batches = load(source, 4)
    tags, hues = (torch.cat([batch[place] for batch in batches], dim) for place, dim in ((5, 0), (6, 0)))
    seen: dict[int, list[float]] = {}
    for tag, hue in zip(tags.tolist(), hues.tolist(), strict=True):
        seen.setdefault(tag % 9, []).append(hue)
    twice = [hues for hues in seen.values() if len(hues) == 2]
    assert len(twice) >= 7
    assert all(one != other for one, other in twice)
