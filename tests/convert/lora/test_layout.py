"""LoRAs in every layout: other programs' own readers see the same weights, and there and back is exact."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sdlab.convert import stream
from sdlab.convert.lora.layout import LAYOUTS, Adapter, outputs, peft_config, read_adapters
from sdlab.errors import SdlabError
from sdlab.keyed import keyed
from sdlab.models.bases import CONFIGS, builtin_folder
from sdlab.models.files import read_header
from sdlab.models.parts import Part, build

RANK = 4


def random_adapter(part: str, name: str, layer: Any, *, rank: int = RANK, scale: float = 1.0) -> Adapter:
    """A LoRA of a layer that changes it about as much as training does."""
    shape = layer.weight.shape
    down = torch.randn((rank, *shape[1:]), generator=keyed("A", name)) / layer.weight[0].numel() ** 0.5
    up = 0.1 * torch.randn((shape[0], rank, *[1] * (len(shape) - 2)), generator=keyed("B", name))
    return Adapter(part, name, down, up, scale)


def adapters_of(
    modules: dict[str, nn.Module], layers: str = ".*", *, scale: float = 1.0, dtype: torch.dtype | None = None
) -> list[Adapter]:
    """Random ones for all linear layers and convolutions whose names match, sorted as they are read."""
    found = [
        random_adapter(part, name, layer, scale=scale)
        for part, module in modules.items()
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and re.fullmatch(layers, name)
    ]
    if dtype is not None:
        word = {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
        found = [
            replace(a, down=a.down.to(dtype).float(), up=a.up.to(dtype).float(), dtype=word) for a in found
        ]
    return sorted(found, key=lambda a: (a.part, a.layer))


def write(path: Path, adapters: Sequence[Adapter], layout: str, *, dtype: str | None = None) -> Path:
    """A file (for PEFT a folder with its configuration) in the layout, as `sdlab convert` writes it."""
    family = "flux2" if adapters[0].part == "transformer" else "sd"
    if layout == "peft":
        path.mkdir()
        (path / "adapter_config.json").write_text(peft_config(adapters), encoding="utf-8")
        path = path / "adapter_model.safetensors"
    stream.write(path, outputs(adapters, family=family, layout=layout, dtype=dtype), metadata={})
    return path


def difference(adapter: Adapter) -> torch.Tensor:
    """scale B A in the shape of the weight."""
    product = adapter.scale * adapter.up.flatten(1) @ adapter.down.flatten(1)
    return product.reshape(adapter.up.shape[0], *adapter.down.shape[1:])


def check_effect(before: nn.Module, after: nn.Module, adapters: Sequence[Adapter], part: str) -> None:
    """Every weight of `after` is that of `before`, plus scale B A where the layer is adapted."""
    wanted = {a.layer: difference(a) for a in adapters if a.part == part}
    layers = dict(after.named_modules())
    assert wanted
    for name, layer in before.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        mine = layers[name]
        mine = mine.get_base_layer() if hasattr(mine, "get_base_layer") else mine
        change = mine.weight - layer.weight
        if name in wanted:
            rounded = torch.finfo(torch.float32).eps * layer.weight.abs().max()  # of the sum
            assert (change - wanted[name]).abs().max() < 1e-4 * wanted[name].abs().max() + rounded + 1e-6, (
                name
            )
        else:
            assert not change.any(), name


@pytest.fixture(scope="module")
def sd() -> dict[str, nn.Module]:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    folder = builtin_folder("mini-sd")
    return {
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
    }


@pytest.fixture(scope="module")
def flux2() -> dict[str, nn.Module]:
    from diffusers import Flux2Transformer2DModel

    folder = builtin_folder("mini-flux2") / "transformer"
    return {"transformer": Flux2Transformer2DModel.from_pretrained(folder, torch_dtype=torch.float32)}


def sd_pipeline(modules: dict[str, nn.Module]) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        **copy.deepcopy(modules),
        vae=None,
        tokenizer=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def flux2_pipeline(modules: dict[str, nn.Module]) -> Any:
    from diffusers import Flux2KleinPipeline

    transformer = copy.deepcopy(modules["transformer"])
    return Flux2KleinPipeline(
        scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=transformer
    )


def fused(pipeline: Any, path: Path) -> Any:
    """The pipeline with the LoRA that diffusers read in its weights."""
    pipeline.load_lora_weights(path)
    parts = [name for name in pipeline._lora_loadable_modules if getattr(pipeline, name, None) is not None]
    pipeline.fuse_lora(components=parts)
    return pipeline


# ------------------------------------------------------------------------------------------ what other readers see

BLOCKS = (
    r".*transformer_blocks.*|.*attentions.*|.*resnets.*(conv\d|time_emb_proj|conv_shortcut)|encoder\.layers.*"
)
FLUX2_BLOCKS = r"(single_)?transformer_blocks.*|x_embedder|context_embedder|proj_out"


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_diffusers_reads_stable_diffusions_with_the_effect_it_has(
    sd: dict[str, nn.Module], tmp_path: Path, layout: str
) -> None:
    adapters = adapters_of(sd, BLOCKS, scale=0.5)
    assert any(a.down.ndim == 4 and a.down.shape[-1] == 3 for a in adapters)
    path = write(tmp_path / "a.safetensors", adapters, layout)
    theirs = fused(sd_pipeline(sd), path)
    check_effect(sd["unet"], theirs.unet, adapters, "unet")
    check_effect(sd["text_encoder"], theirs.text_encoder, adapters, "text_encoder")


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "bfl"])
@pytest.mark.parametrize("shared", [False, True], ids=["A of each", "one A"])
def test_diffusers_reads_flux2s_with_the_effect_it_has(
    flux2: dict[str, nn.Module], tmp_path: Path, layout: str, shared: bool
) -> None:
    adapters = adapters_of(flux2, FLUX2_BLOCKS, scale=0.25)
    if shared:
        adapters = [of_one_a(adapter) for adapter in adapters]
    path = write(tmp_path / "a.safetensors", adapters, layout)
    theirs = fused(flux2_pipeline(flux2), path)
    check_effect(flux2["transformer"], theirs.transformer, adapters, "transformer")
    qkv = [s for n, s in shapes_in(path).items() if re.search(r"img_attn.qkv.lora_(A|down)", n)]
    assert all(shape[0] == (RANK if shared else 3 * RANK) for shape in qkv)
    assert bool(qkv) == (layout != "diffusers")


def of_one_a(adapter: Adapter) -> Adapter:
    """The same A for q, k and v of a block, as trainers of Black Forest Labs' own code have it."""
    block = re.match(r"transformer_blocks\.\d+\.attn\.(add_|to_)[qkv](_proj)?$", adapter.layer)
    if not block:
        return adapter
    generator = keyed("A", adapter.layer.partition(".attn.")[0], str(block[1]))
    return replace(adapter, down=0.1 * torch.randn(adapter.down.shape, generator=generator))


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    return {name: stored.shape for name, stored in read_header(path).tensors.items()}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's own
@pytest.mark.parametrize("part", ["unet", "text_encoder", "transformer"])
def test_peft_reads_its_own_folder_with_alphas_of_its_own(
    sd: dict[str, nn.Module], flux2: dict[str, nn.Module], tmp_path: Path, part: str
) -> None:
    from peft import PeftModel

    model = {**sd, **flux2}[part]
    adapters = adapters_of({part: model}, f"{BLOCKS}|{FLUX2_BLOCKS}", scale=0.5)
    name, layer = adapters[1].layer, model.get_submodule(adapters[1].layer)
    adapters[1] = random_adapter(part, name, layer, rank=2, scale=3.0)
    write(tmp_path / "lora", adapters, "peft")
    theirs: Any = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "lora").merge_and_unload()
    check_effect(model, theirs, adapters, part)


def full_size(base: str) -> dict[str, nn.Module]:
    """UNet and text encoder of Stable Diffusion, without memory."""
    return {
        name: build(
            Part(
                name, class_name, json.loads((CONFIGS / base / name / "config.json").read_text()), {}, CONFIGS
            )
        )
        for name, class_name in (("unet", "UNet2DConditionModel"), ("text_encoder", "CLIPTextModel"))
    }


# Patterns of the names that A1111 knows in a LoRA of Stable Diffusion 1.x
A1111 = (
    r"lora_unet_conv_(in|out)",
    r"lora_unet_time_embedding_linear_\d+",
    r"lora_unet_(down_blocks_\d+|up_blocks_\d+|mid_block)_(attentions|resnets)_\d+_.+",
    r"lora_unet_(down_blocks_\d+_down|up_blocks_\d+_up)samplers_0_conv",
    r"lora_te_text_model_encoder_layers_\d+_(mlp_fc[12]|self_attn_(q|k|v|out)_proj)",
)
# What ComfyUI makes of the names of each layer of FLUX.2 that it has
COMFYUI = (
    r"diffusion_model\.double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02])",
    r"diffusion_model\.single_blocks\.\d+\.linear[12]",
    r"diffusion_model\.(img_in|txt_in|time_in\.(in|out)_layer|final_layer\.(linear|adaLN_modulation\.1))",
    r"diffusion_model\.(single_stream_modulation|double_stream_modulation_(img|txt))\.lin",
)
A_LAYERS_NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"


def test_every_layer_of_stable_diffusion_15_gets_a_name_that_a1111_and_comfyui_know() -> None:
    modules = full_size("sd15")
    adapters = [
        Adapter(part, name, torch.zeros(1, *layer.weight.shape[1:]), torch.zeros(layer.weight.shape[0], 1))
        for part, module in modules.items()
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    ]
    names = [output.name for output in outputs(adapters, family="sd", layout="kohya", dtype="F16")]
    bases = {re.sub(r"\.(lora_(up|down)\.weight|alpha)$", "", name) for name in names}
    assert A_LAYERS_NAME in bases and len(bases) == len(adapters) and len(names) == 3 * len(adapters)
    assert [b for b in bases if not any(re.fullmatch(pattern, b) for pattern in A1111)] == []


def test_every_layer_of_flux2_gets_a_name_that_comfyui_knows(flux2: dict[str, nn.Module]) -> None:
    adapters = adapters_of(flux2)
    names = {o.name for o in outputs(adapters, family="flux2", layout="bfl", dtype=None)}
    bases = {re.sub(r"\.lora_[AB]\.weight$", "", name) for name in names}
    assert len(names) == 2 * len(bases)
    assert [b for b in bases if not any(re.fullmatch(pattern, b) for pattern in COMFYUI)] == []
    kohya = {o.name for o in outputs(adapters, family="flux2", layout="kohya", dtype=None)}
    assert {n.rpartition(".lora_")[0] or n.removesuffix(".alpha") for n in kohya} == {
        "lora_unet_" + base.removeprefix("diffusion_model.").replace(".", "_") for base in bases
    }


def test_the_last_layers_halves_are_swapped_back(flux2: dict[str, nn.Module], tmp_path: Path) -> None:
    adapters = adapters_of(flux2, r"norm_out\.linear")
    path = write(tmp_path / "a.safetensors", adapters, "bfl")
    up = load_file(path)["diffusion_model.final_layer.adaLN_modulation.1.lora_B.weight"]
    assert torch.equal(up, torch.cat(adapters[0].up.chunk(2)[::-1]))
    assert equal(read_adapters(path)[1], adapters)


# ---------------------------------------------------------------------------------------------------- there and back


def equal(some: Sequence[Adapter], others: Sequence[Adapter]) -> bool:
    """The same layers, with the same halves to the bit, scale and type."""

    def about(adapters: Sequence[Adapter]) -> list[Any]:
        return [(a.part, a.layer, a.down.shape, a.up.shape, a.scale, a.dtype) for a in adapters]

    same = all(
        torch.equal(a.down, b.down) and torch.equal(a.up, b.up) for a, b in zip(some, others, strict=False)
    )
    return about(some) == about(others) and same


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "peft"])
def test_there_and_back_is_exact(
    flux2: dict[str, nn.Module], tmp_path: Path, layout: str, dtype: torch.dtype | None
) -> None:
    adapters = adapters_of(flux2, dtype=dtype)
    path = write(tmp_path / "a.safetensors", adapters, layout)
    kind, back = read_adapters(path)
    assert kind == "flux2-klein"
    assert equal(back, adapters)
    again = write(tmp_path / "b.safetensors", back, layout)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_alphas_are_kept_where_the_layout_has_a_place_for_them(
    sd: dict[str, nn.Module], tmp_path: Path, layout: str
) -> None:
    adapters = adapters_of({"unet": sd["unet"]}, BLOCKS, scale=1 / 3, dtype=torch.float16)
    path = write(tmp_path / "a.safetensors", adapters, layout)
    kind, back = read_adapters(path)
    assert kind == "sd1"
    assert all(a.scale == pytest.approx(1 / 3, rel=1e-7) for a in back)
    assert equal([replace(a, scale=1.0) for a in back], [replace(a, scale=1.0) for a in adapters])
    if layout == "kohya":
        assert write(tmp_path / "b.safetensors", back, layout).read_bytes() == path.read_bytes()


def test_a_scale_is_in_the_weights_where_no_reader_looks_for_it(
    sd: dict[str, nn.Module], tmp_path: Path
) -> None:
    adapters = adapters_of(sd, BLOCKS, scale=1 / 3, dtype=torch.float16)
    for layout, baked in [("diffusers", ("unet", "text_encoder")), ("kohya", ("text_encoder",))]:
        back = read_adapters(write(tmp_path / layout, adapters, layout))[1]
        assert all(a.scale == 1 for a in back if a.part in baked)
        for mine, other in zip(back, adapters, strict=True):
            wanted = difference(other)
            assert (difference(mine) - wanted).abs().max() < 1e-3 * wanted.abs().max()


def test_one_a_of_q_k_and_v_stays_one_there_and_back(flux2: dict[str, nn.Module], tmp_path: Path) -> None:
    """As other trainers write it; the file through diffusers' layout and back is the same."""
    adapters = [of_one_a(a) for a in adapters_of(flux2, FLUX2_BLOCKS)]
    first = write(tmp_path / "first.safetensors", adapters, "bfl")
    middle = write(tmp_path / "middle.safetensors", read_adapters(first)[1], "diffusers")
    last = write(tmp_path / "last.safetensors", read_adapters(middle)[1], "bfl")
    assert last.read_bytes() == first.read_bytes()


def test_q_alone_is_written_with_nothing_for_k_and_v(flux2: dict[str, nn.Module], tmp_path: Path) -> None:
    adapters = adapters_of(flux2, r"transformer_blocks\.0\.attn\.to_q")
    path = write(tmp_path / "a.safetensors", adapters, "bfl")
    theirs = fused(flux2_pipeline(flux2), path)
    check_effect(flux2["transformer"], theirs.transformer, adapters, "transformer")


@pytest.mark.parametrize("shared", [False, True], ids=["A of each", "one A"])
def test_q_k_and_v_may_be_of_scales_of_their_own(
    flux2: dict[str, nn.Module], tmp_path: Path, shared: bool
) -> None:
    adapters = adapters_of(flux2, r"transformer_blocks\.0\.attn\.to_[qkv]")
    adapters = [
        replace(of_one_a(a) if shared else a, scale=scale)
        for a, scale in zip(adapters, (0.5, 2.0, 3.0), strict=True)
    ]
    for layout in ("bfl", "kohya"):
        path = write(tmp_path / f"{layout}.safetensors", adapters, layout)
        theirs = fused(flux2_pipeline(flux2), path)
        check_effect(flux2["transformer"], theirs.transformer, adapters, "transformer")
        back = {a.layer: difference(a) for a in read_adapters(path)[1]}
        assert all(torch.allclose(back[a.layer], difference(a), atol=1e-6) for a in adapters)


def test_a_small_scale_loses_no_digits_in_half_precision(flux2: dict[str, nn.Module], tmp_path: Path) -> None:
    """1/128 in B alone would leave numbers of 1e-5 in a type whose digits end at 6e-8."""
    layer = flux2["transformer"].get_submodule("x_embedder")
    adapter = random_adapter("transformer", "x_embedder", layer, scale=1 / 128)
    adapter = replace(adapter, up=0.01 * adapter.up)
    path = write(tmp_path / "a.safetensors", [adapter], "bfl", dtype="F16")
    [back] = read_adapters(path)[1]
    wanted = difference(adapter)
    assert (difference(back) - wanted).norm() < 1e-3 * wanted.norm()


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("part", "layout", "said"),
    [
        (("unet",), "bfl", "names for layers of FLUX.2 only"),
        (("unet", "text_encoder"), "peft", "of one network, and this LoRA is of text_encoder and unet"),
    ],
)
def test_a_layout_that_cannot_name_a_layer_is_refused(
    sd: dict[str, nn.Module], part: tuple[str, ...], layout: str, said: str
) -> None:
    adapters = adapters_of({name: sd[name] for name in part}, BLOCKS)
    with pytest.raises(SdlabError, match=said) as refused:
        outputs(adapters, family="sd", layout=layout, dtype=None)
    assert "\n" not in str(refused.value)


def test_a_layer_that_black_forest_labs_lack_is_refused() -> None:
    adapter = Adapter("transformer", "new_layer", torch.ones(1, 4), torch.ones(4, 1))
    with pytest.raises(SdlabError, match=r"new_layer has no name"):
        outputs([adapter], family="flux2", layout="kohya", dtype=None)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1": (5, 7)}, "LoRA of SDXL"),
        ({"lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": (64, 2048)}, "LoRA of SDXL"),
        ({"transformer.x_embedder": (8, 9)}, "fits none of the models .*mini-flux2"),
        ({"unet.conv_in": (8, 9)}, "fits none of the models .*mini-sd"),
    ],
)  # fmt: skip
def test_a_lora_of_a_model_we_do_not_know_is_refused_in_one_line(
    tmp_path: Path, tensors: dict[str, tuple[int, int]], said: str
) -> None:
    halves = {}
    for name, (out, width) in tensors.items():
        halves |= {f"{name}.lora_down.weight": torch.ones(2, width)}
        halves |= {f"{name}.lora_up.weight": torch.ones(out, 2)}
    save_file(halves, tmp_path / "a.safetensors")
    with pytest.raises(SdlabError, match=said) as refused:
        read_adapters(tmp_path / "a.safetensors")
    assert "\n" not in str(refused.value)


def test_a_layer_under_two_names_is_refused(tmp_path: Path) -> None:
    halves = {}
    width, out = 768, 320
    for name in ("lora_unet_", "unet."):
        layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
        layer = layer.replace(".", "_") if name == "lora_unet_" else layer
        halves |= {f"{name}{layer}.lora_down.weight": torch.ones(2, width)}
        halves |= {f"{name}{layer}.lora_up.weight": torch.ones(out, 2)}
    save_file(halves, tmp_path / "a.safetensors")
    with pytest.raises(SdlabError, match=r"adapts .*attn2.to_k twice"):
        read_adapters(tmp_path / "a.safetensors")


def test_the_model_is_told_by_shapes_and_the_name_of_the_file_means_nothing(tmp_path: Path) -> None:
    """Real sizes: the same layers are of another width in each."""
    for kind, layer, shape in [
        ("sd1", "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", (1280, 768)),
        ("sd2", "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", (1280, 1024)),
        ("flux2-klein", "lora_unet_single_blocks_19_linear2", (3072, 12288)),
        ("flux2-klein", "lora_unet_single_blocks_23_linear2", (4096, 16384)),
        ("flux2-dev", "lora_unet_single_blocks_47_linear2", (6144, 24576)),
    ]:
        path = tmp_path / "sdxl-lora-of-sd3.safetensors"
        save_file(
            {f"{layer}.lora_down.weight": torch.ones(1, shape[1]), f"{layer}.lora_up.weight": torch.ones(shape[0], 1)},
            path,
        )  # fmt: skip
        found, [adapter] = read_adapters(path)
        assert found == kind and adapter.scale == 1


def test_the_model_may_be_named(flux2: dict[str, nn.Module], tiny_klein_folder: Path, tmp_path: Path) -> None:
    from diffusers import Flux2Transformer2DModel

    model = Flux2Transformer2DModel.from_pretrained(tiny_klein_folder / "transformer")
    adapters = adapters_of({"transformer": model}, FLUX2_BLOCKS)
    path = write(tmp_path / "a.safetensors", adapters, "kohya")
    with pytest.raises(SdlabError, match="fits none"):
        read_adapters(path)
    kind, back = read_adapters(path, base=tiny_klein_folder)
    assert kind == "flux2-klein" and equal(back, adapters)


def test_peft_folders_are_read_by_their_folder(sd: dict[str, nn.Module], tmp_path: Path) -> None:
    from sdlab.models.lora import parse_lora

    adapters = adapters_of({"text_encoder": sd["text_encoder"]}, BLOCKS, scale=0.5)
    path = write(tmp_path / "lora", adapters, "peft")
    assert parse_lora(f"{tmp_path / 'lora'}:0.5") == (path, 0.5)
    assert equal(read_adapters(path)[1], adapters)


@pytest.mark.parametrize("dotted", [False, True], ids=["as kohya's", "as ComfyUI's own"])
def test_original_names_of_layers_are_read(sd: dict[str, nn.Module], tmp_path: Path, dotted: bool) -> None:
    from sdlab.models.ldm import unet_name

    adapters = adapters_of(sd, BLOCKS)
    tensors = {}
    for adapter in adapters:
        if adapter.part == "unet":
            layer = unet_name(f"{adapter.layer}.weight", sd["unet"].config).removesuffix(".weight")
            name = f"diffusion_model.{layer}" if dotted else "lora_unet_" + layer.replace(".", "_")
        else:
            layer = f"text_model.{adapter.layer}"
            name = f"text_encoders.clip_l.transformer.{layer}" if dotted else f"text_encoder.{layer}"
        tensors |= {f"{name}.lora_down.weight": adapter.down, f"{name}.lora_up.weight": adapter.up}
    assert any("input_blocks" in name for name in tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    assert equal(read_adapters(tmp_path / "a.safetensors")[1], adapters)


def test_old_names_of_text_encoders_are_read(sd: dict[str, nn.Module], tmp_path: Path) -> None:
    """diffusers before 0.22; its own reader maps them as we do."""
    adapters = adapters_of({"text_encoder": sd["text_encoder"]}, r"encoder\..*self_attn.*")
    tensors = {}
    for adapter in adapters:
        name = f"text_encoder.text_model.{adapter.layer.removesuffix('_proj')}"
        stem, _, letter = name.rpartition(".")
        tensors[f"{stem}.to_{letter}_lora.down.weight"] = adapter.down
        tensors[f"{stem}.to_{letter}_lora.up.weight"] = adapter.up
    save_file(tensors, tmp_path / "old.safetensors")
    assert equal(read_adapters(tmp_path / "old.safetensors")[1], adapters)
