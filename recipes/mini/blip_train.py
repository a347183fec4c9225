"""Trains mini-blip, from nothing, on the pictures of blip_data.py.

python recipes/mini/blip_train.py WORK_FOLDER --steps 4600 [--decay 1800] [--later-share 0.5]
goes on from WORK_FOLDER/blip.pt where there is one; the learning rate is flat, then falls over the last --decay steps
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from blip_data import CHUNK, NUM_MIXED, SEED, Pixels, example
from blip_model import MEAN, STD, logits_of, small_blip, tokenizer
from master import put
from muon import MuonMaster
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import BlipForConditionalGeneration

from sdlab.testing.scenes import SILHOUETTES, generator

# B pictures, T tokens, V words

BATCH = 128
WARMUP = 100
LENGTH = 12  # tokens that are trained, [DEC] left out
SMOOTHING = 0.02
SHAPE_WEIGHT = 3.0  # the word for the shape is the slow one
SHIFT_PX = 6
HELD_OUT_SEED = SEED + 1


class ForMuon(nn.Module):
    """The model, with names that tell `MuonMaster` which matrices are inside blocks."""

    def __init__(self, model: BlipForConditionalGeneration) -> None:
        super().__init__()
        self.vision_blocks = model.vision_model.encoder
        self.text_blocks = model.text_decoder.bert.encoder
        self.model = model


class Data:
    """The drawn chunks as far as they are there."""

    def __init__(self, folder: Path, later_share: float | None) -> None:
        self.folder, self.chunks, self.later_share = folder, [], later_share
        self.tokenizer = tokenizer()
        self.look()

    def look(self) -> None:
        """Loads chunks that have come since."""
        while (path := self.folder / f"blip_{len(self.chunks):02d}.npz").exists():
            with np.load(path) as chunk:
                self.chunks.append((chunk["pixels"], self.ids(chunk["captions"].tolist())))

    def ids(self, captions: list[str]) -> NDArray[np.int64]:
        """[DEC], the words, [SEP] and padding, (number, 1 + LENGTH)."""
        texts = self.tokenizer(captions, padding="max_length", max_length=1 + LENGTH, truncation=False)
        ids = np.array(texts["input_ids"])
        ids[:, 0] = self.tokenizer.bos_token_id
        return ids

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, height, width), varied a little, and tokens (B, 1 + LENGTH)."""
        rng = generator(SEED, "blip-batch", step)
        picks = [self.pick(rng) for _ in range(BATCH)]
        pixels = np.stack([self.chunks[chunk][0][place] for chunk, place in picks])
        ids = np.stack([self.chunks[chunk][1][place] for chunk, place in picks])
        return normalised(varied(pixels, rng)), torch.from_numpy(ids)

    def pick(self, rng: np.random.Generator) -> tuple[int, int]:
        """A chunk and a place in it."""
        low, high = 0, len(self.chunks)
        if self.later_share is not None:
            low, high = (NUM_MIXED, high) if rng.random() < self.later_share else (0, NUM_MIXED)
        return int(rng.integers(low, high)), int(rng.integers(CHUNK))


def varied(pixels_BHWC: Pixels, rng: np.random.Generator) -> NDArray[np.float32]:
    """Half of the pictures mirrored, all a little moved and brighter or darker."""
    pixels = pixels_BHWC.copy()
    mirrored = rng.random(len(pixels)) < 0.5
    pixels[mirrored] = pixels[mirrored, :, ::-1]
    side = pixels.shape[1]
    wide = np.pad(pixels, ((0, 0), (SHIFT_PX, SHIFT_PX), (SHIFT_PX, SHIFT_PX), (0, 0)), mode="edge")
    top, left = rng.integers(0, 2 * SHIFT_PX + 1, 2)
    moved = wide[:, top : top + side, left : left + side].astype(np.float32)
    gain = rng.uniform(0.94, 1.05, (len(pixels), 1, 1, 1)) * rng.uniform(0.97, 1.03, (len(pixels), 1, 1, 3))
    return np.clip(moved * gain.astype(np.float32), 0, 255)


def normalised(pixels_BHWC: NDArray[np.float32]) -> Tensor:
    """(B, 3, height, width) as BLIP's image processor leaves it."""
    pixels = torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2) / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def loss_of(logits_BTV: Tensor, wanted_BT: Tensor, weight_V: Tensor, padding: int) -> Tensor:
    """Cross-entropy of the next word, some words weighing more; padding counts nothing."""
    return cross_entropy(
        logits_BTV.float().flatten(0, 1), wanted_BT.flatten(), weight=weight_V, ignore_index=padding,
        label_smoothing=SMOOTHING,
    )  # fmt: skip


def weights_of_words(words: dict[str, int]) -> Tensor:
    """(V,)"""
    weight_V = torch.ones(len(words))
    weight_V[[words[name] for name in (*SILHOUETTES, "shape")]] = SHAPE_WEIGHT
    return weight_V


@torch.no_grad()
def held_out(model: BlipForConditionalGeneration, pixels: Tensor, ids: Tensor, shapes: Tensor) -> str:
    """How many captions of known shapes are right word for word, and how many of the shapes' words."""
    parts = [
        logits_of(model, p.to(model.dtype), i[:, :-1]).argmax(-1)
        for p, i in zip(pixels.split(BATCH), ids.split(BATCH), strict=True)
    ]
    guessed, wanted = torch.cat(parts), ids[:, 1:]
    is_shape = torch.isin(wanted, shapes)
    known = is_shape.any(1)
    right = (guessed == wanted) | (wanted == 0)
    return f"held out: captions {right[known].all(1).float().mean():.1%}, shapes {right[is_shape].float().mean():.1%}"


def train(
    folder: Path,
    *,
    name: str,
    num_steps: int,
    decay: int,
    lr: float,
    muon_lr: float,
    average: float,
    later_share: float | None,
) -> None:
    """Leaves `name`.pt in the folder: the fp32 weights, their average and the optimizer's state."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    model, data, path = small_blip().train(), Data(folder, later_share), folder / f"{name}.pt"
    master = MuonMaster(ForMuon(model), lr=lr, muon_lr=muon_lr, average=average)
    if path.exists():
        master.restore(torch.load(path, weights_only=True))
    words = data.tokenizer.get_vocab()
    weight_V, shapes = weights_of_words(words), torch.tensor([words[name] for name in SILHOUETTES])
    drawn = [example(i, seed=HELD_OUT_SEED) for i in range(384)]
    valid = normalised(np.stack([p for p, _ in drawn]).astype(np.float32))
    valid_ids = torch.from_numpy(data.ids([c for _, c in drawn]))
    start, running = time.monotonic(), 0.0
    while master.step < num_steps:
        step = master.step
        pixels, ids = data.batch(step)
        logits = logits_of(model, pixels.to(torch.bfloat16), ids[:, :-1])
        loss = loss_of(logits, ids[:, 1:], weight_V, words["[PAD]"])
        loss.backward()
        running += float(loss.detach()) / 50
        master.update(min(1, (step + 1) / WARMUP) * min(1, (num_steps - step) / max(1, decay)))
        if master.step % 50 == 0:
            each_s = (time.monotonic() - start) / 50
            print(f"step {master.step} of {num_steps}  loss {running:.4f}  {each_s:.2f} s a step", flush=True)
            start, running = time.monotonic(), 0.0
            data.look()
        if master.step % 200 == 0 or master.step == num_steps:
            torch.save(master.state(), folder / f"{name}.tmp")
            (folder / f"{name}.tmp").replace(path)
            put([w.to(torch.bfloat16) for w in master.averaged], [ForMuon(model)])
            print(held_out(model, valid, valid_ids, shapes), f"({len(data.chunks)} chunks)", flush=True)
            master.refresh()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", default="blip")
    parser.add_argument("--steps", type=int, default=4600)
    parser.add_argument("--decay", type=int, default=1800)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--muon-lr", type=float, default=0.015)
    parser.add_argument("--average", type=float, default=0.995)
    parser.add_argument(
        "--later-share", type=float, help="of the pictures, from the later chunks; else all alike"
    )
    args = parser.parse_args()
    train(
        args.folder, name=args.name, num_steps=args.steps, decay=args.decay, lr=args.lr, muon_lr=args.muon_lr,
        average=args.average, later_share=args.later_share,
    )  # fmt: skip
