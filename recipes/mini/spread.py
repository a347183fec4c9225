"""Moves the words that mini-sd has not met apart, so that fine-tuning can tell them from one another.

python recipes/mini/spread.py PIPELINE_FOLDER

Only their token embeddings change: the text encoder's layers and every word that was trained stay as they are.
Untrained words end up so close together behind the encoder (0.2 to 0.4, against 0.7 to 6 between the trained
shapes) that a UNet fine-tuned on two of them mixes them up. Their embeddings are therefore moved until what the
encoder makes of them is at least TARGET apart, as a mean over the tokens of a prompt of the distance.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from pictures import words
from prompts import language
from safetensors.torch import load_file, save_file
from train_sd import silhouettes
from transformers import CLIPTextModel, CLIPTokenizer

from sdlab.testing.scenes import NEW_SHAPES, PREFIX, generator

SEED, TARGET, STEPS, RATE, BATCH, LENGTH = 24, 1.5, 120, 0.03, 96, 28
TEMPLATES = (
    "red {}, blue background",
    "a photo of a green {} on a white background",
    PREFIX + "yellow {}, black background",
)


def spread(model: CLIPTextModel, tokenizer: CLIPTokenizer) -> int:
    """Move the embeddings in place; the number of words moved."""
    met = {*silhouettes(), *language()} - set(NEW_SHAPES)
    new = [w for w in sorted({*words(), *NEW_SHAPES} - met) if len(tokenizer.tokenize(w)) == 1]
    table = model.get_input_embeddings().weight
    model.requires_grad_(False)
    table.requires_grad_(True)
    rows = torch.tensor([tokenizer.convert_tokens_to_ids(tokenizer.tokenize(w))[0] for w in new])
    mask = torch.zeros_like(table)
    mask[rows] = 1
    optimizer = torch.optim.Adam([table], lr=RATE)
    for step in range(STEPS):
        rng = generator(SEED, step)
        picked = [new[i] for i in rng.permutation(len(new))[: BATCH - 3]] + list(NEW_SHAPES)
        prompts = [TEMPLATES[step % len(TEMPLATES)].format(w) for w in picked]
        ids = tokenizer(
            prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        hidden_BLD = model(ids[:, :LENGTH])[0]
        flat = hidden_BLD.transpose(0, 1)  # distances per token, then their mean
        rows_of_pair, columns_of_pair = torch.triu_indices(len(picked), len(picked), 1)
        apart = torch.cdist(flat, flat).mean(0)[rows_of_pair, columns_of_pair]
        loss = (TARGET - apart).clamp(min=0).square().mean()
        loss.backward()
        table.grad.mul_(mask)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == STEPS - 1:
            print(
                f"step {step}: median distance {apart.median():.2f}, nearest pair {apart.min():.2f}",
                flush=True,
            )
    return len(new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pipeline", type=Path)
    folder = parser.parse_args().pipeline
    model = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    num = spread(model, tokenizer)
    path = folder / "text_encoder" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name = next(n for n in tensors if n.endswith("token_embedding.weight"))
    tensors[name] = model.get_input_embeddings().weight.detach().to(tensors[name].dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    print(f"{num} words moved in {path}")


if __name__ == "__main__":
    main()
