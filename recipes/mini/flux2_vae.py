"""Makes mini-flux2's VAE: mini-sd's weights in FLUX.2's class, with batch-norm statistics measured on scenes.

python recipes/mini/flux2_vae.py MINI_SD_FOLDER WORK_FOLDER      leaves WORK_FOLDER/flux2_vae
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from torch import Tensor

from sdlab.testing.scenes import draw, generator, random_scene

# B pictures, C latent channels, H height, W width, P packed channels (4 C)

SEED, NUM_PICTURES = 32, 512
CHANNELS = 4


def small_vae() -> AutoencoderKLFlux2:
    """FLUX.2's VAE in mini-sd's size, untrained."""
    return AutoencoderKLFlux2(
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=CHANNELS,
        sample_size=128,
    )


def patchified(latents_BCHW: Tensor) -> Tensor:
    """Squares of 2 x 2 latents as channels in the order (channel, row, column), (B, P, H / 2, W / 2)."""
    b, c, h, w = latents_BCHW.shape
    cells = latents_BCHW.view(b, c, h // 2, 2, w // 2, 2)
    return cells.permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)


def normalised(vae: AutoencoderKLFlux2, latents_BCHW: Tensor) -> Tensor:
    """Patchified latents in units of the VAE's batch-norm statistics, (B, P, H / 2, W / 2)."""
    mean, var = vae.bn.running_mean[:, None, None], vae.bn.running_var[:, None, None]
    return (patchified(latents_BCHW) - mean) / (var + vae.config.batch_norm_eps).sqrt()


def as_tensor(pictures: np.ndarray) -> Tensor:
    """Pixels (B, H, W, 3) of 0 to 255 as (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def convert(mini_sd: Path) -> AutoencoderKLFlux2:
    """mini-sd's VAE as FLUX.2's class; raises where a weight does not carry over or a picture comes out otherwise."""
    old = AutoencoderKL.from_pretrained(mini_sd / "vae", torch_dtype=torch.float32).eval()
    vae = small_vae().eval()
    missing, unexpected = vae.load_state_dict(old.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("bn.") for name in missing), (missing, unexpected)
    scenes = [random_scene(generator(SEED, i)) for i in range(NUM_PICTURES)]
    pictures = as_tensor(np.stack([np.asarray(draw(scene)) for scene in scenes]))
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pictures.split(32)])
    same = old.encode(pictures[:8]).latent_dist.mode()
    assert torch.equal(same, latents[:8]) or torch.allclose(same, latents[:8], atol=1e-5)
    assert torch.allclose(old.decode(same).sample, vae.decode(same).sample, atol=1e-5)
    packed = patchified(latents)
    vae.bn.running_mean.copy_(packed.mean((0, 2, 3)))
    vae.bn.running_var.copy_(packed.var((0, 2, 3)))
    vae.bn.num_batches_tracked.fill_(1)
    return vae


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mini_sd", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    made = convert(args.mini_sd)
    made.save_pretrained(args.folder / "flux2_vae")
    print("mean", made.bn.running_mean.tolist(), "variance", made.bn.running_var.tolist())
