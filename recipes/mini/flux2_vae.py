"""Makes mini-flux2's VAE: mini-sd's weights in FLUX.2's class, with batch-norm statistics measured on scenes.

python -m recipes.mini.flux2_vae MINI_VAE FOLDER      MINI_VAE holds vae/: a run of train-vae, or a model
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sdlab.models.bases import CONFIGS
from sdlab.models.files import Stored, component_weights, read_json
from sdlab.models.parts import Part
from sdlab.models.vae import Autoencoder, decoded, posterior
from sdlab.testing.scenes import draw, generator, random_scene

# B pictures, 3 colours, H height, W width, P packed channels

SEED, NUM_PICTURES = 32, 512
CONFIG = CONFIGS / "init" / "vae" / "small-flux2.json"


def in_flux2s_class(source: Path) -> Part:
    """The VAE in `source` as AutoencoderKLFlux2, its statistics still those of an untrained batch norm. Raises
    SdlabError where a tensor is missing, or has another shape."""
    weights = component_weights(source, ("diffusion_pytorch_model",), allow_pickle=False)
    config = read_json(CONFIG)
    num_packed = 4 * int(config["latent_channels"])
    untrained = {
        "bn.running_mean": torch.zeros(num_packed),
        "bn.running_var": torch.ones(num_packed),
        "bn.num_batches_tracked": torch.ones((), dtype=torch.int64),
    }
    batch_norm = {name: Stored.of(name, tensor, source) for name, tensor in untrained.items()}
    return Part("vae", "AutoencoderKLFlux2", config, {**weights, **batch_norm}, source)


def scenes() -> Iterator[Tensor]:
    """Pictures (3, H, W) in [-1, 1], as mini-flux2 draws them."""
    for number in range(NUM_PICTURES):
        pixels = np.asarray(draw(random_scene(generator(SEED, number))))
        yield torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


def convert(source: Path, folder: Path) -> None:
    """Writes the VAE into `folder`, which is new. Its pictures are those of the VAE in `source`, bit for bit."""
    cpu = torch.device("cpu")
    old_part = Part(
        "vae", "AutoencoderKL", read_json(source / "config.json"),
        component_weights(source, ("diffusion_pytorch_model",), allow_pickle=False), source,
    )  # fmt: skip
    old = Autoencoder(old_part).load(cpu, torch.float32)
    autoencoder = Autoencoder(in_flux2s_class(source))
    module = autoencoder.load(cpu, torch.float32)
    _check_same(old.vae, module.vae)
    autoencoder.save(module, folder, autoencoder.measure(module, scenes()))


@torch.no_grad()
def _check_same(old: torch.nn.Module, new: torch.nn.Module) -> None:
    pixels_B3HW = torch.stack([picture for picture, _ in zip(scenes(), range(4), strict=False)])
    latents = [posterior(vae, pixels_B3HW)[0] for vae in (old, new)]
    pictures = [decoded(vae, latents[0]) for vae in (old, new)]
    assert torch.equal(*latents) and torch.equal(*pictures), "the two classes compute other things"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    convert(args.source / "vae", args.folder)
