"""How well does a VAE keep pictures? PSNR on held-out drawn scenes, and what it makes of flat colours.

python -m recipes.mini.vae_score PIPELINE_FOLDER      exits with 1 below the bar
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from recipes.mini.figures import Figure, failed
from torch import Tensor

from sdlab.models.vae_loss import psnr
from sdlab.testing.scenes import COLOURS, SILHOUETTES, draw, generator, random_scene

# B pictures, 3 colours, H height, W width

SEED, NUM, SIDE_PX, BATCH = 20, 64, 128, 16
BAR_DB = 30.0
Vae = AutoencoderKL | AutoencoderKLFlux2


def held_out(num: int = NUM) -> Tensor:
    """Drawn scenes that no VAE was trained on, the new things among them, (B, 3, H, W) in [-1, 1]."""
    scenes = [random_scene(generator(SEED, "held-out", i), shapes=tuple(SILHOUETTES)) for i in range(num)]
    pixels = np.stack([np.asarray(draw(scene, (SIDE_PX, SIDE_PX))) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.inference_mode()
def reconstructed(vae: Vae, pixels_B3HW: Tensor) -> Tensor:
    """What comes back through the posterior's mean, (B, 3, H, W) in [-1, 1]."""
    parts = pixels_B3HW.split(BATCH)
    return torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in parts])


def load(folder: Path) -> Vae:
    """The VAE of a pipeline, fp32."""
    kind = AutoencoderKLFlux2 if "Flux2" in (folder / "vae" / "config.json").read_text() else AutoencoderKL
    vae: Vae = kind.from_pretrained(folder / "vae", dtype=torch.float32)
    return vae.eval()


def measure(folder: Path, *, device: str = "cpu") -> list[Figure]:
    """PSNR of the held-out scenes, mean and worst, and the mean error of flat colours in 1/255."""
    vae = load(folder).to(device)
    pixels_B3HW = held_out().to(device)
    each_B = psnr(reconstructed(vae, pixels_B3HW), pixels_B3HW)
    colours = torch.tensor(list(COLOURS.values()), device=device) / 127.5 - 1
    flat = colours[..., None, None].expand(-1, 3, SIDE_PX, SIDE_PX)
    error = (reconstructed(vae, flat) - flat).abs().mean() * 127.5
    return [
        Figure("VAE, held-out scenes", float(each_B.mean()), at_least=BAR_DB, unit="dB"),
        Figure("VAE, the worst of them", float(each_B.min()), unit="dB"),
        Figure("VAE, flat colours off by", float(error), unit="of 255"),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pipeline", type=Path)
    figures = measure(parser.parse_args().pipeline)
    print(*figures, sep="\n")
    sys.exit(bool(failed(figures)))
