"""mini-flux2's text encoder, a Qwen3 language model with written-down weights.

FLUX.2 reads the states after layers 9, 18 and 27; all work is done in the first nine, the others hand it on. What comes
out, 128 numbers a token, three times:

    a word of the prompt      its code | the code of the word before | of the one before that | marks of its kind
    all tokens after the      the thing's | the colour's | the background's code | texture, size, side, height, edit
    prompt: template, filler  (zeros where the text does not say; of an instruction: what is to be kept)

Qwen3 has no biases and no places in its state. The state's "one" holds BIG: RMS norm then divides by nearly the same
for every token, and its gain multiplies by that again. Queries and keys are normed once more; one of their numbers is
BALLAST, which makes that a constant too, and its gain is 0. Position comes in by rotation (RoPE, Su et al. 2021): a
query (cos a, sin a) and a key (1, 0) in the pair of numbers that turns by w a place score cos(a + w d) for a key that
is d places back. With w of 1, 0.32, 0.1, ... (PAIRS; the base is 10^8)

    the word before:   SHARP * sum over the first four w of weight(w) * cos(w (d - 1)), largest at d = 1
    the latest:        -PER_PLACE / w * sin(w d), w = 0.01: falls by PER_PLACE a place;  the first: plus the same

"user", the template's second token, is where a head looks that finds nothing: its places hold nothing, it scores 0.

Layer 1  word -> before, and marks of the word before. Neurons: "colour" after "background" is no anchor, "it" after
         "behind" makes no instruction.
Layer 2  before -> before2, and the mark of two words before.
Layer 3  the latest anchor: was it the background or the thing ("make the background blue and the star red")? Was there
         a word before that makes the text an instruction?
Layer 4  the same for the word before. Neurons tell at a word after a colour whether that was the background's: this
         word is "background", or the latest anchor before was and this word does not go on to the thing. And a thing in
         "change the red star" is no new thing.
Layer 5  after the prompt: the latest colour of the thing, the latest of the background, each read at the word after it.
Layer 6  after the prompt: the thing, best after a colour, not after "the" and "from", the first of equals; texture.
Layers 7, 8  size, side; height.
Layer 9  neurons take BIG away, so that the denoiser sees no large constant (what is left of it is at most 1.5).
Layers 10 to 28 hand the state on: they look where layer 1 does, and their output projections are zero. All zeros would
do as well, but sdlab takes a file of which most weights are zeros for a damaged one.

Two neurons are a step: (silu(GATE * form) - silu(GATE * (form - 1/4))) / (GATE / 4) is 1 for a form of 1/2 and more,
which is how far sums of marks are off their threshold, and nearly 0 for -1/2 and less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from recipes.mini import flux2_tokenizer
from recipes.mini.text import lexicon
from recipes.mini.text.blocks import Attention, Form, Linear, Plan, Score, save, write_copies, write_scores
from recipes.mini.text.codes import WIDTH as CODE
from recipes.mini.text.codes import table
from torch import Tensor
from transformers import Qwen2Tokenizer

from sdlab.testing.scenes import COLOURS

LAYERS, WORKING, HEADS, NEURONS = 28, 9, 2, 8
BIG, BALLAST, KEY_SCALE, GATE = 128.0, 128.0, 400.0, 40.0
ROPE_BASE = 1e8
PAIRS = tuple(ROPE_BASE ** (-i / (CODE // 2)) for i in range(CODE // 2))  # radians a place
NEAR = (1.0, 0.4, 0.4, 0.4)  # weights of the first pairs, for the word before
FAR, CONTENT = (
    4,
    8,
)  # the pair for the latest and the first; the first pair for what does not depend on the distance
SHARP, PER_PLACE = 50.0, 2.5
BALLAST_AT = 5
NOTHING = "user"
TEMPLATE = ("<|endoftext|>", "<|im_start|>", "<think>", "</think>", "assistant", "Ċ", "ĊĊ", NOTHING)
PLAN = Plan(
    width=128,
    slices=("word", "before", "before2"),
    scalars=(
        "one", "end", "nothing", "thing", "colour", *lexicon.KINDS, *lexicon.MARKS,
        "colour_before", "ground_before", "old_before", "old_before2", "comma_before",
        "at_ground", "at_ground_before", "is_edit", "of_ground",
    ),
    one=BIG,
)  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """A score of weight * cos(angle + w d), w that of the pair, at a distance of d places."""

    pair: int
    angle: float
    weight: float


@dataclass
class Layer:
    """One layer of the language model, without its norms."""

    attention: Attention = field(
        default_factory=lambda: Attention.zeros(PLAN.width, HEADS * CODE, bias=False)
    )
    gate: Linear = field(default_factory=lambda: Linear.zeros(NEURONS, PLAN.width, bias=False))
    up: Linear = field(default_factory=lambda: Linear.zeros(NEURONS, PLAN.width, bias=False))
    down: Linear = field(default_factory=lambda: Linear.zeros(PLAN.width, NEURONS, bias=False))
    num_neurons: int = 0

    def head(self, number: int, turns: Sequence[Turn], content: Score, copies: dict[str, str]) -> None:
        """Writes a head: what it scores by distance, what by content, and what it copies."""
        start = number * CODE
        for projection in (self.attention.q, self.attention.k):
            projection.set(start + BALLAST_AT, {"1": BALLAST}, PLAN)
        for turn in turns:
            self.attention.q.set(start + turn.pair, {"1": math.cos(turn.angle)}, PLAN)
            self.attention.q.set(start + turn.pair + CODE // 2, {"1": math.sin(turn.angle)}, PLAN)
            self.attention.k.set(start + turn.pair, {"1": turn.weight / KEY_SCALE}, PLAN)
        write_scores(self.attention, start + CONTENT, content, PLAN, keys=1 / KEY_SCALE)
        write_copies(self.attention, start, copies, PLAN)

    def add_if(self, form: Form, writes: Form) -> None:
        """Two neurons that add `writes` where the form is 1/2 or more, nothing where it is -1/2 or less."""
        for sign, above in ((1.0, 0.0), (-1.0, 0.25)):
            row = self.num_neurons
            self.gate.set(row, {**form, "1": form.get("1", 0.0) - above}, PLAN, times=GATE)
            self.up.set(row, {"1": 1.0}, PLAN)
            for name, weight in writes.items():
                self.down.weight[PLAN.at(name), row] = sign * weight / (GATE / 4)
            self.num_neurons += 1


BEFORE = tuple(Turn(i, -PAIRS[i], SHARP * weight) for i, weight in enumerate(NEAR))
LATEST = (Turn(FAR, math.pi / 2, PER_PLACE / PAIRS[FAR]),)
FIRST = (Turn(FAR, -math.pi / 2, PER_PLACE / PAIRS[FAR]),)


def of_words(score: Score) -> Score:
    """The score, but tokens of the template look at nothing."""
    return [*score, ({"end": 1.0}, {"nothing": 1000.0})]


def of_the_end(suitable: Form) -> Score:
    """The score by which tokens after the prompt pick a suitable word (a form well above 0 there), else nothing."""
    key = {**suitable, "end": -2000.0, "nothing": 2000.0 - suitable.get("1", 0.0)}
    return [({"end": 1.0}, key), ({"1": 1.0, "end": -1.0}, {"nothing": 1000.0})]


def one_of(slot: str) -> Form:
    return {**dict.fromkeys(lexicon.SLOTS[slot], 600.0), "1": -300.0}


def layers() -> list[Layer]:
    """All layers."""
    made = [Layer() for _ in range(WORKING)]
    made[0].head(0, BEFORE, of_words([]), {"word": "before"})
    marks = {
        "colour": "colour_before",
        "ground": "ground_before",
        "old": "old_before",
        "comma": "comma_before",
    }
    made[0].head(1, BEFORE, of_words([]), marks)
    made[0].add_if({"hue": 1, "ground_before": 1, "1": -1.5}, {"anchor": -1.0})
    made[0].add_if(
        {"edit": 1, "anchor": 1, "ground_before": 1, "1": -2.5}, {"edit": -1.0}
    )  # "with blue behind it"
    made[1].head(0, BEFORE, of_words([]), {"before": "before2"})
    made[1].head(1, BEFORE, of_words([]), {"old_before": "old_before2"})
    made[2].head(0, LATEST, [({"1": 1.0}, {"anchor": 400, "nothing": 200})], {"to_ground": "at_ground"})
    made[2].head(1, LATEST, [({"1": 1.0}, {"edit": 400, "nothing": 200})], {"edit": "is_edit"})
    made[3].head(0, BEFORE, of_words([]), {"at_ground": "at_ground_before"})
    _tell_whose(made[3])
    colour: Form = {"colour_before": 400, "of_ground": -400, "1": -200}
    made[4].head(0, LATEST, of_the_end(colour), {"before": "before"})
    made[4].head(1, LATEST, of_the_end({"of_ground": 400, "1": -200}), {"before": "before2"})
    thing: Form = {"thing": 600, "colour_before": 150, "comma_before": -100, "old_before": -900, "1": -250}
    made[5].head(0, FIRST, of_the_end(thing), {"word": "word"})
    for slot, layer, number in (("texture", 5, 1), ("size", 6, 0), ("side", 6, 1), ("height", 7, 0)):
        copies = {kind: kind for kind in lexicon.SLOTS[slot]}
        made[layer].head(number, FIRST, of_the_end(one_of(slot)), copies)
    made[WORKING - 1].add_if({"1": 0.5}, {"one": -BIG})
    return [*made, *(handing_on(made[0]) for _ in range(WORKING, LAYERS))]


def handing_on(like: Layer) -> Layer:
    """A layer that computes what `like` does and adds nothing of it to the state."""
    silent = Layer()
    return replace(like, attention=replace(like.attention, out=silent.attention.out), down=silent.down)


def _tell_whose(layer: Layer) -> None:
    """Neurons of a word after a colour: is it the background's? And is the thing after it a new one?"""
    layer.add_if({"colour_before": 1, "ground": 1, "1": -1.5}, {"of_ground": 1.0})
    later: Form = {"colour_before": 1, "at_ground_before": 1, "joins": -1, "ground": -1, "1": -1.5}
    layer.add_if(later, {"of_ground": 1.0})
    layer.add_if({"colour_before": 1, "is_edit": 1, "old_before2": 1, "1": -2.5}, {"thing": -1.0})


def embeddings(tokenizer: Qwen2Tokenizer) -> Tensor:
    """Every token's code and marks, (tokens, 128); the same for all spellings of a word; the template has no code."""
    vocabulary = tokenizer.get_vocab()
    spelled = {name: _word(name) for name in sorted(vocabulary, key=vocabulary.__getitem__)}
    special = [*COLOURS, *lexicon.KINDS]
    whole = sorted({word for word in spelled.values() if word in lexicon.text_words()} - {*special})
    rest = dict.fromkeys(word for word in spelled.values() if word not in {*special, *whole})
    codes = table(special, whole, [*rest])
    rows = torch.zeros(len(vocabulary), PLAN.width, dtype=torch.float64)
    for name, word in spelled.items():
        row = rows[vocabulary[name]]
        row[PLAN.at("one")] = BIG
        if name in TEMPLATE:
            row[PLAN.at("end")] = 1.0
            row[PLAN.at("nothing")] = float(name == NOTHING)
        else:
            row[PLAN.places("word")] = codes[word]
            _mark(row, word)
    return rows


def _word(token: str) -> str:
    """The word that a token spells, in small letters; a piece of a word is left as it is."""
    word = token.removeprefix(flux2_tokenizer.BLANK).lower()
    return word if word in lexicon.text_words() else token


def _mark(row: Tensor, word: str) -> None:
    """Writes what the encoder knows of a word beside its code; pieces of unknown words can name things."""
    known = lexicon.of_texts(word.removeprefix(flux2_tokenizer.BLANK))
    row[PLAN.at("thing")], row[PLAN.at("colour")] = known.thing, float(known.colour)
    for mark in known.marks | ({known.kind} if known.kind else set()):
        row[PLAN.at(mark)] = 1.0


def tensors(tokenizer: Qwen2Tokenizer) -> dict[str, Tensor]:
    """All weights by the names that transformers has."""
    spread = math.sqrt((BIG**2 + 2.5 * CODE) / PLAN.width)  # the root mean square of a state, of every token
    gain = torch.full((PLAN.width,), spread, dtype=torch.float64)
    ones = torch.ones_like(gain)
    turned = torch.full((CODE,), BALLAST / math.sqrt(CODE), dtype=torch.float64)
    turned *= math.sqrt(
        KEY_SCALE * math.sqrt(CODE)
    )  # half of what makes the product of query and key the score
    turned[BALLAST_AT] = 0.0
    made = {"model.embed_tokens.weight": embeddings(tokenizer), "model.norm.weight": ones}
    for number, layer in enumerate(layers()):
        parts = {
            "self_attn.q_proj": layer.attention.q, "self_attn.k_proj": layer.attention.k,
            "self_attn.v_proj": layer.attention.v, "self_attn.o_proj": layer.attention.out,
            "mlp.gate_proj": layer.gate, "mlp.up_proj": layer.up, "mlp.down_proj": layer.down,
        }  # fmt: skip
        start = f"model.layers.{number}"
        made |= {f"{start}.{name}.weight": part.weight for name, part in parts.items()}
        temper = (
            turned if number < WORKING else torch.ones_like(turned)
        )  # scores that no layer needs stay small
        made |= {f"{start}.self_attn.{name}_norm.weight": temper for name in "qk"}
        made |= {f"{start}.{name}_layernorm.weight": gain for name in ("input", "post_attention")}
    return made


def config(tokenizer: Qwen2Tokenizer) -> dict[str, object]:
    """What config.json says."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": len(tokenizer),
        "hidden_size": PLAN.width,
        "intermediate_size": NEURONS,
        "num_hidden_layers": LAYERS,
        "layer_types": ["full_attention"] * LAYERS,
        "max_window_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": CODE,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": ROPE_BASE, "rope_type": "default"},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    }


def write_encoder(folder: Path, tokenizer: Qwen2Tokenizer) -> None:
    """Writes the text encoder's config.json and weights (3.1 MB, bf16)."""
    save(folder, config(tokenizer), tensors(tokenizer), torch.bfloat16)


def write(folder: Path) -> None:
    """Writes folder/tokenizer and folder/text_encoder."""
    tokenizer = flux2_tokenizer.write(folder / "tokenizer")
    tokenizer.save_pretrained(
        folder / "tokenizer", save_jinja_files=False
    )  # the template where all versions look
    (folder / "tokenizer" / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))  # vocab.json, merges.txt
    write_encoder(folder / "text_encoder", tokenizer)
