"""The recipes of the built-in models. Every number of steps, batch and learning rate is on this page."""

from __future__ import annotations

from pathlib import Path

from recipes.mini.data.captions import CAPTIONS
from recipes.mini.data.edits import EDITS, SLOW_SHAPES
from recipes.mini.data.scenes import SCENES
from recipes.mini.data.vae import VAE
from recipes.mini.figures import Figure
from recipes.mini.recipe import Command, Recipe

VAE_STEPS, DECODER_STEPS = 2400, 600
WORDS_STEPS, SD_STEPS = 1400, 1000
FLUX2_STEPS, SLOW_STEPS, LAST_STEPS = 2600, 1400, 700
BLIP_STEPS, BLIP_MORE_STEPS = 3200, 2400

# A quarter of a picture first: four times the steps in the same time. Then the decoder alone on whole pictures, with
# latents a little off, as a small denoiser's are.
MINI_VAE = (
    Command(
        "vae-small",
        f"train-vae --images vae --init small --image-size 128 --crop 64 --batch 12 --steps {VAE_STEPS} --lr 1.5e-3 "
        "--l2 2 --latent-noise 0.04 --flip --dtype bf16 --held-out 0.01 --seed 20",
    ),
    Command(
        "vae-decoder",
        f"train-vae --images vae --vae tuned/vae-small --decoder-only --image-size 128 --batch 8 "
        f"--steps {DECODER_STEPS} --lr 5e-4 --l2 2 --latent-noise 0.04 --flip --dtype bf16 --held-out 0.01 --seed 21",
    ),
)

# Outlines of a few cells show through all but the latest noise: only there do words tell which one to draw.
MINI_SD = (
    *MINI_VAE,
    Command("text-clip", "-m recipes.mini.text clip text-clip", program="python", makes="text-clip"),
    Command(
        "sd-words",
        "train-sd --init small --load-model mini-sd --vae tuned/vae-small --text-encoder text-clip --images scenes "
        f"--image-size 128 --timestep-range 650-1000 --batch 64 --steps {WORDS_STEPS} --lr 2e-3 --lr-schedule constant "
        "--warmup 200 --dtype bf16 --seed 21",
    ),
    Command(
        "sd-small",
        "train-sd --load-model tuned/sd-words --vae tuned/vae-decoder --images scenes --image-size 128 "
        f"--timestep-range 0-1000 --snr-gamma 5 --batch 64 --steps {SD_STEPS} --lr 1.5e-3 --lr-schedule cosine "
        "--warmup 50 --ema --dtype bf16 --seed 22",
    ),
)

# The VAE's weights are mini-sd's: they fit FLUX.2's class name for name, and only the statistics are measured anew.
MINI_FLUX2 = (
    *MINI_VAE,
    Command("text-qwen", "-m recipes.mini.text qwen text-qwen", program="python", makes="text-qwen"),
    Command(
        "vae-flux2",
        "-m recipes.mini.flux2_vae tuned/vae-decoder vae-flux2",
        program="python",
        makes="vae-flux2",
    ),
    Command(
        "flux2-small",
        "train-transformer --init small --load-model mini-flux2 --vae vae-flux2 --text-encoder text-qwen "
        f"--images edits --image-size 128 --timestep-sampling uniform --shift 5 --optimizer muon --batch 64 "
        f"--steps {FLUX2_STEPS} --lr 4e-3 --lr-schedule cosine --warmup 200 --ema --dtype bf16 --seed 33",
    ),
    # Edits are right after that; stars, crosses, moons and arrows from a description are not.
    Command(
        "flux2-slow",
        "train-transformer --load-model tuned/flux2-small --images slow --image-size 128 --timestep-sampling uniform "
        f"--shift 5 --optimizer muon --batch 64 --steps {SLOW_STEPS} --lr 3e-3 --lr-schedule cosine --warmup 50 --ema "
        "--dtype bf16 --seed 35",
    ),
    # Then 87 % of prompts in many phrasings are right: half of the stars, most of the rest.
    Command(
        "flux2-last",
        "train-transformer --load-model tuned/flux2-slow --images slow --image-size 128 --timestep-sampling uniform "
        f"--shift 5 --optimizer muon --batch 64 --steps {LAST_STEPS} --lr 2.5e-3 --lr-schedule cosine --warmup 30 "
        "--ema --dtype bf16 --seed 36",
    ),
)

# Its words are those of the captions. No caption says left or right, so pictures may be mirrored.
MINI_BLIP = (
    Command(
        "captioner-small",
        "train-captioner --init small --images captions --optimizer muon --batch 128 "
        f"--steps {BLIP_STEPS} --lr 3e-3 --lr-schedule cosine --warmup 100 --label-smoothing 0.02 --ema --flip "
        "--dtype bf16 --seed 41",
    ),
    # After that, 88 % of shapes are right.
    Command(
        "captioner-more",
        "train-captioner --load-model tuned/captioner-small --images captions --optimizer muon --batch 128 "
        f"--steps {BLIP_MORE_STEPS} --lr 2.5e-3 --lr-schedule cosine --warmup 50 --label-smoothing 0.02 --ema --flip "
        "--dtype bf16 --seed 42",
    ),
)


def _sd_figures(folder: Path, *, device: str = "cpu") -> list[Figure]:
    from recipes.mini import score, vae_score

    return [*vae_score.measure(folder, device=device), *score.measure(folder, device=device)]


def _flux2_figures(folder: Path, *, device: str = "cpu") -> list[Figure]:
    from recipes.mini import flux2_score, vae_score

    return [*vae_score.measure(folder, device=device), *flux2_score.measure(folder, device=device)]


def _blip_figures(folder: Path, *, device: str = "cpu") -> list[Figure]:
    from recipes.mini import blip_score

    return blip_score.measure(folder, device=device)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("mini-sd", (VAE, SCENES), MINI_SD, _sd_figures),
        Recipe("mini-flux2", (VAE, EDITS, SLOW_SHAPES), MINI_FLUX2, _flux2_figures),
        Recipe("mini-blip", (CAPTIONS,), MINI_BLIP, _blip_figures),
    )
}
