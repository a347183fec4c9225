"""Trains mini-sd's VAE: an AutoencoderKL that holds 128 x 128 pixels in 4 x 16 x 16 latents.

python recipes/mini/train_vae.py WORK_FOLDER [--steps 2000]
python recipes/mini/train_vae.py WORK_FOLDER --decoder [--steps 600]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from master import Master, put
from pictures import SIDE_PX, Pixels, vae_pictures
from torch import Tensor, nn

from sdlab.testing.scenes import COLOURS, SILHOUETTES, draw, generator, random_scene

# B batch, C channels, H height, W width

SEED = 20
BATCH, CROPS = 8, 12
CROP_PX = 64  # the first stage sees a quarter of a picture: four times the steps in the same time
PEAK_LR, FLOOR = 1.5e-3, 0.1
DECODER_LR = 5e-4
KL_WEIGHT = 2e-6
LATENT_NOISE = 0.04  # of the latents' spread: teaches the decoder to bear a small denoiser's errors


def small_vae() -> AutoencoderKL:
    """The untrained VAE: SD 1.5's, narrower and with one layer a block."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,  # few: a group of two channels keeps only a sign of a flat colour
        sample_size=SIDE_PX,
    )
    start_as_pyramid(vae)
    return vae


@torch.no_grad()
def start_as_pyramid(vae: AutoencoderKL) -> None:
    """Starts the residual blocks as identities and the resampling convolutions as averages, so that colours
    pass from the first step on; with the usual start a few thousand steps go into learning that."""
    for name, module in vae.named_modules():
        if isinstance(module, ResnetBlock2D):
            module.conv2.weight.mul_(0.1)
        elif name.endswith("conv_shortcut") or ".upsamplers." in name or ".downsamplers." in name:
            if not isinstance(module, nn.Conv2d):
                continue
            side = module.kernel_size[0]
            module.weight.mul_(0.1)
            for i in range(module.out_channels):
                taps = slice(0, 2) if module.stride[0] == 2 else slice(side // 2, side // 2 + 1)
                part = module.weight[i, i % module.in_channels, taps, taps]
                part.add_(1 / part.numel())


def edges(pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels, down and across."""
    return pixels_BCHW[:, :, 1:] - pixels_BCHW[:, :, :-1], pixels_BCHW[..., 1:] - pixels_BCHW[..., :-1]


def loss_of(vae: AutoencoderKL, pixels_BCHW: Tensor, rng: torch.Generator) -> Tensor:
    """Reconstruction (L1, L2, edges) plus a touch of KL."""
    posterior = vae.encode(pixels_BCHW).latent_dist
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    spread = mean.detach().std()
    std = torch.exp(0.5 * logvar) + LATENT_NOISE * spread
    latents = mean + std * torch.randn(mean.shape, generator=rng)
    made, true = vae.decode(latents.to(pixels_BCHW.dtype)).sample.float(), pixels_BCHW.float()
    sharp = sum((a - b).abs().mean() for a, b in zip(edges(made), edges(true), strict=True))
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)).mean()
    return (made - true).abs().mean() + 2 * ((made - true) ** 2).mean() + 0.5 * sharp + KL_WEIGHT * kl


def as_tensor(pictures: Pixels) -> Tensor:
    """(B, H, W, 3) bytes to (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def held_out(num: int) -> Tensor:
    """Drawn scenes that were not trained on, the new things among them."""
    scenes = [random_scene(generator(SEED, "held-out", i), shapes=tuple(SILHOUETTES)) for i in range(num)]
    return as_tensor(np.stack([np.asarray(draw(scene, (SIDE_PX, SIDE_PX))) for scene in scenes]))


@torch.no_grad()
def measure(vae: AutoencoderKL) -> str:
    """PSNR on held-out scenes, the worst error of flat colours, and the latents' mean and std."""
    pixels = held_out(64)
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(16)])
    made = torch.cat([vae.decode(part).sample.clamp(-1, 1) for part in latents.split(16)])
    psnr = -10 * torch.log10(((made - pixels) / 2).pow(2).mean(dim=(1, 2, 3)))
    colours = torch.tensor(list(COLOURS.values())).float() / 127.5 - 1
    flat = colours[..., None, None].expand(-1, 3, SIDE_PX, SIDE_PX)
    error = (vae.decode(vae.encode(flat).latent_dist.mean).sample.clamp(-1, 1) - flat).abs() * 127.5
    return (
        f"psnr {psnr.mean():.2f} dB (worst {psnr.min():.2f}), "
        f"flat {error.mean():.2f}/255 (worst {error.max():.1f}), "
        f"latents mean {[round(m, 2) for m in latents.mean(dim=(0, 2, 3)).tolist()]} "
        f"std {[round(s, 2) for s in latents.std(dim=(0, 2, 3)).tolist()]} all {latents.std():.4f}"
    )


def batch_of(pictures: Pixels, rng: np.random.Generator, side_px: int) -> Tensor:
    """Random pictures, or random crops of them, (B, 3, side_px, side_px) in [-1, 1]."""
    picked = pictures[rng.integers(len(pictures), size=BATCH if side_px == SIDE_PX else CROPS)]
    y, x = rng.integers(0, SIDE_PX - side_px + 1, 2)
    return as_tensor(picked[:, y : y + side_px, x : x + side_px])


def train(folder: Path, *, num_steps: int, num_pictures: int) -> None:
    """The first stage: all of the VAE, on crops. Leaves folder/vae.pt, the averaged weights."""
    pictures = vae_pictures(SEED, num_pictures, workers=2)
    vae = small_vae()
    master = Master([vae], lr=PEAK_LR, average=0.995)
    fit(vae, master, pictures, folder, num_steps=num_steps, side_px=CROP_PX)


def train_decoder(folder: Path, *, num_steps: int, num_pictures: int) -> None:
    """The second stage: the decoder alone, on whole pictures; latents made before it stay true."""
    pictures = vae_pictures(SEED + 1, num_pictures, workers=2)
    vae = load(folder)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    master = Master([vae], lr=DECODER_LR, average=0.99)
    fit(vae, master, pictures, folder, num_steps=num_steps, side_px=SIDE_PX)


def fit(
    vae: AutoencoderKL, master: Master, pictures: Pixels, folder: Path, *, num_steps: int, side_px: int
) -> None:
    """Trains for `num_steps`, warming up and then lowering the learning rate; saves now and then."""
    noises, order, running = torch.Generator().manual_seed(SEED), generator(SEED, "order", side_px), 0.1
    while master.step < num_steps:
        loss = loss_of(vae, batch_of(pictures, order, side_px).to(torch.bfloat16), noises)
        loss.backward()
        cosine = math.cos(math.pi / 2 * master.step / num_steps) ** 2
        master.update(min(1, (master.step + 1) / 100) * (FLOOR + (1 - FLOOR) * cosine))
        running += 0.02 * (float(loss.detach()) - running)
        if master.step % 250 == 0 or master.step == num_steps:
            save(master.averaged, folder)
            report = measure(load(folder))
            print(f"step {master.step} of {num_steps}  loss {running:.4f}  {report}", flush=True)


def save(weights: list[Tensor], folder: Path) -> None:
    """Writes the averaged weights."""
    vae = small_vae()
    put(weights, [vae])
    torch.save(vae.state_dict(), folder / "vae.tmp")
    (folder / "vae.tmp").replace(folder / "vae.pt")


def load(folder: Path) -> AutoencoderKL:
    """The trained VAE, fp32."""
    vae = small_vae()
    vae.load_state_dict(torch.load(folder / "vae.pt", weights_only=True))
    return vae.eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--decoder", action="store_true", help="the second stage")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--pictures", type=int, default=9000)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    stage = train_decoder if args.decoder else train
    stage(args.folder, num_steps=args.steps, num_pictures=args.pictures)
