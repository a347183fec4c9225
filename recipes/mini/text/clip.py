"""mini-sd's text encoder, a CLIP text model with written-down weights.

What comes out, 128 numbers a token:

    a word          its code | the code of the word before | of the one before that | marks of its kind
    the end mark,   the background's | the thing's | the colour's code               | texture, size, side, height
    all 40 to 77    (zeros where the prompt does not say)

The state holds +BIG and -BIG in two places, minus half of the sum of all others each: its mean is 0 and its spread
always the same, so that layer norm only divides by a constant, and the gain of layer norm multiplies by it again.

Layer 1 looks back. A place p has the code (cos 2 pi f p / 77, sin 2 pi f p / 77), f in FREQUENCIES; a head whose query
is turned back by n places scores  SHARP * sum over f of cos(2 pi f (p - n - k) / 77)  for the key at k, which is
4 SHARP at k = p - n and less than 1.84 SHARP elsewhere. Four such heads copy

    word -> before (n 1)    word -> before2 (n 2)    colour -> colour_before (n 1)    ground -> ground_before2 (n 2)

The end mark has an empty `before2`: it looks at the start mark, whose places hold nothing. The start mark is where a
head looks that finds nothing: it scores 0 there, unsuitable words less.

Layer 2: the end mark finds what the prompt says. A colour is read at the word after it, which tells whose it is:

    colour      at a word after a colour, when it is not "background" and two words before is no ground word ("on blue")
    background  at a word after a colour, when it is, or two words before is a ground word
    texture, size   at the first word that says one

and its neurons clear `before` at the end mark: neurons 2 i and 2 i + 1 compute g(v) - g(-v) = v where v = before[i] at
an end mark, and nearly 0 elsewhere (g = x sigmoid(1.702 x), which has g(x) - g(-x) = x, and g(-BLOCK) is about 0).

Layer 3: the end mark finds the thing - a noun after a colour, else a noun, else any other word that can name something,
the first of equals - and side and height.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from recipes.mini import tokenizer as clip_tokenizer
from recipes.mini.text import lexicon
from recipes.mini.text.blocks import Attention, Form, Linear, Plan, Score, save, write_copies, write_scores
from recipes.mini.text.codes import WIDTH as CODE
from recipes.mini.text.codes import table
from torch import Tensor
from transformers import CLIPTokenizer

from sdlab.testing.scenes import COLOURS

WINDOW, LAYERS, HEADS, NEURONS = 77, 3, 4, 2 * CODE
BIG = 64.0
FREQUENCIES = (1, 12, 15, 20)  # of all four, those whose sum of cosines has the lowest second peak
SHARP = 16.0
BLOCK = 12.0
GROUND = ("on", "background")  # "on blue", "background blue"
TURNS = tuple(f"{kind}{f}" for f in FREQUENCIES for kind in ("cos", "sin"))
MARKS = ("end", "start", "thing", "colour")
PLAN = Plan(
    width=128,
    slices=("word", "before", "before2"),
    scalars=(
        "big", "small_big", *MARKS, *lexicon.KINDS,
        "background", "ground", "colour_before", "ground_before2", "place", *TURNS,
    ),
)  # fmt: skip
SHOWN = {  # the gain of what comes out; all else is 0
    **dict.fromkeys(PLAN.slices, 1.0), **dict.fromkeys(lexicon.KINDS, 3.0), **dict.fromkeys(MARKS, 2.0),
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One layer of the text model."""

    attention: Attention
    fc1: Linear
    fc2: Linear

    @classmethod
    def zeros(cls) -> Layer:
        return cls(
            Attention.zeros(PLAN.width, PLAN.width, bias=True),
            Linear.zeros(NEURONS, PLAN.width, bias=True),
            Linear.zeros(PLAN.width, NEURONS, bias=True),
        )

    def head(self, number: int, score: Score, copies: dict[str, str]) -> None:
        """Writes one of the four heads."""
        start = number * CODE  # a head is as wide as a code
        write_scores(self.attention, start, score, PLAN, queries=math.sqrt(CODE))
        write_copies(self.attention, start, copies, PLAN)

    def clear_at_end(self, name: str) -> None:
        """Neurons that clear a slice at the end mark."""
        for i, place in enumerate(PLAN.places(name)):
            for row, sign in ((2 * i, 1.0), (2 * i + 1, -1.0)):
                self.fc1.set(row, {"1": -BLOCK, "end": BLOCK}, PLAN)
                self.fc1.weight[row, place] = sign
                self.fc2.weight[place, row] = -sign


def back(num_places: int) -> Score:
    """The score that picks the token `num_places` before."""
    score: list[tuple[Form, Form]] = []
    for f in FREQUENCIES:
        turn = 2 * math.pi * f * num_places / WINDOW
        cos, sin = SHARP * math.cos(turn), SHARP * math.sin(turn)
        score.append(({f"cos{f}": cos, f"sin{f}": sin}, {f"cos{f}": 1.0}))
        score.append(({f"sin{f}": cos, f"cos{f}": -sin}, {f"sin{f}": 1.0}))
    return score


def first(suitable: Form, *, per_place: float = 1.5) -> Score:
    """The score by which the end mark picks the first suitable token (a form that is above 0 there), else the start."""
    start = {"start": -suitable.get("1", 0.0)}  # the start mark scores 0
    key = {**suitable, **start, "place": -per_place * WINDOW}
    elsewhere = ({"1": 1.0, "end": -1.0}, {"start": 300.0})
    return [({"end": 1.0}, key), elsewhere]


def layers() -> list[Layer]:
    """The three layers."""
    look_back, tell, name = Layer.zeros(), Layer.zeros(), Layer.zeros()
    look_back.head(0, back(1), {"word": "before"})
    look_back.head(1, [*back(2), ({"end": 1.0}, {"start": 200.0})], {"word": "before2"})
    look_back.head(2, back(1), {"colour": "colour_before"})
    look_back.head(3, back(2), {"ground": "ground_before2"})
    whose = {"colour_before": 400.0}
    tell.head(
        0, first({**whose, "1": -200, "background": -400, "ground_before2": -400}), {"before": "before2"}
    )
    tell.head(1, first({**whose, "1": -500, "background": 300, "ground_before2": 300}), {"before": "word"})
    tell.head(2, first(one_of("texture")), {kind: kind for kind in lexicon.SLOTS["texture"]})
    tell.head(3, first(one_of("size")), {kind: kind for kind in lexicon.SLOTS["size"]})
    tell.clear_at_end("before")
    name.head(0, first({"thing": 300, "colour_before": 120, "1": -140}), {"word": "before"})
    name.head(1, first(one_of("side")), {kind: kind for kind in lexicon.SLOTS["side"]})
    name.head(2, first(one_of("height")), {kind: kind for kind in lexicon.SLOTS["height"]})
    return [look_back, tell, name]


def one_of(slot: str) -> Form:
    return {**dict.fromkeys(lexicon.SLOTS[slot], 400.0), "1": -200.0}


def embeddings(tokenizer: CLIPTokenizer) -> Tensor:
    """Every token's code and marks, (tokens, 128); the two special tokens have no code."""
    vocabulary = tokenizer.get_vocab()
    special = {tokenizer.bos_token: "start", tokenizer.eos_token: "end"}
    whole = sorted(name for name in vocabulary if _is_word(name))
    first_ones = [f"{word}</w>" for word in (*COLOURS, *lexicon.KINDS)]
    rest = [name for name in sorted(vocabulary, key=vocabulary.__getitem__) if name not in {*whole, *special}]
    codes = table(first_ones, [name for name in whole if name not in first_ones], rest)
    rows = torch.zeros(len(vocabulary), PLAN.width, dtype=torch.float64)
    for name, number in vocabulary.items():
        rows[number, PLAN.at("big")], rows[number, PLAN.at("small_big")] = BIG, -BIG
        if name in special:
            rows[number, PLAN.at(special[name])] = 1.0
        else:
            rows[number, PLAN.places("word")] = codes[name]
            _mark(rows[number], name.removesuffix("</w>"))
    return rows


def _is_word(token: str) -> bool:
    word = token.removesuffix("</w>")
    return token.endswith("</w>") and word in lexicon.known_words()


def _mark(row: Tensor, word: str) -> None:
    """Writes what the encoder knows of a word beside its code; pieces of unknown words can name things."""
    known = lexicon.of_prompts(word) if word.isalpha() else lexicon.Word()
    row[PLAN.at("thing")], row[PLAN.at("colour")] = known.thing, float(known.colour)
    row[PLAN.at("background")], row[PLAN.at("ground")] = float(word == "background"), float(word in GROUND)
    if known.kind:
        row[PLAN.at(known.kind)] = 1.0


def positions() -> Tensor:
    """The code of each place, (77, 128)."""
    rows = torch.zeros(WINDOW, PLAN.width, dtype=torch.float64)
    for p in range(WINDOW):
        rows[p, PLAN.at("place")] = p / WINDOW
        for f in FREQUENCIES:
            turn = 2 * math.pi * f * p / WINDOW
            rows[p, PLAN.at(f"cos{f}")], rows[p, PLAN.at(f"sin{f}")] = math.cos(turn), math.sin(turn)
    return rows


def balanced(rows: Tensor) -> Tensor:
    """The rows of what is added to the state, (..., 128), with a sum of 0: the rest goes to the two large places."""
    rows = rows.clone()
    both = [PLAN.at("big"), PLAN.at("small_big")]
    rows[..., both] -= rows.sum(-1, keepdim=True) / 2
    return rows


def tensors(tokenizer: CLIPTokenizer) -> dict[str, Tensor]:
    """All weights by the names that diffusers' pipelines have."""
    spread = math.sqrt((2 * BIG**2 + 3 * CODE + len(FREQUENCIES)) / PLAN.width)  # the state's, of every token
    gain = torch.full((PLAN.width,), spread, dtype=torch.float64)
    gain[[PLAN.at("big"), PLAN.at("small_big")]] = 0.0
    shown = torch.zeros_like(gain)
    for name, times in SHOWN.items():
        shown[PLAN.places(name)] = spread * times
    zeros = torch.zeros_like(gain)
    made = {
        "embeddings.token_embedding.weight": balanced(embeddings(tokenizer)),
        "embeddings.position_embedding.weight": balanced(positions()),
        "final_layer_norm.weight": shown,
        "final_layer_norm.bias": zeros,
    }
    for number, layer in enumerate(layers()):
        parts = {
            "self_attn.q_proj": layer.attention.q, "self_attn.k_proj": layer.attention.k,
            "self_attn.v_proj": layer.attention.v, "self_attn.out_proj": layer.attention.out,
            "mlp.fc1": layer.fc1, "mlp.fc2": layer.fc2,
        }  # fmt: skip
        for name, part in parts.items():
            adds = name in ("self_attn.out_proj", "mlp.fc2")
            assert part.bias is not None
            made[f"encoder.layers.{number}.{name}.weight"] = (
                balanced(part.weight.T).T if adds else part.weight
            )
            made[f"encoder.layers.{number}.{name}.bias"] = part.bias
        for name in ("layer_norm1", "layer_norm2"):
            made[f"encoder.layers.{number}.{name}.weight"] = gain
            made[f"encoder.layers.{number}.{name}.bias"] = zeros
    return {f"text_model.{name}": tensor for name, tensor in made.items()}


def config(tokenizer: CLIPTokenizer) -> dict[str, object]:
    """What config.json says."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": len(tokenizer),
        "hidden_size": PLAN.width,
        "intermediate_size": NEURONS,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": WINDOW,
        "projection_dim": PLAN.width,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def write_encoder(folder: Path, tokenizer: CLIPTokenizer) -> None:
    """Writes the text encoder's config.json and weights (1 MB, fp16)."""
    save(folder, config(tokenizer), tensors(tokenizer), torch.float16)


def write(folder: Path) -> None:
    """Writes folder/tokenizer and folder/text_encoder."""
    write_encoder(folder / "text_encoder", clip_tokenizer.write(folder / "tokenizer"))
