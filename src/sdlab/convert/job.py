"""A model becomes what other tools open: one file in the original layout, or a folder of diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sdlab.convert import folder_out, metadata, plan, stream
from sdlab.convert.plan import Output
from sdlab.convert.stream import SOURCE_HASH, Differs, Written
from sdlab.convert.wanted import Wanted, gathered
from sdlab.errors import SdlabError
from sdlab.models import runs
from sdlab.models.files import read_header
from sdlab.models.pieces import Pieces

if TYPE_CHECKING:
    from sdlab.convert.source import Source

ANOTHER = "Give another --checkpoint-path"


@dataclass(frozen=True)
class Job:
    """What is to be written where. Headers only have been read."""

    path: Path
    layout: str  # in words
    files: Mapping[str, list[Output]]  # by path within the folder; "" for a file
    metadata: Mapping[str, str]
    write_rest: Callable[[Path], None] | None = None  # all but weights, into a folder; None for a file
    notes: Sequence[str] = ()  # lines for the report

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(output.nbytes for outputs in self.files.values() for output in outputs)


def target(source: Source, asked: Path | None, *, name: str) -> Path:
    """Where the result goes: `asked`, or `name` beside the source. Raises SdlabError where it cannot lie there."""
    path = asked or source.beside / name
    if not path.parent.is_dir():
        raise SdlabError("no such folder", where=str(path.parent), next_step="Make it first")
    if path.suffix.lower() in (".bin", ".pt", ".pth", ".gguf", ".onnx"):
        raise SdlabError(
            "sdlab writes .safetensors, .ckpt and folders",
            where=str(path),
            next_step=f"Give --checkpoint-path {path.with_suffix('.safetensors')}",
        )
    if source.path.is_dir() and source.path.resolve() in path.resolve().parents:
        raise SdlabError("is inside the model's own folder", where=str(path), next_step=ANOTHER)
    if path.is_symlink() and not path.exists():
        raise SdlabError("is a link to nothing", where=str(path), next_step=ANOTHER)
    return path


def is_file_name(path: Path) -> bool:
    """Does the name mean a file? Everything else means a folder."""
    return path.suffix.lower() in (".safetensors", ".ckpt")


def plan_model(source: Source, asked: Path | None, wanted: Wanted) -> Job:
    """What becomes of a model, or of some parts of one: by default a folder of a file, a file of everything else.

    Raises SdlabError where something is missing or does not fit.
    """
    name = f"{source.name}-{wanted.only}" if wanted.only else source.name
    path = target(source, asked, name=name if source.is_file else f"{name}.safetensors")
    pieces = gathered(source.path, _average(source, wanted))
    if wanted.without and not is_file_name(path):
        raise SdlabError(
            f"a whole folder has its {' and its '.join(plan.WORDS[name] for name in wanted.without)}",
            where=str(path),
            next_step="Give a name that ends in .safetensors, or --only unet",
        )
    if wanted.comfyui and not (is_file_name(path) and "transformer" in pieces.networks):
        raise SdlabError(
            "--comfyui is for the file of a FLUX.2 transformer", where=str(path), next_step="Leave it out"
        )
    if is_file_name(path):
        outputs, layout = single_file(pieces, wanted)
        files = {"": outputs}
    else:
        files, layout = folder_out.weights_of(pieces, dtype=wanted.dtype), "a folder of diffusers"
    merged = [f"{source.name}", *(f"{file.stem}:{weight:g}" for file, weight in wanted.loras)]
    fields = metadata.of_model(pieces, title=source.name, merged=merged if wanted.loras else [])
    notes = [*pieces.notes, *_left_out(pieces)]
    rest = None if "" in files else partial(folder_out.write_rest, pieces=pieces, dtype=wanted.dtype)
    return Job(path, layout, files, fields, rest, notes)


def _average(source: Source, wanted: Wanted) -> Wanted:
    """A run of sdlab's own is its average already, or there is none."""
    if not (wanted.ema and source.is_run):
        return wanted
    if runs.about(source.path).get("weights") != "ema":
        raise SdlabError(
            "this run kept no average of its weights",
            where=str(source.path),
            next_step="Leave out --ema, or train with it",
        )
    return replace(wanted, ema=False)


def _left_out(pieces: Pieces) -> list[str]:
    """What the source holds beside the model, so that nothing is dropped without a word."""
    others = pieces.left_out
    return (
        [f"left out, as no part of the model: {len(others)} tensors, the first {others[0]}"] if others else []
    )


def single_file(pieces: Pieces, wanted: Wanted) -> tuple[list[Output], str]:
    """The tensors of one file, and its layout in words."""
    networks, dtype = pieces.networks, wanted.dtype
    if pieces.family == "flux2" and "transformer" in networks:
        prefix = plan.COMFYUI_PREFIX if wanted.comfyui else ""
        outputs = plan.transformer(networks["transformer"], dtype=dtype, prefix=prefix)
        where = "with ComfyUI's prefix" if prefix else "the transformer alone"
        return outputs, f"Black Forest Labs' layout, {where}"
    if set(networks) == {"vae"}:
        return plan.vae(networks["vae"], dtype=dtype), "a VAE in the original layout"
    if "unet" not in networks:
        raise SdlabError(
            f"is a {' and a '.join(networks).replace('_', ' ')} alone",
            where=str(pieces.path),
            next_step="Give a whole model, a UNet, a transformer or a VAE",
        )
    return plan.checkpoint(networks, dtype=dtype), "the original Stable Diffusion layout"


def write(job: Job, *, advance: Callable[[int], None]) -> dict[str, Written]:
    """Write the file or folder, read it back and compare. Raises SdlabError, leaving nothing, if it differs."""
    if job.write_rest is not None:
        return folder_out.write(
            job.path, job.files, metadata=job.metadata, write_rest=job.write_rest, advance=advance
        )
    folder_out.sweep(job.path.parent)
    if job.path.suffix.lower() == ".ckpt":
        from sdlab.convert import ckpt

        return {"": ckpt.write(job.path, job.files[""], advance=advance)}
    return {"": stream.write(job.path, job.files[""], metadata=job.metadata, advance=advance)}


def found(job: Job, *, advance: Callable[[int], None]) -> dict[str, Written]:
    """What is said of the file that is there, if it is what `write` writes, byte by byte.

    Raises SdlabError if it is anything else, and for a folder or a .ckpt. What killed runs left goes first.
    """
    path = job.path
    folder_out.sweep(path.parent)
    if "" not in job.files or path.suffix.lower() == ".ckpt" or not _has_tensors(path, job.files[""]):
        raise SdlabError("is there already", where=str(path), next_step=ANOTHER)
    said = read_header(path).metadata
    if {k: v for k, v in said.items() if k != SOURCE_HASH} != {"format": "pt", **job.metadata}:
        raise _of_another(path)
    try:
        return {"": stream.compare(path, job.files[""], metadata=job.metadata, advance=advance)}
    except Differs as where:
        if stream.source_hash(job.files[""]) != said.get(SOURCE_HASH):
            raise _of_another(path) from where
        raise SdlabError(
            f"is there already, says that it is made of this model, and differs from it in {where}",
            where=str(path),
            next_step="It is damaged: remove it, or give another --checkpoint-path",
        ) from where


def _of_another(path: Path) -> SdlabError:
    what = "is there already, made of another model or by another version of sdlab"
    return SdlabError(what, where=str(path), next_step=ANOTHER)


def _has_tensors(path: Path, outputs: list[Output]) -> bool:
    """Whether a file's header names these very tensors; quick, before a model of gigabytes is read."""
    try:
        header = read_header(path)
    except SdlabError:  # not a file of tensors at all
        return False
    there = {stored.name: (stored.dtype, stored.shape) for stored in header.tensors.values()}
    return there == {output.name: (output.dtype, output.shape) for output in outputs}
