"""The mini models' text encoders, whose weights are written down: what they say of a prompt, and how exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from recipes.mini.flux2_language import Slots, changed, describe, instruct
from recipes.mini.flux2_tokenizer import templated
from recipes.mini.pictures import words
from recipes.mini.prompts import distractor_words, language, training_prompt
from recipes.mini.text import clip, qwen
from recipes.mini.text.blocks import Plan
from recipes.mini.text.codes import all_codes
from recipes.mini.text.lexicon import text_words, thing_words
from torch import Tensor, nn
from transformers import CLIPTokenizer, Qwen2Tokenizer

from sdlab.models.flux2_folder import own_text_part
from sdlab.models.folder import text_part
from sdlab.models.parts import check_tensors, load
from sdlab.testing.edits import instruction
from sdlab.testing.scenes import BASE_SHAPES, COLOURS, NEW_SHAPES, SILHOUETTES, Scene, generator, random_scene

CPU = torch.device("cpu")
SEED = 77  # none of the recipes' own


@dataclass(frozen=True)
class Reader:
    """Reads a thing, a colour and a background off a state: the nearest code, or None where the slot is empty."""

    plan: Plan
    places: dict[str, str]  # the slice in which each slot is
    codes: dict[str, Tensor]  # of words, as in the token embedding

    def read(self, state: Tensor, slot: str) -> str | None:
        names = list(COLOURS) if slot != "thing" else [name for name in self.codes if name not in COLOURS]
        part = state[self.plan.places(self.places[slot])]
        likeness = torch.stack([self.codes[name] for name in names]) @ part / len(part)
        best = int(likeness.argmax())
        return names[best] if likeness[best] > 0.6 else None


Encode = Callable[[Sequence[str]], Tensor]  # texts to their last states, (B, D)


@cache
def clip_encoder(folder: Path, dtype: torch.dtype) -> tuple[Encode, Reader]:
    part = text_part(folder / "text_encoder", allow_pickle=False)
    check_tensors(part)
    model, tokenizer = load(part, CPU, dtype), CLIPTokenizer.from_pretrained(folder / "tokenizer")

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Tensor:
        made = tokenizer(list(texts), padding="max_length", max_length=77, return_tensors="pt")
        hidden: Tensor = model(made.input_ids).last_hidden_state
        return hidden[:, -1].float()

    things = sorted({*words(), *SILHOUETTES} - ({*language()} - {*SILHOUETTES}))
    table = embedding(model)
    codes = {word: table[tokenizer.convert_tokens_to_ids(f"{word}</w>")] for word in [*things, *COLOURS]}
    return encode, Reader(clip.PLAN, {"thing": "before", "colour": "before2", "background": "word"}, codes)


@cache
def qwen_encoder(folder: Path, dtype: torch.dtype) -> tuple[Encode, Reader]:
    part = own_text_part(folder, "klein", allow_pickle=False)
    check_tensors(part)
    model, tokenizer = load(part, CPU, dtype), Qwen2Tokenizer.from_pretrained(folder / "tokenizer")

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Tensor:
        made = tokenizer(
            [templated(text) for text in texts], padding="max_length", max_length=64, return_tensors="pt"
        )
        hidden = model(**made, output_hidden_states=True).hidden_states
        assert torch.equal(hidden[9], hidden[18])
        assert torch.equal(hidden[9], hidden[27])
        state: Tensor = hidden[9][:, -1]
        return state.float()

    table = embedding(model)
    codes = {word: table[tokenizer.convert_tokens_to_ids("Ġ" + word)] for word in [*thing_words(), *COLOURS]}
    return encode, Reader(qwen.PLAN, {"thing": "word", "colour": "before", "background": "before2"}, codes)


def embedding(model: nn.Module) -> Tensor:
    """The words' codes: the first slice of the token embedding."""
    found = next(weight for name, weight in model.named_parameters() if "token" in name)
    return found.detach().float()[:, :32]


def share_right(encode: Encode, reader: Reader, asked: Sequence[tuple[str, Slots]]) -> float:
    """Of the texts: how many have thing, colour and background right."""
    states = encode([text for text, _ in asked])
    slots = ("thing", "colour", "background")
    right = [
        all(reader.read(state, slot) == getattr(wanted, slot) for slot in slots)
        for state, (_, wanted) in zip(states, asked, strict=True)
    ]
    return sum(right) / len(right)


def plain_prompts(num: int) -> list[tuple[str, Slots]]:
    """Training prompts of mini-sd, half about words that were never met."""
    met = sorted({*words()} - {*language(), *NEW_SHAPES})
    blank = distractor_words(words(), {*met[:300]})
    asked = []
    for i in range(num):
        rng = generator(SEED, "clip", i)
        scene = random_scene(rng, shapes=BASE_SHAPES if i % 2 else met)
        slots = Slots(False, scene.shape, scene.colour, scene.background)
        asked.append((training_prompt(scene, rng, blank), slots))
    return asked


def pairs(num: int) -> list[tuple[np.random.Generator, tuple[Scene, Scene]]]:
    made = []
    for i in range(num):
        rng = generator(SEED, "qwen", i)
        shapes = BASE_SHAPES if i % 2 else thing_words()
        before = random_scene(rng, shapes=shapes)
        made.append((rng, (before, changed(before, rng, shapes=shapes))))
    return made


def plain_edits(num: int) -> list[tuple[str, Slots]]:
    asked = []
    for _, (before, after) in pairs(num):
        said = {
            slot: getattr(after, name) if getattr(after, name) != getattr(before, name) else None
            for slot, name in (("thing", "shape"), ("colour", "colour"), ("background", "background"))
        }
        asked.append((instruction(before, after), Slots(True, **said)))
    return asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clips_end_mark_says_thing_colour_and_background(clip_folder: Path, dtype: torch.dtype) -> None:
    encode, reader = clip_encoder(clip_folder, dtype)
    assert (
        share_right(encode, reader, plain_prompts(100)) >= 0.97
    )  # a stray word before "star, red, ..." is not told


def test_a_linear_map_reads_words_it_was_not_fitted_to(clip_folder: Path) -> None:
    """Fitted to the states of 150 words, least squares reads the codes of others: no word is special."""
    encode, reader = clip_encoder(clip_folder, torch.float32)
    names = [name for name in reader.codes if name not in COLOURS][:200]
    states = encode([f"red {name}, blue background" for name in names])
    codes = torch.stack([reader.codes[name] for name in names])
    ones = torch.ones(len(names), 1)
    solved = torch.linalg.lstsq(torch.cat([states, ones], 1)[:150], codes[:150], driver="gelsd").solution
    guessed = (torch.cat([states, ones], 1)[150:] @ solved) @ codes.T
    assert (guessed.argmax(1) == torch.arange(150, 200)).all()


@pytest.mark.parametrize("make", ["describe", "plain edits", "free edits"])
def test_qwens_template_says_thing_colour_and_background(qwen_folder: Path, make: str) -> None:
    encode, reader = qwen_encoder(qwen_folder, torch.bfloat16)
    if make == "plain edits":
        asked = plain_edits(60)
    elif make == "describe":
        asked = [describe(scenes[0], rng) for rng, scenes in pairs(60)]
    else:
        asked = [instruct(*scenes, rng) for rng, scenes in pairs(60)]
    assert share_right(encode, reader, asked) >= 0.98


def test_a_capital_says_the_same(qwen_folder: Path) -> None:
    """Every word is one token, at the start and after a blank, and a capital does not change what it stands for."""
    encode, reader = qwen_encoder(qwen_folder, torch.bfloat16)
    tokenizer = Qwen2Tokenizer.from_pretrained(qwen_folder / "tokenizer")
    spelled = [word.capitalize() for word in sorted(text_words()) if word.isalpha()]
    assert len(spelled) > 700
    assert not [word for word in spelled if len(tokenizer(word).input_ids) != 1]
    assert not [word for word in spelled if len(tokenizer(f"a {word}").input_ids) != 2]
    states = encode(["Lemon, Blue, White background", "a photo of a Blue Lemon on white"])
    said = [[reader.read(state, slot) for slot in ("thing", "colour", "background")] for state in states]
    assert said == [["lemon", "blue", "white"]] * 2


def test_an_instruction_leaves_the_slots_of_what_is_kept_empty(qwen_folder: Path) -> None:
    encode, reader = qwen_encoder(qwen_folder, torch.float32)
    states = encode(["make the star blue", "make the red star blue"])
    for state in states:
        assert [reader.read(state, slot) for slot in ("thing", "colour", "background")] == [
            None,
            "blue",
            None,
        ]


@pytest.mark.parametrize("name", ["clip", "qwen"])
def test_an_empty_prompt_says_nothing(clip_folder: Path, qwen_folder: Path, name: str) -> None:
    encode, reader = (
        clip_encoder(clip_folder, torch.float32)
        if name == "clip"
        else qwen_encoder(qwen_folder, torch.float32)
    )
    assert encode([""])[0, :96].abs().max() < 1e-3
    assert reader.plan.slices == ("word", "before", "before2")


def test_words_are_equally_far_from_each_other() -> None:
    codes = all_codes()
    products = codes @ codes.T
    assert products.fill_diagonal_(0).abs().max() == 8  # of 32: a cosine of 1/4


@pytest.mark.parametrize("name", ["clip", "qwen"])
def test_the_same_bytes_every_time(name: str, clip_folder: Path, qwen_folder: Path, tmp_path: Path) -> None:
    if name == "clip":
        first = clip_folder
        clip.write_encoder(tmp_path, CLIPTokenizer.from_pretrained(first / "tokenizer"))
    else:
        first = qwen_folder
        qwen.write_encoder(tmp_path, Qwen2Tokenizer.from_pretrained(first / "tokenizer"))
    for file in ("config.json", "model.safetensors"):
        assert (first / "text_encoder" / file).read_bytes() == (tmp_path / file).read_bytes()
