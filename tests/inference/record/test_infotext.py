"""What other programs read in our pictures."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdlab.inference.record import metadata
from sdlab.inference.record.container import encoded, found_in
from sdlab.inference.record.infotext import parameters
from sdlab.inference.spec import FORMATS, Format
from tests.inference.record import readers
from tests.inference.record.recipes import HIRES, INIT, LORA, MASK, MODEL, REFERENCE, SOURCE, recipe

PEN, INK = (
    LORA,
    {**LORA, "name": "ink wash (v2)", "sha256": "7" * 64, "autov3": "a1b2c3d4e5f6" + "2" * 52, "weight": 0.7},
)


@dataclass(frozen=True)
class Record:
    """A recipe that readers stumble over, and what they have to find where that is not what was typed."""

    prompt: str = "red star"
    negative: str = "blurry"
    read: str | None = None
    more: dict[str, Any] = field(default_factory=dict)
    model: str = "harbour"
    loras: dict[str, str] = field(default_factory=dict)  # hashes by name


NAMED_MODEL = {"model": {**MODEL, "name": 'a, "b": c\nd {e: "f"}'}}
RECORDS = {
    "plain": Record(),
    "nothing at all": Record("", ""),
    "no prompt": Record(""),
    "no negative prompt": Record(negative=""),
    "Chinese and Japanese": Record("猫, 青い背景", "模糊"),
    "emoji": Record("a 🐈 in 👩‍🚀 suit", "🚫"),
    "Latin-1": Record("naïve café", "über"),
    "right to left": Record("قطة حمراء", "ضبابي"),
    "two lines": Record("two\nlines", "and\ntwo more"),
    "Windows lines": Record("two\r\nlines", "and\rtwo more", read="two\nlines"),
    "empty lines": Record("three\n\nlines, Size: 1x1", "\n\n"),
    "weights": Record("watercolour of a (lighthouse:1.2) [at] \\(dusk\\), BREAK ((sea))", "[text]"),
    "settings as a prompt": Record("Steps: 99, Sampler: Euler a, CFG scale: 1, Seed: 1"),
    "settings as a second line": Record("one\nSteps: 3, Sampler: Heun, CFG scale: 2, Seed: 5, Size: 8x8"),
    "settings without a space": Record("one\nSteps:3, Sampler: Heun, CFG scale: 2, Seed: 5"),
    "settings in the negative": Record(negative="two\nSteps: 5, Seed: 3, CFG scale: 1, Sampler: DDIM"),
    "settings from the middle": Record("Seed: 5, Size: 1x2, Model: evil, Version: v9"),
    "negative in the prompt": Record("one\nNegative prompt: two", read="one\nNegative prompt : two"),
    "negative in a line": Record("he wrote Negative prompt: on it", read="he wrote Negative prompt : on it"),
    "negative in the negative": Record(negative="bad\nNegative prompt: worse"),
    "quotes": Record('he said "hello", \\"twice\\" and {"a": 1}', '"', more={}),
    "tables": Record('Lora hashes: "pen: 0123456789ab", Hashes: {"model": "beef"}'),
    "10,000 letters": Record("x" * 10_000, "y " * 3000),
    "NULs and escapes": Record("nul \x00 and \x1b[2J", read="nul and [2J"),
    "half a character": Record("half \udce9 here", "\ud83d", read="half \ufffd here"),
    "separators of lines": Record("one\u2028two\u2029three\x85four"),
    "a tag that is none": Record(
        "<lora:, <lora:a:b:c> <LoRA:x> <lora:>", read="< lora:, < lora:a:b:c> < LoRA:x> < lora:>"
    ),
    "a tag in the negative": Record(negative="<lora:pen:1> bad"),
    "a model with a hostile name": Record(more=NAMED_MODEL, model="a b c d e f"),
    "LoRAs": Record(more={"loras": [PEN, INK]}, loras={"pen": "5f4e3d2c1b0a", "ink_wash_v2": "a1b2c3d4e5f6"}),
    "LoRAs without a prompt": Record("", "", more={"loras": [INK]}, loras={"ink_wash_v2": "a1b2c3d4e5f6"}),
    "LoRAs of names without a letter": Record(
        more={"loras": [{**PEN, "name": "猫, :"}, {**INK, "name": "犬"}]},
        loras={"unnamed": "5f4e3d2c1b0a", "unnamed-2": "a1b2c3d4e5f6"},
    ),
    "LoRAs named like settings": Record(
        more={"loras": [{**PEN, "name": "Seed"}, {**INK, "name": "Size"}]},
        loras={"Seed-2": "5f4e3d2c1b0a", "Size-2": "a1b2c3d4e5f6"},
    ),
}


def words(text: str) -> list[str]:
    """As CLIP cuts a text: letters, marks, no space."""
    return re.findall(r"\w+|[^\w\s]+", text)


def plain(text: str) -> str:
    lines = text.replace("\r\n", "\n").replace("\r", "\n").strip().split("\n")
    return "\n".join(" ".join(line.split()) for line in lines)


def written(tmp_path: Path, about: dict[str, Any], form: Format) -> Path:
    path = tmp_path / f"picture{form.suffix}"
    path.write_bytes(encoded(Image.new("RGB", (8, 8), "red"), about, form))
    return path


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("which", RECORDS)
def test_four_readers_read_the_same_picture(tmp_path: Path, which: str, name: str) -> None:
    record = RECORDS[which]
    about = recipe(prompt=record.prompt, negative=record.negative, **record.more)
    path = written(tmp_path, about, Format(name))
    negative = record.negative.replace("\ud83d", "\ufffd")
    for reader, found in readers.all_of(path).items():
        assert plain(found.prompt) == plain(record.prompt if record.read is None else record.read), reader
        assert words(found.negative) == words(negative), reader
        assert found.settings["Steps"] == "24" and found.settings["Sampler"] == "DPM++ 2M Karras", reader
        assert found.settings["CFG scale"] == "6.5" and found.settings["Seed"] == str(2**53 - 1), reader
        assert found.settings["Size"] == "512x768" and found.settings["Model"] == record.model, reader
        assert found.settings["Model hash"] == "0f1e2d3c4b", reader
        assert found.lora_hashes == record.loras and found.lora_weights.keys() == record.loras.keys(), reader
    assert metadata.read(path) == about


def test_what_is_guarded_is_the_same_to_clip() -> None:
    for record in RECORDS.values():
        text = parameters(recipe(prompt=record.prompt, negative="")).split("\nNegative prompt: ")[0]
        cleaned = re.sub(r"[\x00-\x1f]", " ", record.prompt.replace("\udce9", "\ufffd"))
        assert words(text) == words(cleaned)


EMBEDDING = {**SOURCE, "name": "bad hand", "sha256": "9" * 64}


@pytest.mark.parametrize(
    ("changes", "has", "has_not"),
    [
        ({}, "Model hash: 0f1e2d3c4b, Model: harbour, RNG: CPU, Version: sdlab 0.1.0", "Denoising"),
        ({"init": INIT, "strength": 0.45}, "Denoising strength: 0.45", "Clip skip"),
        ({"init": INIT, "strength": 0.5, "mask": MASK}, "Denoising strength: 0.5, Mask blur: 4", "Hires"),
        ({"init": INIT, "strength": 0.5, "mask": {**MASK, "blur_px": 0}}, "Mask blur: 0", "Hires"),
        ({"model": {**MODEL, "files": {"a": "0" * 64, "b": "1" * 64}}}, "Model: harbour", "Model hash"),
        ({"unet": {**SOURCE, "name": "mine"}}, "Model: harbour with mine", "Model hash"),
        ({"model": {**MODEL, "name": ',:"{}'}}, "Model: unnamed", '"'),
        ({"guidance": 7.0}, "CFG scale: 7, ", "7.0"),
        ({"guidance": 7.123456}, "CFG scale: 7.123456, ", "quality"),
        ({"vae": SOURCE}, "Model: harbour, VAE hash: 2222222222, VAE: pen", "Denoising"),
        ({"vae": {**SOURCE, "files": {"a": "2" * 64, "b": "2" * 64}}}, "VAE: pen", "VAE hash"),
        ({"references": [REFERENCE]}, "Model: harbour, RNG", "Denoising"),
        ({"clip_skip": 2}, "Clip skip: 2", "Emphasis"),
        ({"clip_skip": 2, "model": {**MODEL, "family": "flux2"}}, "Model: harbour", "Clip skip"),
        ({"emphasis": "none"}, "Emphasis: None", "Hires"),
        ({"emphasis": "comfy"}, "Emphasis: Comfy", "Hires"),
        ({"emphasis": "none", "model": {**MODEL, "family": "flux2"}}, "Model: harbour", "Emphasis"),
        ({"hires": HIRES}, "Hires upscale: 2, Hires steps: 12, Hires upscaler: Lanczos", "1024"),
        ({"hires": HIRES}, "Size: 512x768, Denoising strength: 0.35", "1536"),
        ({"loras": [{**LORA, "autov3": ""}]}, "RNG", "Lora hashes"),
        ({"embeddings": [EMBEDDING]}, "RNG", "TI hashes"),
        ({"embeddings": [EMBEDDING], "negative": "Bad Hand"}, 'TI hashes: "bad_hand: 999999999999"', "Lora"),
        ({"scheduler": {"sampler": "DDIM", "schedule_type": ""}}, "Sampler: DDIM, CFG", "Schedule"),
    ],
)  # fmt: skip
def test_settings_line(changes: dict[str, Any], has: str, has_not: str) -> None:
    *_, line = parameters(recipe(**changes)).split("\n")
    assert has in line and has_not not in line and line.startswith("Steps: ")


def test_every_lora_is_named_once_behind_the_prompt() -> None:
    own = {**SOURCE, "name": "my run", "sha256": "3" * 64, "autov3": "c" * 64}
    loras = [LORA, {**LORA, "weight": 0.25, "tag": True}, {**INK, "name": "PEN", "tag": True}]
    about = recipe(prompt="a <lora:pen:0.25> b <lora:PEN:0.7>", loras=loras, model={**MODEL, "lora": own})
    text = parameters({**about, "prompt_sent": "a  b "})
    assert text.startswith("a  b  <lora:my_run:1> <lora:pen:-0.25> <lora:PEN-2:0.7>\n")
    assert 'Lora hashes: "my_run: cccccccccccc, pen: 5f4e3d2c1b0a, PEN-2: a1b2c3d4e5f6"' in text


def test_chunks_are_those_other_programs_expect(tmp_path: Path) -> None:
    data = written(tmp_path, recipe(prompt="é"), Format()).read_bytes()
    assert b"tEXtparameters\0" in data and b"iTXtsdlab\0" in data
    assert b"tEXtprompt" not in data and b"workflow" not in data and b"eXIf" not in data
    assert b"iTXtparameters\0" in written(tmp_path, recipe(prompt="猫"), Format()).read_bytes()
    for name in ("jpeg", "webp"):
        path = written(tmp_path, recipe(prompt="猫"), Format(name))
        with Image.open(path) as image:
            comment = image.getexif().get_ifd(0x8769)[0x9286]
        assert comment == b"UNICODE\0" + (found_in(path).parameters or "").encode("utf-16-be")
