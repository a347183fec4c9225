"""Networks that nobody has trained yet: a function of the seed, of a known size or of a user's config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sdlab.errors import OutOfResources, SdlabError
from sdlab.models.bases import FROM_SCRATCH, RECOMMENDED
from sdlab.models.fresh import fresh_config, fresh_name, fresh_part, known_sizes
from sdlab.models.parts import load
from sdlab.models.vae import Autoencoder

CPU = torch.device("cpu")
SIZES = [("unet", "small"), ("vae", "small"), ("vae", "small-flux2"), ("transformer", "small")]


def tensors(part) -> dict[str, torch.Tensor]:
    return {name: stored.read() for name, stored in part.weights.items()}


def config_json(folder: Path, name: str, init: str, **changes) -> Path:
    config, _ = fresh_config(name, init)
    path = folder / "mine.json"
    path.write_text(json.dumps({k: v for k, v in {**config, **changes}.items() if v is not ...}))
    return path


@pytest.mark.parametrize(("name", "init"), SIZES)
def test_weights_are_a_function_of_the_seed_alone(name, init):
    state = torch.random.get_rng_state()
    first = fresh_part(name, init, seed=1, adapt={})
    assert torch.equal(state, torch.random.get_rng_state())
    torch.rand(99)
    again, other = (tensors(fresh_part(name, init, seed=seed, adapt={})) for seed in (1, 2))
    mine = tensors(first)
    assert all(torch.equal(mine[n], again[n]) for n in mine)
    drawn = [n for n, t in mine.items() if t.ndim > 1 and t.abs().max() > 0]
    assert len(drawn) > 15 and not any(torch.equal(mine[n], other[n]) for n in drawn)
    assert len({mine[n].flatten()[:4].numpy().tobytes() for n in drawn}) == len(drawn)  # each layer its own
    module = load(first, CPU, torch.float32)
    assert all(torch.equal(t, mine[n]) for n, t in module.state_dict().items())


@pytest.mark.parametrize("name", ["unet", "transformer", "vae"])
def test_every_known_size_has_a_configuration_and_settings(name):
    assert "small" in known_sizes(name)
    for size in known_sizes(name):
        fresh_config(name, size)
        family = {"unet": "sd", "transformer": "flux2"}.get(name)
        assert family is None or {f"{family}-{size}"} <= FROM_SCRATCH.keys() & RECOMMENDED.keys()


def test_the_sizes_are_what_their_help_says():
    """Weights of each size; those called small are mini-sd's and mini-flux2's."""
    sizes = {
        ("unet", "small"): 3_782_084,
        ("vae", "small"): 978_103,
        ("vae", "small-flux2"): 978_103,
        ("transformer", "small"): 3_680_768,
    }
    for (name, init), wanted in sizes.items():
        part = fresh_part(name, init, seed=0, adapt={})
        buffers = [n for n in part.weights if n.startswith("bn.")]
        assert sum(t.numel() for n, t in tensors(part).items() if n not in buffers) == wanted


@pytest.mark.parametrize("init", ["small", "small-flux2"])
def test_an_untrained_vae_lets_colours_pass(init):
    """A picture's rough colours are a linear function of its latents from the start."""
    vae = load(fresh_part("vae", init, seed=3, adapt={}), CPU, torch.float32)
    flat = torch.linspace(-1, 1, 9)[:, None, None, None] * torch.ones(1, 3, 32, 32)
    with torch.no_grad():
        latents = vae.encode(flat).latent_dist.mean.mean(dim=(2, 3))
    spread = latents.std(0)
    line = torch.corrcoef(torch.cat([latents.T, torch.linspace(-1, 1, 9)[None]]))[-1, :-1].abs()
    assert spread.max() > 0.1 and line[spread.argmax()] > 0.8


def test_an_untrained_transformer_says_nothing():
    weights = tensors(fresh_part("transformer", "small", seed=0, adapt={}))
    assert weights["proj_out.weight"].abs().max() == 0
    modulation = [t for n, t in weights.items() if "modulation" in n]
    others = [t for n, t in weights.items() if "blocks" in n and t.ndim == 2]
    assert modulation and max(t.std() for t in modulation) < 0.3 * min(t.std() for t in others)


def test_a_known_size_fits_itself_to_the_other_parts():
    adapt = {"in_channels": 16, "out_channels": 16, "cross_attention_dim": 40}
    part = fresh_part("unet", "small", seed=0, adapt=adapt)
    assert adapt.items() <= part.config.items()
    assert part.weights["conv_in.weight"].shape[1] == part.weights["conv_out.weight"].shape[0] == 16
    assert part.weights["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].tensor.shape[1] == 40


def test_a_config_json_that_fits_nothing_here_says_both_numbers(tmp_path):
    path = config_json(tmp_path, "unet", "small", cross_attention_dim=768)
    with pytest.raises(SdlabError, match=r"cross_attention_dim is 768.* 128") as said:
        fresh_part("unet", str(path), seed=0, adapt={"in_channels": 4, "cross_attention_dim": 128})
    assert "\n" not in str(said.value) and "--text-encoder" in str(said.value)
    path = config_json(tmp_path, "unet", "small", cross_attention_dim=...)  # it leaves that open
    part = fresh_part("unet", str(path), seed=0, adapt={"in_channels": 4, "cross_attention_dim": 128})
    assert part.config["cross_attention_dim"] == 128


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"_class_name": "AutoencoderKL"}, "class AutoencoderKL, not UNet2DConditionModel"),
        ({"block_out_channels": [10**9]}, "more than the"),
        ({"norm_num_groups": 7}, "does not describe a UNet2DConditionModel"),
        ({"layers_per_block": 17}, "more than the 16"),
        ({"dropout": 0.1}, "dropout is 0.1"),
        ({"inner": {"attention_dropout": 1}}, "attention_dropout is 1"),
        ({"num_class_embeds": 5}, "cannot be used .*class_labels"),
        ({"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 8}, "cannot be used"),
        ({"cross_attention_dim": [8, 8, 8]}, "cannot be used|does not describe"),
        ({"out_channels": 8}, r"makes \[1, 8, 256, 256\] of \[1, 4, 256, 256\]"),
    ],
)
def test_a_config_json_of_no_network_is_refused_in_one_line(tmp_path, changes, said):
    path = config_json(tmp_path, "unet", "small", **changes)
    with pytest.raises(SdlabError, match=said) as refused:
        fresh_part("unet", str(path), seed=0, adapt={})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["vae", "unet"])
def test_what_a_config_json_leaves_out_is_what_the_library_takes(tmp_path, name):
    path = config_json(tmp_path, name, "small", layers_per_block=...)
    assert "layers_per_block" in fresh_part(name, str(path), seed=0, adapt={}).config


def test_a_vae_whose_blocks_have_no_sizes_is_one_block(tmp_path):
    left_out = dict.fromkeys(("block_out_channels", "down_block_types", "up_block_types"), ...)
    path = config_json(tmp_path, "vae", "small", norm_num_groups=8, **left_out)
    assert Autoencoder(fresh_part("vae", str(path), seed=0, adapt={})).grid == 1


def test_two_things_that_do_not_fit_are_told_at_once(tmp_path):
    path = config_json(tmp_path, "unet", "small", cross_attention_dim=768, in_channels=9)
    with pytest.raises(SdlabError, match=r"in_channels is 9 and must be 4, cross_attention_dim is 768"):
        fresh_part("unet", str(path), seed=0, adapt={"in_channels": 4, "cross_attention_dim": 128})


def test_a_network_that_memory_cannot_hold_is_refused_before_it_is_built(tmp_path):
    path = config_json(tmp_path, "unet", "small", block_out_channels=[8192, 8192, 8192], layers_per_block=16)
    with pytest.raises(
        OutOfResources, match=r"describes [\d,.]+ million weights: [\d.]+ GB, and [\d.]+ GB are free"
    ):
        fresh_part("unet", str(path), seed=0, adapt={})


def test_a_word_that_is_no_size_names_the_sizes():
    with pytest.raises(SdlabError, match=r"'smal' is no size .*did you mean 'small'\?.*sd, small"):
        fresh_part("unet", "smal", seed=0, adapt={})


def test_names_for_folders():
    assert [fresh_name(i) for i in ("small", "my nets/big one.json", "nets/wide/config.json", "config.json")] == [
        "small", "big-one", "wide", "config",
    ]  # fmt: skip
