"""A model as a folder of diffusers: written under a hidden name, every tensor read back, then named as a whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlab.convert import plan, stream
from sdlab.convert.plan import Output
from sdlab.dataset.disk import sync_folder
from sdlab.errors import SdlabError
from sdlab.models.files import component_weights, read_json
from sdlab.models.folder import TRANSFORMERS_STEMS

if TYPE_CHECKING:
    from sdlab.models.parts import Part
    from sdlab.models.pieces import Pieces

_SUFFIX = "-folder"
_DIFFUSERS = "diffusion_pytorch_model.safetensors"
_TRANSFORMERS = "model.safetensors"
_TYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


def weights_of(pieces: Pieces, *, dtype: str | None) -> dict[str, list[Output]]:
    """The weights of the folder that `pieces` make. Raises SdlabError where a whole pipeline is not there.

    A part alone becomes the folder of that part. `dtype` is for what are floating-point numbers.
    """
    if len(pieces.networks) == 1:
        return {_file_of(part): plan.part_folder(part, dtype=dtype) for part in pieces.networks.values()}
    _check_whole(pieces)
    files = {
        f"{name}/{_file_of(part)}": plan.part_folder(part, dtype=dtype)
        for name, part in pieces.networks.items()
        if not (pieces.family == "flux2" and name == "text_encoder")
    }
    if pieces.family == "flux2":  # whole, with the layers that FLUX.2 does not read
        text = component_weights(pieces.path / "text_encoder", TRANSFORMERS_STEMS, allow_pickle=True)
        files[f"text_encoder/{_TRANSFORMERS}"] = plan.plain(text, dtype=dtype)
    return files


def write(
    path: Path,
    weights: Mapping[str, list[Output]],
    *,
    metadata: Mapping[str, str],
    write_rest: Callable[[Path], None],
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> dict[str, stream.Written]:
    """Write the folder `path`, which must not exist, and say what each file of weights in it is.

    `weights` are by path within the folder; `write_rest` puts everything else into it. Raises SdlabError as
    stream.write does; then nothing is left. What killed runs left beside it goes first.
    """
    sweep(path.parent)
    stream.check_space(path.parent, sum(o.nbytes for outputs in weights.values() for o in outputs))
    with _staged(path) as staged:
        written = {}
        for name, outputs in weights.items():
            file = staged / name
            file.parent.mkdir(parents=True, exist_ok=True)
            written[name] = stream.write(file, outputs, metadata=metadata, advance=advance)
        write_rest(staged)
    return written


def sweep(folder: Path) -> None:
    """Remove the unfinished files and folders of runs that were killed; what another process writes stays."""
    stream.sweep(folder)  # so that the lock files left are held ones
    for path in sorted(folder.glob(f".*.sdlab-part{_SUFFIX}")):
        if path.is_dir() and not path.is_symlink() and not Path(str(path).removesuffix(_SUFFIX)).exists():
            shutil.rmtree(path, ignore_errors=True)  # what is somebody else's stays


def _check_whole(pieces: Pieces) -> None:
    wanted = {"sd": ("unet", "vae", "text_encoder"), "flux2": ("transformer", "vae", "text_encoder")}
    lost = [name for name in wanted[pieces.family] if name not in pieces.networks]
    if lost:
        ways_on = {
            "vae": "Give one with --with-vae FILE, or write a .safetensors with --checkpoint-path",
            "text_encoder": "Write a .safetensors with --checkpoint-path, or its UNet with --only unet",
        }
        raise SdlabError(
            f"holds no {plan.WORDS.get(lost[0], lost[0])}, which a whole folder needs",
            where=str(pieces.path),
            next_step=ways_on.get(lost[0], ""),
        )


def _file_of(part: Part) -> str:
    return _TRANSFORMERS if part.name in ("text_encoder", "safety_checker") else _DIFFUSERS


def write_rest(staged: Path, *, pieces: Pieces, dtype: str | None) -> None:
    """Everything but weights: configurations, tokenizer, schedule, table of contents."""
    from sdlab.models import export  # imports torch, which a single file does not need

    if len(pieces.networks) == 1:
        (part,) = pieces.networks.values()
        export.write_json(staged / "config.json", _config(part, dtype))
        return
    for name, part in pieces.networks.items():
        export.write_json(staged / name / "config.json", _config(part, dtype))
    assert pieces.tokenizer is not None and pieces.scheduler is not None  # of a whole pipeline
    export.write_json(staged / "scheduler" / "scheduler_config.json", pieces.scheduler)
    if pieces.family == "flux2":
        text = pieces.path / "text_encoder"  # its configuration is whole too, as its weights are
        export.copy_files(text, staged / "text_encoder", (".json",), but="index.json")
        if dtype is not None:
            config = _retyped(read_json(text / "config.json"), dtype)
            export.write_json(staged / "text_encoder" / "config.json", config)
        export.copy_files(pieces.tokenizer, staged / "tokenizer", export.TOKENIZER_SUFFIXES)
        source = read_json(pieces.path / "model_index.json")
        export.write_json(staged / "model_index.json", export.flux2_index(source, pieces.is_distilled))
        return
    export.save_tokenizer(pieces.tokenizer, staged / "tokenizer")
    checked = "safety_checker" in pieces.networks
    if checked:
        extractor = pieces.feature_extractor or {}
        export.write_json(staged / "feature_extractor" / "preprocessor_config.json", extractor)
    class_name = "StableDiffusionInpaintPipeline" if pieces.is_inpainting else "StableDiffusionPipeline"
    scheduler = str(pieces.scheduler["_class_name"])
    export.write_json(staged / "model_index.json", export.sd_index(class_name, scheduler, checked=checked))


def _config(part: Part, dtype: str | None) -> dict[str, Any]:
    """The part's configuration as its library saves it, the number type brought up to date."""
    kind = "architectures" if part.name in ("text_encoder", "safety_checker") else "_class_name"
    config: dict[str, Any] = {kind: [part.class_name] if kind == "architectures" else part.class_name}
    config |= {k: v for k, v in part.config.items() if not k.startswith("_") and k != kind}
    return config if dtype is None else _retyped(config, dtype)


def _retyped(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The configuration, and those within it, with the number type that the weights were cast to."""
    inner = {k: _retyped(v, dtype) for k, v in config.items() if isinstance(v, dict)}
    typed: dict[str, Any] = {k: _TYPES[dtype] for k in ("dtype", "torch_dtype") if k in config}
    return {**config, **inner, **typed}


@contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path` that gets the name `path` if the block ends well.

    A file beside it, held by this process, says that it is being written.
    """
    with stream.part_beside(path.with_name(f"{path.name}.safetensors")) as lock:
        staged = Path(f"{lock.name}{_SUFFIX}")
        staged.mkdir()
        try:
            yield staged
            _sync(staged)
            _name(staged, path)
        finally:
            shutil.rmtree(staged, ignore_errors=True)  # not there any more where all went well
    sync_folder(str(path.parent))


def _sync(staged: Path) -> None:
    """Bring all files to disk, and then all names."""
    paths = sorted(staged.rglob("*"))
    for path in (path for path in paths if path.is_file()):
        with path.open("r+b") as file:
            os.fsync(file.fileno())
    for folder in (staged, *(path for path in paths if path.is_dir())):
        sync_folder(str(folder))


def _name(staged: Path, path: Path) -> None:
    try:
        if os.path.lexists(path):
            raise FileExistsError
        os.rename(staged, path)  # never over anything but an empty folder
    except OSError as reason:
        if not os.path.lexists(path):
            raise
        raise SdlabError(
            "is there already", where=str(path), next_step="Give another --checkpoint-path"
        ) from reason
