"""How models read prompts, without their weights: counts, warnings, and what a person is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sdlab.inference import load
from sdlab.inference.prompts.embeddings import Embedding
from sdlab.inference.prompts.reading import Flux2Reading, Reading, reading_of
from sdlab.models import parts
from sdlab.models.opening import open_family
from sdlab.models.resolve import resolve

INKWASH = Embedding("inkwash", torch.zeros(2, 32), Path("inkwash.pt"))


class Opened:
    """As far as a reading looks at it."""

    def __init__(self, name: str) -> None:
        model = resolve(name, training=False)
        self.family: Any = open_family(model)
        self.chosen = type("Chosen", (), {"model": model})


def reading(name: str, *embeddings: Embedding) -> Reading:
    opened: Any = Opened(name)
    assert not isinstance(opened, load.Opened)
    return reading_of(opened, embeddings)


@pytest.fixture(scope="module")
def sd() -> Reading:
    return reading("mini-sd", INKWASH)


@pytest.fixture(scope="module")
def klein() -> Reading:
    return reading("mini-flux2")


def test_no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(parts, "load", refuse)
    for name in ("mini-sd", "mini-flux2"):
        reading(name).explain("red star", "a1111")


def test_chunks_are_counted(sd: Reading, klein: Reading) -> None:
    long = "red star, " * 60
    assert sd.num_chunks("red star", "a1111") == 1
    assert sd.num_chunks("", "a1111") == 1
    assert sd.num_chunks("red BREAK star", "a1111") == 2
    assert sd.num_chunks("red BREAK star", "none") == 1
    assert sd.num_chunks(long, "a1111") == 3
    assert klein.num_chunks(long, "a1111") == 1


def test_a_textual_inversion_counts_its_vectors(sd: Reading) -> None:
    assert sd.num_chunks("inkwash " * 37, "a1111") == 1
    assert sd.num_chunks("inkwash " * 38, "a1111") == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("(red star", "never closed"),
        ("red Negative prompt: blue", "other programs"),
        ("ugly <lora:ink:0.8>", "'<lora:ink:0.8>' is sent as text: a LoRA is named in the prompt"),
        ("ugly <hypernet:ink:1>", "sdlab knows only"),
        ("embedding:glow.pt, embedding:Inkwash", "'embedding:glow.pt' is plain text"),
    ],
)
def test_clip_warns_once_of_what_is_odd(sd: Reading, text: str, said: str) -> None:
    (warning,) = sd.warnings(text, "a1111")
    assert said in warning


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a (red:1.2) star", "the weight 1.2 of 'red' is plain text to FLUX.2"),
        ("a ((red)) star", "the weight 1.21 of 'red'"),
        ("a [red] star, (b:2)", "the weight 0.9091 of 'red' and 1 more"),
        ("a BREAK star", "BREAK is plain text to FLUX.2"),
        ("a star Negative prompt: b", "other programs"),
    ],
)
def test_flux2_tells_that_brackets_are_plain_text(klein: Reading, text: str, said: str) -> None:
    (warning,) = klein.warnings(text, "a1111")
    assert said in warning
    assert klein.warnings(text, "none") == ([warning] if "Negative" in text else [])


def test_flux2_says_nothing_of_a_remark_in_brackets(klein: Reading) -> None:
    assert klein.warnings("a man (smiling), seen from afar", "a1111") == []


def test_flux2_names_what_is_cut(klein: Reading) -> None:
    text = "red star " * 600 + "lighthouse"
    (warning,) = klein.warnings(text, "a1111")
    assert "cut off: " in warning
    assert warning.endswith("lighthouse")
    explained = klein.explain(text, "a1111")
    assert explained.lost.endswith("lighthouse")
    assert explained.num_tokens + explained.num_around == explained.size


def test_clip_explains_every_token_with_its_weight(sd: Reading) -> None:
    explained = sd.explain("red (star:1.3) inkwash<lora:ink:0.5>", "a1111")
    (chunk,) = explained.chunks
    assert [token.weight for token in chunk if token.text == "star"] == [1.3]
    assert chunk[-1].text == "inkwash"
    assert len(chunk[-1].ids) == 2
    assert explained.num_tokens == sum(len(token.ids) for token in chunk)
    assert [(tag.name, tag.weight) for tag in explained.loras] == [("ink", 0.5)]
    assert explained.warnings == ()


def test_a_lora_in_a_negative_prompt_is_shown_as_text(sd: Reading) -> None:
    explained = sd.explain("ugly <lora:ink:0.5>", "a1111", is_negative=True)
    assert not explained.loras
    assert len(explained.warnings) == 1


@pytest.mark.parametrize("kind", ["klein", "dev"])
def test_flux2_explains_the_prompts_own_tokens(
    kind: str, tiny_klein_folder: Path, tiny_dev_folder: Path
) -> None:
    family: Any = open_family(
        resolve(str({"klein": tiny_klein_folder, "dev": tiny_dev_folder}[kind]), training=False)
    )
    reads = Flux2Reading(family.parts)
    explained = reads.explain("(red) 日本", "a1111")
    ids = [number for token in explained.chunks[0] for number in token.ids]
    tokenizer = reads._reader.tokenizer
    assert tokenizer.decode(ids) == "(red) 日本"
    assert explained.num_around == len(
        tokenizer(reads._reader.render(""), add_special_tokens=False).input_ids
    )
    assert not explained.weighs
    assert reads.explain("", "a1111").num_tokens == 0
