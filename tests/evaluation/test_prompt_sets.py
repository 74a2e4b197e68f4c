"""The shipped prompts and class names against their publications and against the readers' own class names."""

import hashlib
from importlib import resources

import pytest
from timm.data import ImageNetInfo

from conftest import refuses
from declip.errors import UserError
from declip.evaluation.datasets import NAMED
from declip.evaluation.readers import wnids_of
from declip.evaluation.zero_shot import class_names, prompt_names, read_prompts

DIGESTS = {
    "aircraft": "91522de75ad4", "caltech101": "610806b98066", "cars": "255ecc632c41", "cifar10": "9bbf912e1144",
    "cifar100": "9bbf912e1144", "dtd": "1f6888d2130f", "flowers102": "b7ec600cc4c7", "food101": "77a79bac7d9c",
    "imagenet": "0cb6809663fc", "pets": "16a0790f0e45", "sun397": "c97a3d1ad581",
}  # fmt: skip


def test_every_set_has_templates_a_source_and_the_classes_of_its_publication():
    for name in prompt_names():
        found = read_prompts(name)
        assert all(template.count("{}") == 1 for template in found.templates)
        assert len(set(found.templates)) == len(found.templates) > 0
        assert "declip" in found.source or "openai/CLIP" in found.source
        assert len(found.classes) == {"caltech101": 102, "flowers102": 102, "imagenet": 1000}.get(name, 0)
    assert {named.templates for named in NAMED.values()} <= set(prompt_names())


def test_imagenet_is_in_the_order_of_the_wordnet_numbers_that_timm_has():
    assert list(read_prompts("imagenet").classes) == sorted(ImageNetInfo("imagenet1k").label_names())


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r"])
def test_the_200_of_imagenet_a_and_r_are_those_that_timm_lists(name):
    path = resources.files("timm.data") / "_info" / f"{name.replace('-', '_')}_synsets.txt"
    assert wnids_of(name) == sorted(path.read_text().split())


def test_published_templates_and_names_are_unchanged():
    texts = {name: "\n".join([*(found := read_prompts(name)).templates, *found.classes.values()]) for name in DIGESTS}
    assert {name: hashlib.sha256(text.encode()).hexdigest()[:12] for name, text in texts.items()} == DIGESTS


def test_a_name_is_looked_up_by_the_sets_own_and_not_by_its_place():
    known = {
        ("flowers102", "93"): "air plant", ("caltech101", "Faces"): "off-center face",
        ("imagenet", "n03126707"): "construction crane", ("aircraft", "F-16A/B"): "F-16A/B",
    }  # fmt: skip
    assert {(name, raw): class_names(name, [raw])[0] for name, raw in known} == known


def test_classes_of_another_set():
    with pytest.raises(UserError, match=r"2 classes.*'unicorn'.*102 classes of 'caltech101'"):
        class_names("caltech101", ["ant", "unicorn", "dragon"])
    refuses("Did you mean 'caltech101'", class_names, "caltech", ["ant"])
