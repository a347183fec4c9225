"""A model that is loaded: what it wears, how many threads it takes, and what is refused before a weight is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sdlab.errors import SdlabError
from sdlab.inference import load
from sdlab.inference.identity import Hasher
from sdlab.inference.load import Asked, Loaded, Opened, Running, Source
from sdlab.inference.spec import Shot, Spec
from sdlab.keyed import keyed
from sdlab.models.lora import targets

SPEC = Spec(steps=2, guidance=5.0, width=32, height=32)
CPU = Running(device="cpu", dtype="fp32")
Tagged = Callable[..., tuple[Source, float]]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def opened(folder: Path, **asked: object) -> Opened:
    asked_for = Asked(str(folder), **asked)  # type: ignore[arg-type]
    return load.open_chosen(load.choose(asked_for, tuned=folder.parent / "none", hasher=Hasher()))


def loaded(folder: Path, running: Running = CPU, prompt: str = "red", **asked: object) -> Loaded:
    return load.load(opened(folder, **asked), running, prompts=[prompt, ""])


@pytest.fixture(scope="module")
def sd(tiny_sd_folder: Path) -> Loaded:
    return loaded(tiny_sd_folder)


def pixels(one: Loaded, prompt: str = "red") -> np.ndarray:
    [made] = one.sampler.sample([Shot(0, prompt, "", "", 3)], SPEC)
    assert made.image is not None
    return np.asarray(made.image).astype(int)


def write_lora(module: nn.Module, path: Path, *, part: str, names: list[str]) -> Path:
    tensors = {}
    for name in names:
        rows, columns = module.get_submodule(name).weight.shape
        for half, shape in (("lora_A", (2, columns)), ("lora_B", (rows, 2))):
            drawn = torch.randn(shape, generator=keyed(path.stem, name, half))
            tensors[f"{part}.{name}.{half}.weight"] = drawn
    save_file(tensors, path)
    return path


@pytest.fixture
def tagged(sd: Loaded, tmp_path: Path) -> Tagged:
    """A factory of LoRAs of the UNet; "words" is one of the text encoder."""

    def make(name: str, weight: float = 0.5) -> tuple[Source, float]:
        path = tmp_path / f"{name}.safetensors"
        pipeline = sd.sampler.pipeline
        if name == "words":
            encoder = pipeline.text_encoder
            names = [n for n, m in encoder.named_modules() if isinstance(m, nn.Linear) and "q_proj" in n]
            write_lora(encoder, path, part="text_encoder", names=names)
        else:
            sd.wear(())  # so that its layers have their own names
            write_lora(pipeline.unet, path, part="unet", names=targets(pipeline.unet))
        return load.lora_source(path, Hasher()), weight

    return make


def test_the_same_loras_give_the_same_bits_whatever_was_worn_before(sd: Loaded, tagged: Tagged) -> None:
    a, b, words = tagged("a"), tagged("b"), tagged("words", 2.0)
    seen = {}
    for wanted in ((), (a,), (a, words), (b, a), (words,), (a, b), (a, words), (), (words,), (a,)):
        sd.wear(wanted)
        made = pixels(sd)
        first = seen.setdefault(frozenset(source.name for source, _ in wanted), made)
        assert np.array_equal(made, first), wanted
    sd.wear(())
    different = list(seen.values())
    assert all((x != y).any() for i, x in enumerate(different) for y in different[:i])


def test_a_tagged_lora_is_the_chosen_one(tiny_sd_folder: Path, sd: Loaded, tagged: Tagged) -> None:
    source, weight = tagged("a", 0.7)
    sd.wear([(source, weight)])
    worn = pixels(sd)
    sd.wear(())
    chosen = loaded(tiny_sd_folder, loras=((source.path, weight),))
    assert np.array_equal(pixels(chosen), worn)
    chosen.wear([tagged("b")])
    assert (pixels(chosen) != worn).any()
    chosen.wear(())  # its own stays
    assert np.array_equal(pixels(chosen), worn)


def test_what_is_worn_already_is_not_touched(sd: Loaded, tagged: Tagged, monkeypatch) -> None:
    a, b = tagged("a"), tagged("b")
    sd.wear([a, b])
    monkeypatch.setattr(type(sd.sampler), "forget_prompts", lambda _: pytest.fail("touched"))
    sd.wear([b, a])
    monkeypatch.undo()
    sd.wear(())


def test_after_a_lora_that_does_not_fit_the_next_one_is_worn_as_ever(
    sd: Loaded, tagged: Tagged, tmp_path: Path
) -> None:
    a = tagged("a")
    sd.wear(())
    plain = pixels(sd)
    sd.wear([a])
    with_a = pixels(sd)
    save_file({"unet.nowhere.lora_A.weight": torch.zeros(2, 8)}, tmp_path / "other.safetensors")
    with pytest.raises(SdlabError, match=r"other\.safetensors"):
        sd.wear([(load.lora_source(tmp_path / "other.safetensors", Hasher()), 1.0)])
    assert np.array_equal(pixels(sd), plain)
    sd.wear([a])
    assert np.array_equal(pixels(sd), with_a)
    sd.wear(())


def test_a_tagged_lora_that_does_not_fit_is_named_before_a_weight_is_read(
    tiny_sd_folder: Path, tagged: Tagged, tmp_path: Path
) -> None:
    one = opened(tiny_sd_folder)
    load.check_tagged(one, [tagged("a")])
    save_file({"unet.nowhere.lora_A.weight": torch.zeros(2, 8)}, tmp_path / "other.safetensors")
    with pytest.raises(SdlabError, match=r"other\.safetensors") as raised:
        load.check_tagged(one, [(load.lora_source(tmp_path / "other.safetensors", Hasher()), 1.0)])
    assert "\n" not in str(raised.value)


def test_flux2_wears_loras_after_its_text_encoder_is_gone(tiny_klein_folder: Path, tmp_path: Path) -> None:
    flux2 = loaded(tiny_klein_folder)
    net = flux2.sampler.pipeline.transformer
    path = write_lora(net, tmp_path / "a.safetensors", part="transformer", names=targets(net))
    plain = pixels(flux2)
    flux2.wear([(load.lora_source(path, Hasher()), 0.5)])
    assert (pixels(flux2) != plain).any()
    flux2.wear(())
    assert np.array_equal(pixels(flux2), plain)


def test_a_lora_carries_the_hash_that_civitai_lists(tagged: Tagged) -> None:
    source, _ = tagged("a")
    assert source.autov3 == Hasher().autov3(source.path) and len(source.autov3) == 64


def test_only_textual_inversions_that_a_prompt_names_are_read(tiny_sd_folder: Path, tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    width = 32
    save_file({"emb_params": torch.ones(2, width)}, shelf / "mark.safetensors")
    save_file({"emb_params": torch.ones(2, 768)}, shelf / "foreign.safetensors")
    one = opened(tiny_sd_folder, embeddings=(shelf,))
    assert [source.name for source in one.chosen.embeddings] == ["foreign", "mark"]
    assert [e.name for e in load.embeddings_of(one, ["a red mark", "blue"])] == ["mark"]
    with pytest.raises(SdlabError, match="foreign"):
        load.load(one, CPU, prompts=["a foreign star"])


def test_a_picture_is_the_same_in_a_worker_thread(sd: Loaded) -> None:
    assert sd.num_threads == 1  # small, in float32 on a CPU
    expected = pixels(sd)
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(sd.num_threads,)) as pool:
        assert all(np.array_equal(one, expected) for one in pool.map(lambda _: pixels(sd), range(4)))


def test_threads_of_a_recipe_are_taken_exactly(tiny_sd_folder: Path) -> None:
    one = loaded(tiny_sd_folder, Running(device="cpu", threads=2))
    assert (one.num_threads, one.num_workers, torch.get_num_threads()) == (2, 1, 2)


@pytest.mark.parametrize(
    ("running", "said"),
    [
        (Running(device="cpu", offload="model"), "--offload model spares the memory of a CUDA card"),
        (Running(device="cpu", offload="layers"), "--offload layers spares the memory of a CUDA card"),
        (Running(device="gpu"), "unknown device"),
        (Running(dtype="int8"), "unknown number type"),
    ],
)
def test_what_this_computer_cannot_do_is_refused_before_a_weight_is_read(
    tiny_sd_folder: Path, monkeypatch, running: Running, said: str
) -> None:
    one = opened(tiny_sd_folder)
    monkeypatch.setattr(type(one.family), "load_denoiser", lambda *_: pytest.fail("read"))
    with pytest.raises(SdlabError, match=said) as raised:
        load.load(one, running, prompts=[])
    assert "\n" not in str(raised.value)


def test_compile_and_layers_exclude_each_other(monkeypatch) -> None:
    monkeypatch.setattr("sdlab.models.memory.pick_device", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr("sdlab.models.memory.check_compiler", lambda _: None)
    with pytest.raises(SdlabError, match="--compile and --offload layers"):
        load.check_running(Running(dtype="fp16", compile=True, offload="layers"))


def test_the_vae_works_in_tiles_only_where_asked(sd: Loaded, tiny_sd_folder: Path) -> None:
    assert not sd.sampler.pipeline.vae.use_tiling
    tiled = loaded(tiny_sd_folder, Running(device="cpu", vae_tiling=True))
    assert tiled.sampler.pipeline.vae.use_tiling


@pytest.mark.parametrize("family", ["sd", "klein"])
def test_all_attention_is_fused(
    family: str, tiny_sd_folder: Path, tiny_klein_folder: Path, monkeypatch
) -> None:
    one = loaded(tiny_sd_folder if family == "sd" else tiny_klein_folder)
    pipeline = one.sampler.pipeline
    denoiser = pipeline.unet if family == "sd" else pipeline.transformer
    processors = {type(p).__name__ for p in denoiser.attn_processors.values()}
    assert processors <= {"AttnProcessor2_0", "Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor"}
    assert {type(p).__name__ for p in pipeline.vae.attn_processors.values()} <= {"AttnProcessor2_0"}
    parts = {"denoiser": denoiser, "vae": pipeline.vae.decoder, "text": pipeline.text_encoder}
    at_work, seen, fused = [], set(), torch.nn.functional.scaled_dot_product_attention
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: at_work.append(name))
        for name, module in parts.items()
        if module is not None  # FLUX.2's text encoder has read the prompts and is gone
    ]

    def attend(*tensors: torch.Tensor, **settings: object) -> torch.Tensor:
        seen.add(at_work[-1])
        return fused(*tensors, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    pixels(one)
    assert seen == set(at_work) and len(seen) == len(handles)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, in what its compiler imports
def test_a_compiled_denoiser_draws_the_same_picture_and_changes_loras(
    sd: Loaded, tiny_sd_folder: Path, tagged: Tagged
) -> None:
    a = tagged("a")
    compiled = loaded(tiny_sd_folder, Running(device="cpu", compile=True))
    assert np.abs(pixels(compiled) - pixels(sd)).max() <= 2
    first = pixels(compiled)
    compiled.wear([a])
    sd.wear([a])
    assert np.abs(pixels(compiled) - pixels(sd)).max() <= 2
    sd.wear(())
    compiled.wear(())
    assert np.array_equal(pixels(compiled), first)
