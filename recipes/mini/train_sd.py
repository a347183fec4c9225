"""Trains mini-sd's UNet and text encoder together, from nothing, on cached latents.

python recipes/mini/train_sd.py WORK_FOLDER [--steps 4500]     goes on from WORK_FOLDER/sd.pt where there is one
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from master import Master
from pictures import SIDE_PX, Pixels, named_silhouettes, words
from prompts import distractor_words, language, training_prompt
from torch import Tensor
from train_vae import as_tensor
from train_vae import load as load_vae
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdlab.testing.scenes import BASE_SHAPES, NEW_SHAPES, SILHOUETTES, Scene, draw, generator, random_scene
from sdlab.testing.shapes import Silhouette

# B batch, C channels, H height, W width, L tokens, D text width

SEED = 21
NUM_NAMED = 200  # random outlines with common words for names
NAMED_SHARE = 0.10  # of a batch
BATCH = 64
PEAK_LR = 3e-3
WARMUP = 200
SNR_GAMMA = 5.0
LATE, LATE_SHARE = (
    650,
    0.8,
)  # outlines of a few cells show through all but the latest noise: only there words tell
TEXT_WIDTH = 128
BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}


def small_unet() -> UNet2DConditionModel:
    """The untrained denoiser: SD 1.5's, with three levels (16, 8, 4 cells) of one layer."""
    return UNet2DConditionModel(
        sample_size=SIDE_PX // 8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 96, 96),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
    )


def small_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The untrained text encoder. Token embeddings start wide apart: words that no training prompt holds keep their
    place, and must still be told apart after it."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=3 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config)
    torch.nn.init.normal_(
        model.get_input_embeddings().weight, std=0.3, generator=torch.Generator().manual_seed(SEED)
    )
    return model


@cache
def silhouettes() -> dict[str, Silhouette]:
    """The scenes' base shapes and the named random ones."""
    named = named_silhouettes(SEED, NUM_NAMED, taken={*language(), *NEW_SHAPES})
    return {**{name: SILHOUETTES[name] for name in BASE_SHAPES}, **named}


def training_scene(index: int) -> Scene:
    """The scene of a training picture."""
    rng = generator(SEED, "scene", index)
    named = [name for name in silhouettes() if name not in BASE_SHAPES]
    return random_scene(rng, shapes=named if rng.random() < 0.4 else BASE_SHAPES)


def training_picture(index: int) -> Pixels:
    """A training picture, (SIDE_PX, SIDE_PX, 3)."""
    return np.asarray(draw(training_scene(index), (SIDE_PX, SIDE_PX), silhouettes=silhouettes()))


@torch.no_grad()
def encoded(numbers: range, folder: Path) -> Tensor:
    """The latents of training pictures, (B, 4, H, W), as the VAE gives them."""
    torch.set_num_threads(1)
    vae: AutoencoderKL = load_vae(folder).to(torch.bfloat16)
    pictures = as_tensor(np.stack([training_picture(i) for i in numbers])).to(torch.bfloat16)
    return torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(16)]).float()


def cached_latents(folder: Path, num: int, *, workers: int) -> Tensor:
    """The latents of `num` training pictures, (num, 4, H, W); kept in latents.pt."""
    path = folder / "latents.pt"
    if path.exists() and len(kept := torch.load(path, weights_only=True)) == num:
        return kept
    parts = [range(start, min(start + 500, num)) for start in range(0, num, 500)]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        latents = torch.cat(list(pool.map(partial(encoded, folder=folder), parts)))
    torch.save(latents, path)
    return latents


def train(folder: Path, *, num_steps: int, num_pictures: int, threads: int) -> None:
    """Trains to `num_steps` and leaves folder/sd.pt: weights, average, optimizer and the latents' scale."""
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.distributed.init_process_group("gloo")
    latents = cached_latents(folder, num_pictures, workers=2)
    scale = 1 / float(latents.std())
    scenes = [training_scene(i) for i in range(num_pictures)]
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    blank = distractor_words(words(), set(silhouettes()))
    unet, text_encoder = small_unet(), small_text_encoder(tokenizer)
    unet.set_attn_processor(AttnProcessor())  # on a CPU, fused attention's backward is 40 % of a step in bf16
    master = Master([unet, text_encoder], lr=PEAK_LR, average=0.998)
    if (folder / "sd.pt").exists():
        master.restore(torch.load(folder / "sd.pt", weights_only=True)["master"])
    is_named = np.array([scene.shape not in BASE_SHAPES for scene in scenes])
    odds = np.where(is_named, NAMED_SHARE / is_named.sum(), (1 - NAMED_SHARE) / (~is_named).sum())
    alphas = DDPMScheduler(**BETAS).alphas_cumprod
    start, running = time.monotonic(), 0.5
    while master.step < num_steps:
        step = master.step
        rng, noises = generator(SEED, "step", step, rank), torch.Generator().manual_seed(step * world + rank)
        picked = rng.choice(num_pictures, BATCH // world, p=odds)
        prompts = [training_prompt(scenes[i], rng, blank) for i in picked]
        tokens = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        cond_BLD = text_encoder(tokens.input_ids).last_hidden_state
        loss = loss_of(unet, scale * latents[torch.from_numpy(picked)], cond_BLD, alphas, noises)
        loss.backward()
        cosine = math.cos(math.pi / 2 * step / num_steps) ** 2
        master.update(min(1, (step + 1) / WARMUP) * (0.02 + 0.98 * cosine))
        running += 0.02 * (float(loss.detach()) - running)
        if master.step % 50 == 0 and rank == 0:
            each_s = (time.monotonic() - start) / 50
            start = time.monotonic()
            print(f"step {master.step} of {num_steps}  loss {running:.4f}  {each_s:.2f} s a step", flush=True)
        if rank == 0 and (master.step % 200 == 0 or master.step == num_steps):
            torch.save({"master": master.state(), "scale": scale}, folder / "sd.tmp")
            (folder / "sd.tmp").replace(folder / "sd.pt")


def random_times(num: int, num_times: int, rng: torch.Generator) -> Tensor:
    """Times, (B,), `LATE_SHARE` of them from `LATE` on."""
    late_B = torch.rand(num, generator=rng) < LATE_SHARE
    early_B = torch.randint(0, LATE, (num,), generator=rng)
    return torch.where(late_B, torch.randint(LATE, num_times, (num,), generator=rng), early_B)


def loss_of(
    unet: UNet2DConditionModel, latents_BCHW: Tensor, cond_BLD: Tensor, alphas: Tensor, rng: torch.Generator
) -> Tensor:
    """The mean squared error of the noise, weighted by min(SNR, gamma) / SNR (arXiv 2303.09556)."""
    times_B = random_times(len(latents_BCHW), len(alphas), rng)
    alpha_B = alphas[times_B]
    noise = torch.randn(latents_BCHW.shape, generator=rng)
    clean_share_B, noise_share_B = (
        alpha_B.sqrt()[:, None, None, None],
        (1 - alpha_B).sqrt()[:, None, None, None],
    )
    noisy = clean_share_B * latents_BCHW + noise_share_B * noise
    made = unet(noisy.to(cond_BLD.dtype), times_B, cond_BLD).sample.float()
    snr_B = alpha_B / (1 - alpha_B)
    weight_B = snr_B.clamp(max=SNR_GAMMA) / snr_B
    return (weight_B * ((made - noise) ** 2).mean(dim=(1, 2, 3))).mean()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--pictures", type=int, default=20000)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    train(args.folder, num_steps=args.steps, num_pictures=args.pictures, threads=args.threads)
