"""Write ``src/sdlab/models/configs/tensors.json``: names and shapes of all tensors of the models that sdlab knows.

    python -m recipes.tensor_tables

Run it after a change of the configurations below ``configs/`` or of diffusers' classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdlab.models.bases import BUILTINS, CONFIGS, builtin_folder
from sdlab.models.files import read_json
from sdlab.models.parts import build_module, expected
from sdlab.models.tables import CLIP_SHAPES, TABLE, signature

CLASSES = {
    "unet": "UNet2DConditionModel",
    "transformer": "Flux2Transformer2DModel",
    "text_encoder": "CLIPTextModel",
}
VAES = {"sd": "AutoencoderKL", "flux2": "AutoencoderKLFlux2"}


def described() -> Iterator[tuple[str, dict[str, Any]]]:
    """(class, configuration) of every network that we know; UNets as inpainting ones too."""
    for folder in [
        *sorted(p for p in CONFIGS.iterdir() if p.is_dir()),
        *map(builtin_folder, sorted(BUILTINS)),
    ]:
        family = "flux2" if (folder / "transformer").is_dir() else "sd"
        for part in ("unet", "transformer", "vae", "text_encoder"):
            if not (folder / part / "config.json").is_file() or (family, part) == ("flux2", "text_encoder"):
                continue
            config = read_json(folder / part / "config.json")
            yield VAES[family] if part == "vae" else CLASSES[part], config
            if part == "unet":
                yield CLASSES[part], {**config, "in_channels": 9}


def defaults(class_name: str) -> dict[str, Any]:
    """The settings that a class takes where a configuration leaves them out."""
    import inspect

    import diffusers
    from transformers import CLIPTextConfig

    if class_name == "CLIPTextModel":
        return {key: getattr(CLIPTextConfig(), key) for key in CLIP_SHAPES}
    parameters = inspect.signature(getattr(diffusers, class_name).__init__).parameters
    return {n: json.loads(json.dumps(p.default)) for n, p in parameters.items() if n != "self"}


def table() -> dict[str, Any]:
    """The whole table, networks of one signature once."""
    known = {name: defaults(name) for name in (*CLASSES.values(), *VAES.values())}
    entries: dict[str, dict[str, Any]] = {}
    for class_name, config in described():
        key = signature(class_name, config, known[class_name])
        tensors = expected(build_module(class_name, config, Path("configs")))
        entry = {"class": class_name, "config": key, "tensors": tensors}
        entries.setdefault(json.dumps([class_name, key], sort_keys=True), entry)
    return {"defaults": known, "entries": list(entries.values())}


def main() -> None:
    written = json.dumps(table(), separators=(",", ":"), ensure_ascii=False)
    TABLE.write_text(written.replace('},{"class"', '},\n{"class"') + "\n", encoding="utf-8", newline="\n")
    print(f"{TABLE}: {TABLE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
