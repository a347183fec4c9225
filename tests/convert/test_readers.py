"""What other programs look for in a file, and find in ours: names, shapes and types, for models of the real sizes.

Headers are enough for this: nothing of these models is drawn or written but in the slow test.
"""

from __future__ import annotations

import gc
import hashlib
import re
import socket
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import psutil
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from sdlab.convert import plan
from sdlab.convert.lora import layout as layouts
from sdlab.convert.plan import Output
from sdlab.models.bases import builtin_folder
from sdlab.models.files import read_header
from sdlab.models.lora_files import Adapter
from tests.convert import originals
from tests.convert.full_size import NUM_TENSORS, drawn_networks, random_sd
from tests.convert.originals import CLIP, OPENCLIP, UNET, VAE, Shapes, prefixed
from tests.convert.readers import READERS, Reader, unmet
from tests.program import sdlab

SD_PARTS = ("unet", "vae", "text_encoder")
GIB = 1 << 30


@cache
def outputs_of(kind: str) -> tuple[Output, ...]:
    """The tensors of the file that `sdlab convert --half` makes of a model of full size."""
    return tuple(_FILES[kind]())


def _transformer(base: str, prefix: str = "") -> list[Output]:
    part = drawn_networks(base, ["transformer"])["transformer"]
    return plan.transformer(part, dtype="BF16", prefix=prefix)


_FILES: dict[str, Callable[[], Iterable[Output]]] = {
    "sd1": lambda: plan.checkpoint(drawn_networks("sd15", SD_PARTS), dtype="F16"),
    "sd1 inpainting": lambda: plan.checkpoint(drawn_networks("sd15", SD_PARTS, in_channels=9), dtype="F16"),
    "sd2": lambda: plan.checkpoint(drawn_networks("sd21", SD_PARTS), dtype="F16"),
    "sd2 inpainting": lambda: plan.checkpoint(drawn_networks("sd21", SD_PARTS, in_channels=9), dtype="F16"),
    "sd vae": lambda: plan.vae(drawn_networks("sd15", ["vae"])["vae"], dtype="F16"),
    "klein": lambda: _transformer("flux2-klein-base-4b"),
    "klein for ComfyUI": lambda: _transformer("flux2-klein-base-4b", plan.COMFYUI_PREFIX),
    "dev": lambda: _transformer("flux2-dev"),
    "flux2 vae": lambda: plan.vae(drawn_networks("flux2-dev", ["vae"])["vae"], dtype="F16"),
}


def _sd(unet: Shapes, text: Shapes) -> Shapes:
    return prefixed(UNET, unet) | prefixed(VAE, originals.vae()) | text


_CLIP, _OPENCLIP = prefixed(CLIP, originals.clip()), prefixed(OPENCLIP, originals.openclip())
_KLEIN = originals.flux2(width=3072, doubles=5, singles=20, context=7680)
NETWORKS: dict[str, Shapes] = {
    "sd1": _sd(originals.unet(), _CLIP),
    "sd1 inpainting": _sd(originals.unet(channels=9), _CLIP),
    "sd2": _sd(originals.unet(context=1024, linear_proj=True), _OPENCLIP),
    "sd2 inpainting": _sd(originals.unet(channels=9, context=1024, linear_proj=True), _OPENCLIP),
    "sd vae": originals.vae(),
    "klein": _KLEIN,
    "klein for ComfyUI": prefixed(UNET, _KLEIN),
    "dev": originals.flux2(width=6144, doubles=8, singles=48, context=15360, guidance=True),
    "flux2 vae": originals.flux2_vae(),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_file_has_the_tensors_of_the_original_network_and_no_others(kind: str) -> None:
    """A1111 fills a VAE file and the UNet of 2.x strictly: one name too many or too few, and it stops."""
    found = {output.name: output.shape for output in outputs_of(kind)}
    assert found == NETWORKS[kind]


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_number_is_of_the_type_asked_for(kind: str) -> None:
    wanted = "BF16" if kind.startswith(("klein", "dev")) else "F16"
    counts = {output.name: output.dtype for output in outputs_of(kind) if output.dtype != wanted}
    assert counts in ({}, {"bn.num_batches_tracked": "I64"})  # of a batch norm: a count, never to be cast


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: f"{reader.name}-{reader.kind}")
def test_a_reader_knows_the_file_for_what_it_is(reader: Reader) -> None:
    assert not unmet(reader, {output.name: output.shape for output in outputs_of(reader.kind)})


def test_the_readers_would_not_know_files_with_names_as_transformers_has_them_now() -> None:
    """That the tables can fail: names without ``text_model.`` were what diffusers' own script wrote."""
    shapes = {name.replace(".text_model.", "."): shape for name, shape in NETWORKS["sd1"].items()}
    failing = {reader.name for reader in READERS if reader.kind == "sd1" and unmet(reader, shapes)}
    assert {"ComfyUI", "A1111", "stable-diffusion.cpp"} <= failing


# --- LoRAs ------------------------------------------------------------------------------------------------------------

_KOHYA_LAYER = re.compile(  # layers that A1111 and ComfyUI have under kohya's names, SD 1.x and 2.x
    r"lora_unet_(?:(?:down|up)_blocks_[0-3]|mid_block)_attentions_[0-2]_"
    r"(?:proj_in|proj_out|transformer_blocks_0_(?:attn[12]_to_(?:q|k|v|out_0)|ff_net_(?:0_proj|2)))"
    r"|lora_te_text_model_encoder_layers_\d+_(?:mlp_fc[12]|self_attn_(?:q|k|v|out)_proj)"
)
_BFL_LAYER = re.compile(
    r"(?:double_blocks[._]\d+[._](?:img|txt)_(?:attn[._](?:qkv|proj)|mlp[._][02])|single_blocks[._]\d+[._]linear[12])"
)


def lora_of(base: str, names: Iterable[str], pattern: str) -> list[Adapter]:
    """A LoRA of rank 2 and alpha 1 on the layers of full size that match."""
    found = []
    for part, network in drawn_networks(base, names).items():
        for name, stored in network.weights.items():
            layer = name.removesuffix(".weight")
            if layer != name and re.search(pattern, layer):
                num_out, num_in = stored.shape[:2]
                found.append(
                    Adapter(
                        part, layer, torch.ones(2, num_in), torch.ones(num_out, 2), scale=0.5, dtype="F16"
                    )
                )
    return found


def lora_file(adapters: list[Adapter], *, family: str, layout: str) -> Shapes:
    """Names and shapes of its file."""
    return {o.name: o.shape for o in layouts.outputs(adapters, family=family, layout=layout, dtype="F16")}


@pytest.mark.parametrize(("base", "width", "layers"), [("sd15", 768, 12), ("sd21", 1024, 23)])
def test_a_stable_diffusion_lora_has_kohyas_names_and_the_width_readers_go_by(
    base: str, width: int, layers: int
) -> None:
    adapters = lora_of(base, ("unet", "text_encoder"), r"attn[12]\.to_|self_attn\.|\.ff\.net\.|\.mlp\.fc")
    shapes = lora_file(adapters, family="sd", layout="kohya")
    stems = {name.split(".", 1)[0] for name in shapes}  # InvokeAI and A1111 take what is before the first dot
    assert len(stems) == len(adapters) == 16 * 10 + layers * 6
    assert all(_KOHYA_LAYER.fullmatch(stem) for stem in stems)
    assert {name.split(".", 1)[1] for name in shapes} == {"lora_down.weight", "lora_up.weight", "alpha"}
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    assert shapes[f"{key}.lora_down.weight"] == (2, width)  # InvokeAI: 768 is 1.x, 1024 is 2.x
    assert shapes[f"{key}.lora_up.weight"] == (320, 2) and shapes[f"{key}.alpha"] == ()
    assert shapes["lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"] == (2, width)


@pytest.mark.parametrize(
    ("layout", "prefix", "leaves"),
    [
        ("kohya", "lora_unet_", {"lora_down.weight", "lora_up.weight", "alpha"}),
        ("bfl", "diffusion_model.", {"lora_A.weight", "lora_B.weight"}),
    ],
)
def test_a_flux2_lora_has_the_layers_of_black_forest_labs(layout: str, prefix: str, leaves: set[str]) -> None:
    """ComfyUI and InvokeAI go by the layer; with no alpha there the scale is in B."""
    adapters = lora_of("flux2-klein-base-4b", ["transformer"], r"_blocks\.\d+\.(attn\.(to_|add_)|ff)")
    shapes = lora_file(adapters, family="flux2", layout=layout)
    split = [re.fullmatch(r"(.+?)\.((?:lora_\w+\.weight)|alpha)", name) for name in shapes]
    assert all(m and m[1].startswith(prefix) for m in split)
    assert all(m and _BFL_LAYER.fullmatch(m[1].removeprefix(prefix)) for m in split)
    assert {m[2] for m in split if m} == leaves
    assert len({m[1] for m in split if m}) == 5 * 8 + 20 * 2
    if layout == "bfl":
        assert shapes["diffusion_model.double_blocks.0.img_mlp.0.lora_B.weight"][0] == 6 * 3072  # FLUX.1: 4
        assert shapes["diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight"][0] == 3 * 3072


def test_diffusers_names_of_a_stable_diffusion_lora_carry_text_model() -> None:
    adapters = lora_of("sd15", ["text_encoder"], r"self_attn\.q_proj")
    shapes = lora_file(adapters, family="sd", layout="diffusers")
    assert set(shapes) == {
        f"text_encoder.text_model.encoder.layers.{i}.self_attn.q_proj.lora_{ab}.weight"
        for i in range(12)
        for ab in "AB"
    }


# --- folders ----------------------------------------------------------------------------------------------------------


def old_transformers_misses(folder: Path) -> set[str]:
    """Names that transformers before 5.6 looks for in a text encoder's file and would make up at random."""
    layers = len({n.split(".layers.")[1].split(".")[0] for n in _text_names(folder) if ".layers." in n})
    return set(prefixed("text_model.", originals.clip(layers=layers))) - _text_names(folder)


def _text_names(folder: Path) -> set[str]:
    return set(read_header(folder / "text_encoder" / "model.safetensors").tensors)


def test_a_folder_that_convert_writes_has_names_that_old_transformers_finds(
    tiny_sd_folder: Path, tmp_path: Path
) -> None:
    assert old_transformers_misses(tiny_sd_folder)  # as transformers saves it today
    file, folder = tmp_path / "x.safetensors", tmp_path / "again"
    settings = ("--checkpoint-path", file)
    assert sdlab("convert", "--model-path", builtin_folder("mini-sd"), *settings) == 0
    assert sdlab("convert", "--model-path", file, "--checkpoint-path", folder) == 0
    assert not old_transformers_misses(folder)


def test_a_folder_that_is_saved_after_training_has_them_too(tiny_sd_folder: Path, tmp_path: Path) -> None:
    from sdlab.models.export import save_pipeline
    from sdlab.models.opening import open_family
    from sdlab.models.resolve import resolve

    family = open_family(resolve(str(tiny_sd_folder), training=True))
    denoiser = family.load_denoiser(device=torch.device("cpu"), dtype=torch.float32)
    save_pipeline(family, denoiser, tmp_path / "run")
    assert not old_transformers_misses(tmp_path / "run")


# --- diffusers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever connects fails."""

    def refuse(*args: object) -> None:
        raise AssertionError(f"a connection was tried: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def own_memory(pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """The same, every tensor copied out of the mapped file: where that lies changes last digits."""
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        for tensor in (*part.parameters(), *part.buffers()):
            tensor.data = tensor.data.clone()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def digests(pipeline: StableDiffusionPipeline) -> dict[str, str]:
    """A hash of every tensor of the three networks."""
    parts = {"unet": pipeline.unet, "vae": pipeline.vae, "text_encoder": pipeline.text_encoder}
    return {
        f"{name}.{key}": hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()
        for name, part in parts.items()
        for key, tensor in part.state_dict().items()
    }


def picture_hash(pipeline: StableDiffusionPipeline, *, steps: int) -> str:
    """Of the pixels of one picture, 64 x 64."""
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    picture = pipeline(
        "red circle, blue background",
        width=64,
        height=64,
        num_inference_steps=steps,
        generator=torch.Generator("cpu").manual_seed(3),
        output_type="np",
    ).images[0]
    assert picture.std() > 0.05, "a flat picture would equal any other"
    return hashlib.sha256((picture * 255).round().astype("uint8").tobytes()).hexdigest()


def same_in_diffusers(folder: Path, file: Path, *, steps: int) -> None:
    """Assert that diffusers loads the same bits from both, and draws the same pixels. One is in memory at a time."""
    settings = {"safety_checker": None, "dtype": torch.float32, "local_files_only": True}
    found = []
    for load in (
        lambda: StableDiffusionPipeline.from_pretrained(folder, **settings),
        lambda: StableDiffusionPipeline.from_single_file(str(file), config=str(folder), **settings),
    ):
        pipeline = own_memory(load())
        found.append((digests(pipeline), picture_hash(pipeline, steps=steps)))
        del pipeline
        gc.collect()
    assert found[0] == found[1]


def test_diffusers_draws_the_same_picture_from_the_file_offline(tmp_path: Path, no_network: None) -> None:
    file = tmp_path / "mini.safetensors"
    assert sdlab("convert", "--model-path", "mini-sd", "--checkpoint-path", file) == 0
    same_in_diffusers(builtin_folder("mini-sd"), file, steps=20)


def test_diffusers_reads_a_vae_alone_with_every_bit(tmp_path: Path, no_network: None) -> None:
    file, folder = tmp_path / "vae.safetensors", builtin_folder("mini-sd") / "vae"
    assert sdlab("convert", "--model-path", folder, "--checkpoint-path", file) == 0
    vae = AutoencoderKL.from_single_file(str(file), config=str(folder), local_files_only=True)
    stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, stored[name].float()) for name, tensor in vae.state_dict().items())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_diffusers_draws_the_same_picture_from_a_full_size_file(tmp_path: Path, no_network: None) -> None:
    if psutil.virtual_memory().available < 10 * GIB:
        pytest.skip("needs 10 GB of free memory")
    folder, file = random_sd(tmp_path / "random-sd15"), tmp_path / "x.safetensors"
    assert sdlab("convert", "--model-path", folder, "--half", "--checkpoint-path", file) == 0
    assert len(read_header(file).tensors) == NUM_TENSORS
    same_in_diffusers(folder, file, steps=2)
