"""A LoRA made of two models: the closest one of its rank, and what it cannot hold is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdlab.convert.lora.extract import Extracted, extract, num_tensors
from sdlab.convert.lora.layout import LAYOUTS, read_adapters
from sdlab.convert.lora.merge import merged
from sdlab.errors import SdlabError
from sdlab.keyed import keyed
from sdlab.models.files import Stored, read_header
from sdlab.models.parts import Part, build
from tests.convert.lora.test_layout import BLOCKS, FLUX2_BLOCKS, adapters_of, difference, write
from tests.convert.lora.test_merge import part_of


@pytest.fixture
def sd(tiny_sd_folder: Path) -> dict[str, Part]:
    return {
        "unet": part_of(tiny_sd_folder, "unet", "UNet2DConditionModel"),
        "text_encoder": part_of(tiny_sd_folder, "text_encoder", "CLIPTextModel"),
    }


@pytest.fixture
def klein(tiny_klein_folder: Path) -> dict[str, Part]:
    return {"transformer": part_of(tiny_klein_folder, "transformer", "Flux2Transformer2DModel")}


def changed(
    networks: dict[str, Part], tmp_path: Path, change: Callable[[str, torch.Tensor], torch.Tensor]
) -> dict[str, Part]:
    """The same networks, each tensor as `change` of its name and value has it, in new files."""
    found = {}
    for part, network in networks.items():
        path = tmp_path / f"{part}.safetensors"
        save_file(
            {name: change(name, stored.read()).contiguous() for name, stored in network.weights.items()}, path
        )
        found[part] = replace(network, weights=read_header(path).tensors, where=path)
    return found


def with_lora(networks: dict[str, Part], layers: str, path: Path) -> dict[str, Part]:
    adapters = adapters_of({name: build(part) for name, part in networks.items()}, layers)
    write(path, adapters, "kohya")
    return merged(networks, [(path, 1.0)], dtype=None)


@pytest.mark.parametrize("family", ["sd", "klein"])
def test_what_a_lora_added_comes_back(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Rank 4 went in; with 8 asked for, its product comes back, of convolutions as of matrices."""
    networks: dict[str, Part] = request.getfixturevalue(family)
    layers = BLOCKS if family == "sd" else FLUX2_BLOCKS
    tuned = with_lora(networks, layers, tmp_path / "a.safetensors")
    found = extract(networks, tuned, rank=8)
    wanted = adapters_of({name: build(part) for name, part in networks.items()}, layers)
    assert sorted((a.part, a.layer) for a in found.adapters) == [(a.part, a.layer) for a in wanted]
    assert found.kept == pytest.approx(1, abs=1e-6) and found.left_out == []
    by_layer = {(a.part, a.layer): a for a in found.adapters}
    for adapter in wanted:
        mine, product = by_layer[adapter.part, adapter.layer], difference(adapter)
        assert mine.rank == min(8, *product.flatten(1).shape) and mine.scale == 1
        assert (difference(mine) - product).norm() < 1e-4 * product.norm(), adapter.layer


def test_a_difference_of_low_rank_is_exact_to_float32(sd: dict[str, Part], tmp_path: Path) -> None:
    """Without a large weight below it, nothing is lost but float32's own last digits."""
    low = torch.randn(32, 4, generator=keyed("left")) @ torch.randn(4, 288, generator=keyed("right"))
    low = low.reshape(32, 32, 3, 3)
    name = "mid_block.resnets.0.conv1.weight"
    zero = changed(sd, tmp_path, lambda n, t: torch.zeros_like(t) if n == name else t)
    (tmp_path / "tuned").mkdir()
    tuned = changed(sd, tmp_path / "tuned", lambda n, t: low if n == name else t)
    [adapter] = extract(zero, tuned, rank=4).adapters
    assert adapter.down.shape == (4, 32, 3, 3) and adapter.up.shape == (32, 4, 1, 1)
    assert (difference(adapter) - low).norm() < 1e-5 * low.norm()


def noisy(networks: dict[str, Part], tmp_path: Path) -> dict[str, Part]:
    """Every tensor changed by noise."""
    return changed(
        networks, tmp_path, lambda n, t: t + 0.01 * torch.randn(t.shape, generator=keyed("noise", n))
    )


def test_of_a_full_change_the_largest_part_is_kept_and_the_share_is_true(
    sd: dict[str, Part], tmp_path: Path
) -> None:
    """As close as the whole SVD, to 2 in a thousand; biases, norms and embeddings are named."""
    tuned = noisy(sd, tmp_path)
    found = extract(sd, tuned, rank=4)
    best = total = kept = 0.0
    for adapter in found.adapters:
        part, name = sd[adapter.part], f"{adapter.layer}.weight"
        change = (tuned[adapter.part].weights[name].read() - part.weights[name].read()).flatten(1)
        best += float(torch.linalg.svdvals(change)[:4].square().sum())
        total += float(change.square().sum())
        kept += float(change.square().sum() - (change - difference(adapter).flatten(1)).square().sum())
    assert found.kept == pytest.approx(kept / total, rel=1e-4)
    assert 0.998 * best < kept <= 1.0001 * best and 0.1 < found.kept < 0.9
    rest = {
        "unet.conv_in.bias",
        "unet.conv_norm_out.weight",
        "text_encoder.embeddings.token_embedding.weight",
    }
    assert rest <= set(found.left_out)
    num = sum(len(part.weights) for part in sd.values())
    assert len(found.adapters) + len(found.left_out) == num == num_tensors(sd)


def test_the_same_models_give_the_same_lora_and_progress_counts_tensors(
    sd: dict[str, Part], tmp_path: Path
) -> None:
    tuned, told = noisy(sd, tmp_path), list[float]()
    once = extract(sd, tuned, rank=2, advance=told.append)
    twice = extract(sd, tuned, rank=2)
    assert told == list(range(1, num_tensors(sd) + 1))
    for one, other in zip(once.adapters, twice.adapters, strict=True):
        assert torch.equal(one.down, other.down) and torch.equal(one.up, other.up)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "peft"])
def test_an_extracted_lora_is_written_in_every_layout(
    klein: dict[str, Part], tiny_klein_folder: Path, tmp_path: Path, layout: str
) -> None:
    found = extract(klein, noisy(klein, tmp_path), rank=4)
    path = write(tmp_path / "lora.safetensors", found.adapters, layout)
    back = read_adapters(path, base=tiny_klein_folder)[1]
    mine = {a.layer: difference(a) for a in found.adapters}
    assert mine.keys() == {a.layer for a in back}
    assert all(torch.equal(difference(a), mine[a.layer]) for a in back)


def test_only_rounding_is_no_difference(sd: dict[str, Part], tmp_path: Path) -> None:
    """The same model in half precision beside one in full: what both can tell is equal."""
    half = changed(sd, tmp_path, lambda n, t: t.half())
    with pytest.raises(SdlabError, match="the models do not differ: there is nothing to extract") as refused:
        extract(sd, half, rank=4)
    assert "\n" not in str(refused.value)
    low = with_lora(sd, r"mid_block\.resnets\.0\.conv1", tmp_path / "a.safetensors")
    (tmp_path / "low").mkdir()
    found: Extracted = extract(half, changed(low, tmp_path / "low", lambda n, t: t), rank=8)
    assert [a.layer for a in found.adapters] == ["mid_block.resnets.0.conv1"] and found.kept > 0.99


def test_a_change_that_no_lora_holds_is_refused_with_its_name(sd: dict[str, Part], tmp_path: Path) -> None:
    tuned = changed(sd, tmp_path, lambda n, t: t + 1 if n == "conv_in.bias" else t)
    with pytest.raises(SdlabError, match=r"but in nothing that a LoRA can hold: unet.conv_in.bias$"):
        extract(sd, tuned, rank=4)


def test_models_of_different_shapes_are_refused_before_a_weight_is_read(sd: dict[str, Part]) -> None:
    wide = dict(sd["unet"].weights)
    stored = wide["conv_in.weight"]
    wide["conv_in.weight"] = Stored("conv_in.weight", "F32", (32, 9, 3, 3), Path("/nowhere"))
    other = {"unet": replace(sd["unet"], weights=wide)}
    with pytest.raises(
        SdlabError, match=r"another shape .* conv_in.weight is \[32, 4, 3, 3\] there, \[32, 9, 3, 3\] here"
    ):
        extract(sd, other, rank=4)
    assert stored.shape == (32, 4, 3, 3)


def test_a_damaged_model_is_refused_with_its_tensor(sd: dict[str, Part], tmp_path: Path) -> None:
    tuned = changed(sd, tmp_path, lambda n, t: t * float("nan") if n == "conv_out.weight" else t)
    with pytest.raises(SdlabError, match=r"'conv_out.weight' holds values that are not finite"):
        extract(sd, tuned, rank=4)
