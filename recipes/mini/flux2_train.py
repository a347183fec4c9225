"""Trains mini-flux2's denoiser, from nothing, on cached latents and prompts: half text-to-image, half edits.

python recipes/mini/flux2_train.py WORK_FOLDER --steps 5000 [--decay 1500]
goes on from WORK_FOLDER/flux2.pt where there is one; the learning rate is flat, then falls over the last --decay steps
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from diffusers import Flux2Transformer2DModel
from diffusers.models.transformers import transformer_flux2
from flux2_data import BUCKETS_PX, GROUP, SEED, edits_of, group_of
from flux2_text import OUT_LAYERS, SHORT_WINDOW, WIDTH
from flux2_tokenizer import WINDOW
from muon import MuonMaster
from torch import Tensor
from torch.nn.functional import mse_loss

from sdlab.testing.scenes import BASE_SHAPES, generator

# B batch, L text tokens, T picture tokens, C packed channels, D text width

BATCH = 64
WARMUP = 200
EMPTY_SHARE = 0.10  # prompts left out: what guidance compares with
NAMED_SHARE = 0.12  # of a batch: random outlines with common words for names
SQUARE_SHARE = 0.9  # of the batches
FULL_WINDOW_SHARE = (
    0.25  # of the batches have all text tokens; the others leave out the last, which repeat the end
)
HARD = {"star": 4, "cross": 2, "moon": 2, "arrow": 1}  # slow to be learnt; odds in the share of --hard-share
SAMPLER_SHIFT = 6.46  # of the times that klein's sampler visits in 15 steps of 64 tokens
SAMPLER_SHARE, OTHER_SHIFT = 0.7, 2.0


def small_transformer() -> Flux2Transformer2DModel:
    """The untrained denoiser: FLUX.2's with 2 double and 4 single blocks of width 192."""
    model = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=4, num_attention_heads=6, attention_head_dim=32,
        axes_dims_rope=(8, 8, 8, 8), mlp_ratio=2.0, joint_attention_dim=len(OUT_LAYERS) * WIDTH, guidance_embeds=False,
        timestep_guidance_channels=128,
    )  # fmt: skip
    with torch.no_grad():
        model.proj_out.weight.zero_()
        for name, weight in model.named_parameters():
            if "modulation" in name:
                weight.mul_(0.1)
    return model


def plain_attention(query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
    """Attention of (B, tokens, heads, width) spelled out: on a CPU, fused attention's backward takes a third of a
    step in bf16, and the compiler would put it back in the place of a plain softmax."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    shares = torch.exp(scores - scores.amax(-1, keepdim=True))
    return ((shares / shares.sum(-1, keepdim=True)).to(query.dtype) @ value).transpose(1, 2)


@torch.no_grad()
def mute_mean(model: Flux2Transformer2DModel, states_BLD: Tensor) -> None:
    """Makes the untrained model blind to what all prompts' states have in common, most of their length."""
    mean_D = torch.nn.functional.normalize(states_BLD.flatten(0, 1).mean(0), dim=0)
    weight = model.context_embedder.weight
    weight.sub_(torch.outer(weight @ mean_D, mean_D))


def picture_ids(height: int, width: int, time_index: int) -> Tensor:
    """Positions (time, row, column, 0) of a picture's tokens, (T, 4)."""
    return torch.cartesian_prod(
        torch.tensor([time_index]), torch.arange(height), torch.arange(width), torch.arange(1)
    )


def text_ids(num: int) -> Tensor:
    """Positions (0, 0, 0, number) of text tokens, (L, 4)."""
    zero = torch.arange(1)
    return torch.cartesian_prod(zero, zero, zero, torch.arange(num))


def random_times(num: int, rng: torch.Generator) -> Tensor:
    """Times in (0, 1), (B,): most as often as the sampler visits them, the others logit-normal and shifted."""
    u_B = torch.rand(num, generator=rng)
    normal_B = torch.randn(num, generator=rng).sigmoid()
    as_sampler_B = torch.rand(num, generator=rng) < SAMPLER_SHARE
    shift_B = torch.where(as_sampler_B, SAMPLER_SHIFT, OTHER_SHIFT)
    time_B = torch.where(as_sampler_B, u_B, normal_B)
    return (shift_B * time_B / (1 + (shift_B - 1) * time_B)).clamp(1e-3, 1)


def loss_of(
    model: Flux2Transformer2DModel,
    clean_BTC: Tensor,
    text_BLD: Tensor,
    reference_BTC: Tensor | None,
    size_px: tuple[int, int],
    rng: torch.Generator,
) -> Tensor:
    """The mean squared error of the velocity, noise - clean, over the target's tokens; the reference comes after
    them, clean and at time 10."""
    height, width = size_px[0] // 16, size_px[1] // 16
    time_B = random_times(len(clean_BTC), rng)
    noise_BTC = torch.randn(clean_BTC.shape, generator=rng)
    share = time_B[:, None, None]
    tokens, ids = (1 - share) * clean_BTC + share * noise_BTC, picture_ids(height, width, 0)
    if reference_BTC is not None:
        tokens = torch.cat([tokens, reference_BTC], dim=1)
        ids = torch.cat([ids, picture_ids(height, width, 10)])
    made_BTC = model(
        hidden_states=tokens.to(model.dtype),
        encoder_hidden_states=text_BLD.to(model.dtype),
        timestep=time_B,
        img_ids=ids,
        txt_ids=text_ids(text_BLD.shape[1]),
        return_dict=False,
    )[0][:, : height * width]
    return mse_loss(made_BTC.float(), noise_BTC - clean_BTC)


class Data:
    """The cached groups, and batches of them."""

    def __init__(self, folder: Path, editions: list[int], hard_share: float) -> None:
        self.hard_share, self.hard = hard_share, {}
        self.latents = torch.load(folder / "flux2_latents.pt", weights_only=True)
        self.prompts = [np.load(folder / f"flux2_prompts{i}.npy", mmap_mode="r") for i in editions]
        self.empty_LD = torch.load(folder / "flux2_empty.pt", weights_only=True)
        self.odds = {}
        for bucket, (numbers, _) in self.latents.items():
            is_named = np.array([group_of(int(i))[1][0].shape not in BASE_SHAPES for i in numbers])
            shares = np.where(is_named, NAMED_SHARE / is_named.sum(), (1 - NAMED_SHARE) / (~is_named).sum())
            self.odds[bucket] = shares / shares.sum()
            self.hard[bucket] = [
                (row, place)
                for row, number in enumerate(numbers.tolist())
                for place, scene in enumerate(group_of(number)[1])
                for _ in range(HARD.get(scene.shape, 0))
            ]
        self.edits = {int(i): edits_of(int(i)) for numbers, _ in self.latents.values() for i in numbers}

    def batches(
        self, step: int, rank: int, nums: dict[str, int]
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
        """Bucket, latents, text and reference latents (None for text-to-image) of this step: one of each kind."""
        shared = generator(SEED, "bucket", step)
        for kind, num in nums.items():
            bucket = 0 if shared.random() < SQUARE_SHARE else 1 + int(shared.integers(len(BUCKETS_PX) - 1))
            length = WINDOW if shared.random() < FULL_WINDOW_SHARE else SHORT_WINDOW
            rng = generator(SEED, "batch", kind, step, rank)
            numbers, latents = self.latents[bucket]
            rows = rng.choice(len(numbers), num, p=self.odds[bucket])
            places = rng.integers(GROUP if kind == "picture" else len(self.edits[0]), size=num)
            if kind == "picture" and self.hard_share:
                hard = self.hard[bucket]
                for i in np.flatnonzero(rng.random(num) < self.hard_share):
                    rows[i], places[i] = hard[int(rng.integers(len(hard)))]
            edition = self.prompts[int(rng.integers(len(self.prompts)))]
            offset = 0 if kind == "picture" else GROUP
            text = torch.stack([
                self.empty_LD if rng.random() < EMPTY_SHARE
                else torch.from_numpy(edition[int(numbers[row]), offset + place].astype(np.float32))
                for row, place in zip(rows.tolist(), places.tolist(), strict=True)
            ])[:, :length]  # fmt: skip
            if kind == "picture":
                yield bucket, latents[rows, places], text, None
                continue
            pairs = [self.edits[int(numbers[row])][place] for row, place in zip(rows, places, strict=True)]
            after, before = [pair.after for pair in pairs], [pair.before for pair in pairs]
            yield bucket, latents[rows, after], text, latents[rows, before]


def train(
    folder: Path,
    *,
    name: str,
    num_steps: int,
    decay: int,
    editions: list[int],
    lr: float,
    muon_lr: float,
    batch: int,
    edit_share: float,
    hard_share: float,
    average: float,
) -> None:
    """Trains to `num_steps` and leaves folder/name.pt: weights, average and optimizer."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.distributed.init_process_group("gloo")
    data, model = Data(folder, editions, hard_share), small_transformer()
    mute_mean(model, torch.from_numpy(data.prompts[0][:64].astype(np.float32)).flatten(0, 1)[:, 16:])
    transformer_flux2.dispatch_attention_fn = plain_attention
    compiled = torch.compile(model, dynamic=False)  # for the common shapes; a shape takes minutes to compile
    master = MuonMaster(model, lr=lr, muon_lr=muon_lr, average=average)
    path = folder / f"{name}.pt"
    if path.exists():
        master.restore(torch.load(path, weights_only=True)["master"])
    num_edits = round(edit_share * batch / world)
    nums = {"picture": batch // world - num_edits, "edit": num_edits}
    start, running = time.monotonic(), {}
    while master.step < num_steps:
        step = master.step
        noises = torch.Generator().manual_seed(step * 16 + rank)
        for bucket, clean, text, reference in data.batches(step, rank, nums):
            common = bucket == 0 and text.shape[1] == SHORT_WINDOW
            used = compiled if common else model
            loss = loss_of(used, clean, text, reference, BUCKETS_PX[bucket], noises)
            (loss * (len(clean) * world / batch)).backward()
            kind = "picture" if reference is None else "edit"
            value = float(loss.detach())
            running[kind] = value if kind not in running else running[kind] + 0.02 * (value - running[kind])
        factor = min(1, (step + 1) / WARMUP) * min(1, (num_steps - step) / max(1, decay))
        master.update(factor)
        if master.step % 50 == 0 and rank == 0:
            each_s = (time.monotonic() - start) / 50
            start = time.monotonic()
            losses = "  ".join(f"{kind} {value:.4f}" for kind, value in running.items())
            print(f"step {master.step} of {num_steps}  {losses}  {each_s:.2f} s a step", flush=True)
        if rank == 0 and (master.step % 200 == 0 or master.step == num_steps):
            torch.save({"master": master.state()}, folder / f"{name}.tmp")
            (folder / f"{name}.tmp").replace(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", default="flux2")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--decay", type=int, default=1500)
    parser.add_argument("--editions", type=int, nargs="+", default=[0])
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--muon-lr", type=float, default=0.015, help="0: AdamW for all weights")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument(
        "--hard-share", type=float, default=0.0, help="of the pictures, of the slowest shapes"
    )
    parser.add_argument("--average", type=float, default=0.998)
    parser.add_argument("--edit-share", type=float, default=0.5)
    args = parser.parse_args()
    train(
        args.folder, name=args.name, num_steps=args.steps, decay=args.decay, editions=args.editions, lr=args.lr,
        muon_lr=args.muon_lr, batch=args.batch, edit_share=args.edit_share, hard_share=args.hard_share,
        average=args.average,
    )  # fmt: skip
