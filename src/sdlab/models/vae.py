"""An autoencoder as something that is trained: SD's AutoencoderKL, and FLUX.2's with its batch-norm statistics.

What a denoiser sees are the posterior's means, here as when pictures are drawn: an AutoencoderKL's are multiplied by
its scaling factor, an AutoencoderKLFlux2's are packed and normalised channel by channel. Both are measured after the
training, and neither has a part in it.

Shapes: B batch, C latent channels, H W height and width of pixels or latents.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdlab.errors import SdlabError
from sdlab.keyed import Draws
from sdlab.models import flow, vae_loss
from sdlab.models.discriminator import PatchDiscriminator, balance, hinge, unconvincing
from sdlab.models.export import write_json
from sdlab.models.files import Stored, write_safetensors
from sdlab.models.lpips import LEAST_PX, Lpips, load_lpips, weights_file
from sdlab.models.parts import Part, check_tensors, load

if TYPE_CHECKING:
    from sdlab.models.base import Batch

KINDS = ("AutoencoderKL", "AutoencoderKLFlux2")
PERCEPTUAL_NETS = ("structure", "lpips")
MAX_WIDTH = 64  # of the discriminator; a narrower autoencoder gets one as narrow as itself
FROZEN = ("encoder.", "quant_conv.", "bn.")  # what latents depend on: --decoder-only leaves it as it is


@dataclass(frozen=True)
class VaeObjective:
    """The weights of the terms that are added up, and what is trained.

        l1 * L1 + l2 * L2 + perceptual * P + kl_weight * KL + disc_weight * factor * adversarial

    L1 and L2 are means over pixels. KL is the posterior's from a normal distribution divided by the number of pixel
    values: the loss of Rombach et al. 2022, which sums both, divided by a constant, so that its weight of 1e-6 means
    the same here at every size of picture or crop. P is edges and SSIM (vae_loss.py), or of VGG's features (lpips.py).
    The adversarial term's factor makes its gradient as long as that of L1, L2 and P together (discriminator.py).
    """

    l1: float = 1.0
    l2: float = 0.0
    perceptual: float = 0.5
    perceptual_net: str = "structure"  # or "lpips"
    kl_weight: float = 1e-6
    disc_start: int | None = None  # optimizer steps before there is a discriminator; None: never
    disc_weight: float = 0.5
    latent_noise: float = 0.0  # normal noise on the latents, a share of their spread: a denoiser errs as well
    decoder_only: bool = False  # encoder, quant_conv and statistics stay: latents made before stay true

    @property
    def needs_lpips(self) -> bool:
        """Has LPIPS a part in the loss? Without a weight it is neither needed nor loaded."""
        return self.perceptual_net == "lpips" and self.perceptual > 0


@dataclass(frozen=True)
class Statistics:
    """Of latents as the posterior's means: one number for all channels, or of FLUX.2 one a packed channel."""

    mean: tuple[float, ...]
    variance: tuple[float, ...]
    num_pictures: int

    @property
    def scaling_factor(self) -> float:
        """What an AutoencoderKL's latents are multiplied by to have a standard deviation of 1."""
        assert len(self.variance) == 1, "FLUX.2 has statistics of each channel"
        return 1 / math.sqrt(self.variance[0])


class TrainedVae(nn.Module):
    """An autoencoder and what judges it: a discriminator and LPIPS, where wanted. Forward gives each sample's loss."""

    def __init__(
        self, vae: Any, disc: PatchDiscriminator | None, lpips: Lpips | None, objective: VaeObjective
    ) -> None:
        super().__init__()
        self.vae, self.disc, self.lpips, self.objective = vae, disc, lpips, objective

    def enable_gradient_checkpointing(self) -> None:
        """Trade time for memory: the autoencoder's blocks are computed again in the backward pass."""
        self.vae.enable_gradient_checkpointing()

    def forward(
        self,
        pixels_B3HW: Tensor,
        posterior_BCHW: Tensor | None,
        noise_BCHW: Tensor | None,
        adversarial: bool,
    ) -> Tensor:
        """(B,) float32, of pictures in [-1, 1] and standard normal draws; None for those that are not wanted.

        Without `adversarial` the discriminator is not touched, and its parameters get no gradient at all.
        """
        aim, true_B3HW = self.objective, pixels_B3HW.float()
        mean_BCHW, logvar_BCHW = self._posterior(pixels_B3HW)
        latents_BCHW = mean_BCHW
        if posterior_BCHW is not None:
            latents_BCHW = latents_BCHW + torch.exp(0.5 * logvar_BCHW) * posterior_BCHW
        if noise_BCHW is not None:
            spread_B = mean_BCHW.detach().flatten(1).std(dim=1, correction=0)
            latents_BCHW = latents_BCHW + aim.latent_noise * spread_B.reshape(-1, 1, 1, 1) * noise_BCHW
        made_B3HW = decoded(self.vae, latents_BCHW).float()
        loss_B = self._reconstruction(made_B3HW, true_B3HW)
        if not aim.decoder_only:
            loss_B = loss_B + aim.kl_weight * vae_loss.kl(mean_BCHW, logvar_BCHW) / true_B3HW[0].numel()
        if adversarial:
            assert self.disc is not None
            factor_B = self._factor(made_B3HW.detach(), true_B3HW)
            loss_B = loss_B + aim.disc_weight * factor_B * unconvincing(self.disc, made_B3HW)
            hinge_B = hinge(self.disc, made_B3HW, true_B3HW)
            loss_B = loss_B + (
                hinge_B - hinge_B.detach()
            )  # its gradient alone: the curve is the autoencoder's
        return loss_B

    def _posterior(self, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, float32. Of a frozen encoder without rounding: an error of bf16 would be learned."""
        if not self.objective.decoder_only:
            return posterior(self.vae, pixels_B3HW)
        with torch.no_grad(), vae_loss.unrounded(pixels_B3HW):
            return posterior(self.vae, pixels_B3HW)

    def _reconstruction(self, made_B3HW: Tensor, true_B3HW: Tensor) -> Tensor:
        aim = self.objective
        perceptual = self.lpips or vae_loss.structure
        terms = ((aim.l1, vae_loss.l1), (aim.l2, vae_loss.l2), (aim.perceptual, perceptual))
        wanted = [weight * term(made_B3HW, true_B3HW) for weight, term in terms if weight]
        return torch.stack(wanted).sum(dim=0)

    @torch.compiler.disable  # type: ignore[untyped-decorator] # it cannot trace a gradient within a forward pass
    def _factor(self, made_B3HW: Tensor, true_B3HW: Tensor) -> Tensor:
        assert self.disc is not None
        with torch.enable_grad():
            leaf_B3HW = made_B3HW.clone().requires_grad_()
            reconstruction_B = self._reconstruction(leaf_B3HW, true_B3HW)
            return balance(reconstruction_B, unconvincing(self.disc, leaf_B3HW), leaf_B3HW)


class Autoencoder:
    """An autoencoder of a model, or of no model yet. Holds paths and numbers, no weights."""

    def __init__(self, part: Part, objective: VaeObjective | None = None, *, seed: int = 0) -> None:
        """Check the part's tensors against its configuration; SdlabError before a weight is read.

        `seed` draws the discriminator's start.
        """
        self.part, self.objective, self.seed = part, objective or VaeObjective(), seed
        _check(part, self.objective)
        check_tensors(part)
        halvings = len(part.config["block_out_channels"]) - 1
        self.grid = int(2 ** (halvings + self.is_flux2))  # pixels of one latent; of FLUX.2 of a patch of 2x2

    @property
    def is_flux2(self) -> bool:
        """Are latents packed and normalised by batch-norm statistics?"""
        return self.part.class_name == "AutoencoderKLFlux2"

    def load(self, device: torch.device, dtype: torch.dtype) -> TrainedVae:
        """The module in eval mode; what --decoder-only freezes is in float32 and takes no gradient."""
        aim = self.objective
        vae: Any = load(self.part, device, torch.float32 if aim.decoder_only else dtype)
        disc = None
        if aim.disc_start is not None:
            width = max(8, min(MAX_WIDTH, self.part.config["block_out_channels"][0]) // 8 * 8)
            disc = PatchDiscriminator(width, seed=self.seed).to(device, dtype)
        for name, parameter in vae.named_parameters():
            if aim.decoder_only and name.startswith(FROZEN):
                parameter.requires_grad_(False)
            else:
                parameter.data = parameter.data.to(dtype)
        lpips = load_lpips(weights_file(), device) if aim.needs_lpips else None
        return TrainedVae(vae, disc, lpips, aim).eval()

    def loss(self, module: nn.Module, batch: Batch, rng: Draws) -> Tensor:
        """Loss of each sample, (B,) float32, as VaeObjective says; `batch.latents_BCHW` are pixels in [-1, 1].

        Draws ``posterior`` per sample unless the encoder is frozen (then the posterior's mean is decoded), and
        ``latent-noise`` where the objective has some. From step `disc_start` on (from 0) the discriminator is trained
        as well: the gradient of its own loss comes with this one's, whose value does not count it. Before, its
        parameters get no gradient, and stay as they are.
        Raises SdlabError for pictures that are too small for LPIPS.
        """
        aim, pixels_B3HW = self.objective, batch.latents_BCHW
        if aim.needs_lpips and min(pixels_B3HW.shape[-2:]) < LEAST_PX:
            height, width = pixels_B3HW.shape[-2:]
            what = f"LPIPS cannot see pictures of {width}x{height}, only from {LEAST_PX} pixels on"
            raise SdlabError(
                what, next_step="Use a larger --crop or --image-size, or --perceptual-net structure"
            )
        channels = int(self.part.config.get("latent_channels", 32 if self.is_flux2 else 4))
        side = self.grid // 2 if self.is_flux2 else self.grid
        shape = (channels, *(n // side for n in pixels_B3HW.shape[-2:]))
        device = pixels_B3HW.device
        drawn = None if aim.decoder_only else rng.normal("posterior", batch.ids, shape).to(device)
        noise = rng.normal("latent-noise", batch.ids, shape).to(device) if aim.latent_noise else None
        adversarial = aim.disc_start is not None and rng.step >= aim.disc_start
        loss_B: Tensor = module(pixels_B3HW, drawn, noise, adversarial)
        return loss_B

    @torch.no_grad()
    def reconstruct(self, module: TrainedVae, pixels_B3HW: Tensor) -> Tensor:
        """What pictures look like after the posterior's mean is decoded: float32 in [-1, 1], one at a time."""
        rows = []
        with vae_loss.unrounded(pixels_B3HW):
            for pixels_13HW in torch.split(pixels_B3HW, 1):
                mean_1CHW, _ = posterior(module.vae, pixels_13HW)
                rows.append(decoded(module.vae, mean_1CHW).float().clamp(-1, 1))
        return torch.cat(rows)

    @torch.no_grad()
    def measure(self, module: TrainedVae, pictures: Iterable[Tensor]) -> Statistics:
        """Mean and variance of the latents of pictures (3, H, W) in [-1, 1], of any sizes, read once.

        Of an AutoencoderKL the variance about one mean for all channels, divided by the number of latents (Rombach et
        al. 2022, appendix G); of FLUX.2 each packed channel's, divided by one less, as its batch norm takes them.
        Float32 latents, float64 sums. Raises SdlabError where there is no picture, or the latents do not vary.
        """
        vae, moments = _in_float32(module.vae), Moments()
        device = next(vae.parameters()).device
        for pixels_3HW in pictures:
            with vae_loss.unrounded(pixels_3HW):
                latents_1CHW, _ = posterior(vae, pixels_3HW[None].to(device))
            packed_1CHW = flow.patchify(latents_1CHW) if self.is_flux2 else latents_1CHW
            moments.add(packed_1CHW[0].flatten(1) if self.is_flux2 else packed_1CHW.reshape(1, -1))
        return self._statistics(moments)

    def _statistics(self, moments: Moments) -> Statistics:
        divisor = moments.num - 1 if self.is_flux2 else moments.num
        variance = (moments.squares / divisor).tolist() if divisor > 0 else [0.0]
        if not all(v < math.inf for v in variance):
            raise SdlabError(
                "latents are not finite: the training went wrong",
                where=str(self.part.where),
                next_step="Train with a lower --lr",
            )
        if not all(variance):
            raise SdlabError(
                f"the latents of {moments.num_pictures} picture{'s' * (moments.num_pictures != 1)} do not vary, so "
                "they have no spread to be divided by",
                where=str(self.part.where),
                next_step="Train on more pictures, or for longer",
            )
        return Statistics(tuple(moments.mean.tolist()), tuple(variance), moments.num_pictures)

    def save(self, module: TrainedVae, folder: Path, statistics: Statistics | None) -> None:
        """Write config.json and diffusion_pytorch_model.safetensors into `folder`, which must be new or empty.

        What was trained is saved in the type it has, what --decoder-only froze with the bytes it was stored with: the
        two may be of different types, and every reader casts them to one. Statistics, of a whole training only, go
        into the configuration or, of FLUX.2, the batch norm's buffers.
        """
        assert statistics is None or not self.objective.decoder_only, "the encoder has not changed"
        config = {k: v for k, v in self.part.config.items() if not k.startswith("_")}
        tensors = {name: Stored.of(name, t, folder) for name, t in module.vae.state_dict().items()}
        assert tensors.keys() == self.part.weights.keys(), "the module is not this autoencoder (wrapped?)"
        kept = FROZEN if self.objective.decoder_only else ("bn.",)
        tensors |= {name: stored for name, stored in self.part.weights.items() if name.startswith(kept)}
        if statistics is not None and self.is_flux2:
            for name, values in (
                ("bn.running_mean", statistics.mean),
                ("bn.running_var", statistics.variance),
            ):
                tensors[name] = Stored.of(name, torch.tensor(values, dtype=torch.float32), folder)
        elif statistics is not None:
            config["scaling_factor"] = statistics.scaling_factor
            if config.get("shift_factor") is not None:
                config["shift_factor"] = statistics.mean[0]
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / "diffusion_pytorch_model.safetensors", tensors)
        write_json(folder / "config.json", {"_class_name": self.part.class_name, **config})


class Moments:
    """Number, mean and sum of squared differences from it of rows of numbers, float64, seen a piece at a time."""

    def __init__(self) -> None:
        self.num, self.num_pictures = 0, 0
        self.mean = self.squares = torch.zeros(1, dtype=torch.float64)

    def add(self, values_CN: Tensor) -> None:
        """One picture's N numbers of each of C rows: Chan, Golub & LeVeque 1983, eq. 2.1, which does not cancel."""
        values_CN = values_CN.double().cpu()
        more, mean = values_CN.shape[1], values_CN.mean(dim=1)
        squares = (values_CN - mean[:, None]).square().sum(dim=1)
        total, off = self.num + more, mean - self.mean
        self.squares = self.squares + squares + off.square() * (self.num * more / total)
        self.mean = self.mean + off * (more / total)
        self.num, self.num_pictures = total, self.num_pictures + 1


def posterior(vae: Any, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance of the latents' distribution, float32; the mean is its mode."""
    dtype = next(vae.encoder.parameters()).dtype
    found = vae.encode(pixels_B3HW.to(dtype)).latent_dist
    return found.mean.float(), found.logvar.float()


def decoded(vae: Any, latents_BCHW: Tensor) -> Tensor:
    """Pixels (B, 3, H, W), about [-1, 1], in the decoder's type."""
    dtype = next(vae.decoder.parameters()).dtype
    pixels_B3HW: Tensor = vae.decode(latents_BCHW.to(dtype)).sample
    return pixels_B3HW


def _in_float32(vae: nn.Module) -> nn.Module:
    """The same weights in float32: statistics must not hold the rounding of one run's type."""
    if all(p.dtype == torch.float32 for p in vae.parameters()):
        return vae
    return copy.deepcopy(vae).float()


def _check(part: Part, aim: VaeObjective) -> None:
    """Raise SdlabError for an autoencoder or an objective that cannot be trained."""
    where = str(part.where)
    if part.class_name not in KINDS:
        what = f"its class is {part.class_name[:60]}, not {KINDS[0]} or {KINDS[1]}"
        raise SdlabError(what, where=where)
    for key in ("in_channels", "out_channels"):
        if part.config.get(key, 3) != 3:
            raise SdlabError(f"{key} is {part.config[key]}; pictures have 3", where=where)
    if list(part.config.get("patch_size", (2, 2))) != [2, 2]:
        raise SdlabError(f"patch_size is {part.config['patch_size']}; FLUX.2 has 2 by 2", where=where)
    if aim.perceptual_net not in PERCEPTUAL_NETS:
        what = f"'{aim.perceptual_net}' is none that we know"
        raise SdlabError(what, where="--perceptual-net", next_step=f"Use {' or '.join(PERCEPTUAL_NETS)}")
    if aim.needs_lpips:
        weights_file()  # is there one?
    if not any((aim.l1, aim.l2, aim.perceptual)):
        raise SdlabError(
            "nothing compares the pictures: all three are 0",
            where="--l1, --l2, --perceptual",
            next_step="Give one of them a weight",
        )
