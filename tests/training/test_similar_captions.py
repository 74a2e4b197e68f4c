"""The pair with the most similar caption, found once before training by another model."""

import pytest
import torch
from torch.nn.functional import normalize

import declip
from conftest import refuses, write_rows
from data.fakes import Noise
from declip.data.sources.open import open_source
from declip.training.similar_captions import nearest_captions, similar_captions
from training.starts import recipe_for, trainer_of


@pytest.fixture
def captioned(tmp_path, table):
    """Pairs of which two have equal captions and one has none."""
    words = [["a red circle", "red"], ["a red circle", "red"], ["a red bar"], [""], ["a blue square"], ["red circle"]]
    images = sorted(table.parent.glob("*.png"))
    rows = [{"image": str(image), "caption": captions} for image, captions in zip(images, words, strict=False)]
    return write_rows(tmp_path / "captioned.jsonl", rows)


def test_neighbors_are_those_of_the_encoder(start, captioned, tmp_path):
    source, model = open_source(str(captioned)), declip.load(start, device="cpu")
    means, pairs = {}, [index for index in range(6) if index != 3]
    for index in pairs:
        mean = model.encode_text(list(source.captions(index))).mean(dim=0)
        means[index] = mean / mean.norm()

    def nearest(i):
        others = [j for j in pairs if source.captions(j) != source.captions(i)]
        return max(others, key=lambda j: float(means[i] @ means[j]))

    found = similar_captions(str(start), source, quiet=True).tolist()
    assert [found[i] for i in pairs] == [nearest(i) for i in pairs]
    sections = {
        "loss_weights": {"contrastive": 0.8, "caption_neighbor": 0.2},
        "caption_neighbor": {"encoder": str(start)},
        "data": {"source": str(captioned), "max_broken_fraction": 0.5},
    }
    trainer = trainer_of(recipe_for(captioned, "clip", sections, batch_size=4), tmp_path / "run")
    term = trainer.state.objective.terms["caption_neighbor"]
    assert term.neighbors.tolist() == found
    run = trainer.train()
    assert term.features_of[3].norm() == 0, "no step had it"
    torch.testing.assert_close(term.features_of[pairs].norm(dim=1), torch.ones(5))
    assert set(run.metrics[-1]["losses"]) == {"contrastive", "caption_neighbor"}


def test_what_cannot_have_neighbors_is_refused(start, tmp_path, monkeypatch):
    class Remote(Noise):
        remote = True

    refuses("captions .*remote.*Copy", similar_captions, str(start), Remote(), True)
    refuses("no-such-model", similar_captions, str(tmp_path / "no-such-model"), Noise(), True)
    model = declip.load(start, device="cpu")
    model.has_text = False
    monkeypatch.setattr("declip.training.similar_captions.load", lambda weights: model)
    refuses("images-alone.*no text tower.*Give weights", similar_captions, "images-alone", Noise(), True)


def test_the_nearest_other_caption_equals_a_plain_loop(monkeypatch):
    monkeypatch.setattr("declip.training.similar_captions.COSINES_AT_ONCE", 40)  # blocks of a few rows
    features = normalize(torch.randn(17, 4, generator=torch.Generator().manual_seed(3)), dim=1)
    same = torch.tensor([0, 0, 1, 2, 1, *range(3, 15)])

    def nearest(i):
        return max((j for j in range(17) if same[j] != same[i]), key=lambda j: float(features[i] @ features[j]))

    assert nearest_captions(features, same).tolist() == [nearest(i) for i in range(17)]
    assert nearest_captions(features[:2], same[:2]).tolist() == [0, 1], "no other caption"
