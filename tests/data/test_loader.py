"""The loader: batches are a function of their position, whoever makes them; the order of an epoch; broken pairs."""

import itertools
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest, chisquare

from conftest import refuses
from data.fakes import Noise, Words
from data.fakes import make_loader as make
from declip.data import order as orders
from declip.data.columns import Columns
from declip.data.order import Order
from declip.data.pair import Pair, PairSource
from declip.data.sources.open import open_source
from declip.data.sources.shards import ShardSource
from declip.data.sources.subset import Joined, take
from declip.errors import UserError

PAIRS = 30


def first_of(loader, count):
    with loader:
        return list(itertools.islice(loader, count))


def test_views_are_cropped_with_the_interpolation_of_their_plan():
    loaders = [make(interpolation=how) for how in ("bicubic", "bilinear")]
    cubic, linear = (first_of(loader, 1)[0].views["first"].pixels for loader in loaders)
    assert not torch.equal(cubic, linear)
    assert (cubic.float().std() > linear.float().std()).item(), (
        "the filter with negative lobes keeps more contrast"
    )


def content(batch):
    tensors = dict(vars(batch))
    for name, view in batch.views.items():
        tensors |= {f"{name}.pixels": view.pixels, f"{name}.photometric": view.photometric}
    return {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}


def assert_same(given, expected):
    assert len(given) == len(expected)
    for one, other in zip(given, expected, strict=True):
        ours, theirs = content(one), content(other)
        assert len(ours) == 9
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert [str(broken) for broken in one.skipped] == [str(broken) for broken in other.skipped]


SOURCES = {
    "pairs": lambda _: Noise(broken={4: "missing image", 11: "truncated image"}),
    "shards": ShardSource,
    "joined": lambda at: Joined(
        [ShardSource(f"{at}/{name}.tar") for name in ("{00000..00002}", "00003", "00003")]
    ),
    "part": lambda at: take(ShardSource(at), 13, seed=0),
}


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("kind", "buffer"),
    [("pairs", None), ("shards", 8), ("joined", None), ("joined", 8), ("part", 8)],
)
def test_any_number_of_workers_and_any_start_give_the_same_batches(shard_folder, kind, buffer):
    source, options = SOURCES[kind](str(shard_folder)), {"batch_size": 4, "shuffle_buffer": buffer}
    alone = make(source, **options, max_broken_fraction=1.0)
    whole = first_of(alone, 10)
    samples = torch.cat([batch.sample_ids for batch in whole])
    assert len(samples.unique()) == 40 - alone.skipped.total
    assert (kind == "pairs") == (alone.skipped.total > 0)
    for start, workers in ((5, 0), (2, 2)):
        again = make(pickle.loads(pickle.dumps(source)), step=start, workers=workers, **options)
        assert_same(first_of(again, 10 - start), whole[start:])
        assert again.step == 10


def test_a_pair_is_drawn_again_each_epoch_and_by_each_seed():
    first, second = (first_of(make(batch_size=PAIRS, step=step), 1)[0] for step in (0, 1))
    third = first_of(make(batch_size=PAIRS, seed=4), 1)[0]
    for other in (second, third):
        here, there = ((batch.sample_ids % PAIRS).argsort() for batch in (first, other))
        for name in ("first", "second"):
            one, two = first.views[name], other.views[name]
            changed = (one.pixels[here] != two.pixels[there]).flatten(1).any(-1)
            assert changed.float().mean() > 0.9
            assert (one.photometric[here, 3] != two.photometric[there, 3]).all(), "the hue"
        assert (first.masked[here] != other.masked[there]).any()
    both = [first.views[name].pixels for name in ("first", "second")]
    assert (both[0] != both[1]).flatten(1).any(-1).float().mean() > 0.9


@pytest.mark.parametrize(
    ("words", "context", "length"), [(6, 32, 8), (7, 32, 16), (15, 32, 24), (15, 9, 9)]
)
def test_all_texts_have_one_length_a_multiple_of_eight_within_the_context(
    words, context, length, monkeypatch
):
    caption = " ".join(f"qx{word}" for word in range(words))  # no synonyms
    monkeypatch.setattr(Noise, "said", lambda *_: (caption,))
    batch = first_of(make(context=context), 1)[0]
    assert batch.texts.shape[2] == batch.masked.shape[1] == batch.labels.shape[1] == length
    assert ((batch.texts == Words.end).sum(-1) == 1).all()
    # Where padding counts, a pair's loss must not depend on the longest caption of its batch.
    assert first_of(make(context=context, whole_context=True), 1)[0].texts.shape[2] == context


def test_the_mask_is_of_the_caption_view():
    batches = first_of(make(mask=0.5), 20)
    for batch in batches:
        chosen = batch.labels != -100
        assert torch.equal(batch.masked[~chosen], batch.texts[0][~chosen])
        assert torch.equal(batch.labels[chosen], batch.texts[0][chosen])
    words = sum(int((batch.texts[0] > 0).sum()) - 2 * len(batch) for batch in batches)
    chosen = sum(int((batch.labels != -100).sum()) for batch in batches)
    assert binomtest(chosen, words, 0.5).pvalue > 1e-4


def _said(loader, epochs=5):
    """Both texts of each pair in some epochs."""
    assembler, said = loader.assembler, []
    for epoch, index in itertools.product(range(epochs), range(PAIRS)):
        rows = assembler.sample(index, epoch).rows
        said.append(tuple(map(assembler.tokenizer.decode, rows)))
    return said


def test_one_caption_is_drawn_each_time_and_its_augmentation_is_of_the_same_one():
    loader = make()
    said = _said(loader, 20)
    for tag, (caption, _) in enumerate(said):
        assert caption in loader.assembler.source[tag % PAIRS].captions()
    assert binomtest(sum("photo" in caption for caption, _ in said), len(said), 0.5).pvalue > 1e-4
    assert sum(caption != other for caption, other in said) > 0.5 * len(said)
    assert not any("photo" in caption and "sketch" in other for caption, other in said)


def test_the_second_text_is_what_was_chosen(monkeypatch):
    for first, second in _said(make(second_view="caption")):
        assert {"photo" in first, "photo" in second} == {True, False}
        assert first.split()[0] == second.split()[0]  # of the same pair
    said = Noise.said
    # There is no other one
    monkeypatch.setattr(Noise, "said", lambda *given: said(*given)[:1])
    usual = _said(make())
    assert sum(first != second for first, second in usual) > 0.5 * len(usual)
    assert _said(make(second_view="caption")) == usual


def test_broken_pairs_shrink_their_batch_and_are_counted_when_it_is_yielded():
    broken = dict.fromkeys(range(10), "missing image") | {20: "image too large"}
    loader = make(Noise(broken=broken), workers=1, max_broken_fraction=1.0)
    total = 0
    for step, batch in enumerate(itertools.islice(loader, 5)):
        assert len(batch) + len(batch.skipped) == 6
        assert batch.texts.shape[1] == batch.sample_ids.shape[0] == len(batch)
        total += len(batch.skipped)
        assert (loader.skipped.total, loader.seen, loader.step) == (total, 6 * (step + 1), step + 1)
    loader.close()
    assert loader.skipped.counts == {"missing image": 10, "image too large": 1}
    assert loader.skipped.to_dict()["reasons"]["image too large"]["examples"] == ["pair-20"]


def test_a_batch_without_a_good_pair_is_empty_and_a_source_smaller_than_a_batch_is_refused():
    batches = first_of(make(Noise(broken=dict.fromkeys(range(PAIRS), "missing image"))), 16)
    assert [len(batch) for batch in batches] == [0] * 16
    assert batches[0].views["second"].pixels.shape == (0, 3, 12, 12)
    refuses(r"'fake' holds 30 pairs.* 31.*train\.batch_size", make, batch_size=31)


def test_too_large_a_share_of_broken_pairs_stops_after_a_hundred_pairs():
    source = Noise(broken={1: "missing image", 2: "missing image", 3: "truncated image"})
    exact = make(source, batch_size=PAIRS, max_broken_fraction=0.1)
    assert len(first_of(exact, 8)) == 8  # a tenth is broken in every batch, a tenth is allowed
    for seed in range(3):  # where chance shows more of them at first
        assert len(first_of(make(source, seed=seed, max_broken_fraction=0.1), 20)) == 20
    loader = make(source, workers=1, max_broken_fraction=0.02)
    said = refuses("", first_of, loader, 40)
    assert loader.step == 17
    assert said.startswith(f"{loader.skipped.total} of the 102 pairs of ")
    for part in ("max_broken_fraction allows 2.0 %", " × missing image, such as pair-"):
        assert part in said


def test_a_mistake_that_a_worker_meets_arrives_as_it_was_and_a_lost_worker_is_explained(
    monkeypatch,
):
    def fail(_, index):
        raise UserError(f"Row {index} is gone.")

    for act, says in (
        (fail, r"^Row \d+ is gone\.$"),
        (lambda *_: os._exit(1), r"at step 4: .*fewer workers"),
    ):
        monkeypatch.setattr(Noise, "__getitem__", act)
        refuses(says, first_of, make(workers=1, step=4), 1)


AT_FORK = {"thread": False}


def _start_a_thread():
    if AT_FORK["thread"]:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()


os.register_at_fork(after_in_child=_start_a_thread)


@pytest.mark.parametrize("thread", [False, True])
def test_workers_ignore_signals_of_others_and_end_with_the_loader(thread, monkeypatch):
    """Also where a library starts a thread in each forked process."""
    monkeypatch.setitem(AT_FORK, "thread", thread)
    before = set(multiprocessing.active_children())
    loader = make(workers=2)
    first = [next(loader), next(loader)]  # one of each worker, so both have started
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        subprocess.run(["kill", f"-{number}", *(str(worker.pid) for worker in workers)], check=True)
    assert_same([*first, *itertools.islice(loader, 8)], first_of(make(), 10))
    loader.close()
    loader.close()
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()
    assert list(loader) == []


def test_a_process_that_leaves_its_loader_open_can_end():
    """Python asks workers by SIGTERM to end and then waits for them: a deaf one would be waited for for ever."""

    def leave_open():
        loader = make(workers=1)
        next(loader)
        multiprocessing.active_children()[0].join(0)
        raise SystemExit(3)

    process = multiprocessing.get_context("fork").Process(target=leave_open)
    process.start()
    process.join(30)
    assert process.exitcode == 3


class Numbers(PairSource):
    """A source that is only as long as it is."""

    def __init__(self, count, blocks=None, remote=False, name="numbers"):
        self.count = count
        self.blocks = blocks
        self.remote = remote
        self.name = name

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return Pair.of(f"{index}", Image.new("RGB", (1, 1)), [f"{self.name} {index}"])

    def shards(self):
        return super().shards() if self.blocks is None else np.array(self.blocks)


SIZES = [30, 7, 0, 55, 41, 1, 66, 23, 19, 60]
SHARDS = Numbers(sum(SIZES), SIZES)


def epoch_of(order, epoch):
    return np.concatenate([order.group(epoch, group) for group in range(order.groups)])


def steps(order, first, last):
    return np.concatenate([order.indices(step) for step in range(first, last)])


def test_the_default_is_the_permutation_that_runs_were_trained_with():
    order = Order(SHARDS, 8, 5, None)
    for epoch in (0, 3):
        whole = np.random.default_rng((5, epoch, 302)).permutation(302)
        assert epoch_of(order, epoch).tolist() == whole.tolist()
        assert steps(order, 37 * epoch, 37 * epoch + 37).tolist() == whole[:296].tolist()
    assert order.steps_per_epoch == 37


def test_processes_of_a_machine_compute_a_large_permutation_once(tmp_path, monkeypatch):
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path))
    monkeypatch.setattr(orders, "SHARED_FROM", 302)
    files = (tmp_path / "orders").glob
    for epoch in range(4):  # those before the last one leave
        whole = np.random.default_rng((5, epoch, 302)).permutation(302)
        assert Order(SHARDS, 8, 5, None).group(epoch, 0).tolist() == whole.tolist()
        assert len([*files("*")]) == min(epoch + 1, 2)
    # The next process reads what this one wrote, and other seeds and epochs have other files.
    first, second = sorted(files("*"), key=lambda path: path.stat().st_mtime_ns)
    second.write_bytes(first.read_bytes())
    third = np.random.default_rng((5, 2, 302)).permutation(302).tolist()
    assert steps(Order(SHARDS, 8, 5, None), 3 * 37, 4 * 37).tolist() == third[:296]
    assert Order(SHARDS, 8, 6, None).group(3, 0).tolist() != third
    # A cache that cannot be written, and fewer pairs
    monkeypatch.setenv("DECLIP_CACHE", str(first))
    whole = np.random.default_rng((7, 0, 302)).permutation(302)
    assert Order(SHARDS, 8, 7, None).group(0, 0).tolist() == whole.tolist()
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path / "unused"))
    Order(Numbers(301), 8, 5, None).group(0, 0)
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize("buffer", [1, 40, 100, 1000])
@pytest.mark.parametrize("source", [SHARDS, Numbers(302), Numbers(2500)])
def test_every_pair_comes_once_an_epoch_in_another_order(source, buffer):
    order = Order(source, 8, 5, buffer)
    orders = [epoch_of(order, epoch) for epoch in range(2)]
    assert all(sorted(each.tolist()) == list(range(len(source))) for each in orders)
    assert (orders[0] != orders[1]).mean() > 0.9
    taken = steps(order, 0, order.steps_per_epoch)
    assert taken.tolist() == orders[0][: order.steps_per_epoch * 8].tolist()


def test_a_stretch_of_steps_touches_the_shards_of_a_group_only():
    source = Numbers(20_000, [100] * 200)
    order = Order(source, 50, 5, 1000)
    for first in range(0, order.steps_per_epoch, 20):
        shards = {index // 100 for index in steps(order, first, first + 20).tolist()}
        assert len(shards) <= 11
    together = epoch_of(order, 0)[:1000]
    # Of ten shards from all over the source, mixed
    assert np.abs(np.diff(together // 100)).mean() > 30


def test_pairs_left_out_at_an_epochs_end_are_chance():
    source = Numbers(105, [35, 35, 35])
    order, left = Order(source, 50, 5, 20), Counter()
    for epoch in range(600):
        left.update(epoch_of(order, epoch)[100:].tolist())
    assert len(left) == 105
    assert chisquare(list(left.values())).pvalue > 1e-4


def test_remote_shards_are_buffered_unless_told_otherwise():
    near, far = Numbers(120_000, [1000] * 120), Numbers(120_000, [1000] * 120, remote=True)
    for source, buffer, shards in ((near, None, 120), (far, None, 60), (far, 10_000, 20)):
        first = epoch_of(Order(source, 8, 5, buffer), 0)[:20_000]
        assert len({*(first // 1000).tolist()}) == shards


def read_text(source, index):
    (caption,) = source[index].captions()
    return caption


PARTS = [Numbers(100, [30, 70], name="a"), Numbers(40, name="b"), Numbers(60, [60], name="c")]


@pytest.mark.parametrize("buffer", [None, 50, 150])
def test_an_epoch_shows_each_pair_of_a_source_as_often_as_the_source_is_given(buffer):
    joined = Joined([*PARTS, PARTS[0]])
    order = Order(joined, 8, 5, buffer)
    assert (len(joined), order.steps_per_epoch) == (300, 300 // 8)
    for epoch in range(3):
        shown = Counter(read_text(joined, index) for index in epoch_of(order, epoch).tolist())
        assert len(shown) == 200
        assert all(count == 1 + name.startswith("a") for name, count in shown.items())


def test_shards_of_joined_sources_come_in_one_random_order():
    joined = Joined([Numbers(9000, [900] * 10, name="a"), Numbers(8000, name="b")])
    order = Order(joined, 100, 5, 2000)
    shares = []
    for first in range(0, 160, 20):
        indices = steps(order, first, first + 20).tolist()
        shares.append(sum(read_text(joined, index).startswith("b") for index in indices))
    assert len({*shares}) > 1
    assert 0.2 < np.mean(shares) / 2000 < 0.8


def test_joined_sources_follow_each_other_and_pairs_are_taken_of_all():
    joined = Joined([Numbers(5, name="a"), Numbers(5, name="a"), Numbers(3, name="b")])
    expected = [f"a {i % 5}" for i in range(10)] + [f"b {i}" for i in range(3)]
    assert [read_text(joined, i) for i in range(13)] == expected
    assert (joined[11].captions(), joined.name) == (("b 1",), "a + a + b")
    with pytest.raises(IndexError):
        joined[13]
    joined = Joined(PARTS)
    small, large = take(joined, 50, seed=1), take(joined, 120, seed=1)
    chosen = [{read_text(one, i) for i in range(len(one))} for one in (small, large)]
    assert len(small) == len(chosen[0]) == 50
    assert chosen[0] <= chosen[1]
    shards = np.searchsorted([30, 100, 140, 200], small.indices, "right")
    assert small.shards().tolist() == np.bincount(shards).tolist()
    refuses("has 200", take, joined, 201, seed=1)


def test_pairs_of_one_caption_or_one_group_share_an_id():
    rows = [("a mug", 7), ("a mug", 8), ("a cup", 8), ("a pan", None)]
    image = np.zeros((16, 16, 3), np.uint8)
    items = [{"image": image, "caption": caption, "product": group} for caption, group in rows]
    source = open_source(items, Columns(group="product"))
    (batch,) = first_of(make(source, batch_size=4, duplicates=True), 1)
    captions, groups = batch.duplicate_ids[batch.sample_ids.argsort()].T.tolist()
    assert (captions[0] == captions[1], len({*captions})) == (True, 3)
    assert (groups[1] == groups[2], len({*groups}), groups[3]) == (True, 3, 0)
    assert first_of(make(source, batch_size=4), 1)[0].duplicate_ids is None


class Late(Noise):
    """The batch that has this pair comes after those of all other workers."""

    def __getitem__(self, index):
        if index == self.late:
            time.sleep(0.7)
        return super().__getitem__(index)


def _descriptors(workers, spare):
    limit = len(os.listdir("/proc/self/fd")) + spare
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    source = Late(count=200)
    loader = make(source, workers=workers, batch_size=4)
    source.late = loader.indices(0)[0]
    with loader:
        for _ in range(4 * workers):
            next(loader)


@pytest.mark.skipif(sys.platform != "linux", reason="counts the descriptors of Linux")
@pytest.mark.filterwarnings("ignore:This DataLoader will create 8 worker processes")
def test_batches_of_many_workers_hold_few_descriptors():
    # Up to 14 batches of 8 tensors wait for the late one; each worker has pipes, too.
    child = multiprocessing.get_context("fork").Process(target=_descriptors, args=(8, 220))
    child.start()
    child.join(120)
    assert child.exitcode == 0
