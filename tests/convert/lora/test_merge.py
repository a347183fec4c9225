"""LoRAs in a model's weights: W + sum of weight B A in float32, rounded once, a block of rows at a time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sdlab.convert import stream
from sdlab.convert.lora import merge
from sdlab.convert.lora.layout import Adapter, outputs
from sdlab.convert.lora.merge import Merged, merged
from sdlab.convert.plan import Output
from sdlab.errors import SdlabError
from sdlab.models.files import read_header
from sdlab.models.lora import apply_loras
from sdlab.models.parts import Part, build, load
from tests.convert.lora.test_layout import BLOCKS, FLUX2_BLOCKS, adapters_of, difference, write

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def part_of(folder: Path, name: str, class_name: str, *, dtype: torch.dtype = torch.float32) -> Part:
    """A network of a pipeline folder, its weights in a file of `dtype`, under the names of its class."""
    import json

    file = next((folder / name).glob("*.safetensors"))
    state = {k.removeprefix("text_model."): v.to(dtype) for k, v in load_file(file).items()}
    copy = folder.parent / f"{folder.name}-{name}-{dtype}.safetensors"
    save_file(state, copy)
    config = json.loads((folder / name / "config.json").read_text())
    return Part(name, class_name, config, read_header(copy).tensors, copy)


@pytest.fixture(params=["F32", "F16", "BF16"])
def networks(request: Any, tiny_sd_folder: Path) -> dict[str, Part]:
    dtype = DTYPES[request.param]
    return {
        "unet": part_of(tiny_sd_folder, "unet", "UNet2DConditionModel", dtype=dtype),
        "text_encoder": part_of(tiny_sd_folder, "text_encoder", "CLIPTextModel", dtype=dtype),
    }


@pytest.fixture
def klein(tiny_klein_folder: Path) -> dict[str, Part]:
    return {"transformer": part_of(tiny_klein_folder, "transformer", "Flux2Transformer2DModel")}


def lora(path: Path, networks: dict[str, Part], layers: str, *, scale: float = 1.0) -> list[Adapter]:
    """Random adapters of the networks, written to `path`."""
    adapters = adapters_of({name: build(part) for name, part in networks.items()}, layers, scale=scale)
    write(path, adapters, "kohya")
    return adapters


def check(before: dict[str, Part], after: dict[str, Part], parts: Sequence[tuple[Adapter, float]]) -> None:
    """Each weight is that of before plus the products, to the last digit of its type; the others are the same files."""
    sums: dict[tuple[str, str], torch.Tensor] = {}
    for adapter, weight in parts:
        key = (adapter.part, f"{adapter.layer}.weight")
        sums[key] = sums.get(key, torch.tensor(0.0)) + weight * difference(adapter)
    assert sums
    for part, network in before.items():
        assert list(after[part].weights) == list(network.weights)
        for name, stored in network.weights.items():
            if (part, name) not in sums:
                assert after[part].weights[name] is stored
                continue
            now = after[part].weights[name]
            wanted = (stored.read().float() + sums[part, name]).to(DTYPES[now.dtype])
            mine = now.read()
            assert mine.dtype == wanted.dtype and mine.shape == wanted.shape == now.shape
            digit = torch.finfo(mine.dtype).eps * wanted.abs().max()
            assert (mine.float() - wanted.float()).abs().max() <= 2 * digit, name
            if (
                mine.dtype != torch.float32
            ):  # where a last digit of float32 decides, it may be rounded otherwise
                assert (mine != wanted).float().mean() < 0.01, name
            assert (mine.float() - stored.read().float()).abs().max() > 4 * digit, name


def test_merged_weights_are_the_sum_rounded_once(networks: dict[str, Part], tmp_path: Path) -> None:
    first = lora(tmp_path / "a.safetensors", networks, BLOCKS, scale=0.5)
    second = lora(tmp_path / "b.safetensors", {"unet": networks["unet"]}, r".*attn1.*|conv_in")
    assert any(a.down.ndim == 4 and a.down.shape[-1] == 3 for a in first)
    loras = [(tmp_path / "a.safetensors", 0.8), (tmp_path / "b.safetensors", -1.5)]
    found = merged(networks, loras, dtype=None)
    check(networks, found, [(a, 0.8) for a in first] + [(a, -1.5) for a in second])
    for word in DTYPES:
        there = merged(networks, loras, dtype=word)
        kinds = {s.dtype for part in there.values() for s in part.weights.values() if isinstance(s, Merged)}
        assert kinds == {word}
        check(networks, there, [(a, 0.8) for a in first] + [(a, -1.5) for a in second])


def test_a_merged_model_is_what_the_lora_beside_the_model_is(klein: dict[str, Part], tmp_path: Path) -> None:
    from types import SimpleNamespace

    lora(tmp_path / "a.safetensors", klein, FLUX2_BLOCKS, scale=2.0)
    device = torch.device("cpu")
    beside = SimpleNamespace(transformer=load(klein["transformer"], device, torch.float32))
    apply_loras(beside, [(tmp_path / "a.safetensors", 0.7)])
    inside: nn.Module = load(
        merged(klein, [(tmp_path / "a.safetensors", 0.7)], dtype=None)["transformer"], device, torch.float32
    )
    plain = load(klein["transformer"], device, torch.float32)
    name = "transformer_blocks.0.attn.to_q"
    ones = torch.ones(1, 32)
    outs = [m.get_submodule(name)(ones) for m in (inside, beside.transformer, plain)]
    assert (outs[1] - outs[2]).abs().max() > 0.1
    assert torch.allclose(outs[0], outs[1], atol=1e-5)


def one(networks: dict[str, Part], tmp_path: Path, **settings: Any) -> Merged:
    """A merged weight of the tiny UNet."""
    lora(tmp_path / "one.safetensors", {"unet": networks["unet"]}, r"mid_block\.resnets\.0\.conv1")
    found = merged(networks, [(tmp_path / "one.safetensors", 1.0)], **({"dtype": None} | settings))
    weight = found["unet"].weights["mid_block.resnets.0.conv1.weight"]
    assert isinstance(weight, Merged)
    return weight


def test_every_pass_gives_the_same_bytes_whatever_the_blocks(
    networks: dict[str, Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = one(networks, tmp_path)
    whole = b"".join(weight.pieces())
    assert whole == b"".join(weight.pieces()) == raw(weight.read()) and len(whole) == weight.nbytes
    monkeypatch.setattr(merge, "_BLOCK_NUMBERS", 5 * 288)  # five rows, which does not divide 32
    assert [len(p) for p in weight.pieces()] == [weight.nbytes * n // 32 for n in (5, 5, 5, 5, 5, 5, 2)]
    parted = weight.read().float()
    assert (parted - floats(whole, weight.dtype)).abs().max() < 1e-2 * parted.abs().max()


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def floats(whole: bytes, dtype: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(whole), dtype=DTYPES[dtype]).float().reshape(32, 32, 3, 3)


def test_halves_may_be_swapped_and_rows_taken(networks: dict[str, Part], tmp_path: Path) -> None:
    """As a single file needs them: FLUX.2's last modulation, and q, k and v as one."""
    weight = one(networks, tmp_path)
    plain = weight.read()
    swapped = replace(weight, halves_swapped=True)
    assert torch.equal(swapped.read(), torch.cat(plain.chunk(2)[::-1]))
    assert b"".join(swapped.pieces()) == raw(swapped.read())
    also = replace(weight, base=replace(weight.base, halves_swapped=True))
    assert (also.read().float() - plain.float()).abs().max() > 0.01  # only the base is
    quarters = [weight.rows(i, 4) for i in range(4)]
    assert [q.shape for q in quarters] == [(8, 32, 3, 3)] * 4
    assert torch.equal(torch.cat([q.read() for q in quarters]), plain)
    assert sum(q.nbytes for q in quarters) == weight.nbytes


def test_a_merged_weight_is_written_and_compared_like_any_other(
    networks: dict[str, Part], tmp_path: Path
) -> None:
    weight = one(networks, tmp_path)
    path = tmp_path / "out.safetensors"
    for dtype in (weight.dtype, "F32"):
        output = Output("x", dtype, weight.shape, (weight,))
        stream.write(path, [output], metadata={})
        assert torch.equal(load_file(path)["x"], weight.read().to(DTYPES[dtype]))
        path.unlink()


def test_a_sum_too_large_for_its_type_is_refused_in_one_line(tiny_sd_folder: Path, tmp_path: Path) -> None:
    part = part_of(tiny_sd_folder, "unet", "UNet2DConditionModel")
    adapters = adapters_of({"unet": build(part)}, r"conv_in")
    made = outputs([replace(adapters[0], scale=1e6)], family="sd", layout="kohya", dtype=None)
    stream.write(tmp_path / "a.safetensors", made, metadata={})
    loras = [(tmp_path / "a.safetensors", 1.0)]
    weight = merged({"unet": part}, loras, dtype="F16")["unet"].weights["conv_in.weight"]
    with pytest.raises(
        SdlabError, match=r"with the LoRAs tensor 'conv_in.weight' grows to .*, too much for F16"
    ):
        weight.read()
    assert torch.isfinite(
        merged({"unet": part}, loras, dtype=None)["unet"].weights["conv_in.weight"].read()
    ).all()


def test_a_lora_of_another_model_is_refused_before_anything_is_read(
    klein: dict[str, Part], tiny_sd_folder: Path, tmp_path: Path
) -> None:
    unet = {"unet": part_of(tiny_sd_folder, "unet", "UNet2DConditionModel")}
    lora(tmp_path / "a.safetensors", klein, FLUX2_BLOCKS)
    with pytest.raises(SdlabError, match=r"a.safetensors: is a LoRA of another kind of model"):
        merged(unet, [(tmp_path / "a.safetensors", 1.0)], dtype=None)
    text = {"text_encoder": part_of(tiny_sd_folder, "text_encoder", "CLIPTextModel")}
    lora(tmp_path / "both.safetensors", {**unet, **text}, BLOCKS)
    with pytest.raises(SdlabError, match=r"layers have no place: there is no lora_te_"):
        merged(unet, [(tmp_path / "both.safetensors", 1.0)], dtype=None)


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_memory_does_not_grow_with_the_weight(tmp_path: Path) -> None:
    """A weight of 400 MB, a rank of 4: less than a quarter of it is ever held."""
    import subprocess

    script = """
import resource, sys, torch
from pathlib import Path
from sdlab.convert.lora.merge import Merged
from sdlab.models.files import Stored
path, rows, width = Path(sys.argv[1]), 12_500, 8_000
with path.open("wb") as file:
    file.truncate(4 * rows * width)
base = Stored("w", "F32", (rows, width), path, 0, 4 * rows * width)
weight = Merged(name="w", dtype="F16", shape=base.shape, path=path, nbytes=2 * rows * width, base=base,
                down_RI=torch.ones(4, width), up_OR=torch.ones(rows, 4))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
num = sum(len(piece) for piece in weight.pieces())
assert num == weight.nbytes
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "w")], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 100
