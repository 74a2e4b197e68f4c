"""The monitor and its sinks: the files of a run, examples of its pairs, and warnings about losses, loader, captions."""

import base64
import io
import json
import math
import os
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from conftest import refuses, write_rows
from declip.data.batch import PairBatch
from declip.data.sources.checks import caption_warnings, refuse_broken
from declip.data.sources.open import open_source
from declip.data.text.tokenizer import HuggingfaceTokenizer, Tokenizer
from declip.models.hf_encoder import read_encoder
from declip.recipe.schema import ImageTowerConfig
from declip.runs.folder import EVALUATIONS, METRICS, Run, read_rows
from declip.training.assemble import auto_workers
from declip.training.examples import view_sheet
from declip.training.sinks import RunInfo, Sink, open_monitor
from declip.training.warnings import FLAT_AFTER, LossMonitor, ThroughputMonitor
from text_encoders import bert


def test_numbers_that_are_not_finite_are_null_in_every_row(tmp_path):
    result = {
        "dataset": "a",
        "task": "retrieval",
        "r1": math.nan,
        "ranks": [1, math.inf],
        "by_way": {"text": math.nan},
    }
    for start in (0, 1):  # resuming reads the rows and writes them again
        with open_monitor(RunInfo(tmp_path, start, 2, 8, progress=False)) as monitor:
            if not start:
                monitor.log(
                    1, {"loss": math.nan, "contrastive": math.inf, "grad_norm": 2.0}, 0.1, 14.0
                )
                monitor.evaluation(1, result)
        for name in (METRICS, EVALUATIONS):
            json.loads((tmp_path / name).read_text(), parse_constant=pytest.fail)
    (row,), (found,) = read_rows(tmp_path / METRICS), read_rows(tmp_path / EVALUATIONS)
    assert (row["loss"], row["losses"], row["grad_norm"]) == (None, {"contrastive": None}, 2.0)
    assert found == {"step": 1, **result, "r1": None, "ranks": [1, None], "by_way": {"text": None}}
    assert math.isnan(Run(tmp_path).column("losses.contrastive")[0])


def test_time_and_samples_leave_out_evaluations_and_nothing_else(tmp_path, monkeypatch):
    clock = iter([0.0, 5.0, 6.0, 7.0, 17.0, 18.0, 19.0])
    monkeypatch.setattr("declip.training.sinks.time.perf_counter", lambda: next(clock))
    with open_monitor(RunInfo(tmp_path, 2, 6, 8, progress=False)) as monitor:
        monitor.restart_timer()  # at 5, after an evaluation before the first step
        monitor.count()  # 1 s, at 6; read again at 7
        monitor.restart_timer()  # at 17
        monitor.log(4, {"loss": 1.0, "grad_norm": 2.0}, 0.1, 14.0)  # 1 s, at 18
    (row,) = read_rows(tmp_path / METRICS)
    assert (row["seconds"], row["samples_per_second"]) == (2.0, 8.0)


def test_a_failing_sink_closes_those_before_it(tmp_path):
    first, failing = Mock(Sink), Mock(Sink, start=Mock(side_effect=OSError))
    with (
        pytest.raises(OSError),
        open_monitor(RunInfo(tmp_path, 0, 2, 8, progress=False), [first, failing]),
    ):
        pass
    assert first.close.called


CHANCE = math.log(64)


def warnings_of(losses, watched="contrastive"):
    """The warnings of the steps that have one, by step."""
    monitor = LossMonitor(batch_size=64, warmup_steps=10, watched=watched)
    said = {step: monitor.check(step, {watched: loss}) for step, loss in losses.items()}
    return {step: warning for step, warning in said.items() if warning}


@pytest.mark.parametrize(("first", "last"), [(CHANCE, 0.1), (8.24, 6.98), (30.0, 8.0)])
def test_a_falling_loss_hears_nothing(first, last):
    assert not warnings_of(
        {n: first + (last - first) * n / 250 + 0.3 * math.sin(n) for n in range(1, 251)}
    )


@pytest.mark.parametrize(
    ("losses", "step", "said"),
    [
        ({FLAT_AFTER - 1: 0, FLAT_AFTER: 0.01, FLAT_AFTER + 10: 0}, FLAT_AFTER, "4.16"),
        ({5: 0, 10: 2, 11: 2}, 11, "the run diverges"),
        *(
            ({1: 3.0, 20: between, 30: 4.1}, 30, "the run diverges")
            for between in (3.9, math.nan, math.inf)
        ),
    ],
)
@pytest.mark.parametrize("watched", ["contrastive", "late_interaction"])
def test_a_loss_that_stays_at_chance_or_rises_after_the_warmup_is_named_once(
    losses, step, said, watched
):
    (found,) = warnings_of({n: CHANCE + above for n, above in losses.items()}, watched).items()
    assert found[0] == step
    assert all(part in found[1] for part in (said, "train.lr"))


def test_steps_that_wait_for_the_loader_are_named_once_and_not_before_enough_was_seen():
    monitor = ThroughputMonitor()
    steps = [
        *[(100.0, 0.1)] * 3,
        *[(0.1, 0.9)] * 20,
        *[(0.6, 0.4)] * 60,
    ]  # before the queue is full; little; much
    said = {
        step: warning
        for step, times in enumerate(steps, 1)
        if (warning := monitor.check(*times, 1))
    }
    assert said.keys() == {3 + 20 + 9}
    assert all(part in said[32] for part in ("wait 26% of", "data.workers=1 now"))
    monitor = ThroughputMonitor()
    assert [monitor.check(0.06, 0.04, 1) for _ in range(40)] == [None] * 40, "4 s are too few"


def test_automatic_workers_are_the_cores_of_a_rank_that_do_not_train(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert [auto_workers(threads) for threads in (0, 40, 63, 64, 99)] == [32, 24, 1, 0, 0]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert auto_workers(1) == 15


@pytest.mark.parametrize(
    ("caption", "parts"),
    [
        ("a red circle", ()),
        ("赤い丸", ("100.0 %", "unknown", "--from")),
        ("a red circle " * 9, ("100.0 %", "text.context_length")),
    ],
)
def test_captions_that_cannot_be_read_are_named(caption, parts, tmp_path):
    encoder = read_encoder(str(bert(tmp_path / "bert")), pretrained=False)
    tokenizer = HuggingfaceTokenizer(encoder.tokenizer, encoder.specials, context=16)
    source = open_source([("image.png", caption)] * 3)
    warnings = caption_warnings(source, tokenizer)
    assert len(warnings) == bool(parts)
    assert all(part in warnings[0] for part in parts)


def test_a_tokenizer_of_bytes_knows_every_script():
    assert not caption_warnings(open_source([("image.png", "赤い丸")]), Tokenizer(context=77))


def test_views_are_unnormalized_and_texts_decoded():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    tokenizer = Tokenizer(context=16, merges=4000)
    ids, changed = (tokenizer.encode(text) for text in ("a red cat sat", "a cat red sat"))
    masked, labels = list(ids), [-100] * len(ids)
    cat, sat = (tokenizer.encode(word)[1] for word in ("cat", "sat"))
    masked[ids.index(cat)], labels[ids.index(cat)] = tokenizer.mask, cat
    masked[ids.index(sat)], labels[ids.index(sat)] = cat, sat
    batch = PairBatch(
        views={"first": torch.zeros(1, 3, 8, 8), "second": torch.ones(1, 3, 8, 8)},
        texts=torch.tensor([[ids], [changed]]),
        masked=torch.tensor([masked]),
        labels=torch.tensor([labels]),
    )
    statistics = ImageTowerConfig(model="test_vit", mean=mean, std=std)
    sheet = view_sheet(batch, statistics, tokenizer)
    picture = _image(sheet["picture"]["src"])
    assert picture.size == (16, 8)
    assert picture.getpixel((3, 3)) == pytest.approx(tuple(round(255 * m) for m in mean), abs=1)
    second = tuple(min(255, round(255 * (m + s))) for m, s in zip(mean, std, strict=True))
    assert picture.getpixel((11, 3)) == pytest.approx(second, abs=1)
    expected = {
        "caption": "aredcatsat",
        "augmented": "acatredsat",
        "masked": "ared[mask:cat][cat:sat]",
    }
    (texts,) = sheet["texts"]
    assert {name: text.replace(" ", "") for name, text in texts.items()} == expected


def _image(src):
    return Image.open(io.BytesIO(base64.b64decode(src.partition(",")[2])))


def test_a_few_pairs_are_all_opened_before_a_run(rows, tmp_path):
    broken = [{"image": f"missing-{number}.png", "caption": "lost"} for number in range(2)]
    source = open_source(write_rows(tmp_path / "pairs.jsonl", [*rows[:6], *broken]))
    refuses("2 of the 8 pairs .*missing-0.png", refuse_broken, source, 0.24)
    refuse_broken(source, 0.26)
