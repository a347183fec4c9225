"""Offload: a part is on the card only while it works, and its weights come back as they left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from sdlab.errors import SdlabError
from sdlab.inference import load
from sdlab.inference.engines import placement
from sdlab.inference.engines.placement import Placement, check_offload
from sdlab.inference.identity import Hasher
from sdlab.inference.spec import Shot, Spec

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


class Card:
    """Stands for a card's memory: what was copied to it, and is still held."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.copies: list[Tensor] = []
        monkeypatch.setattr(placement, "_copied", self._copied)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def _copied(self, data: Tensor, device: torch.device) -> Tensor:
        assert device == CARD
        self.copies.append(data.clone())
        return self.copies[-1]

    def holds(self, module: nn.Module) -> bool:
        there = {copy.data_ptr() for copy in self.copies}
        at = [tensor.data_ptr() in there for tensor in [*module.parameters(), *module.buffers()]]
        assert all(at) or not any(at)
        return all(at)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(monkeypatch)


def module() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval().requires_grad_(False)


def test_a_part_is_on_the_card_only_while_it_works(card: Card) -> None:
    one, other = module(), module()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in one.state_dict().items()}
    with Placement(CARD, "model").using(one):
        assert card.holds(one) and not card.holds(other)
    assert not card.holds(one)
    for name, tensor in one.state_dict().items():  # the very memory: nothing is copied back
        assert tensor.data_ptr() == before[name][0] and torch.equal(tensor, before[name][1])


def test_a_part_leaves_the_card_when_its_work_fails(card: Card) -> None:
    one = module()
    with pytest.raises(ZeroDivisionError), Placement(CARD, "model").using(one):
        raise ZeroDivisionError
    assert not card.holds(one)


def test_a_part_may_be_used_within_itself_and_change_its_numbers_there_and_back(card: Card) -> None:
    one, where = module(), Placement(CARD, "model")
    before = one.state_dict()["0.weight"].clone()
    with where.using(one):
        with where.using(one):
            one.half()
            one.float()
        assert card.holds(one)
    assert not card.holds(one) and torch.equal(one.state_dict()["0.weight"], before)


def test_without_offload_nothing_is_moved(card: Card) -> None:
    with Placement(CARD).using(module()):
        pass
    assert not card.copies and Placement(CARD).home == CARD
    assert Placement(CARD, "model").home == Placement(CARD, "layers").home == CPU


def test_a_pipeline_makes_its_tensors_on_the_card_while_its_parts_wait() -> None:
    kind = Placement(CARD, "model").pipeline(StableDiffusionPipeline)
    assert issubclass(kind, StableDiffusionPipeline) and kind.__name__ == "StableDiffusionPipeline"
    assert kind.__new__(kind)._execution_device == CARD
    assert Placement(CARD).pipeline(StableDiffusionPipeline) is StableDiffusionPipeline


def test_layers_come_one_by_one_and_give_the_same_bits(tiny_sd_folder: Path, monkeypatch) -> None:
    """On the CPU, where coming to the device is a copy from itself; the order of all calls is the real one."""
    one = load.load(_opened(tiny_sd_folder), load.Running(device="cpu", dtype="fp32"), prompts=[])
    unet, where = one.sampler.pipeline.unet, Placement(CPU, "layers")
    expected = _pixels(one)
    where.settle(unet)
    monkeypatch.setattr(placement, "_copied", lambda *_: pytest.fail("it goes by layers"))
    with where.using(unet):
        assert np.array_equal(_pixels(one), expected)
    assert any("group_offloading" in m._diffusers_hook.hooks for m in unet.modules() if _hooked(m))
    where.unsettle(unet)
    assert not any(m._diffusers_hook.hooks for m in unet.modules() if _hooked(m))
    assert np.array_equal(_pixels(one), expected)


@pytest.mark.parametrize("folder", ["tiny_sd_folder", "tiny_klein_folder"])
def test_every_part_of_an_engine_comes_to_the_card_and_leaves(
    folder: str, request: pytest.FixtureRequest, card: Card, monkeypatch
) -> None:
    """The engine computes on the CPU here; what matters is that each part is on the card when it is called."""
    opened = _opened(request.getfixturevalue(folder))
    plain = load.load(opened, load.Running(device="cpu", dtype="fp32"), prompts=["red", ""])
    expected = _pixels(plain)
    monkeypatch.setattr(placement, "_copied", lambda data, _: card._copied(data, CARD))
    one = load.load(opened, load.Running(device="cpu", dtype="fp32"), prompts=["red", ""])
    object.__setattr__(one.sampler, "placement", Placement(CPU, "model"))
    pipeline, worked = one.sampler.pipeline, []
    parts = [getattr(pipeline, name, None) for name in ("text_encoder", "unet", "transformer")]
    for part in [pipeline.vae.decoder, *(p for p in parts if p is not None)]:
        part.register_forward_pre_hook(lambda module, _: worked.append(card.holds(module)))
    assert np.array_equal(_pixels(one), expected)
    assert len(worked) > 2 and all(worked)
    networks = [pipeline.vae, *(p for p in parts if p is not None)]
    assert not any(card.holds(network) for network in networks)


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_offload_without_a_card_is_one_line(device: str) -> None:
    check_offload("none", torch.device(device))
    with pytest.raises(SdlabError, match=f"pictures are made on {device}") as raised:
        check_offload("model", torch.device(device))
    assert "\n" not in str(raised.value)


def _hooked(module: nn.Module) -> bool:
    return hasattr(module, "_diffusers_hook")


def _opened(folder: Path) -> load.Opened:
    asked = load.Asked(str(folder))
    return load.open_chosen(load.choose(asked, tuned=folder.parent / "none", hasher=Hasher()))


def _pixels(one: load.Loaded) -> np.ndarray:
    [made] = one.sampler.sample([Shot(0, "red", "", "", 3)], Spec(2, 5.0, 32, 32))
    assert made.image is not None
    return np.asarray(made.image).astype(int)
