"""A fit of a model of one's own: an object with four methods."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import declip
from conftest import refuses
from declip.closed_form.folds import assign_folds
from declip.closed_form.pairs import FOLDS
from declip.data.images.thumbnails import Thumbnail
from declip.data.pair import Pair, PairSource
from declip.fitting.shown import OUTCOMES, SHOWN_QUERIES, compared_queries

NAMES = ("red", "green", "blue", "yellow", "cyan", "magenta", "gray", "orange")
COLORS = np.random.default_rng(0).integers(0, 256, (len(NAMES), 3))
TABLE = torch.randn(len(NAMES) + 1, 12, generator=torch.Generator().manual_seed(0))


class Painted(PairSource):
    """Images of one color with some noise; a caption names two of them by number."""

    name = "painted"

    def __len__(self):
        return 56

    def __getitem__(self, index):
        first, second = index % 8, (index % 8 + 1 + index // 8) % 8
        pixels = np.zeros((8, 8, 3), dtype=np.uint8)
        pixels[:, :4], pixels[:, 4:] = COLORS[first], COLORS[second]
        return Pair.of(f"{index}", Image.fromarray(pixels), (f"{NAMES[first]} {NAMES[second]}",))


class Colors(torch.nn.Module):
    """Embeds colors and words in two spaces that know nothing of each other."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.turn = torch.nn.Parameter(torch.randn(6, 12, generator=generator))
        self.passes = 0

    def preprocess(self, images):
        return torch.stack(
            [torch.from_numpy(np.array(image.resize((2, 1)))) / 255 for image in images]
        ).permute(0, 3, 1, 2)

    def encode_image(self, pixels):
        self.passes += len(pixels)
        return pixels.flatten(1) @ self.turn

    def tokenize(self, texts):
        known = {name: number for number, name in enumerate(NAMES)}
        rows = [[known.get(word, len(NAMES)) for word in text.split()][:2] for text in texts]
        return torch.tensor([(row * 2)[:2] for row in rows])

    def encode_text(self, tokens):
        return TABLE[tokens[:, 0]] + 2 * TABLE[tokens[:, 1]]


@pytest.fixture(scope="module")
def fitted():
    return declip.fit(Painted(), Colors())


def test_the_heads_map_its_embeddings_into_one_space(fitted):
    known = fitted.measures()
    assert (known["pairs"], known["better"]) == (56, True)
    assert known["percentile"]["low"] > 0.6
    before = declip.evaluate(Colors(), Painted(), "retrieval", progress=False)
    after = declip.evaluate(fitted.model, Painted(), "retrieval", progress=False)
    assert before.text_to_image.r10 < 0.4 < 0.7 < after.text_to_image.r10


def test_the_seed_divides_the_pairs_into_folds():
    fitted = declip.fit(Painted(), Colors(), seed=3)
    expected = assign_folds(fitted.features.groups, FOLDS, 3)
    assert fitted.choice.whole.data.folds.tolist() == expected.tolist()


def test_the_report_shows_what_came_first_before_and_by_a_fit_without_the_caption(fitted):
    choice, features = fitted.choice, fitted.features
    images, texts, _ = features.pairs
    folds = torch.from_numpy(assign_folds(features.groups, FOLDS, fitted.seed))
    of_folds = choice.whole.heads_of_folds(choice.form)
    first, outcomes = {}, Counter()
    for row, caption in enumerate(features.captions):
        heads = of_folds[int(folds[row])].to(images)
        others = folds != folds[row]
        before, now = (
            int(each.masked_fill(others, -torch.inf).argmax())
            for each in (images @ texts[row], heads.similarities(images, texts[row][None])[:, 0])
        )
        first[caption] = {"own": row, "before": before, "now": now}
        right = (now == row, before == row)
        names = {(True, False): "now", (False, True): "before", (True, True): "both"}
        outcomes[names.get(right, "neither")] += 1
    found = compared_queries(fitted, lambda index: Thumbnail(str(index), ""))
    assert found["compared"]
    assert found["counts"] == {name: outcomes[name] for name in OUTCOMES}
    assert len({query["caption"] for query in found["shown"]}) == SHOWN_QUERIES
    for query in found["shown"]:
        for name, index in first[query["caption"]].items():
            assert query[name]["src"] == str(index)


def test_every_image_is_encoded_once():
    model = Colors()
    declip.fit(Painted(), model)
    assert model.passes == len(Painted())


def test_the_fitted_model_is_embedded_and_searched(fitted, tmp_path):
    index = declip.embed(fitted.model, Painted(), out=tmp_path / "index")
    hits = index.search("red green", k=3, copies=True)
    model, source = fitted.model, Painted()
    images = model.encode_image(
        model.preprocess([source[i].open().decoded() for i in range(len(source))])
    )
    text = model.encode_text(model.tokenize(["red green"]))
    best = (text @ images.T)[0].argsort(descending=True)[:3]
    assert [hit.id for hit in hits] == best.tolist()
    assert (
        declip.Index(tmp_path / "index", model=fitted.model).search("red green", copies=True)[0]
        == hits[0]
    )
    refuses("made by another model", lambda: declip.Index(tmp_path / "index", model=Colors()).model)


def test_only_models_of_declip_are_exported(fitted):
    refuses("Colors is not a model of declip", fitted.model.merged)


def test_spaces_of_two_widths_have_no_start():
    class Narrow(Colors):
        def encode_text(self, tokens):
            return super().encode_text(tokens)[:, :9]

    refuses("12 and 9 numbers|9 and 12 numbers", declip.evaluate, Narrow(), Painted(), "retrieval")
    fitted = declip.fit(Painted(), Narrow())
    assert fitted.start is None
    assert "percentile_of_start" not in fitted.measures()
    after = declip.evaluate(fitted.model, Painted(), "retrieval", progress=False)
    assert after.text_to_image.r10 > 0.6


def test_an_object_is_fitted_by_fit_and_not_fine_tuned(tmp_path):
    refuses("declip.fit", declip.finetune, Painted(), Colors(), out=tmp_path / "out")
