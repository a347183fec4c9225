"""What other programs read in our pictures, and what we read back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sd_parsers import ParserManager

from sdlab.errors import SdlabError
from sdlab.inference.record import metadata


def recipe(**changes: Any) -> dict[str, Any]:
    """A recipe as a picture would hold it."""
    plain: dict[str, Any] = {
        "schema": 2,
        "kind": "txt2img",
        "prompt": "red star",
        "prefix": "",
        "prompt_sent": "red star",
        "negative": "blurry",
        "index": 0,
        "seed": 2**53 - 1,
        "steps": 24,
        "guidance": 6.5,
        "width": 512,
        "height": 768,
        "strength": None,
        "scheduler": {
            "name": "dpm++ 2m karras",
            "sampler": "DPM++ 2M Karras",
            "schedule_type": "Karras",
            "class": "DPMSolverMultistepScheduler",
            "config": {},
        },
        "model": {
            "name": "harbour",
            "kind": "file",
            "asked": "harbour.safetensors",
            "family": "sd",
            "files": {"": "0f1e2d3c4b5a" + "0" * 52},
            "sha256": "0f1e2d3c4b5a" + "0" * 52,
        },
        "unet": None,
        "vae": None,
        "loras": [],
        "init": None,
        "references": [],
        "batch": [],
        "batch_position": 0,
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "exact": False,
        "versions": {"sdlab": "0.1.0"},
    }
    return {**plain, **changes}


FOLDER = {"files": {"unet/a.safetensors": "0" * 64, "vae/b.safetensors": "1" * 64}}
INIT = {
    "name": "a.png",
    "asked": "a.png",
    "sha256": "0" * 64,
    "background": "white",
    "max_pixels": 64_000_000,
}

SOURCE = {
    "name": "pen",
    "kind": "file",
    "asked": "pen.safetensors",
    "files": {"": "2" * 64},
    "sha256": "2" * 64,
}
LORA = {**SOURCE, "weight": -0.5}
REFERENCE = {**INIT, "width": 64, "height": 80}

PROMPTS = [
    "red star",
    "",
    "watercolour of a (lighthouse:1.2) at dusk, <lora:inkwash:0.7>",
    "猫, 青い背景 🐈",
    "naïve café",
    "two\nlines",
    "three\n\nlines, Size: 1x1",
    'he said "hello", \\"twice\\" and {"a": 1}',
    "Steps: 99, Sampler: Euler a, CFG scale: 1, Seed: 1",
    "line one\nSteps: 3, Sampler: Heun, CFG scale: 2, Seed: 5, Size: 8x8",
    "Seed: 5, Size: 1x2, Model: evil, Version: v9",
    "a: b, c: d, e: f",
    "parameters",
    "tab\tbetween",
]


def written(tmp_path: Path, about: dict[str, Any]) -> Path:
    path = tmp_path / "picture.png"
    path.write_bytes(metadata.png(Image.new("RGB", (8, 8)), metadata.texts(about)))
    return path


def a1111(text: str) -> dict[str, str]:
    """The way A1111 reads an infotext: the last line is the settings where it has three pairs or more."""
    pairs = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    *lines, last = text.strip().split("\n")
    if len(pairs.findall(last)) < 3:
        lines, last = [*lines, last], ""
    prompt, negative, in_negative = "", "", False
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            in_negative, line = True, line[16:].strip()
        if in_negative:
            negative += ("" if negative == "" else "\n") + line
        else:
            prompt += ("" if prompt == "" else "\n") + line
    return {**dict(pairs.findall(last)), "Prompt": prompt, "Negative prompt": negative}


def comfyui(text: str) -> dict[str, str]:
    """ComfyUI imports a text only if it can be cut at these two places."""
    rest, settings = text[: text.rindex("\nSteps:")], text[text.rindex("\nSteps:") + 1 :]
    positive, negative = rest.split("\nNegative prompt:", 1)
    found = dict(pair.split(": ", 1) for pair in settings.split(", "))
    return {**found, "Prompt": positive.strip(), "Negative prompt": negative.strip()}


def civitai(text: str) -> dict[str, str]:
    """Civitai takes the first line that starts with ``Steps: `` for the settings, quotes for tables."""
    lines = text.split("\n")
    place = next(i for i, line in enumerate(lines) if line.startswith("Steps: "))
    body, _, negative = "\n".join(lines[:place]).partition("Negative prompt:")
    assert '"' not in lines[place]
    found = dict(pair.split(": ", 1) for pair in lines[place].split(", "))
    return {**found, "Prompt": body.strip(), "Negative prompt": negative.strip()}


def plain(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().split("\n"))


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("negative", ["", "blurry, [text]", "two\nSteps: 5, Seed: 3, CFG scale: 1"])
def test_four_readers_read_the_same_picture(tmp_path: Path, prompt: str, negative: str) -> None:
    about = recipe(prompt=prompt, prompt_sent=prompt, negative=negative)
    path = written(tmp_path, about)
    with Image.open(path) as image:
        text = image.text["parameters"]
    for reader in (a1111, comfyui, civitai):
        found = reader(text)
        assert plain(found["Prompt"]) == plain(prompt), reader.__name__
        assert plain(found["Negative prompt"]) == plain(negative), reader.__name__
        assert found["Steps"] == "24" and found["Sampler"] == "DPM++ 2M Karras"
        assert found["CFG scale"] == "6.5" and found["Seed"] == str(2**53 - 1)
        assert found["Size"] == "512x768" and found["Model"] == "harbour" and found["RNG"] == "CPU"
        assert found["Model hash"] == "0f1e2d3c4b" and found["Version"] == "sdlab 0.1.0"
    parsed = ParserManager().parse(path)
    assert parsed is not None
    sampler = parsed.samplers[0]
    assert sampler.name == "DPM++ 2M Karras" and sampler.parameters["steps"] == "24"
    assert [plain(p.value) for p in sampler.prompts] == [plain(prompt)] * bool(prompt)
    assert [plain(p.value) for p in sampler.negative_prompts] == [plain(negative)] * bool(negative)
    assert (
        sampler.model is not None and sampler.model.name == "harbour" and sampler.model.hash == "0f1e2d3c4b"
    )


@pytest.mark.parametrize("prompt", [*PROMPTS, "Negative prompt: inside", "nul \x00 and \x1b[2J", "\u2028"])
def test_recipe_comes_back_as_it_was(tmp_path: Path, prompt: str) -> None:
    about = recipe(prompt=prompt, prompt_sent=f"best, {prompt}", prefix="best, ", init=INIT, strength=0.5)
    assert metadata.read(written(tmp_path, about)) == about


@pytest.mark.parametrize(
    ("changes", "has", "has_not"),
    [
        ({}, "Model hash: 0f1e2d3c4b, Model: harbour", "Denoising"),
        ({"init": INIT, "strength": 0.45}, "Denoising strength: 0.45", "Clip skip"),
        ({"model": {**recipe()["model"], **FOLDER}}, "Model: harbour", "Model hash"),
        ({"unet": {"name": "mine"}}, "Model: harbour with mine", "Model hash"),
        ({"model": {**recipe()["model"], "name": 'a, "b": c\nd'}}, "Model: a b c d, RNG", '"'),
        ({"model": {**recipe()["model"], "name": ',:"'}}, "Model: unnamed", '"'),
        ({"guidance": 7.0}, "CFG scale: 7, ", "7.0"),
        ({"vae": SOURCE}, "Model: harbour, VAE: pen", "Denoising"),
        ({"references": [REFERENCE]}, "Model: harbour, RNG", "Denoising"),
    ],
)
def test_settings_line(changes: dict[str, Any], has: str, has_not: str) -> None:
    *_, line = metadata.parameters(recipe(**changes)).split("\n")
    assert has in line and has_not not in line and line.startswith("Steps: ")


def test_loras_are_where_a1111_wants_them(tmp_path: Path) -> None:
    about = recipe(loras=[LORA, {**LORA, "name": "a, b", "weight": 1.0}])
    assert a1111(metadata.parameters(about))["Prompt"] == "red star <lora:pen:-0.5> <lora:a b:1>"
    assert metadata.read(written(tmp_path, about)) == about


def test_pictures_of_the_first_version_are_still_read(tmp_path: Path) -> None:
    about = recipe(schema=1, init=INIT, strength=0.5)
    new = {name: about.pop(name) for name in ("vae", "loras", "references")}
    path = tmp_path / "old.png"
    texts = {metadata.CHUNK: metadata.to_json(about)}
    path.write_bytes(metadata.png(Image.new("RGB", (8, 8)), texts))
    assert metadata.read(path) == {**about, **new}


def test_recipe_is_found_without_the_pixels(tmp_path: Path) -> None:
    path = written(tmp_path, recipe())
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"IDAT") + 6])  # nothing behind the first bytes of pixels
    assert metadata.peek(path) == recipe()
    for broken in (b"", b"no picture", data[:40]):
        path.write_bytes(broken)
        assert metadata.peek(path) is None
    assert metadata.peek(tmp_path / "gone.png") is None
    assert metadata.peek(picture_with(tmp_path, parameters="x")) is None


def test_chunks_are_those_other_programs_expect(tmp_path: Path) -> None:
    data = written(tmp_path, recipe(prompt="é", prompt_sent="é")).read_bytes()
    assert b"tEXtparameters\0" in data and b"iTXtsdlab\0" in data
    assert b"tEXtprompt" not in data and b"workflow" not in data and b"eXIf" not in data
    assert b"iTXtparameters\0" in written(tmp_path, recipe(prompt_sent="猫")).read_bytes()


def test_file_names_that_are_not_utf8_come_back(tmp_path: Path) -> None:
    about = recipe(init={**INIT, "name": "caf\udce9.png"}, strength=0.5, prompt="猫", prompt_sent="猫")
    assert metadata.read(written(tmp_path, about)) == about


def test_same_recipe_gives_the_same_bytes(tmp_path: Path) -> None:
    assert written(tmp_path, recipe()).read_bytes() == written(tmp_path, recipe()).read_bytes()


def picture_with(tmp_path: Path, **texts: str) -> Path:
    chunks = PngInfo()
    for key, value in texts.items():
        chunks.add_itxt(key, value)
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png", pnginfo=chunks)
    return tmp_path / "other.png"


@pytest.mark.parametrize(
    ("chunk", "word"),
    [
        ("not json", "damaged"),
        ("[" * 100_000, "damaged"),
        ("[]", "another version"),
        (json.dumps(recipe(schema=3)), "another version"),
        (json.dumps(recipe(loras=[SOURCE])), "damaged at loras.weight"),
        (json.dumps(recipe(loras=[{**LORA, "weight": float("nan")}])), "damaged at loras"),
        (json.dumps(recipe(loras=[{**LORA, "files": {"": 1}}])), "damaged at files"),
        (json.dumps(recipe(vae={"name": "x"})), "damaged at vae.asked"),
        (json.dumps(recipe(references=[INIT])), "damaged at references.width"),
        (json.dumps(recipe(references=[None], loras=[None])), "damaged at loras.*references"),
        (json.dumps(recipe(references=[{**REFERENCE, "width": 2**20}])), "damaged at references"),
        (json.dumps(recipe(references=[REFERENCE] * 65)), "damaged at references"),
        (json.dumps(recipe(model={**recipe()["model"], "lora": {"name": "x"}})), "damaged at model"),
        (json.dumps({"schema": 1}), "damaged at prompt"),
        (json.dumps(recipe(steps=10**9)), "damaged at steps"),
        (json.dumps(recipe(steps=True)), "damaged at steps"),
        (json.dumps(recipe(width=10**9)), "damaged at width"),
        (json.dumps(recipe(batch=[1])), "damaged at batch"),
        (json.dumps(recipe(batch_position=3)), "batch_position"),
        (json.dumps(recipe(width=513)), "damaged at size"),
        (json.dumps(recipe(guidance=float("nan"))), "damaged at guidance"),
        (json.dumps(recipe(index=-1)), "damaged at index"),
        (json.dumps(recipe(init=INIT)), "damaged at strength"),
        (json.dumps(recipe(init=INIT, strength=0.01)), "damaged at strength"),
        (
            json.dumps(recipe(scheduler={**recipe()["scheduler"], "name": "eval"})),
            "damaged at scheduler.name",
        ),
        (json.dumps(recipe(model={**recipe()["model"], "files": {"a": 1}})), "damaged at files"),
        (json.dumps(recipe(model={"name": "x"})), "damaged at model.asked"),
        (json.dumps({"schema": 1, "kind": "grid"}), "is a grid"),
    ],
)
def test_picture_from_anywhere_is_refused_not_trusted(tmp_path: Path, chunk: str, word: str) -> None:
    with pytest.raises(SdlabError, match=word) as caught:
        metadata.read(picture_with(tmp_path, sdlab=chunk))
    assert "other.png" in str(caught.value)


def test_picture_without_recipe_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(SdlabError, match="of another program"):
        metadata.read(picture_with(tmp_path, parameters="x"))
    with pytest.raises(SdlabError, match="holds no sdlab recipe"):
        metadata.read(picture_with(tmp_path))
    with pytest.raises(SdlabError, match="no such picture"):
        metadata.read(tmp_path / "gone.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    with pytest.raises(SdlabError, match="not a PNG"):
        metadata.read(tmp_path / "a.jpg")
    cut = tmp_path / "cut.png"
    cut.write_bytes(written(tmp_path, recipe()).read_bytes()[:300])
    with pytest.raises(SdlabError, match=r"cut\.png"):
        metadata.read(cut)
