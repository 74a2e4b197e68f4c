"""Files of the authors' models: what is read from them, what may be chosen, and every wrong one."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from declip.errors import UserError
from declip.interchange import read_declip_authors
from golden_cases import SHIPPED


@pytest.fixture
def tiny():
    return load_file(SHIPPED / "clip_vit_tiny.safetensors")


@pytest.mark.parametrize("suffix", [".pth.tar", ".safetensors"])
def test_a_file_gives_the_same_as_its_state_dict(tiny, tmp_path, suffix):
    path = tmp_path / f"ckpt{suffix}"
    named = {f"module.{name}": tensor for name, tensor in tiny.items()}
    if suffix == ".safetensors":
        save_file(named, path)
    else:
        torch.save({"last_iter": 2, "model": named, "optimizer": {"state": {}, "param_groups": [1]}}, path)
    from_file, from_state = read_declip_authors(path), read_declip_authors(tiny)
    for read, expected in zip(from_file, from_state, strict=True):
        assert read.state_dict().keys() == expected.state_dict().keys()
        for name, tensor in expected.state_dict().items():
            assert torch.equal(read.state_dict()[name], tensor), name


def test_weights_choose_the_terms_and_heads():
    state = load_file(SHIPPED / "defilip_vit_tiny.safetensors")
    _, objective = read_declip_authors(state, {"contrastive": 1.0, "late_interaction": 0.5}, text_heads=2)
    assert objective.weights == {"contrastive": 1.0, "late_interaction": 0.5}
    assert {name.split(".")[0] for name in objective.state_dict()} == {
        "patch_projection",
        "word_projection",
        "late_scale",
    }
    assert objective.queue is None


def test_heads_of_attention(tiny):
    """Published models have a head for each 64 channels; equally wide towers share the number that is given."""

    def heads(**options):
        model, _ = read_declip_authors(tiny, **options)
        text = model.text_tower.transformer.resblocks[0].attn.heads
        return text, model.image_tower.trunk.blocks[0].attn.num_heads

    assert heads() == (1, 1)
    assert heads(text_heads=2) == (2, 2)
    assert heads(text_heads=2, image_heads=4) == (2, 4)
    declip_state = load_file(SHIPPED / "declip_vit_tiny.safetensors")
    model, _ = read_declip_authors(declip_state, text_heads=4, queue_size=2)
    assert model.image_tower.trunk.blocks[0].attn.num_heads == 2


def test_reading_leaves_the_random_state_alone(tiny):
    before = torch.get_rng_state()
    read_declip_authors(tiny)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_result_does_not_share_memory_with_what_was_given(tiny):
    model, _ = read_declip_authors(tiny)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert tiny["visual.ln_pre.weight"].abs().sum() > 0


def test_a_logit_scale_that_theirs_cuts_off_is_cut_off(tiny):
    tiny["logit_scale"] = torch.tensor([6.0])
    model, _ = read_declip_authors(tiny)
    assert model.logit_scale.shape == ()
    assert model.logit_scale.exp().item() == pytest.approx(100, rel=1e-6)


class Harmful:
    """What a pickle can do when it is trusted."""

    def __reduce__(self):
        return Path.touch, (Path("harm"),)


def test_no_code_in_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open("ckpt.pth", "wb") as file:
        pickle.dump({"model": Harmful()}, file, protocol=2)
    torch.save({"model": Harmful()}, "saved.pth")
    for path in ("ckpt.pth", "saved.pth"):
        with pytest.raises(UserError, match="Cannot read weights"):
            read_declip_authors(path)
    assert not Path("harm").exists()


def test_a_file_that_is_not_there_or_cut(tiny, tmp_path):
    with pytest.raises(UserError, match="no file"):
        read_declip_authors(tmp_path / "none.pth")
    torch.save(tiny, tmp_path / "whole.pth")
    save_file(tiny, tmp_path / "whole.safetensors")
    for name in ("whole.pth", "whole.safetensors"):
        cut = tmp_path / f"cut{Path(name).suffix}"
        for size in (0, 1000):
            cut.write_bytes((tmp_path / name).read_bytes()[:size])
            with pytest.raises(UserError, match=r"Cannot read weights from .*cut"):
                read_declip_authors(cut)


@pytest.mark.parametrize("content", [[1, 2], {"model": 3}, {"model": {"layer": torch.ones(1)}}, {"epoch": 3}, {}])
def test_something_else_in_a_file(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match="authors"):
        read_declip_authors(tmp_path / "other.pth")


def test_a_tensor_too_many_or_too_few_or_of_another_shape(tiny):
    with pytest.raises(UserError, match=r"'visual\.extra' is not a tensor"):
        read_declip_authors(tiny | {"visual.extra": torch.ones(1)})
    with pytest.raises(UserError, match=r"not complete.*not ours: text_tower\.extra"):
        read_declip_authors(tiny | {"encode_text.extra": torch.ones(1)})
    short = dict(tiny)
    del short["visual.ln_post.weight"]
    with pytest.raises(UserError, match=r"not complete.*missing: image_tower\.norm\.weight"):
        read_declip_authors(short)
    with pytest.raises(UserError, match=r"do not fit.*norm\.weight"):
        read_declip_authors(tiny | {"visual.ln_post.weight": torch.ones(3)})


def test_weights_that_the_file_cannot_serve(tiny):
    with pytest.raises(UserError, match=r"simsiam has the weight 0\.2.*contrastive"):
        read_declip_authors(tiny, {"contrastive": 1.0, "simsiam": 0.2})
    with pytest.raises(UserError, match="Did you mean 'contrastive'"):
        read_declip_authors(tiny, {"contrastiv": 1.0})
    model, objective = read_declip_authors(tiny, {"contrastive": 1.0, "simsiam": 0.0})
    assert objective.weights == {"contrastive": 1.0}
    assert model.training


def test_heads_that_do_not_divide_the_width(tiny):
    with pytest.raises(UserError, match="multiple"):
        read_declip_authors(tiny, text_heads=3)
    resnet = load_file(SHIPPED / "declip_resnet_tiny.safetensors")
    with pytest.raises(UserError, match="image_heads=3"):
        read_declip_authors(resnet, text_heads=2, image_heads=3)
