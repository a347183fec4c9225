"""LPIPS with the weights of an installed package, which is never run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdlab.errors import SdlabError
from sdlab.keyed import Draws, keyed
from sdlab.models import lpips
from sdlab.models.base import Batch
from sdlab.models.folder import vae_part
from sdlab.models.lpips import Lpips, halved, load_lpips, weights_file
from sdlab.models.vae import Autoencoder, VaeObjective
from sdlab.training.checkpoint import trainable

CPU = torch.device("cpu")
THEIR_NAMES = (  # of the file in stlpips-pytorch 0.0.2
    *("net.slice1.0", "net.slice1.2", "net.slice2.6", "net.slice2.8"),
    *("net.slice3.12", "net.slice3.14", "net.slice3.16"),
    *("net.slice4.20", "net.slice4.22", "net.slice4.24"),
    *("net.slice5.28", "net.slice5.30", "net.slice5.32"),
)


def file_of(path: Path, net: nn.Module, *, but: str = "", pickled: bool = False) -> Path:
    """The weights of a network under the names that the package uses."""
    rows = {}
    own = net.state_dict()
    convolutions = [name.removesuffix(".weight") for name in own if name.endswith("weight")]
    for mine, theirs in zip(convolutions, THEIR_NAMES, strict=True):
        rows |= {f"{theirs}.{part}": own[f"{mine}.{part}"] for part in ("weight", "bias")}
    for index in range(5):
        rows[f"lin{index}.model.1.weight"] = own[f"heads.{index}"].reshape(1, -1, 1, 1)
    rows["net.slice2.5.filt"] = torch.zeros(4, 1, 3, 3)  # what we compute ourselves
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor for name, tensor in rows.items() if name != but}
    if pickled:
        torch.save(kept, path)
    else:  # what a file is, its content says, not its name
        save_file(kept, path)
    return path


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A narrow network's weights where the package would have them; running the package would fail."""
    monkeypatch.setattr(lpips, "SLICES", ((4, 4), (4, 4), (8, 8, 8), (8, 8, 8), (8, 8, 8)))
    root = tmp_path / "site" / "stlpips_pytorch"
    net = Lpips()
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3, generator=keyed(name))
        else:
            parameter.data.uniform_(0.01, 0.1, generator=keyed(name))
    file_of(root / "weights" / "vST0.0" / "vgg_shift_tolerant.pth", net)
    (root / "__init__.py").write_text("raise RuntimeError('it is run')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert "stlpips_pytorch" not in sys.modules
    return root


def pictures(num: int, side_px: int = 32) -> Tensor:
    return torch.rand(num, 3, side_px, side_px, generator=keyed("pictures", side_px)) * 2 - 1


def distance_by_hand(net: Lpips, one: Tensor, other: Tensor) -> float:
    """Equation 1 of Zhang et al. 2018, of one pair, in float64."""
    total, seen = 0.0, []
    for pixels in (one, other):
        shift = torch.tensor(lpips.MEAN).double().reshape(3, 1, 1)
        values = (pixels.double() - shift) / torch.tensor(lpips.SPREAD).double().reshape(3, 1, 1)
        rows = []
        for index, convolutions in enumerate(net.slices):
            values = blurred_by_hand(values) if index else values
            for c in convolutions:
                weight, bias = c.weight.double(), c.bias.double()
                values = torch.relu(torch.nn.functional.conv2d(values[None], weight, bias, padding=1)[0])
            rows.append(values / (values.square().sum(dim=0, keepdim=True) + 1e-10).sqrt())
        seen.append(rows)
    for head, a, b in zip(net.heads, *seen, strict=True):
        total += float((head.double().reshape(-1, 1, 1) * (a - b) ** 2).sum(dim=0).mean())
    return total


def blurred_by_hand(values_CHW: Tensor) -> Tensor:
    """The maximum of 2x2, mirrored by 2 pixels at each side, and every second place's weighted mean of 3x3."""
    largest = values_CHW.unfold(1, 2, 1).unfold(2, 2, 1).amax(dim=(-1, -2))
    wide = torch.nn.functional.pad(largest[None], (2, 2, 2, 2), mode="reflect")[0]
    window = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=values_CHW.dtype) / 16
    return (wide.unfold(1, 3, 2).unfold(2, 3, 2) * window).sum(dim=(-1, -2))


def test_the_distance_is_the_papers_by_hand(package: Path, tmp_path: Path) -> None:
    pickled = file_of(tmp_path / "pickled.pth", load_lpips(weights_file(), CPU), pickled=True)
    net, pixels = load_lpips(pickled, CPU), pictures(4)
    found = net(pixels[:2], pixels[2:])
    wanted = [distance_by_hand(net, pixels[i], pixels[2 + i]) for i in range(2)]
    assert found.dtype == torch.float32 and found.tolist() == pytest.approx(wanted, rel=1e-4)
    assert net(pixels, pixels).tolist() == [0.0] * 4
    torch.testing.assert_close(halved(pixels)[0], blurred_by_hand(pixels[0]))


def test_flat_and_dead_pictures_have_a_gradient(package: Path) -> None:
    net, flat = load_lpips(weights_file(), CPU), torch.zeros(1, 3, 24, 24, requires_grad=True)
    with torch.no_grad():
        net.slices[0][1].bias.fill_(-1e3)  # type: ignore[index]  # no feature is above 0 any more
    distance = net(flat, pictures(1, 24))
    distance.sum().backward()
    assert distance.isfinite().all()
    assert flat.grad is not None and flat.grad.isfinite().all()


def test_an_autoencoder_is_trained_by_it_and_it_is_not(package: Path, tiny_sd_folder: Path) -> None:
    part = vae_part(tiny_sd_folder / "vae", allow_pickle=False)
    vae = Autoencoder(
        part, VaeObjective(l1=0, perceptual=2.0, perceptual_net="lpips", kl_weight=0, disc_start=0)
    )
    module, pixels = vae.load(CPU, torch.float32), pictures(1)
    assert not any(name.startswith("lpips") for name in trainable(module))
    draws, ids = Draws(0, 0), ("a.png",)
    loss = vae.loss(module, Batch(pixels, {}, torch.ones(1), ids), draws)
    loss.sum().backward()
    plain = Autoencoder(part, replace(vae.objective, disc_start=None))
    posterior = module.vae.encode(pixels).latent_dist
    latents = posterior.mean + posterior.std * draws.normal("posterior", ids, posterior.mean.shape[1:])
    wanted = 2 * module.lpips(module.vae.decode(latents).sample, pixels)
    bare = plain.load(CPU, torch.float32)
    torch.testing.assert_close(plain.loss(bare, Batch(pixels, {}, torch.ones(1), ids), draws), wanted)
    assert module.vae.decoder.conv_in.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in module.lpips.parameters())


def test_an_autocast_to_bf16_does_not_round_it(package: Path) -> None:
    net, pixels = load_lpips(weights_file(), CPU), pictures(4)
    found = []
    for enabled in (False, True):
        leaf = pixels[:2].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            distance = net(leaf, pixels[2:])
        distance.sum().backward()
        found.append((distance, leaf.grad))
    for plain, inside in zip(*found, strict=True):
        assert plain is not None and inside is not None
        assert torch.equal(plain, inside)


def test_without_a_weight_it_is_neither_needed_nor_loaded(
    tiny_sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find: Callable[[str], None] = lambda name: None  # noqa: E731
    monkeypatch.setattr(lpips, "find_spec", find)
    aim = VaeObjective(perceptual=0, perceptual_net="lpips")
    vae = Autoencoder(vae_part(tiny_sd_folder / "vae", allow_pickle=False), aim)
    module = vae.load(CPU, torch.float32)
    assert module.lpips is None
    batch = Batch(pictures(1, 16), {}, torch.ones(1), ("a.png",))
    assert vae.loss(module, batch, Draws(0, 0)).isfinite().all()


def test_what_it_cannot_see_is_refused_in_one_line(package: Path, tiny_sd_folder: Path) -> None:
    vae = Autoencoder(
        vae_part(tiny_sd_folder / "vae", allow_pickle=False), VaeObjective(perceptual_net="lpips")
    )
    batch = Batch(pictures(1, 16), {}, torch.ones(1), ("a.png",))
    with pytest.raises(SdlabError, match="LPIPS cannot see pictures of 16x16, only from 24 pixels on"):
        vae.loss(vae.load(CPU, torch.float32), batch, Draws(0, 0))
    batch = Batch(pictures(1, 24), {}, torch.ones(1), ("a.png",))
    assert vae.loss(vae.load(CPU, torch.float32), batch, Draws(0, 0)).isfinite().all()


def test_without_the_package_it_is_refused_before_anything_is_loaded(
    tiny_sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = vae_part(tiny_sd_folder / "vae", allow_pickle=False)
    find: Callable[[str], None] = lambda name: None  # noqa: E731
    monkeypatch.setattr(lpips, "find_spec", find)
    with pytest.raises(SdlabError, match=r'stlpips-pytorch, which .*pip install "sdlab\[lpips\]"'):
        Autoencoder(part, VaeObjective(perceptual_net="lpips"))
    with pytest.raises(SdlabError, match=r"'lpip' is none that we know\. Use structure or lpips"):
        Autoencoder(part, VaeObjective(perceptual_net="lpip"))


def test_a_file_without_its_tensors_is_named(package: Path, tmp_path: Path) -> None:
    path = file_of(tmp_path / "other.pth", Lpips(), but="net.slice3.14.bias")
    with pytest.raises(SdlabError, match=r"other.pth: holds no tensor net.slice3.14.bias of 8 numbers"):
        load_lpips(path, CPU)
