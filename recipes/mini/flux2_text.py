"""Trains mini-flux2's text encoder, a small Qwen3, to read what a prompt says; after that it stays frozen.

python recipes/mini/flux2_text.py WORK_FOLDER [--steps 1800]     leaves WORK_FOLDER/flux2_text

The layers that FLUX.2 reads (hidden states 9, 18 and 27) must hold a fixed code of the prompt's slots in every token
from the prompt's end on. A thing's code is a random one of its own, as far from every other's for words that the
denoiser never meets as for those it does: what a new word needs to be learnt quickly.
"""

from __future__ import annotations

import argparse
import math
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from flux2_language import SLOT_NAMES, Slots, changed, describe, empty, instruct, known_things, values
from flux2_tokenizer import WINDOW, templated
from pictures import words
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from sdlab.testing.scenes import BASE_SHAPES, generator, random_scene

# B batch, L tokens, D width of one layer, K width of the code

SEED = 31
WIDTH, LAYERS, OUT_LAYERS = 64, 28, (9, 18, 27)
BATCH, PEAK_LR, WARMUP = 64, 2e-3, 150
SHORT_WINDOW = 48  # holds all of the language's texts; the rest of the window repeats their end
THING_WIDTH = 30
SCALES = {"colour": 2.5, "background": 2.5, "texture": 2.0, "size": 2.0, "side": 2.0, "height": 2.0}
EDIT_SCALE = 2.0


@cache
def codes() -> dict[str, Tensor]:
    """The code of each value of each slot, (values, width); rows in the order of `values`."""
    rng = torch.Generator().manual_seed(SEED)
    made = {"thing": torch.randn(len(values("thing")), THING_WIDTH, generator=rng)}
    made["thing"] *= THING_WIDTH**0.5 / made["thing"].norm(dim=1, keepdim=True)
    for name, scale in SCALES.items():
        made[name] = scale * torch.eye(len(values(name)))
    return made


def code_of(slots: Slots, *, is_empty: bool = False) -> Tensor:
    """The code that the prompt's last tokens must hold, (K,), K <= WIDTH; zeros where a slot says nothing."""
    parts = []
    for name in SLOT_NAMES[1:]:
        value, table = getattr(slots, name), codes()[name]
        parts.append(table[_index(name)[value]] if value else torch.zeros(table.shape[1]))
    sign = 0.0 if is_empty else EDIT_SCALE if slots.edit else -EDIT_SCALE
    return torch.cat([*parts, torch.tensor([sign])])


@cache
def _index(name: str) -> dict[str, int]:
    return {value: i for i, value in enumerate(values(name))}


def untrained(tokenizer: Qwen2Tokenizer) -> Qwen3ForCausalLM:
    """The encoder before training: quiet residual branches, so that 28 layers train; words start at their code."""
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=1024,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )  # fmt: skip
    rng = torch.Generator().manual_seed(SEED)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed_tokens" in name:
                weight.normal_(0, 0.5, generator=rng)
            elif weight.ndim == 2:
                weight.normal_(0, weight.shape[1] ** -0.5, generator=rng)
                if "o_proj" in name or "down_proj" in name:
                    weight.mul_((2 * LAYERS) ** -0.5)
        table = model.get_input_embeddings().weight
        for i, word in enumerate(known_things()):
            for spelling in (word, "Ġ" + word, word.capitalize(), "Ġ" + word.capitalize()):
                row = tokenizer.convert_tokens_to_ids(spelling)
                if row is not None and row < len(tokenizer):
                    table[row, :THING_WIDTH] = codes()["thing"][i]
    return model


def random_text(rng: np.random.Generator) -> tuple[str, Tensor]:
    """A text of the language and its code: half descriptions, half instructions, 3 % empty; about half of the things
    are the scenes' shapes, at times a word that means nothing is put in."""
    if rng.random() < 0.03:
        text, slots = empty()
        return text, code_of(slots, is_empty=True)
    shapes = BASE_SHAPES if rng.random() < 0.4 else known_things()
    before = random_scene(rng, shapes=shapes)
    if rng.random() < 0.5:
        text, slots = describe(before, rng)
        if rng.random() < 0.08:
            text = f"{text}, {_blank(rng)}" if rng.random() < 0.7 else f"{_blank(rng)}, {text}"
    else:
        text, slots = instruct(before, changed(before, rng, shapes=shapes), rng, full_share=0.1)
        if rng.random() < 0.03:
            text = f"{text} {_made_up(rng)}"
    return text, code_of(slots)


def _blank(rng: np.random.Generator) -> str:
    return _made_up(rng) if rng.random() < 0.5 else words()[int(rng.integers(len(words())))]


def _made_up(rng: np.random.Generator) -> str:
    return "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), int(rng.integers(3, 8))))


def batch_of(tokenizer: Qwen2Tokenizer, texts: list[str], *, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and mask, (B, L), and whether a token stands at the prompt's end or after it, (B, L)."""
    made = tokenizer(
        [templated(text) for text in texts], padding="max_length", truncation=True, max_length=length,
        return_tensors="pt",
    )  # fmt: skip
    at_end = made.input_ids == tokenizer.convert_tokens_to_ids("<|im_end|>")
    return made.input_ids, made.attention_mask, at_end.cumsum(1) > 0


def read_back(code: Tensor) -> dict[str, Tensor]:
    """For every slot the index of the nearest value, or -1 for none, (B,); of codes (B, K)."""
    found, start = {}, 0
    for name in SLOT_NAMES[1:]:
        table = codes()[name]
        part = code[:, start : start + table.shape[1]]
        with_none = torch.cat([torch.zeros(1, table.shape[1]), table])
        found[name] = torch.cdist(part, with_none).argmin(1) - 1
        start += table.shape[1]
    found["edit"] = code[:, start].div(EDIT_SCALE).round().clamp(-1, 1).long()
    return found


@torch.no_grad()
def accuracy(model: Qwen3ForCausalLM, tokenizer: Qwen2Tokenizer, *, num: int = 1024) -> dict[str, float]:
    """Of held-out texts: the share whose slot is read right from each layer's last template token, worst layer."""
    pairs = [random_text(generator(SEED, "held out", i)) for i in range(num)]
    wanted = read_back(torch.stack([code for _, code in pairs]))
    result: dict[str, float] = {}
    right_all = torch.ones(num, dtype=torch.bool)
    states: dict[int, list[Tensor]] = {layer: [] for layer in OUT_LAYERS}
    for start in range(0, num, 128):
        ids, mask, _ = batch_of(tokenizer, [t for t, _ in pairs[start : start + 128]], length=WINDOW)
        hidden = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        last = mask.sum(1) - 1
        for layer in OUT_LAYERS:
            states[layer].append(hidden[layer][torch.arange(len(last)), last])
    for layer in OUT_LAYERS:
        seen = read_back(torch.cat(states[layer]))
        for name in SLOT_NAMES:
            right = seen[name] == wanted[name]
            right_all &= right
            result[name] = min(result.get(name, 1.0), float(right.float().mean()))
    result["all"] = float(right_all.float().mean())
    return result


def train(folder: Path, *, num_steps: int) -> None:
    """Trains to `num_steps` and leaves folder/flux2_text.

    Reading is learnt in the layers up to the first that FLUX.2 reads; the quiet layers above it join for the last
    tenth and only have to hand it on. That takes a third of the time of all layers throughout.
    """
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "flux2_tokenizer")
    model = untrained(tokenizer).train()
    joined_at = round(0.9 * num_steps)
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_LR, betas=(0.9, 0.98), weight_decay=0.0)
    start, running = time.monotonic(), 0.0
    for step in range(num_steps):
        model.config.num_hidden_layers = LAYERS if step >= joined_at else OUT_LAYERS[0] + 1
        layers = OUT_LAYERS if step >= joined_at else OUT_LAYERS[:1]
        rng = generator(SEED, "step", step)
        texts, wanted = zip(*(random_text(rng) for _ in range(BATCH)), strict=True)
        ids, mask, at_end_BL = batch_of(
            tokenizer, list(texts), length=WINDOW if step % 5 == 0 else SHORT_WINDOW
        )
        hidden = model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, logits_to_keep=1, use_cache=False
        ).hidden_states
        code_BK = torch.stack(wanted)
        target_BLK = code_BK[:, None].expand(-1, ids.shape[1], -1)[at_end_BL]
        loss = torch.stack([
            nn.functional.mse_loss(hidden[layer][..., : code_BK.shape[1]][at_end_BL], target_BLK)
            for layer in layers
        ]).mean()  # fmt: skip
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = min(1, (step + 1) / WARMUP) * (0.02 + 0.98 * math.cos(math.pi / 2 * step / num_steps) ** 2)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * factor
        optimizer.step()
        optimizer.zero_grad()
        running += (0.05 if step else 1) * (float(loss.detach()) - running)
        if (step + 1) % 50 == 0:
            each_s = (time.monotonic() - start) / 50
            start = time.monotonic()
            print(f"step {step + 1} of {num_steps}  loss {running:.4f}  {each_s:.2f} s a step", flush=True)
        if (step + 1) % 400 == 0 or step + 1 == num_steps:
            model.config.num_hidden_layers = LAYERS
            model.eval()
            print({name: round(x, 4) for name, x in accuracy(model, tokenizer).items()}, flush=True)
            model.save_pretrained(folder / "flux2_text")
            model.train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1800)
    args = parser.parse_args()
    train(args.folder, num_steps=args.steps)
