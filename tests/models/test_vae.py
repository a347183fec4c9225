"""Autoencoders as something to train: what is learned, what stays, what is measured and what is saved."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from safetensors import safe_open
from torch import Tensor, nn

from sdlab.errors import SdlabError
from sdlab.keyed import Draws, keyed
from sdlab.models import flow, vae_loss
from sdlab.models.base import Batch
from sdlab.models.files import Stored
from sdlab.models.flux2_folder import vae_part as flux2_vae_part
from sdlab.models.folder import vae_part
from sdlab.models.parts import Part, load
from sdlab.models.vae import Autoencoder, Statistics, TrainedVae, VaeObjective
from sdlab.training.checkpoint import trainable
from sdlab.training.optim import make_optimizer
from tests.factories import tiny_flux2_vae

CPU, F32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
CLASSES = {"AutoencoderKL": AutoencoderKL, "AutoencoderKLFlux2": AutoencoderKLFlux2}


@pytest.fixture(scope="module")
def sd_part(tmp_path_factory: pytest.TempPathFactory) -> Part:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    vae.save_pretrained(folder := tmp_path_factory.mktemp("sd") / "vae")
    return read_part(folder, "AutoencoderKL")


@pytest.fixture(scope="module")
def flux2_part(tmp_path_factory: pytest.TempPathFactory) -> Part:
    torch.manual_seed(0)
    tiny_flux2_vae().save_pretrained(folder := tmp_path_factory.mktemp("flux2") / "vae")
    return read_part(folder, "AutoencoderKLFlux2")


@pytest.fixture(params=["sd_part", "flux2_part"])
def part(request: pytest.FixtureRequest) -> Part:
    found: Part = request.getfixturevalue(request.param)
    return found


def read_part(folder: Path, class_name: str) -> Part:
    read = flux2_vae_part if class_name == "AutoencoderKLFlux2" else vae_part
    return read(folder, allow_pickle=False)


def stored_in(part: Part, dtype: torch.dtype) -> Part:
    """The part as a file of another type would give it."""
    weights = {}
    for name, stored in part.weights.items():
        tensor = stored.read()
        cast = tensor.to(dtype) if tensor.is_floating_point() else tensor
        weights[name] = Stored.of(stored.name, cast, stored.path)
    return replace(part, weights=weights)


def pictures(num: int = 2, side_px: int = 32) -> Tensor:
    """Random pictures of large squares, in [-1, 1]."""
    squares = torch.rand(num, 3, 4, 4, generator=keyed("pictures", num)) * 2 - 1
    return squares.repeat_interleave(side_px // 4, dim=2).repeat_interleave(side_px // 4, dim=3)


def batch_of(pixels_B3HW: Tensor, first: int = 0) -> Batch:
    ids = tuple(f"p{first + i}.png" for i in range(len(pixels_B3HW)))
    return Batch(pixels_B3HW, {}, torch.ones(len(ids)), ids)


def steps(vae: Autoencoder, module: nn.Module, num: int, *, lr: float = 1e-3, first: int = 0) -> list[float]:
    """Train; the losses."""
    updater = make_optimizer(
        trainable(module), kind="adamw", lr=lr, weight_decay=0.01, max_grad_norm=1.0, seed=0, fused_backward=False
    )  # fmt: skip
    module.train()
    losses = []
    for step in range(first, first + num):
        updater.begin(step, lr)
        loss = vae.loss(module, batch_of(pictures()), Draws(0, step)).mean()
        loss.backward()
        losses.append(float(loss.detach()))
        updater.end(losses[-1])
    module.eval()
    return losses


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def latents_of(module: Any, pixels_B3HW: Tensor) -> Tensor:
    with torch.no_grad():
        mode: Tensor = module.encode(pixels_B3HW).latent_dist.mode()
    return mode


def test_the_loss_is_the_sum_of_its_terms(part: Part) -> None:
    aim = VaeObjective(l1=0.7, l2=0.3, perceptual=0.2, kl_weight=0.01, latent_noise=0.1)
    vae, pixels, draws = Autoencoder(part, aim), pictures(), Draws(5, 7)
    module = vae.load(CPU, F32)
    found = vae.loss(module, batch_of(pixels), draws)
    posterior = module.vae.encode(pixels).latent_dist
    mean, ids = posterior.mean, batch_of(pixels).ids
    spread = torch.stack([row.std(correction=0) for row in mean]).reshape(-1, 1, 1, 1)
    latents = mean + posterior.std * draws.normal("posterior", ids, mean.shape[1:])
    latents = latents + 0.1 * spread * draws.normal("latent-noise", ids, mean.shape[1:])
    made = module.vae.decode(latents).sample
    wanted = (
        0.7 * (made - pixels).abs().mean(dim=(1, 2, 3))
        + 0.3 * (made - pixels).square().mean(dim=(1, 2, 3))
        + 0.2 * vae_loss.structure(made, pixels)
        + 0.01 * posterior.kl() / (3 * 32 * 32)
    )
    assert found.shape == (2,) and found.dtype == F32
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("decoder_only", [False, True])
def test_a_samples_loss_does_not_know_its_batch(part: Part, decoder_only: bool) -> None:
    vae = Autoencoder(part, VaeObjective(disc_start=0, latent_noise=0.1, decoder_only=decoder_only))
    module, pixels = vae.load(CPU, F32), pictures(4)
    together = vae.loss(module, batch_of(pixels), Draws(0, 3))
    alone = [vae.loss(module, batch_of(pixels[i : i + 1], i), Draws(0, 3)) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("disc_start", [None, 0])
def test_training_makes_reconstructions_better(sd_part: Part, disc_start: int | None) -> None:
    vae = Autoencoder(sd_part, VaeObjective(disc_start=disc_start))
    module = vae.load(CPU, F32)
    before = vae_loss.psnr(vae.reconstruct(module, pictures()), pictures()).mean()
    steps(vae, module, 8, lr=3e-3)
    after = vae_loss.psnr(vae.reconstruct(module, pictures()), pictures()).mean()
    assert after > before + 1, (before, after)


def test_two_runs_of_one_seed_have_the_same_bits_and_another_seed_others(part: Part) -> None:
    ends = []
    for seed in (1, 1, 2):
        vae = Autoencoder(part, VaeObjective(disc_start=1), seed=seed)
        module = vae.load(CPU, F32)
        steps(vae, module, 2)
        ends.append(weights_of(module))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not all(torch.equal(ends[0][name], ends[2][name]) for name in ends[0])


def test_the_two_sides_share_a_backward_and_no_gradient(part: Part) -> None:
    """Each side's gradient is the same whether or not the other side is there to be trained."""
    pixels = pictures()
    aims = {"both": 0.5, "no term for the autoencoder": 0.0}
    grads = {}
    for name, disc_weight in aims.items():
        vae = Autoencoder(part, VaeObjective(disc_start=0, disc_weight=disc_weight))
        module = vae.load(CPU, F32)
        vae.loss(module, batch_of(pixels), Draws(0, 0)).sum().backward()
        grads[name] = {n: p.grad for n, p in module.named_parameters()}
    both, without = grads.values()
    for name in both:
        assert both[name] is not None and without[name] is not None
        same = torch.equal(both[name], without[name])
        assert same or not name.startswith("disc."), name
    assert not torch.equal(both["vae.decoder.conv_out.weight"], without["vae.decoder.conv_out.weight"])
    plain = Autoencoder(part, VaeObjective())
    module = plain.load(CPU, F32)
    plain.loss(module, batch_of(pixels), Draws(0, 0)).sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, without[name], msg=lambda said, n=name: f"{n}: {said}")


def test_the_loss_that_is_logged_is_the_autoencoders_alone(part: Part) -> None:
    """What the discriminator learns from is in the gradient, and not in the number."""
    aim, pixels = VaeObjective(disc_start=1, disc_weight=0), batch_of(pictures())
    vae, plain = Autoencoder(part, aim), Autoencoder(part, replace(aim, disc_start=None))
    module = vae.load(CPU, F32)
    loss = vae.loss(module, pixels, Draws(0, 1))
    assert torch.equal(loss, plain.loss(plain.load(CPU, F32), pixels, Draws(0, 1)))
    loss.sum().backward()
    assert module.disc is not None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.disc.parameters() if p.ndim > 1)


def test_the_discriminator_stays_as_it_is_until_its_step(part: Part) -> None:
    vae = Autoencoder(part, VaeObjective(disc_start=2))
    module = vae.load(CPU, F32)
    start = weights_of(module)
    steps(vae, module, 2)
    before = weights_of(module)
    assert all(torch.equal(start[n], before[n]) for n in start if n.startswith("disc."))
    steps(vae, module, 1, first=2)
    after = weights_of(module)
    moved = [n for n, p in module.named_parameters() if not torch.equal(before[n], after[n])]
    weights = [n for n, p in module.named_parameters() if n.startswith("disc.") and p.ndim > 1]
    assert weights and set(weights) <= set(moved)


@pytest.mark.parametrize("dtype", [torch.float16, F32])
def test_decoder_only_leaves_encode_bit_identical(part: Part, dtype: torch.dtype, tmp_path: Path) -> None:
    part, pixels = stored_in(part, dtype), pictures()
    vae = Autoencoder(part, VaeObjective(decoder_only=True, disc_start=1, latent_noise=0.05))
    module, kind = vae.load(CPU, F32), CLASSES[part.class_name]
    before = latents_of(load(part, CPU, F32), pixels)
    made_before = vae.reconstruct(module, pixels)
    steps(vae, module, 2)
    assert torch.equal(latents_of(module.vae, pixels), before)
    assert not torch.equal(vae.reconstruct(module, pixels), made_before)
    vae.save(module, tmp_path / "vae", None)
    again = read_part(tmp_path / "vae", part.class_name)
    for name, stored in part.weights.items():
        if name.startswith(("encoder.", "quant_conv.", "bn.")) and "num_batches" not in name:
            assert b"".join(stored.pieces()) == b"".join(again.weights[name].pieces()), name
            assert again.weights[name].dtype == stored.dtype
    assert torch.equal(latents_of(load(again, CPU, F32), pixels), before)
    theirs = kind.from_pretrained(tmp_path / "vae", torch_dtype=F32).eval()
    assert torch.equal(latents_of(theirs, pixels), before)
    with torch.no_grad():
        assert torch.equal(theirs.decode(before).sample, module.vae.decode(before).sample)
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    assert config.get("scaling_factor") == part.config.get("scaling_factor")


def test_decoder_only_decodes_the_mean_and_trains_nothing_else(part: Part) -> None:
    vae, pixels = Autoencoder(part, VaeObjective(decoder_only=True)), pictures()
    module = vae.load(CPU, F32)
    names = set(trainable(module))
    assert names and all(n.startswith(("vae.decoder.", "vae.post_quant_conv.")) for n in names)
    made = module.vae.decode(latents_of(module.vae, pixels)).sample
    wanted = vae_loss.l1(made, pixels) + 0.5 * vae_loss.structure(made, pixels)
    torch.testing.assert_close(vae.loss(module, batch_of(pixels), Draws(0, 0)), wanted)
    with torch.autocast("cpu", BF16):  # the frozen encoder is not rounded: the decoder would learn the error
        mean, _ = module._posterior(pixels)
    assert torch.equal(mean, latents_of(module.vae, pixels))


def test_the_measured_factor_gives_latents_a_spread_of_one(sd_part: Part, tmp_path: Path) -> None:
    vae = Autoencoder(sd_part)
    module = vae.load(CPU, F32)
    shown = [pictures(1, side_px)[0] for side_px in (32, 48, 64)]  # of several sizes
    statistics = vae.measure(module, iter(shown))
    assert statistics.num_pictures == 3
    vae.save(module, tmp_path / "vae", statistics)
    theirs: Any = AutoencoderKL.from_pretrained(tmp_path / "vae").eval()
    latents = torch.cat([latents_of(theirs, p[None]).flatten() for p in shown]).double()
    assert float((latents * theirs.config.scaling_factor).std(correction=0)) == pytest.approx(1, abs=1e-9)
    assert statistics.mean[0] == pytest.approx(float(latents.mean()), abs=1e-9)


def test_the_statistics_of_flux2_are_those_of_its_batch_norm(flux2_part: Part, tmp_path: Path) -> None:
    vae = Autoencoder(flux2_part)
    module, shown = vae.load(CPU, F32), pictures(5)
    statistics = vae.measure(module, shown)
    vae.save(module, tmp_path / "vae", statistics)
    theirs: Any = AutoencoderKLFlux2.from_pretrained(tmp_path / "vae")
    theirs.bn.momentum = 1.0  # all of it is of this one batch
    measured = {name: tensor.clone() for name, tensor in theirs.bn.state_dict().items()}
    theirs.bn.train()(flow.patchify(latents_of(theirs, shown)))
    torch.testing.assert_close(measured["running_mean"], theirs.bn.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(measured["running_var"], theirs.bn.running_var, rtol=1e-5, atol=1e-6)


def test_statistics_are_exact_however_far_from_zero(sd_part: Part) -> None:
    """Sums of squares would lose everything here; measured by 1 picture and by 40 it is the same formula."""
    vae = Autoencoder(sd_part)
    module = vae.load(CPU, F32)
    with torch.no_grad():
        module.vae.quant_conv.bias[:4] += 3e4
    for num in (1, 40):
        shown = pictures(num)
        latents = torch.cat([latents_of(module.vae, p[None]) for p in shown]).double()
        found = vae.measure(module, shown)
        assert found.variance[0] == pytest.approx(float(latents.var(correction=0)), rel=1e-12)


def test_latents_that_do_not_vary_are_refused_in_one_line(part: Part) -> None:
    vae = Autoencoder(part)
    module = vae.load(CPU, F32)
    with pytest.raises(SdlabError, match="the latents of 0 pictures do not vary"):
        vae.measure(module, [])
    with torch.no_grad():
        module.vae.quant_conv.weight.zero_()
        module.vae.quant_conv.bias.zero_()
    with pytest.raises(SdlabError, match="the latents of 1 picture do not vary") as caught:
        vae.measure(module, pictures(1))
    assert "\n" not in str(caught.value)


def test_latents_of_a_training_that_went_wrong_are_called_so(part: Part) -> None:
    vae = Autoencoder(part)
    module = vae.load(CPU, F32)
    with torch.no_grad():
        module.vae.quant_conv.bias.fill_(torch.nan)
    with pytest.raises(SdlabError, match="latents are not finite: the training went wrong"):
        vae.measure(module, pictures(2))


def test_one_patch_of_flux2_has_no_variance(flux2_part: Part) -> None:
    vae = Autoencoder(flux2_part)
    with pytest.raises(SdlabError, match="do not vary"):
        vae.measure(vae.load(CPU, F32), pictures(1, 16))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_diffusers_opens_what_is_saved_and_draws_the_same(
    part: Part, dtype: torch.dtype, tmp_path: Path
) -> None:
    vae, pixels = Autoencoder(part, VaeObjective(disc_start=0)), pictures()
    module = vae.load(CPU, F32)
    steps(vae, module, 2)
    module.to(dtype)
    statistics = vae.measure(module, pixels)
    same = vae.measure(copy.deepcopy(module).float(), pixels)
    assert statistics == same  # measured in float32 whatever the weights' type
    vae.save(module, tmp_path / "vae", statistics)
    theirs: Any = CLASSES[part.class_name].from_pretrained(tmp_path / "vae", torch_dtype=dtype).eval()
    with torch.no_grad():
        made = torch.cat([theirs.decode(latents_of(theirs, p[None].to(dtype))).sample for p in pixels])
    assert torch.equal(made.float().clamp(-1, 1), vae.reconstruct(module, pixels))
    with safe_open(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert set(file.keys()) == set(part.weights)
        if part.class_name == "AutoencoderKLFlux2":
            assert file.get_tensor("bn.running_var").tolist() == pytest.approx(statistics.variance)
    saved = json.loads((tmp_path / "vae" / "config.json").read_text())
    assert saved["_class_name"] == part.class_name and "_name_or_path" not in saved


def test_a_shift_factor_is_measured_where_there_is_one(sd_part: Part, tmp_path: Path) -> None:
    vae = Autoencoder(replace(sd_part, config={**sd_part.config, "shift_factor": 0.1}))
    vae.save(vae.load(CPU, F32), tmp_path / "vae", Statistics((0.5,), (4.0,), 9))
    saved = json.loads((tmp_path / "vae" / "config.json").read_text())
    assert (saved["scaling_factor"], saved["shift_factor"]) == (0.5, 0.5)


def test_a_module_of_other_weights_is_not_saved(part: Part, tmp_path: Path) -> None:
    vae = Autoencoder(part)
    module = vae.load(CPU, F32)
    module.vae.quant_conv = None
    with pytest.raises(AssertionError):
        vae.save(module, tmp_path / "vae", None)
    assert not (tmp_path / "vae").exists()


@pytest.mark.parametrize("objective", [{}, {"decoder_only": True}])
def test_checkpointed_gradients_are_the_same(part: Part, objective: dict[str, Any]) -> None:
    vae, grads = Autoencoder(part, VaeObjective(disc_start=0, **objective)), []
    for checkpointed in (False, True):
        module = vae.load(CPU, F32).train()
        if checkpointed:
            module.enable_gradient_checkpointing()
            assert module.vae.decoder.gradient_checkpointing and module.vae.encoder.gradient_checkpointing
        vae.loss(module, batch_of(pictures()), Draws(0, 0)).sum().backward()
        grads.append({name: p.grad for name, p in module.named_parameters() if p.requires_grad})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


@pytest.mark.parametrize("objective", [{}, {"decoder_only": True}])
def test_an_autocast_to_bf16_rounds_the_network_and_not_the_loss(
    part: Part, objective: dict[str, Any]
) -> None:
    vae, losses = Autoencoder(part, VaeObjective(disc_start=0, **objective)), []
    module = vae.load(CPU, F32)
    for enabled in (False, True):
        module.zero_grad()
        with torch.autocast("cpu", BF16, enabled=enabled):
            losses.append(vae.loss(module, batch_of(pictures()), Draws(0, 0)))
        losses[-1].sum().backward()
    assert losses[1].dtype == F32
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters() if p.requires_grad)


def test_the_module_is_only_called_so_that_it_may_be_wrapped(part: Part) -> None:
    """What DDP and the compiler put around a module has no .vae and no .disc."""

    class Wrapped(nn.Module):
        def __init__(self, inner: TrainedVae) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any) -> Tensor:
            loss: Tensor = self.inner(*args)
            return loss

    vae = Autoencoder(part, VaeObjective(disc_start=0, latent_noise=0.1))
    module = vae.load(CPU, F32)
    plain = vae.loss(module, batch_of(pictures()), Draws(0, 0))
    assert torch.equal(vae.loss(Wrapped(module), batch_of(pictures()), Draws(0, 0)), plain)


@pytest.mark.parametrize("side_px", [(16, 48), (32, 16), (16, 16)])
def test_pictures_of_any_size_on_the_grid(part: Part, side_px: tuple[int, int]) -> None:
    vae = Autoencoder(part, VaeObjective(disc_start=0, latent_noise=0.1))
    module, pixels = vae.load(CPU, F32), torch.rand(1, 3, *side_px, generator=keyed("any"))
    assert vae.loss(module, batch_of(pixels), Draws(0, 0)).isfinite().all()
    assert vae.reconstruct(module, pixels).shape == pixels.shape
    assert vae.grid == (16 if part.class_name == "AutoencoderKLFlux2" else 8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: replace(p, class_name="AsymmetricAutoencoderKL"), "class is AsymmetricAutoencoderKL"),
        (lambda p: replace(p, config={**p.config, "in_channels": 4}), "in_channels is 4"),
        (lambda p: replace(p, config={**p.config, "patch_size": [1, 1]}), "patch_size"),
    ],
)
def test_other_autoencoders_are_refused_in_one_line(
    part: Part, change: Callable[[Part], Part], said: str
) -> None:
    with pytest.raises(SdlabError, match=said) as caught:
        Autoencoder(change(part))
    assert "\n" not in str(caught.value)


def test_a_loss_that_compares_nothing_is_refused(part: Part) -> None:
    with pytest.raises(SdlabError, match="nothing compares the pictures"):
        Autoencoder(part, VaeObjective(l1=0, l2=0, perceptual=0))
