"""Files of the official models: what is read from them, what may be chosen, and every wrong one."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import declip
from declip.errors import UserError
from declip.interchange.export import import_weights
from declip.interchange.official import read_official
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
    from_file, from_state = read_official(path), read_official(tiny)
    for read, expected in zip(from_file, from_state, strict=True):
        assert read.state_dict().keys() == expected.state_dict().keys()
        for name, tensor in expected.state_dict().items():
            assert torch.equal(read.state_dict()[name], tensor), name


def test_weights_choose_the_terms_and_heads():
    state = load_file(SHIPPED / "defilip_vit_tiny.safetensors")
    _, objective = read_official(state, {"contrastive": 1.0, "late_interaction": 0.5}, text_heads=2)
    assert objective.weights == {"contrastive": 1.0, "late_interaction": 0.5}
    assert {".".join(name.split(".")[1:3]) for name in objective.state_dict()} == {
        "late_interaction.patch_projection",
        "late_interaction.word_projection",
        "late_interaction.logit_scale",
    }
    assert objective.queue is None


def test_heads_of_attention(tiny, tmp_path):
    """Published models have a head for each 64 channels; equally wide towers share the number that is given."""

    def heads(**options):
        model, _ = read_official(tiny, **options)
        text = model.text_tower.transformer.resblocks[0].attn.heads
        return text, model.image_tower.trunk.blocks[0].attn.num_heads

    assert heads() == (1, 1)
    assert heads(text_heads=2) == (2, 2)
    assert heads(text_heads=2, image_heads=4) == (2, 4)
    save_file(tiny, tmp_path / "tiny.safetensors")
    import_weights(tmp_path / "tiny.safetensors", "declip-official", tmp_path / "out", text_heads=2, image_heads=4)
    imported = declip.load(tmp_path / "out", device="cpu")
    assert imported.text_tower.transformer.resblocks[0].attn.heads == 2
    assert imported.image_tower.trunk.blocks[0].attn.num_heads == 4
    with pytest.raises(UserError, match="text_heads"):
        import_weights(tmp_path, "huggingface", tmp_path / "other", text_heads=2)
    declip_state = load_file(SHIPPED / "declip_vit_tiny.safetensors")
    model, _ = read_official(declip_state, text_heads=4, queue_size=2)
    assert model.image_tower.trunk.blocks[0].attn.num_heads == 2


def test_reading_leaves_the_random_state_alone(tiny):
    before = torch.get_rng_state()
    read_official(tiny)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_result_does_not_share_memory_with_what_was_given(tiny):
    model, _ = read_official(tiny)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert tiny["visual.ln_pre.weight"].abs().sum() > 0


def test_a_logit_scale_that_theirs_cuts_off_is_cut_off(tiny):
    tiny["logit_scale"] = torch.tensor([6.0])
    model, _ = read_official(tiny)
    assert model.logit_scale.shape == ()
    assert model.logit_scale.exp().item() == pytest.approx(100, rel=1e-6)


def test_weights_that_the_file_cannot_serve(tiny):
    with pytest.raises(UserError, match=r"simsiam has the weight 0\.2.*contrastive"):
        read_official(tiny, {"contrastive": 1.0, "simsiam": 0.2})
    with pytest.raises(UserError, match="Did you mean 'contrastive'"):
        read_official(tiny, {"contrastiv": 1.0})
    model, objective = read_official(tiny, {"contrastive": 1.0, "simsiam": 0.0})
    assert objective.weights == {"contrastive": 1.0}
    assert model.training


def test_heads_that_do_not_divide_the_width(tiny):
    with pytest.raises(UserError, match="multiple"):
        read_official(tiny, text_heads=3)
    resnet = load_file(SHIPPED / "declip_resnet_tiny.safetensors")
    with pytest.raises(UserError, match="image_heads=3"):
        read_official(resnet, text_heads=2, image_heads=3)
