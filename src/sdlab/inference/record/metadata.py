"""What a picture says about itself: the whole recipe as JSON, and the line that other programs read.

Two PNG text chunks. `sdlab` (iTXt) holds a JSON object with everything needed to make the picture again.
`parameters` is what A1111, Civitai, ComfyUI and others read; their readers are simple, so its rules matter.
Neither holds a time, so the same recipe gives the same bytes.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlab.errors import SdlabError
from sdlab.inference.engines.schedulers import SCHEDULERS
from sdlab.inference.spec import MAX_SEED

if TYPE_CHECKING:
    from PIL import Image

CHUNK, SCHEMA = "sdlab", 2
ADDED_IN_2: dict[str, Any] = {"vae": None, "loras": [], "references": []}
MAX_BATCH, MAX_REFERENCES = 1024, 64

Recipe = dict[str, Any]


def parameters(recipe: Recipe) -> str:
    """The recipe as an A1111 infotext: prompt, negative prompt and one line of settings.

    The negative line is always there (ComfyUI reads nothing without it), so is the prompt's, even empty; a
    prompt line that starts with ``Steps: `` gets a space in front, or Civitai takes it for the settings;
    names of models lose the marks that separate fields; nothing is quoted. A LoRA is a ``<lora:name:weight>``
    behind the prompt, where A1111 wants it.
    """
    model, scheduler = recipe["model"], recipe["scheduler"]
    pairs: list[tuple[str, Any]] = [("Steps", recipe["steps"]), ("Sampler", scheduler["sampler"])]
    if scheduler["schedule_type"]:
        pairs.append(("Schedule type", scheduler["schedule_type"]))
    pairs += [
        ("CFG scale", _number(recipe["guidance"])),
        ("Seed", recipe["seed"]),
        ("Size", f"{recipe['width']}x{recipe['height']}"),
    ]
    if recipe["unet"] is None and list(model["files"]) == [""]:
        pairs.append(
            ("Model hash", model["sha256"][:10])
        )  # only a single file has the hash that Civitai knows
    name = model["name"] if recipe["unet"] is None else f"{model['name']} with {recipe['unet']['name']}"
    pairs.append(("Model", _field(name)))
    if recipe["vae"] is not None:
        pairs.append(("VAE", _field(recipe["vae"]["name"])))
    if recipe["init"] is not None:
        pairs.append(("Denoising strength", _number(recipe["strength"])))
    pairs += [("RNG", "CPU"), ("Version", f"sdlab {recipe['versions']['sdlab']}")]
    settings = ", ".join(f"{key}: {value}" for key, value in pairs)
    tags = "".join(f" <lora:{_field(one['name'])}:{_number(one['weight'])}>" for one in recipe["loras"])
    return f"{_lines(recipe['prompt_sent'])}{tags}\nNegative prompt: {_lines(recipe['negative'])}\n{settings}"


def _number(value: float) -> str:
    return f"{value:g}"


def _field(text: str) -> str:
    """A name without what separates fields: Civitai reads anything quoted as a table of its own."""
    return (
        " ".join("".join(" " if c in ',:"' or not c.isprintable() else c for c in text).split()) or "unnamed"
    )


def _lines(text: str) -> str:
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    guarded = [f" {line}" if line.startswith("Steps: ") else line for line in lines]
    return "\n".join("".join(c if c >= " " or c == "\t" else " " for c in line) for line in guarded)


def png(image: Image.Image, texts: dict[str, str]) -> bytes:
    """The picture as PNG bytes with the given text chunks; nothing else goes in (no profile, no EXIF)."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for name, text in texts.items():
        if name == CHUNK:
            chunks.add_itxt(name, text)
        else:
            chunks.add_text(name, text)  # tEXt where Latin-1 will do, as other programs write it, else iTXt
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def texts(recipe: Recipe) -> dict[str, str]:
    """Both text chunks of a picture."""
    return {"parameters": parameters(recipe), CHUNK: to_json(recipe)}


def to_json(recipe: Recipe) -> str:
    """One line of JSON, as readable as can be: file names that are not UTF-8 make all of it ASCII."""
    text = json.dumps(recipe, ensure_ascii=False, sort_keys=True)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(recipe, ensure_ascii=True, sort_keys=True)
    return text


def peek(path: Path) -> Recipe | None:
    """The recipe in a picture, without looking at its pixels; None where there is none that can be read."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            recipe = json.loads(image.info.get(CHUNK, "null"))  # ours stands before the pixels
        return _checked(recipe, path)
    except (OSError, SyntaxError, ValueError, RecursionError, Image.DecompressionBombError, SdlabError):
        return None


def read(path: Path) -> Recipe:
    """The recipe in a picture made by sdlab.

    Raises SdlabError where the file cannot be read or has no recipe that this version understands.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        if not path.is_file():
            raise SdlabError("there is no such picture", where=str(path))
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # text chunks may stand behind the pixels
            found = dict(getattr(image, "text", {}))
    except UnidentifiedImageError as reason:
        raise SdlabError("not a PNG, and the recipe is kept in PNG files only", where=str(path)) from reason
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as reason:
        raise SdlabError(f"cannot read the picture ({reason})", where=str(path)) from reason
    if CHUNK not in found:
        other = ", only the A1111 'parameters' text of another program" if "parameters" in found else ""
        raise SdlabError(
            f"holds no sdlab recipe{other}", where=str(path), next_step="Give a PNG made by sdlab"
        )
    try:
        recipe = json.loads(found[CHUNK])
    except (ValueError, RecursionError) as reason:
        raise SdlabError("its sdlab recipe is damaged", where=str(path)) from reason
    return _checked(recipe, path)


SHAPE: dict[str, Any] = {
    "prompt": str,
    "prefix": str,
    "negative": str,
    "index": int,
    "seed": int,
    "steps": int,
    "guidance": (int, float),
    "width": int,
    "height": int,
    "strength": (int, float, type(None)),
    "scheduler": dict,
    "model": dict,
    "unet": (dict, type(None)),
    "vae": (dict, type(None)),
    "loras": list,
    "init": (dict, type(None)),
    "references": list,
    "batch": list,
    "batch_position": int,
    "device": str,
    "dtype": str,
    "threads": int,
    "exact": bool,
    "versions": dict,
}
_FILES = {"asked": str, "kind": str, "name": str, "files": dict, "sha256": str}
_PICTURE = {"asked": str, "name": str, "sha256": str, "background": str, "max_pixels": int}
INNER: dict[str, dict[str, Any]] = {
    "scheduler": {"name": str, "sampler": str, "schedule_type": str, "class": str, "config": dict},
    "model": {**_FILES, "family": str},
    "unet": _FILES,
    "vae": _FILES,
    "loras": {**_FILES, "weight": (int, float)},
    "init": _PICTURE,
    "references": {**_PICTURE, "width": int, "height": int},
    "batch": {"prompt": str, "prefix": str, "negative": str, "seed": int, "index": int},
}
RANGES = {
    "steps": (1, 1000),
    "width": (8, 4096),
    "height": (8, 4096),
    "guidance": (0, 100),
    "index": (0, 10**9),
    "seed": (0, MAX_SEED),
    "threads": (1, 4096),
}


def _checked(recipe: Any, path: Path) -> Recipe:
    """The recipe, if each part has its type and a sane value: a picture may come from anywhere."""
    where = str(path)
    if isinstance(recipe, dict) and recipe.get("kind") == "grid":
        raise SdlabError("is a grid of several pictures", where=where, next_step="Give one of its pictures")
    if not isinstance(recipe, dict) or recipe.get("schema") not in (1, SCHEMA):
        raise SdlabError("its sdlab recipe is of another version", where=where, next_step="Update sdlab")
    checked: Recipe = {**(ADDED_IN_2 if recipe["schema"] == 1 else {}), **recipe}
    bad = _misfits(checked, SHAPE)
    for name, shape in INNER.items():
        inner = checked.get(name)
        for part in inner if isinstance(inner, list) else [inner] * (inner is not None):
            bad += [f"{name}.{key}" for key in (_misfits(part, shape) if isinstance(part, dict) else ["?"])]
    bad = bad or _insane(checked)
    if bad:
        raise SdlabError(f"its sdlab recipe is damaged at {', '.join(bad[:5])}", where=where)
    return checked


def _insane(recipe: Recipe) -> list[str]:
    """Parts of the right type whose value no picture of ours has."""
    batch, references = recipe["batch"], recipe["references"]
    parts = [p for p in (recipe["model"], recipe["unet"], recipe["vae"], *recipe["loras"]) if p]
    beside = [recipe["model"].get(name) for name in ("lora", "rest")]
    sane = {
        **{key: low <= recipe[key] <= high for key, (low, high) in RANGES.items()},
        "batch": len(batch) <= MAX_BATCH and all(0 <= one["seed"] <= MAX_SEED for one in batch),
        "batch_position": 0 <= recipe["batch_position"] < max(1, len(batch)),
        "scheduler.name": recipe["scheduler"]["name"] in ("", *SCHEDULERS),
        "strength": _sane_strength(recipe),
        "files": all(isinstance(digest, str) for part in parts for digest in part["files"].values()),
        "size": all(one[side] % 8 == 0 for one in (recipe, *references) for side in ("width", "height")),
        "references": len(references) <= MAX_REFERENCES
        and all(8 <= one[side] <= 4096 for one in references for side in ("width", "height")),
        "loras": all(math.isfinite(one["weight"]) for one in recipe["loras"]),
        "model": all(p is None or (isinstance(p, dict) and not _misfits(p, _FILES)) for p in beside),
    }
    return [key for key, good in sane.items() if not good]


def _sane_strength(recipe: Recipe) -> bool:
    strength = recipe["strength"]
    if recipe["init"] is None or strength is None:
        return recipe["init"] is None and strength is None
    return bool(0 < strength <= 1 and int(recipe["steps"] * strength) >= 1)


def _misfits(table: dict[str, Any], shape: dict[str, Any]) -> list[str]:
    def fits(value: Any, kinds: Any) -> bool:
        return isinstance(value, kinds) and (kinds is bool or not isinstance(value, bool))

    return [key for key, kinds in shape.items() if key not in table or not fits(table[key], kinds)]
