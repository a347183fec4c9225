"""How other programs read an infotext: their rules in our words, no line of theirs."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from sd_parsers import ParserManager
from sd_parsers.extractors import _jpeg_usercomment

from sdlab.inference.record.container import found_in

_LORA = re.compile(r"<lora:([^:>]+):([^>]+)>")


@dataclass
class Read:
    """What a reader makes of a picture; hashes and weights by the LoRA's name."""

    prompt: str
    negative: str
    settings: dict[str, str]
    lora_hashes: dict[str, str] = field(default_factory=dict)
    lora_weights: dict[str, str] = field(default_factory=dict)


def _without_tags(prompt: str) -> tuple[str, dict[str, str]]:
    return _LORA.sub("", prompt).strip(), dict(_LORA.findall(prompt))


def _table(text: str) -> dict[str, str]:
    return {one.split(": ")[0]: one.split(": ")[1] for one in text.split(", ")} if text else {}


def a1111(text: str) -> Read:
    """The last line is the settings where it has three pairs; a line that starts so begins the negative prompt."""
    pair = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    *lines, last = text.strip().split("\n")
    if len(pair.findall(last)) < 3:
        lines, last = [*lines, last], ""
    parts: tuple[list[str], list[str]] = ([], [])
    place = 0
    for line in map(str.strip, lines):
        begins = line.startswith("Negative prompt:")
        place = 1 if begins else place
        parts[place].append(line[16:].strip() if begins else line)
    settings = {
        key: json.loads(value) if value.startswith('"') else value for key, value in pair.findall(last)
    }
    prompt, weights = _without_tags("\n".join(parts[0]))
    return Read(prompt, "\n".join(parts[1]), settings, _table(settings.get("Lora hashes", "")), weights)


def comfyui(text: str) -> Read:
    """Two places are looked for from the end; without either of them nothing is read."""
    end = text.rindex("\nSteps:")
    middle = text.rindex("\nNegative prompt:", 0, end + 1)
    line = text[end + 1 :].split("\n")[0]
    pairs = re.findall(r'\s*([^:]+):\s*([^"{].*?|".*?"|\{.*?\})\s*(?:,|$)', line)
    prompt, weights = _without_tags(text[:middle])
    settings = dict(pairs)
    hashes = _table(settings.get("Lora hashes", "").strip('"'))
    return Read(prompt, text[middle + 18 : end].strip(), settings, hashes, weights)


def civitai(text: str) -> Read:
    """The first line that starts so is the settings; whatever is quoted there is a table of its own."""
    lines = text.split("\n")
    place = next(i for i, line in enumerate(lines) if line.startswith("Steps: "))
    details = lines.pop(place)
    prompt, *rest = "\n".join(lines).split("Negative prompt:")
    tables = dict(re.findall(r'([^:,]+): "([^"]+)"', details))
    plain = re.sub(r',\s*[^:,]+: "[^"]+"', "", details)
    settings = {key.strip(): value for key, value in (pair.split(": ", 1) for pair in plain.split(", "))}
    quoted = {key.strip(): _table(value) for key, value in tables.items()}
    assert quoted.keys() <= {"Lora hashes", "TI hashes"}
    named = re.findall(r"<lora:([a-zA-Z0-9_.\-]+):([0-9.\-]+)>", prompt)  # no other names are linked
    shown, _ = _without_tags(prompt)
    return Read(shown, "\n".join(rest).strip(), settings, quoted.get("Lora hashes", {}), dict(named))


def sd_parsers(path: Path) -> Read:
    """The library's own result; it knows no tables of hashes, so that one is cut out of the text."""
    _jpeg_usercomment._image_id = None  # it remembers texts by id(), which another picture may have got
    found = ParserManager().parse(path)
    assert found is not None
    [sampler] = found.samplers
    prompt, weights = _without_tags("".join(one.value for one in sampler.prompts))
    settings = {
        "Steps": sampler.parameters["steps"],
        "Seed": sampler.parameters["seed"],
        "CFG scale": sampler.parameters["cfg_scale"],
        "Sampler": sampler.name,
        "Size": found.metadata["Size"],
    }
    if sampler.model is not None:
        settings |= {"Model": sampler.model.name or "", "Model hash": sampler.model.hash or ""}
    line = (found_in(path).parameters or "").split("\n")[-1]
    hashes = re.search(r'Lora hashes: "([^"]*)"', line)
    negative = "".join(one.value for one in sampler.negative_prompts)
    return Read(prompt, negative, settings, _table(hashes[1] if hashes else ""), weights)


def all_of(path: Path) -> dict[str, Read]:
    """What each of the four readers makes of the picture."""
    text = found_in(path).parameters
    assert text is not None
    return {
        "A1111": a1111(text),
        "ComfyUI": comfyui(text),
        "Civitai": civitai(text),
        "sd-parsers": sd_parsers(path),
    }
