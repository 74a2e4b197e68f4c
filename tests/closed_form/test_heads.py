"""Heads chosen by cross-validation, and how the recall grows with the pairs."""

import numpy as np
import pytest
import torch
from scipy.stats import t
from torch.nn.functional import pad

from declip.closed_form import choice as choosing
from declip.closed_form import estimates, ranks
from declip.closed_form import pairs as known_data
from declip.closed_form.axes import largest_directions
from declip.closed_form.candidates import best_candidate
from declip.closed_form.choice import choose_heads
from declip.closed_form.cross_validation import CrossValidation
from declip.closed_form.estimates import jackknife
from declip.closed_form.folds import assign_folds
from declip.closed_form.growth import growth
from declip.closed_form.heads import Heads, fit_heads, mix
from declip.closed_form.mixing import mixed_choices
from declip.closed_form.pairs import FitData, Pairs
from declip.closed_form.ranks import HeldOutBlock, HeldOutRanks, caption_numbers, ranks_by
from declip.closed_form.solve import DEFAULT_FORM, START
from declip.reports.charts import growth_chart
from pair_features import chosen, class_pairs, data_of, pairs_of, randn


def held_out(found, pairs):
    return ranks_by(
        found, pairs._replace(images=pairs.images.double()), torch.zeros(len(pairs.images))
    )


def test_classes_alone_make_heads_that_find_images():
    nothing = Pairs(torch.empty(0, 12), torch.empty(0, 7), torch.empty(0, dtype=torch.int64))
    choice = chosen(nothing, classes=class_pairs())
    assert choice.class_weight == 1
    # Chance: 1 of 40
    assert float((held_out(choice.heads, pairs_of(40)).to_text < 1).double().mean()) > 0.5


def test_embeddings_stay_as_they_are_unless_their_pairs_say_otherwise():
    texts, noise = randn(2, 200, 12)
    turned = torch.linalg.qr(randn(12, 12, seed=1)).Q
    for images, form in ((texts + noise, "start"), (texts @ turned + 0.3 * noise, "pulled")):
        pairs = Pairs(images, texts, torch.arange(200))
        choice = chosen(pairs, one_space=True)
        assert choice.form.method == form
    few = Pairs(texts[:10], texts[10:20], torch.arange(10))
    assert chosen(few, one_space=True).form.method == "start"


def test_a_start_is_changed_with_more_caution_than_the_usual_heads(monkeypatch):
    numbers = randn(128 * 8).view(128, 8)
    texts, turn, noise = numbers.split([60, 8, 60])
    images = texts @ (torch.eye(8) + 0.35 * turn) + 0.7 * noise
    pairs = Pairs(images, texts, torch.arange(60))  # a gain of 1.5 standard errors
    data = data_of(pairs, one_space=True)
    assert choose_heads(data).form == START
    monkeypatch.setattr(choosing, "START_CAUTION", choosing.CAUTION)
    assert choose_heads(data).form != START


def some_ranks(to_text, to_image):
    nothing = torch.empty(0)
    owners = torch.arange(len(to_text))
    return HeldOutRanks(
        owners,
        torch.tensor(to_text),
        torch.tensor(to_image),
        first=nothing,
        images=nothing,
        fit=nothing,
        losses=nothing,
    )


def test_a_gain_within_the_noise_is_not_taken():
    usual = some_ranks([1] * 40, [1] * 40)
    noisy, steady = [0, 0, 20, 0] * 10, [0, 1, 1, 1] * 10
    tried = {"usual": usual, "noisy": some_ranks(noisy, noisy)}
    assert float(tried["noisy"].scores().mean()) > float(usual.scores().mean())
    assert best_candidate(tried, "usual", 1.0) == "usual"
    assert best_candidate(tried | {"steady": some_ranks(steady, steady)}, "usual", 1.0) == "steady"


def test_percentiles_do_not_depend_on_the_number_of_candidates():
    pairs = pairs_of(800, noise=1.5)
    found = chosen(pairs).heads
    few, many = (ranks_by(found, pairs, torch.arange(800) % count) for count in (100, 1))
    assert few.recall(10, np.arange(800)).value > 5 * many.recall(10, np.arange(800)).value / 2
    percentiles = [float(each.percentiles().mean()) for each in (few, many)]
    assert percentiles[0] == pytest.approx(percentiles[1], abs=0.015)


@pytest.mark.parametrize(
    ("image", "expected"), [(torch.eye(6), 1.0), (torch.zeros(6, 6), 0.5), (-torch.eye(6), 0.0)]
)
def test_percentiles_of_the_best_of_equal_and_of_the_worst_candidates(image, expected):
    rows = torch.eye(6)
    # Two captions of each image
    pairs = Pairs(rows, torch.cat([rows, rows + 0.1]), torch.arange(6).repeat(2))
    outcome = ranks_by(Heads(image, torch.eye(6)), pairs, torch.zeros(6))
    assert outcome.percentiles().tolist() == pytest.approx([expected] * 6)


def test_groups_of_several_images_count_by_their_images():
    pairs = pairs_of(90, noise=2.0)
    outcome, groups = chosen(pairs).outcome, np.minimum(np.arange(90), 30)
    first = [float((places < 1).double().mean()) for places in (outcome.to_text, outcome.to_image)]
    assert outcome.recall(1, groups).value == pytest.approx(sum(first) / 2)
    assert outcome.percentile(groups).value == pytest.approx(float(outcome.percentiles().mean()))


def test_captions_of_one_image_weigh_as_one_in_cross_validation():
    once, folds = pairs_of(40, noise=1.0), torch.arange(40) % 5
    owners = torch.cat([torch.arange(40), torch.arange(0, 40, 5).repeat(4)])
    # Every fifth image has its caption five times
    often = Pairs(once.images, once.texts[owners], owners)
    fits = []
    for pairs in (once, often):
        (outcome,) = CrossValidation(FitData(pairs, np.arange(40), folds), 0.0).ranks(
            (DEFAULT_FORM,)
        )
        fits.append(outcome.fit[:40])
    torch.testing.assert_close(*fits)


def test_meaningless_captions_leave_the_start_as_it_is():
    pairs = pairs_of(100)
    meaningless = pairs._replace(texts=randn(*pairs.texts.shape, seed=3))
    choice = chosen(meaningless, classes=class_pairs())
    assert choice.form == START
    low, high = choice.outcome.percentile(np.arange(100))[1:]
    assert low < 0.5 < high


def test_the_start_knows_no_pair():
    pairs, classes, groups = pairs_of(40, noise=1.0), class_pairs(), np.arange(40)
    nothing = Pairs(*(part[:0] for part in pairs))
    alone = fit_heads(nothing, classes, 1.0, DEFAULT_FORM)
    expected = ranks_by(alone, pairs, torch.from_numpy(assign_folds(groups, 5))).percentiles()
    torch.testing.assert_close(chosen(pairs, groups, classes).start.percentiles(), expected)


def test_few_pairs_take_the_usual_heads():
    for count, usual in ((40, True), (400, False)):
        choice = chosen(pairs_of(count, noise=0.1))
        assert (choice.form == DEFAULT_FORM) == usual
    known = class_pairs(60)
    # Worse than any pairs, so the start does not stay
    wrong = known._replace(texts=known.texts.flip(0))
    assert chosen(pairs_of(40, noise=0.1), classes=wrong).class_weight == 1


def test_more_noise_needs_more_ridge_and_a_smaller_scale():
    clear, noisy = (chosen(pairs_of(300, noise=noise)) for noise in (0.3, 3.0))
    assert clear.form.ridge < noisy.form.ridge
    assert clear.logit_scale > noisy.logit_scale


def test_classes_help_in_cross_validation_as_in_the_fit():
    pairs, folds = pairs_of(20, noise=3.0), torch.arange(20) % 5
    means = []
    for weight in (0.0, 1.0):
        validation = CrossValidation(FitData(pairs, np.arange(20), folds, class_pairs(300)), weight)
        means.append(float(validation.ranks((DEFAULT_FORM,))[0].percentiles().mean()))
    assert means[1] > means[0] + 0.1


def test_cross_validated_recall_is_near_that_of_new_images():
    pairs, new = pairs_of(400, noise=1.0), pairs_of(80, noise=1.0, seed=5)
    choice = chosen(pairs)
    truth = held_out(choice.heads, new).recall(10, np.arange(80)).value
    estimate = choice.outcome.recall(10, np.arange(400))
    assert estimate.value == pytest.approx(truth, abs=0.1)  # folds of 80 images, too
    assert estimate.low < estimate.value < estimate.high


def test_many_images_compete_in_blocks_and_all_have_a_rank(monkeypatch):
    pairs = pairs_of(200, noise=0.5)
    monkeypatch.setattr(known_data, "MOST", 100)
    monkeypatch.setattr(ranks, "BLOCK", 20)
    outcome = chosen(pairs).outcome
    assert set(outcome.images.tolist()) == {20}
    assert outcome.fit.isfinite().all()


def test_captions_that_do_not_fit_have_bad_ranks_out_of_fold():
    pairs = pairs_of(200)
    wrong = torch.arange(0, 40, 2)
    pairs.texts[wrong] = pairs.texts[wrong.roll(1)]
    outcome = chosen(pairs).outcome
    assert int(torch.isin(outcome.fit.argsort(descending=True)[:30], wrong).sum()) >= 16


def test_folds_keep_groups_together_and_are_of_one_size():
    groups = np.repeat(np.arange(30), np.arange(30) % 4 + 1)
    folds = assign_folds(groups, 5)
    assert all(len(np.unique(folds[groups == group])) == 1 for group in range(30))
    assert np.ptp(np.bincount(folds)) <= 1


def test_fewer_groups_than_can_be_validated_take_the_defaults():
    choice = chosen(pairs_of(30), np.arange(30) // 2)
    assert (choice.form, choice.class_weight, choice.outcome) == (("ridge", 1.0), 0.0, None)


def test_the_jackknife_of_equal_groups_is_the_interval_of_a_mean(monkeypatch):
    monkeypatch.setattr(estimates, "WIDER", 1.0)
    values = np.random.default_rng(0).random(30)
    without = (values.sum() - values) / 29
    half = t.ppf(0.975, 29) * values.std(ddof=1) / 30**0.5
    assert jackknife(without, np.full(30, 4)) == pytest.approx(half)


def test_the_interval_contains_the_result_on_new_pairs():
    # Of 60 intervals of 95 % about 57; without the factor for folds that are not independent 52
    new, groups, right = pairs_of(600, noise=4.0, seed=999), np.arange(40), 0
    for seed in range(60):
        choice = chosen(pairs_of(40, noise=4.0, seed=seed))
        estimate = choice.outcome.percentile(groups)
        truth = float(held_out(choice.heads, new).percentiles().mean())
        right += estimate.low <= truth <= estimate.high
    assert 54 <= right < 60


def test_a_few_large_groups_widen_the_interval():
    pairs = pairs_of(200, noise=1.0)
    outcome = chosen(pairs).outcome
    # 100 groups of 2; 100 of 1 and one of 100
    even = np.arange(200) // 2
    uneven = np.minimum(np.arange(200), 100)
    for estimate in (lambda groups: outcome.recall(1, groups), outcome.percentile):
        widths = [(found := estimate(groups)).high - found.low for groups in (even, uneven)]
        assert widths[1] > 1.15 * widths[0]


def curve_of(pairs, groups):
    choice = chosen(pairs, groups)
    return choice, growth(choice)


def test_the_curve_rises_where_more_pairs_help():
    pairs, groups = pairs_of(600, v=100, w=80, noise=3.0), np.arange(600)
    choice, curve = curve_of(pairs, groups)
    assert curve.pairs == [75, 150, 300, 600]
    assert curve.measured[-1] == choice.outcome.percentile(groups)
    values = [each.value for each in curve.measured]
    assert values == sorted(values)
    assert "600 pairs" in growth_chart(curve.to_dict()).words


def test_fewer_pairs_may_take_more_ridge(monkeypatch):
    choice = chosen(pairs_of(320, v=60, w=50, noise=1.0))
    several = growth(choice).measured
    monkeypatch.setattr("declip.closed_form.growth.MORE_RIDGE", (1.0,))
    alone = growth(choice).measured
    assert several[0].value > alone[0].value
    assert several[-1] == alone[-1]


def test_parts_keep_groups_together():
    assert curve_of(pairs_of(320), np.arange(320) // 4)[1].pairs == [40, 80, 160, 320]


def test_a_few_large_groups_have_no_curve():
    assert curve_of(pairs_of(200), np.maximum(np.arange(200) - 100, 0))[1] == ([], [])


def test_ranks_equal_a_plain_loop():
    # 1 and 2 share a caption
    texts = torch.tensor([0, 1, 2, 2, 3, 4, 5])
    owners = torch.tensor([0, 0, 1, 2, 3, 4, 4])
    numbers = caption_numbers(Pairs(torch.empty(5, 1), texts[:, None].double(), owners))
    scores = randn(5, 6)
    found = ranks.score(scores, HeldOutBlock.of(torch.arange(5), owners, numbers))
    for image in range(5):
        best = max(scores[image, texts[owners == image]])
        assert found.to_text[image] == sum(score > best for score in scores[image])
    for caption, text in enumerate(texts):
        best = max(scores[owners[texts == text], text])
        assert found.to_image[caption] == sum(score > best for score in scores[:, text])


@pytest.mark.parametrize("count", [30, 90])  # fewer rows than columns, and more
def test_the_largest_directions_are_the_principal_axes(count):
    rows = torch.randn(count, 40, generator=torch.Generator().manual_seed(0))
    weights = torch.linspace(0.1, 2, count)
    turned = rows @ largest_directions(rows, weights, 10)
    moments = torch.linalg.eigvalsh((rows * weights[:, None]).mT @ rows)[-10:]
    torch.testing.assert_close(
        (turned * weights[:, None]).mT @ turned, moments.diag(), atol=1e-3, rtol=1e-4
    )


def recall(heads, pairs):
    return float((held_out(heads, pairs).to_text < 1).double().mean())


@pytest.mark.parametrize("posteriors", [False, True])
def test_a_mixture_with_the_start_is_better_on_pairs_of_the_start(posteriors):
    classes, kept = class_pairs(300)._replace(posteriors=posteriors), pairs_of(100, seed=3)
    turn = torch.linalg.qr(randn(7, 7, seed=5)).Q
    own = pairs_of(100, seed=1)
    own = own._replace(texts=own.texts @ turn)  # other words for the same images
    choices = mixed_choices(chosen(own, classes=classes), (1.0, 0.5, 0.25))
    of_kept = {alpha: recall(choice.heads, kept) for alpha, choice in choices.items()}
    assert of_kept[0.25] > of_kept[0.5] > of_kept[1] + 0.05
    best, worst = (choices[alpha].outcome.recall(1, np.arange(100)) for alpha in (1.0, 0.25))
    assert best.value > worst.value


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_mixture_adds_the_maps_of_both_heads(weight):
    pairs, classes = pairs_of(60), class_pairs(30)
    ends = [fit_heads(pairs, classes, part, DEFAULT_FORM) for part in (1.0, weight)]
    mixed = mix(*ends, 0.3)
    maps = [
        pad(heads.image, (0, 42 - heads.image.shape[1])).mT @ heads.text for heads in (*ends, mixed)
    ]
    start, end, found = (each / each.norm() for each in maps)
    expected = 0.7 * start + 0.3 * end
    torch.testing.assert_close(found, expected / expected.norm())
    assert mixed.classifier is (ends[1].classifier or ends[0].classifier)


def test_the_out_of_fold_ranks_of_a_mixture_are_those_of_heads_without_the_fold():
    pairs, classes = pairs_of(60, noise=1.0), class_pairs(300)
    choice = chosen(pairs, classes=classes)
    found, folds = mixed_choices(choice, (1.0, 0.5))[0.5].outcome, choice.whole.data.folds
    equal = []
    for fold in folds.unique():
        some, rows = (sides.nonzero().flatten() for sides in (folds != fold, folds == fold))
        fitted, left_out = (
            Pairs(pairs.images[at], pairs.texts[at], torch.arange(len(at))) for at in (some, rows)
        )
        heads = fit_heads(fitted, classes, choice.class_weight, choice.form)
        ranks = held_out(mix(choice.start_heads, heads, 0.5), left_out).to_text
        equal.append((found.to_text[rows] == ranks).double())
    assert float(torch.cat(equal).mean()) > 0.9  # cross-validation takes the means of all folds


def test_a_sample_of_many_pairs_keeps_their_groups_and_folds(monkeypatch):
    monkeypatch.setattr(known_data, "MOST", 40)
    pairs, groups = pairs_of(100), np.arange(100) // 2
    data = data_of(pairs, groups, seed=1)
    sample = data.sample()
    rows = torch.cdist(sample.pairs.images, pairs.images).argmin(dim=1)
    assert len(rows.unique()) == 40
    assert sample.folds.tolist() == data.folds[rows].tolist()
    assert sample.groups.tolist() == groups[rows.numpy()].tolist()
