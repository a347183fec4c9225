"""LoRAs as results: one in another layout, or one made of the difference of two models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from sdlab import progress
from sdlab.convert import metadata
from sdlab.convert.job import ANOTHER, Job, is_file_name, target
from sdlab.convert.lora import extract
from sdlab.convert.lora import layout as layouts
from sdlab.convert.lora.layout import Adapter
from sdlab.convert.source import Source, find
from sdlab.convert.wanted import Wanted, gathered
from sdlab.errors import SdlabError
from sdlab.models.files import read_header


def model_at(asked: str, *, allow_pickle: bool) -> Path:
    """The folder or file of the model that `asked` names. Raises SdlabError for a LoRA."""
    source = find(asked, allow_pickle=allow_pickle)
    if source.is_lora:
        raise SdlabError("is a LoRA, not a model", where=asked, next_step="Give a whole model")
    return source.path


def converted(
    source: Source,
    asked: Path | None,
    *,
    layout: str | None,
    base: Path | None,
    dtype: str | None,
    allow_pickle: bool,
) -> Job:
    """A LoRA in another layout. Raises SdlabError where its model is not known, or the layout lacks a layer's name."""
    kind, adapters = layouts.read_adapters(source.path, base=base, allow_pickle=allow_pickle)
    layout = layout or _default(kind)
    name = source.name if source.is_run else f"{source.name}-{layout}"
    path = _target(source, asked, name, layout)
    fields = metadata.of_lora(kind, read_header(source.path).metadata, title=source.name)
    job = _job(path, kind, adapters, layout=layout, dtype=dtype, fields=fields, where=source.path)
    note = f"to have it in a model of its own: sdlab convert --model-path MODEL --lora {source.path}"
    return replace(job, notes=[note]) if source.is_run else job


def extracted(
    source: Source,
    base: Path,
    asked: Path | None,
    wanted: Wanted,
    *,
    layout: str | None,
    rank: int,
) -> Job:
    """The LoRA of `rank` that makes the model of `source` out of the one at `base`, as far as a LoRA can.

    Raises SdlabError where they are of different kinds or shapes, or equal.
    """
    if source.is_lora:
        raise SdlabError("is a LoRA already", where=str(source.path), next_step="Leave out --extract-lora")
    tuned = gathered(source.path, wanted)
    other = gathered(base, Wanted(only=wanted.only, without=wanted.without, allow_pickle=wanted.allow_pickle))
    parts = ("transformer",) if tuned.family == "flux2" else ("unet", "text_encoder")
    shared = [name for name in parts if name in tuned.networks and name in other.networks]
    if not shared:
        raise SdlabError(
            "have no network in common that a LoRA is made for", where=f"{source.path} and {base}"
        )
    layout, title = layout or _default(tuned.kind), f"{source.name}-lora"
    path = _target(source, asked, title, layout)
    if path.exists():  # known before minutes of work
        raise SdlabError("is there already", where=str(path), next_step=ANOTHER)
    before = {name: other.networks[name] for name in shared}
    after = {name: tuned.networks[name] for name in shared}
    with progress.counted(extract.num_tensors(before), unit="tensors", doing="comparing:") as advance:
        made = extract.extract(before, after, rank=rank, advance=advance)
    fields = metadata.of_lora(tuned.kind, {}, title=title)
    job = _job(
        path, tuned.kind, made.adapters, layout=layout, dtype=wanted.dtype, fields=fields, where=source.path
    )
    notes = [f"{made.kept:.1%} of the difference of the weights is in it"]
    if made.left_out:
        others = f"{len(made.left_out)} tensors, the first {made.left_out[0]}"
        notes.append(f"left out, as they differ and cannot be in a LoRA: {others}")
    return replace(job, notes=notes)


def _target(source: Source, asked: Path | None, name: str, layout: str) -> Path:
    """Where the LoRA goes. Raises SdlabError where the layout is of a file and the name of a folder, or otherwise."""
    path = target(source, asked, name=name if layout == "peft" else f"{name}.safetensors")
    if (layout == "peft") == is_file_name(path) or path.suffix.lower() == ".ckpt":
        shape = "a folder" if layout == "peft" else "one .safetensors file"
        raise SdlabError(
            f"a LoRA in the layout {layout} is {shape}, and {path.name} names another thing",
            where="--checkpoint-path",
            next_step="Give another name",
        )
    return path


def _job(
    path: Path,
    kind: str,
    adapters: list[Adapter],
    *,
    layout: str,
    dtype: str | None,
    fields: Mapping[str, str],
    where: Path,
) -> Job:
    outputs = layouts.outputs(adapters, family=_family(kind), layout=layout, dtype=dtype, path=where)
    words = f"a LoRA of {len(adapters)} layers in the layout of {_WORDS[layout]}"
    if layout != "peft":
        return Job(path, words, {"": outputs}, fields)
    config = layouts.peft_config(adapters)
    return Job(path, words, {"adapter_model.safetensors": outputs}, fields, partial(_write_text, text=config))


def _family(kind: str) -> str:
    return "flux2" if kind.startswith("flux2") else "sd"


def _default(kind: str) -> str:
    """The layout that most other tools open."""
    return "bfl" if _family(kind) == "flux2" else "kohya"


_WORDS = {
    "kohya": "kohya's scripts",
    "diffusers": "diffusers",
    "peft": "PEFT",
    "bfl": "Black Forest Labs, as ComfyUI reads it",
}


def _write_text(folder: Path, *, text: str) -> None:
    (folder / "adapter_config.json").write_text(text, encoding="utf-8", newline="\n")
