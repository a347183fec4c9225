"""A finished run as it is shipped: the model's files alone, weights in fp16, tidy JSON; and its place in sdlab."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from recipes.mini.disk import size_bytes, staged
from recipes.mini.figures import Figure, failed
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdlab.errors import SdlabError

MOST_BYTES = 32_000_000  # of all built-in models together
SUFFIXES = (".json", ".txt", ".safetensors", ".jinja")
OF_THE_RUN = ("run.json", "dataset.json")
OF_THE_PLACE = (
    "_name_or_path",
    "is_local",
    "local_files_only",
)  # JSON entries that say where a part was loaded from
ONE_LINE = ("tokenizer.json", "vocab.json")
SHIPPED = ("mini-sd", "mini-flux2", "mini-blip")


def ship(run: Path, target: Path) -> Path:
    """Writes `target`, which it replaces: the model that `run` holds, as it is shipped."""
    with staged(target) as made:
        for path in model_files(run):
            place = made / path.relative_to(run)
            place.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".safetensors":
                save_file(halved(load_file(path), path), place, metadata={"format": "pt"})
            else:
                place.write_text(tidied(path), encoding="utf-8")
    return target


def model_files(run: Path) -> list[Path]:
    """The files of the model itself: the parts that model_index.json names, or all beside the run's own."""
    index = run / "model_index.json"
    if index.is_file():
        parts = [
            name for name, kind in json.loads(index.read_text(encoding="utf-8")).items() if _is_part(kind)
        ]
        paths = [index, *(path for part in parts for path in (run / part).rglob("*"))]
    else:
        paths = [path for path in run.iterdir() if path.name not in OF_THE_RUN]
    found = sorted(
        path for path in paths if path.is_file() and path.suffix in SUFFIXES and path.name[0] != "."
    )
    if not any(path.suffix == ".safetensors" for path in found):
        raise SdlabError("holds no model", where=str(run), next_step="Run the recipe's commands first")
    return found


def _is_part(kind: object) -> bool:
    return isinstance(kind, list) and any(kind)


def halved(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Numbers with a fraction as fp16, others as they are. Raises SdlabError for what is not finite in it."""
    made = {name: t.to(torch.float16) if t.is_floating_point() else t for name, t in tensors.items()}
    wrong = [name for name, t in made.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if wrong:
        raise SdlabError(f"{wrong[0]} has values that fp16 cannot hold", where=str(path))
    return {name: t.contiguous() for name, t in made.items()}


def tidied(path: Path) -> str:
    """A text file without what is of this computer only."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return text
    content = {name: value for name, value in json.loads(text).items() if name not in OF_THE_PLACE}
    indent = None if path.name in ONE_LINE else 2
    return json.dumps(content, indent=indent, ensure_ascii=False) + "\n"


def install(model: Path, figures: list[Figure], *, name: str, builtin: Path) -> None:
    """Puts a shipped model in its place in `builtin`, the package's folder of models. Raises SdlabError below its
    score, or where all models together would be too large; then nothing has changed."""
    low = failed(figures)
    if low:
        raise SdlabError(
            f"is not installed: {'; '.join(low)}", where=str(model),
            next_step="Train it for longer, or with other settings (recipes/mini/models.py)",
        )  # fmt: skip
    others = sum(size_bytes(builtin / other) for other in SHIPPED if other != name)
    total = others + size_bytes(model)
    if total > MOST_BYTES:
        raise SdlabError(f"all built-in models would be {total:,} bytes, of {MOST_BYTES:,}", where=str(model))
    with staged(builtin / name) as made:
        shutil.copytree(model, made)
