"""LoRA: what is adapted, how it starts, and that files of every make mean the same here as in diffusers."""

from __future__ import annotations

import copy
import json
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdlab.errors import SdlabError
from sdlab.keyed import keyed
from sdlab.models.files import Stored
from sdlab.models.lora import add_lora, apply_loras, check_loras, parse_lora, take_off, targets, write_lora
from sdlab.models.parts import Part

CHANNELS, WIDTH, TEXT = 32, 64, 96


def flux2(*, double: int = 2, single: int = 2, guidance: bool = False, width: int = WIDTH):
    from diffusers import Flux2Transformer2DModel

    torch.manual_seed(0)
    return Flux2Transformer2DModel(
        in_channels=CHANNELS,
        num_layers=double,
        num_single_layers=single,
        num_attention_heads=width // 16,
        attention_head_dim=16,
        axes_dims_rope=(4, 4, 4, 4),
        joint_attention_dim=TEXT,
        guidance_embeds=guidance,
    ).eval()


@torch.no_grad()
def flux2_out(model) -> torch.Tensor:
    draws = keyed("lora-test")
    rows = torch.arange(4.0)
    guidance = torch.ones(1) if model.config.guidance_embeds else None
    return model(
        hidden_states=torch.randn(1, 16, CHANNELS, generator=draws),
        encoder_hidden_states=torch.randn(1, 12, TEXT, generator=draws),
        timestep=torch.tensor([0.5]),
        img_ids=torch.cartesian_prod(torch.zeros(1), rows, rows, torch.zeros(1)),
        txt_ids=torch.cartesian_prod(*[torch.zeros(1)] * 3, torch.arange(12.0)),
        guidance=guidance,
        return_dict=False,
    )[0]


@torch.no_grad()
def unet_out(model) -> torch.Tensor:
    draws = keyed("lora-test")
    return model(
        torch.randn(1, 4, 8, 8, generator=draws),
        torch.tensor([7]),
        encoder_hidden_states=torch.randn(1, 77, 32, generator=draws),
        return_dict=False,
    )[0]


def flux2_pipeline(model):
    from diffusers import Flux2KleinPipeline

    return Flux2KleinPipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=model)


@pytest.fixture
def sd(tiny_sd_folder):
    from diffusers import StableDiffusionPipeline

    return lambda: StableDiffusionPipeline.from_pretrained(tiny_sd_folder, dtype=torch.float32)


def lora_of(model, *, rank: int = 4, alpha: float = 4.0, std: float = 1.0):
    """The model with a LoRA whose B is not zero."""
    add_lora(model, rank=rank, alpha=alpha, seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = std * torch.randn(parameter.shape, generator=keyed("B", name))
    return model


def close(mine: torch.Tensor, theirs: torch.Tensor, base: torch.Tensor) -> bool:
    """Equal to rounding, and the LoRA does something."""
    effect = (theirs - base).abs().max()
    assert effect > 0.02
    return bool((mine - theirs).abs().max() < 1e-3 * effect)


# ------------------------------------------------------------------------------------------------ what is adapted


@pytest.mark.parametrize(
    ("double", "single", "num"), [(5, 20, 100), (8, 24, 144), (8, 48, 192)], ids=["4B", "9B", "32B"]
)
def test_every_linear_layer_of_every_block_is_adapted(double, single, num):
    with torch.device("meta"):
        model = flux2(double=double, single=single)
    names = targets(model)
    inside = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.split(".")[0].endswith("transformer_blocks")
    ]
    assert len(names) == num and set(names) == set(inside)


def test_a_unets_attention_and_feed_forward_are_adapted(sd):
    unet = sd().unet
    names = targets(unet)
    blocks = {name.partition(".transformer_blocks.0.")[0] for name in names}
    assert len(names) == 10 * len(blocks) > 0
    inside = [
        name
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear) and ".transformer_blocks." in name
    ]
    assert set(names) == set(inside)


def test_the_real_klein_4b_gets_24_1_million_weights():
    from diffusers import Flux2Transformer2DModel

    with torch.device("meta"):
        model = Flux2Transformer2DModel(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680,
            guidance_embeds=False,
        )  # fmt: skip
        shapes = [model.get_submodule(name).weight.shape for name in targets(model)]
    assert sum(16 * (out + width) for out, width in shapes) == 24_084_480


def test_a_new_lora_changes_nothing_and_is_drawn_by_name():
    model = flux2()
    before = flux2_out(model)
    lora = add_lora(model, rank=4, alpha=2.0, seed=7)
    assert torch.equal(flux2_out(model), before)
    assert lora.num_layers == 28 and lora.scale == 0.5
    assert "rank 4 on 28 layers" in lora.as_line() and "scale 0.5" in lora.as_line()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 28 and all(
        "lora_" in n and p.dtype == torch.float32 for n, p in trained.items()
    )
    assert sum(p.numel() for p in trained.values()) == lora.num_parameters
    torch.manual_seed(99)  # nothing hangs on the global state
    again = flux2()
    add_lora(again, rank=4, alpha=2.0, seed=7)
    other = flux2()
    add_lora(other, rank=4, alpha=2.0, seed=8)
    mine, same, differs = (
        {n: p for n, p in m.named_parameters() if p.requires_grad} for m in (model, again, other)
    )
    assert all(torch.equal(mine[n], same[n]) for n in mine)
    assert any(not torch.equal(mine[n], differs[n]) for n in mine)
    downs = [p for n, p in trained.items() if "lora_A" in n]
    assert all(p.abs().max() <= p.shape[1] ** -0.5 and p.std() > 0.5 * p.shape[1] ** -0.5 for p in downs)


def test_a_lora_beside_bf16_weights_is_trained_in_fp32_and_gets_gradients():
    model = flux2().to(torch.bfloat16)
    lora_of(model)
    model.enable_gradient_checkpointing()
    draws = keyed("x")
    rows = torch.arange(4.0)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(
            hidden_states=torch.randn(1, 16, CHANNELS, generator=draws).bfloat16(),
            encoder_hidden_states=torch.randn(1, 12, TEXT, generator=draws).bfloat16(),
            timestep=torch.tensor([0.5]),
            img_ids=torch.cartesian_prod(torch.zeros(1), rows, rows, torch.zeros(1)),
            txt_ids=torch.cartesian_prod(*[torch.zeros(1)] * 3, torch.arange(12.0)),
            return_dict=False,
        )[0]
        out.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.dtype == torch.float32 and parameter.grad.dtype == torch.float32
        else:
            assert parameter.grad is None


# ------------------------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("alpha", [4.0, 2.0])
def test_diffusers_reads_what_is_written_with_the_same_effect(tmp_path, alpha):
    model = flux2()
    base = flux2_out(model)
    trained = lora_of(copy.deepcopy(model), alpha=alpha)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    write_lora(trained, path, rank=4, alpha=alpha, metadata={"about": "a test"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "about": "a test"}
        assert len(file.keys()) == 2 * 28 and all(k.startswith("transformer.") for k in file.keys())
    pipeline = flux2_pipeline(copy.deepcopy(model))
    pipeline.load_lora_weights(tmp_path)
    assert close(flux2_out(pipeline.transformer), flux2_out(trained), base)
    mine = flux2_pipeline(copy.deepcopy(model))
    apply_loras(mine, [(path, 1.0)])
    assert close(flux2_out(mine.transformer), flux2_out(trained), base)


def test_diffusers_reads_a_unets_lora_with_the_same_effect(sd, tmp_path):
    base = unet_out(sd().unet)
    trained = lora_of(sd().unet, alpha=2.0)
    write_lora(trained, tmp_path / "pytorch_lora_weights.safetensors", rank=4, alpha=2.0, metadata={})
    theirs, mine = sd(), sd()
    theirs.load_lora_weights(tmp_path)
    apply_loras(mine, [(tmp_path / "pytorch_lora_weights.safetensors", 1.0)])
    assert close(unet_out(theirs.unet), unet_out(trained), base)
    assert close(unet_out(mine.unet), unet_out(trained), base)


def test_a_lora_of_bf16_weights_is_stored_in_bf16(tmp_path):
    write_lora(
        lora_of(flux2().to(torch.bfloat16)), tmp_path / "a.safetensors", rank=4, alpha=4.0, metadata={}
    )
    assert {t.dtype for t in load_file(tmp_path / "a.safetensors").values()} == {torch.bfloat16}


# ---------------------------------------------------------------------------------------------- what others wrote


DOUBLE = {
    "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj", "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2", "ff_context.linear_in": "txt_mlp.0", "ff_context.linear_out": "txt_mlp.2",
}  # fmt: skip
SINGLE = {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}


def to_bfl(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Diffusers' names as Black Forest Labs': q, k, v fused, A stacked and B on the diagonal of a matrix."""
    out: dict[str, torch.Tensor] = {}
    fused: dict[str, list[str]] = {}
    for base in sorted({k.rpartition(".lora_")[0] for k in tensors}):
        kind, number, leaf = base.removeprefix("transformer.").split(".", 2)
        if kind.startswith("single"):
            out |= moved(tensors, base, f"diffusion_model.single_blocks.{number}.{SINGLE[leaf]}")
        elif leaf in DOUBLE:
            out |= moved(tensors, base, f"diffusion_model.double_blocks.{number}.{DOUBLE[leaf]}")
        else:
            side = "txt" if leaf.startswith("attn.add_") else "img"
            fused.setdefault(f"diffusion_model.double_blocks.{number}.{side}_attn.qkv", []).append(base)
    for name, bases in fused.items():
        order = sorted(bases, key=lambda b: "qkv".index(b.removesuffix("_proj")[-1]))
        out[f"{name}.lora_A.weight"] = torch.cat([tensors[f"{b}.lora_A.weight"] for b in order])
        out[f"{name}.lora_B.weight"] = torch.block_diag(*[tensors[f"{b}.lora_B.weight"] for b in order])
    return out


def moved(tensors, base, name):
    return {f"{name}.lora_{half}.weight": tensors[f"{base}.lora_{half}.weight"] for half in "AB"}


def to_kohya(bfl: dict[str, torch.Tensor], *, share: float = 1.0) -> dict[str, torch.Tensor]:
    """kohya's names, with alpha = `share` of the rank and B as much larger."""
    out = {}
    for key, tensor in bfl.items():
        base, _, half = key.removeprefix("diffusion_model.").rpartition(".lora_")
        name = f"lora_unet_{base.replace('.', '_')}"
        down = half.startswith("A")
        out[f"{name}.lora_{'down' if down else 'up'}.weight"] = tensor if down else tensor / share
        if down:
            out[f"{name}.alpha"] = torch.tensor(share * len(tensor))
    return out


@pytest.fixture
def klein(tmp_path):
    """(model, its output, its output with a LoRA, the LoRA's tensors under diffusers' names)."""
    model = flux2()
    trained = lora_of(copy.deepcopy(model))
    path = tmp_path / "first.safetensors"
    write_lora(trained, path, rank=4, alpha=4.0, metadata={})
    return SimpleNamespace(
        model=model, base=flux2_out(model), wanted=flux2_out(trained), tensors=load_file(path)
    )


def bare(tensors):
    return {k.removeprefix("transformer."): t for k, t in tensors.items()}


LAYOUTS = {
    "diffusers": lambda t: t,
    "bfl": to_bfl,
    "kohya": lambda t: to_kohya(to_bfl(t)),
    "kohya with alpha": lambda t: to_kohya(to_bfl(t), share=0.25),
    "peft": lambda t: {f"base_model.model.{k}": v for k, v in bare(t).items()},
    "comfyui": lambda t: {f"diffusion_model.{k}": v for k, v in bare(t).items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_effect_it_has_in_diffusers(klein, tmp_path, layout):
    path = tmp_path / "other.safetensors"
    save_file({k: v.contiguous().clone() for k, v in LAYOUTS[layout](klein.tensors).items()}, path)
    theirs, mine = flux2_pipeline(copy.deepcopy(klein.model)), flux2_pipeline(copy.deepcopy(klein.model))
    theirs.load_lora_weights(path)
    apply_loras(mine, [(path, 1.0)])
    assert close(flux2_out(theirs.transformer), klein.wanted, klein.base)
    assert close(flux2_out(mine.transformer), klein.wanted, klein.base)


@pytest.mark.parametrize(
    "layout",
    [
        lambda t: bare(t),
        lambda t: {k.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."): v
                   for k, v in t.items()},
        lambda t: {k.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): v for k, v in t.items()},
        lambda t: {k.replace(".", "_").replace("_lora_A_weight", ".lora_down.weight")
                   .replace("_lora_B_weight", ".lora_up.weight").replace("transformer_", "lora_transformer_", 1): v
                   for k, v in t.items()},
        lambda t: {k.replace("diffusion_model", "base_model.model"): v for k, v in to_bfl(t).items()},
        lambda t: {**{k.replace("lora_B", "lora_B"): 2 * v if "lora_B" in k else v for k, v in t.items()},
                   **{k.replace("lora_A.weight", "alpha"): torch.tensor(2.0) for k in t if "lora_A" in k}},
    ],
    ids=["bare", "adapter name", "down and up", "lora_transformer_", "peft of bfl", "alpha beside diffusers names"],
)  # fmt: skip
def test_layouts_that_diffusers_refuses_mean_what_they_say(klein, tmp_path, layout):
    path = tmp_path / "other.safetensors"
    save_file({k: v.contiguous().clone() for k, v in layout(klein.tensors).items()}, path)
    mine = flux2_pipeline(copy.deepcopy(klein.model))
    apply_loras(mine, [(path, 1.0)])
    assert close(flux2_out(mine.transformer), klein.wanted, klein.base)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_scale_in_the_header_counts_as_in_diffusers(klein, tmp_path, rslora):
    from diffusers import Flux2KleinPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    model = copy.deepcopy(klein.model)
    first, *rest = targets(model)
    model.add_adapter(
        LoraConfig(
            r=4, lora_alpha=1, target_modules=[first, *rest[-8:]], alpha_pattern={first: 3}, use_rslora=rslora
        )
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=keyed("B", name))
    wanted = flux2_out(model)
    Flux2KleinPipeline.save_lora_weights(
        tmp_path / "with",
        transformer_lora_layers=get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    theirs, mine = flux2_pipeline(copy.deepcopy(klein.model)), flux2_pipeline(copy.deepcopy(klein.model))
    theirs.load_lora_weights(tmp_path / "with")
    apply_loras(mine, [parse_lora(str(tmp_path / "with"))])
    assert close(flux2_out(theirs.transformer), wanted, klein.base)
    assert close(flux2_out(mine.transformer), wanted, klein.base)


def test_pefts_own_folder_keeps_its_scale(klein, tmp_path):
    tensors = {
        f"base_model.model.{k}": v * (4 if "lora_B" in k else 1) for k, v in bare(klein.tensors).items()
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 1}))
    mine = flux2_pipeline(copy.deepcopy(klein.model))
    apply_loras(mine, [(tmp_path / "adapter_model.safetensors", 1.0)])
    assert close(flux2_out(mine.transformer), klein.wanted, klein.base)


def test_embedders_and_the_last_layer_are_read_from_bfl_names(klein, tmp_path):
    """The last layer's shift and scale stand the other way round there."""
    model = flux2(guidance=True)
    names = {
        "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
        "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
        "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    }  # fmt: skip
    tensors, wanted = {}, copy.deepcopy(model)
    for bfl, name in names.items():
        weight = wanted.get_submodule(name).weight
        down = torch.randn(2, weight.shape[1], generator=keyed("A", name))
        up = torch.randn(weight.shape[0], 2, generator=keyed("B", name))
        tensors |= {f"diffusion_model.{bfl}.lora_A.weight": down, f"diffusion_model.{bfl}.lora_B.weight": up}
        rows = torch.cat(up.chunk(2)[::-1]) if "adaLN" in bfl else up
        weight.data = weight.data + rows @ down
    save_file(tensors, tmp_path / "a.safetensors")
    mine = flux2_pipeline(copy.deepcopy(model))
    apply_loras(mine, [(tmp_path / "a.safetensors", 1.0)])
    assert close(flux2_out(mine.transformer), flux2_out(wanted), flux2_out(model))


def test_kohyas_lora_of_stable_diffusion_counts_alpha_by_rank_everywhere(sd, tmp_path):
    """Linear layers, 1x1 and 3x3 convolutions, and the text encoder: as if added to the weights.

    The UNet's is compared with diffusers too; that leaves out the text encoder's alpha.
    """
    tensors, wanted, theirs, mine, plain = {}, sd(), sd(), sd(), sd()
    for prefix, module in (("lora_unet", wanted.unet), ("lora_te", wanted.text_encoder)):
        for name, layer in module.named_modules():
            inside = "transformer_blocks" in name or "proj_in" in name or "resnets.0.conv1" in name
            inside = inside if prefix == "lora_unet" else name.endswith(("q_proj", "fc1"))
            if not inside or not isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
                continue
            full = name if prefix == "lora_unet" or name.startswith("text_model") else f"text_model.{name}"
            base, shape = f"{prefix}_{full.replace('.', '_')}", layer.weight.shape
            down = 0.2 * torch.randn((2, *shape[1:]), generator=keyed("A", base))
            up = 0.2 * torch.randn((shape[0], 2, *[1] * (len(shape) - 2)), generator=keyed("B", base))
            tensors |= {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up}
            tensors[f"{base}.alpha"] = torch.tensor(0.5)
            layer.weight.data = layer.weight.data + 0.25 * (up.flatten(1) @ down.flatten(1)).reshape(shape)
    assert any(t.ndim == 4 and t.shape[-1] == 3 for t in tensors.values())
    assert any(k.startswith("lora_te") for k in tensors)
    path = tmp_path / "kohya.safetensors"
    save_file(tensors, path)
    theirs.load_lora_weights(path)
    apply_loras(mine, [(path, 1.0)])
    assert close(unet_out(mine.unet), unet_out(wanted.unet), unet_out(plain.unet))
    assert close(unet_out(theirs.unet), unet_out(wanted.unet), unet_out(plain.unet))
    tokens = torch.arange(77)[None]
    encoded = [p.text_encoder(tokens).last_hidden_state.detach() for p in (mine, wanted, plain)]
    assert close(*encoded)


def test_old_attention_processor_names_are_read(sd, tmp_path):
    base = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    unet = sd().unet
    tensors = {}
    for layer in ("to_q", "to_out"):
        weight = unet.get_submodule(f"{base[5:]}.{layer if layer == 'to_q' else 'to_out.0'}").weight
        tensors[f"{base}.processor.{layer}_lora.down.weight"] = torch.randn(
            2, weight.shape[1], generator=keyed(layer)
        )
        tensors[f"{base}.processor.{layer}_lora.up.weight"] = torch.randn(
            weight.shape[0], 2, generator=keyed(layer)
        )
    save_file(tensors, tmp_path / "old.safetensors")
    theirs, mine = sd(), sd()
    theirs.load_lora_weights(tmp_path / "old.safetensors")
    apply_loras(mine, [(tmp_path / "old.safetensors", 1.0)])
    assert close(unet_out(mine.unet), unet_out(theirs.unet), unet_out(unet))


def test_several_loras_count_as_often_as_asked(klein, tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    write_lora(lora_of(copy.deepcopy(klein.model), rank=2, alpha=2.0), second, rank=2, alpha=2.0, metadata={})
    theirs, mine = flux2_pipeline(copy.deepcopy(klein.model)), flux2_pipeline(copy.deepcopy(klein.model))
    theirs.load_lora_weights(first, adapter_name="a")
    with pytest.warns(UserWarning, match="peft_config"):
        theirs.load_lora_weights(second, adapter_name="b")
    theirs.set_adapters(["a", "b"], [0.5, -0.25])
    apply_loras(mine, [(first, 0.5), (second, -0.25)])
    assert close(flux2_out(mine.transformer), flux2_out(theirs.transformer), klein.base)
    assert not any(p.requires_grad for p in mine.transformer.parameters())
    none = flux2_pipeline(copy.deepcopy(klein.model))
    apply_loras(none, [])
    assert torch.equal(flux2_out(none.transformer), klein.base)


# ---------------------------------------------------------------------------------------------- what is taken off


def random_lora(modules: dict[str, torch.nn.Module], path, *, rank: int, std: float = 0.3):
    """A kohya file on linear layers and 3x3 convolutions of these networks, alpha half the rank."""
    tensors = {}
    for prefix, module in modules.items():
        for name, layer in module.named_modules():
            is_conv = isinstance(layer, torch.nn.Conv2d) and "resnets.0.conv1" in name
            if not is_conv and not (
                isinstance(layer, torch.nn.Linear) and re.search(r"to_q|q_proj|fc1", name)
            ):
                continue
            base, shape = f"{prefix}_{name.replace('.', '_')}", layer.weight.shape
            down = torch.randn((rank, *shape[1:]), generator=keyed("A", base, rank))
            up = torch.randn((shape[0], rank, *[1] * (len(shape) - 2)), generator=keyed("B", base, rank))
            tensors |= {f"{base}.lora_down.weight": std * down, f"{base}.lora_up.weight": std * up}
            tensors[f"{base}.alpha"] = torch.tensor(rank / 2)
    save_file(tensors, path)
    return path


def sd_out(pipeline) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.arange(77)[None]
    return unet_out(pipeline.unet), pipeline.text_encoder(tokens).last_hidden_state.detach()


def same(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_lora_taken_off_leaves_the_very_modules_and_bits_that_were_there(sd, tmp_path):
    pipeline = sd()
    nets = {"lora_unet": pipeline.unet, "lora_te": pipeline.text_encoder}
    first = random_lora(nets, tmp_path / "first.safetensors", rank=2)
    second = random_lora(nets, tmp_path / "second.safetensors", rank=3)
    modules = {name: dict(net.named_modules()) for name, net in nets.items()}
    weights = {name: {k: v.clone() for k, v in net.state_dict().items()} for name, net in nets.items()}
    own = {name: set(vars(net)) for name, net in nets.items()}
    plain = sd_out(pipeline)
    made = []
    for loras in ([(first, 0.7)], [(first, 0.7), (second, -0.4)], [(second, 1.0)], [(first, 0.7)]):
        apply_loras(pipeline, loras)
        made.append(sd_out(pipeline))
        assert not same(made[-1], plain)
        take_off(pipeline)
        assert same(sd_out(pipeline), plain)
        for name, net in nets.items():
            assert list(net.named_modules()) == list(
                modules[name].items()
            )  # modules are equal only to themselves
            assert list(net.state_dict()) == list(weights[name]) and set(vars(net)) == own[name]
            assert all(torch.equal(v, weights[name][k]) for k, v in net.state_dict().items())
    assert same(made[0], made[3]) and not same(made[0], made[1]) and not same(made[0], made[2])
    take_off(pipeline)  # with none on it
    assert same(sd_out(pipeline), plain)


def test_a_lora_of_flux2_is_taken_off_in_bf16_too(klein, tmp_path):
    pipeline = flux2_pipeline(copy.deepcopy(klein.model).to(torch.bfloat16))
    pipeline.transformer.requires_grad_(False)
    before = dict(pipeline.transformer.named_modules())
    apply_loras(pipeline, [(tmp_path / "first.safetensors", 1.0)])
    take_off(pipeline)
    assert list(pipeline.transformer.named_modules()) == list(before.items())


@pytest.mark.parametrize("prefix", ["lora_te_", "lora_te_text_model_"])
def test_text_encoder_layers_are_found_under_flat_and_old_names(sd, tmp_path, prefix):
    """transformers 5.6 took `text_model` away; files have both."""
    pipeline = sd()
    before = sd_out(pipeline)[1]
    path = random_lora({prefix[:-1]: pipeline.text_encoder}, tmp_path / "a.safetensors", rank=2)
    apply_loras(pipeline, [(path, 1.0)])
    assert not torch.equal(sd_out(pipeline)[1], before)


# ------------------------------------------------------------------------------------------------ what is refused


def test_a_lora_of_another_model_is_refused_and_nothing_is_changed(klein, sd, tmp_path):
    path = tmp_path / "first.safetensors"
    wide, unet = flux2_pipeline(flux2(width=128)), sd()
    before = flux2_out(wide.transformer)
    with pytest.raises(SdlabError, match=r"first.safetensors: is a LoRA of another model: .* takes"):
        apply_loras(wide, [(path, 1.0)])
    assert torch.equal(flux2_out(wide.transformer), before) and not hasattr(wide.transformer, "peft_config")
    with pytest.raises(SdlabError, match=r"another kind of model: 0 of its 28 .* no transformer\.single"):
        apply_loras(unet, [(path, 1.0)])
    part = Part("transformer", "Flux2Transformer2DModel", dict(wide.transformer.config), {}, tmp_path)
    with pytest.raises(SdlabError, match=r"first.safetensors: is a LoRA of another model: .* takes"):
        check_loras([part], [(path, 1.0)])  # told without any weights
    with pytest.raises(SdlabError, match=r"1[24] of 28 layers have no place"):
        apply_loras(flux2_pipeline(flux2(double=1)), [(path, 1.0)])


def test_checking_reads_no_weight_of_a_lora(klein, tmp_path, monkeypatch):
    path = tmp_path / "first.safetensors"
    part = Part("transformer", "Flux2Transformer2DModel", dict(klein.model.config), {}, tmp_path)
    monkeypatch.setattr(Stored, "read", lambda stored: pytest.fail(f"{stored.name} was read"))
    check_loras([part], [(path, 1.0)])


def test_a_lora_that_fits_nowhere_says_which_models_it_is_for(sd, klein, tmp_path):
    """One line, with how many of its layers fit: by names, by some of the names, by sizes alone."""
    base = "lora_unet_down_blocks_{}_attentions_0_transformer_blocks_{}_attn2_to_k"
    xl = {name: (640, 2048) for name in (base.format(1, 0), base.format(1, 1))}
    sd1 = {base.format(0, 0): (320, 768)}
    for shapes, pipeline, said in [
        (xl, flux2_pipeline(klein.model), r"0 of its 2 layers have a place here: .*; it is for SDXL\."),
        (xl, sd(), r"1 of 2 layers have no place: .*; it is for SDXL\."),
        (sd1, sd(), r"another model: 0 of its 1 layers fit, .*; it is for Stable Diffusion 1\.x\."),
    ]:
        tensors = {}
        for name, (out, width) in shapes.items():
            tensors |= {
                f"{name}.lora_down.weight": torch.ones(4, width),
                f"{name}.lora_up.weight": torch.ones(out, 4),
            }
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(SdlabError, match=said) as refused:
            apply_loras(pipeline, [(tmp_path / "a.safetensors", 1.0)])
        assert "\n" not in str(refused.value) and "a.safetensors" in str(refused.value)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 2)}, "is not a LoRA"),
        ({"lora_unet_single_blocks_0_linear1.lokr_w1": torch.ones(2, 2)}, "is a LoKr"),
        ({"transformer.a.lora_A.weight": torch.ones(2, 2), "transformer.a.dora_scale": torch.ones(2)}, "is a DoRA"),
        ({"transformer.a.lora_A.weight": torch.ones(2, 2)}, "lacks one half of transformer.a"),
        ({"transformer.a.lora_A.weight": torch.ones(2, 2), "transformer.a.lora_B.weight": torch.ones(2, 2),
          "transformer.a.extra": torch.ones(2)}, "transformer.a.extra, which is no part"),
        ({"transformer.x_embedder.lora_A.weight": torch.ones(2, 32),
          "transformer.x_embedder.lora_B.weight": torch.full((64, 2), torch.nan)}, "not finite"),
        ({"transformer.x_embedder.lora_A.weight": torch.ones(2, 32),
          "transformer.x_embedder.lora_B.weight": torch.ones(64, 3)}, "do not fit each other"),
    ],
)  # fmt: skip
def test_what_is_no_lora_is_refused_in_one_line(klein, tmp_path, tensors, said):
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path)
    with pytest.raises(SdlabError, match=said) as refused:
        parse_lora(str(path))
        apply_loras(flux2_pipeline(copy.deepcopy(klein.model)), [(path, 1.0)])
    assert "\n" not in str(refused.value) and "bad.safetensors" in str(refused.value)


def test_a_lora_is_named_with_or_without_a_weight(klein, tmp_path):
    path = tmp_path / "first.safetensors"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pytorch_lora_weights.safetensors").write_bytes(path.read_bytes())
    assert parse_lora(str(path)) == (path, 1.0)
    assert parse_lora(f"{path}:0.8") == (path, 0.8)
    assert parse_lora(f"{path}:-1") == (path, -1.0)
    assert parse_lora(f"{tmp_path / 'run'}:0.5")[1] == 0.5
    assert parse_lora(str(tmp_path / "run"))[0].name == "pytorch_lora_weights.safetensors"
    named = tmp_path / "odd:2"
    named.write_bytes(path.read_bytes())
    assert parse_lora(str(named)) == (named, 1.0)
    for text, said in [
        (f"{path}:high", "'high' is not a weight"),
        (f"{path}:nan", "'nan' is not a weight"),
        (str(tmp_path / "none.safetensors"), "cannot be read"),
        (str(tmp_path), "holds no pytorch_lora_weights"),
        (r"C:\loras\a.safetensors", r"C:\\loras\\a.safetensors: cannot be read"),
        (r"C:\loras\a.safetensors:0.8", r"a.safetensors: cannot be read"),
    ]:
        with pytest.raises(SdlabError, match=said):
            parse_lora(text)
