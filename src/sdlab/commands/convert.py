"""`sdlab convert`: a model as one file, a folder out of a file, LoRAs in other layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sdlab import show
from sdlab.errors import SdlabError
from sdlab.options import normalise, opt

if TYPE_CHECKING:
    from sdlab.convert.job import Job
    from sdlab.convert.source import Source
    from sdlab.convert.stream import Written
    from sdlab.convert.wanted import Wanted

WHAT, PARTS, LORAS = "What to convert", "Parts of a model", "LoRAs"
CKPT = (
    "a .ckpt is a pickle: opening one can run code, so many will not open yours, and it has no header to say what the "
    "UNet predicts. A .safetensors holds more and loads everywhere"
)


@dataclass(frozen=True)
class ConvertConfig:
    """Options of `sdlab convert`."""

    model_path: Annotated[
        str,
        opt(
            "Model or LoRA: a run, folder, file, hub id or built-in (default: the newest run).",
            old=("--load-model",),
            group=WHAT,
        ),
    ] = ""
    checkpoint_path: Annotated[
        Path | None,
        opt(
            "What to write: NAME.safetensors for one file, another name for a folder (default: beside the model; "
            "a file becomes a folder and everything else a file).",
            old=("--output",),
            group=WHAT,
        ),
    ] = None
    half: Annotated[bool, opt("Write 16-bit numbers: --dtype fp16.", flag="--half", group=WHAT)] = False
    dtype: Annotated[
        str | None,
        opt("Number type (default: as it is).", choices=("fp16", "bf16", "fp32"), group=WHAT),
    ] = None
    use_safetensors: Annotated[
        bool,
        opt(
            "Write .safetensors, which is the default; a name that ends in .ckpt asks for a pickle.",
            flag="--use-safetensors",
            group=WHAT,
        ),
    ] = True
    vae: Annotated[bool, opt("Put the VAE in (Stable Diffusion).", group=PARTS)] = True
    text_encoder: Annotated[bool, opt("Put the text encoder in (Stable Diffusion).", group=PARTS)] = True
    only: Annotated[
        str | None,
        opt("Write this part alone.", choices=("unet", "vae", "transformer"), group=PARTS),
    ] = None
    with_vae: Annotated[Path | None, opt("Take the VAE from this file or folder (a path).", group=PARTS)] = (
        None
    )
    ema: Annotated[
        bool, opt("Take the averaged weights that a file keeps beside the others.", flag="--ema", group=PARTS)
    ] = False
    comfyui: Annotated[
        bool,
        opt(
            "Put ComfyUI's prefix before the names of a FLUX.2 transformer; diffusers does not read that.",
            flag="--comfyui",
            group=PARTS,
        ),
    ] = False
    prediction_type: Annotated[
        str | None,
        opt(
            "What the UNet predicts, where its file does not say.",
            choices=("epsilon", "v_prediction"),
            group=PARTS,
        ),
    ] = None
    lora: Annotated[
        tuple[str, ...],
        opt("Merge a LoRA into the model: FILE or FILE:0.8; repeat for more.", group=LORAS),
    ] = ()
    lora_layout: Annotated[
        str | None,
        opt(
            "Names and form of a LoRA that is written (default: kohya for Stable Diffusion, bfl for FLUX.2, which "
            "most tools open).",
            choices=("kohya", "diffusers", "peft", "bfl"),
            group=LORAS,
        ),
    ] = None
    extract_lora: Annotated[
        str, opt("Write the LoRA that makes --model-path out of this model.", group=LORAS)
    ] = ""
    rank: Annotated[int, opt("Rank of an extracted LoRA.", min=1, max=1024, group=LORAS)] = 32
    base: Annotated[
        str, opt("Model that a LoRA was trained for, where its shapes do not tell.", group=LORAS)
    ] = ""
    allow_pickle: Annotated[
        bool, opt("Read .ckpt and .bin files (tensors only).", flag="--allow-pickle", group=WHAT)
    ] = False
    json: Annotated[bool, opt("The report as one JSON document on stdout.", flag="--json", group=WHAT)] = (
        False
    )


def convert(config: ConvertConfig, given: frozenset[str]) -> None:
    """Make one file of a model that A1111, ComfyUI and others open, or a folder of diffusers out of such a file.

    A LoRA is written with the names of other tools, merged into its model (--lora), or made of the difference of
    two models (--extract-lora). What is written is read back and compared with its source before it gets its name.
    Nothing that is there is ever replaced.
    """
    from sdlab.convert import source as sources

    _check(config, given)
    source = sources.find(config.model_path, allow_pickle=config.allow_pickle)
    show.note(source.why)
    job = _job(config, source)
    if job.path.suffix.lower() == ".ckpt":
        show.warn(CKPT)
    is_there = job.path.exists()
    written = _run(job, is_there=is_there)
    if is_there:
        show.note(f"{job.path}: made of this model already")
    _tell(config, job, written)


def _check(config: ConvertConfig, given: frozenset[str]) -> None:
    if config.half and config.dtype not in (None, "fp16"):
        raise SdlabError(f"--half and --dtype {config.dtype} contradict each other", next_step="Give one")
    path = config.checkpoint_path
    if path is not None and path.suffix.lower() == ".ckpt" and "use_safetensors" in given:
        raise SdlabError(f"--use-safetensors and {path} contradict each other", next_step="Give one")
    if config.extract_lora and config.lora:
        raise SdlabError("--extract-lora and --lora are two jobs", next_step="Give one")
    if config.extract_lora:
        _refuse(
            config, ("base", "with_vae", "ema", "comfyui", "prediction_type"), "is not for --extract-lora"
        )
    if config.with_vae is not None and config.only not in (None, "vae"):
        raise SdlabError(f"--with-vae and --only {config.only} are two jobs", next_step="Give one")
    if "rank" in given and not config.extract_lora:
        raise SdlabError("--rank is for --extract-lora", next_step="Leave it out")


def _dtype(config: ConvertConfig) -> str | None:
    from sdlab.convert.wanted import WORDS

    word = "fp16" if config.half else config.dtype
    return WORDS[word] if word else None


def _job(config: ConvertConfig, source: Source) -> Job:
    from sdlab.convert import job as jobs

    wanted = _wanted(config)
    if config.extract_lora:
        from sdlab.convert.lora import job as lora_job

        base = lora_job.model_at(config.extract_lora, allow_pickle=config.allow_pickle)
        return lora_job.extracted(
            source, base, config.checkpoint_path, wanted, layout=config.lora_layout, rank=config.rank
        )
    if not source.is_lora:
        if config.lora_layout is not None or config.base:
            raise SdlabError(
                "--lora-layout and --base are for LoRAs, and this is none",
                where=str(source.path),
                next_step="Leave them out",
            )
        return jobs.plan_model(source, config.checkpoint_path, wanted)
    if config.lora:
        raise SdlabError(
            "is a LoRA, and a LoRA cannot be merged into one",
            where=str(source.path),
            next_step=f"Merge it into its model: --model-path MODEL --lora {source.path}",
        )
    from sdlab.convert.lora import job as lora_job

    _refuse_model_options(config)
    trained_on = lora_job.model_at(config.base, allow_pickle=config.allow_pickle) if config.base else None
    return lora_job.converted(
        source,
        config.checkpoint_path,
        layout=config.lora_layout,
        base=trained_on,
        dtype=wanted.dtype,
        allow_pickle=config.allow_pickle,
    )


def _refuse(config: ConvertConfig, names: Sequence[str], why: str) -> None:
    """Raise SdlabError for the first of these options that was used: it would be passed over."""
    for name in names:
        if getattr(config, name) != getattr(ConvertConfig(), name):
            flag = f"--no-{name}" if name in ("vae", "text_encoder") else f"--{name}"
            raise SdlabError(f"{normalise(flag)} {why}", next_step="Leave it out")


def _refuse_model_options(config: ConvertConfig) -> None:
    """A LoRA has no parts."""
    names = ("vae", "text_encoder", "only", "with_vae", "ema", "comfyui", "prediction_type")
    _refuse(config, names, "is for whole models, and this is a LoRA")


def _wanted(config: ConvertConfig) -> Wanted:
    from sdlab.convert.wanted import Wanted
    from sdlab.models.lora_files import parse_lora

    return Wanted(
        dtype=_dtype(config),
        without=[name for name in ("vae", "text_encoder") if not getattr(config, name)],
        only=config.only,
        ema=config.ema,
        comfyui=config.comfyui,
        prediction_type=config.prediction_type,
        loras=[parse_lora(text) for text in config.lora],
        vae=config.with_vae,
        allow_pickle=config.allow_pickle,
    )


def _run(job: Job, *, is_there: bool) -> dict[str, Written]:
    from sdlab import progress
    from sdlab.convert import job as jobs

    done = 0
    passes = 1 if is_there else 2  # written and read back
    with progress.counted(-(-passes * job.num_bytes // 1_000_000), unit="MB") as advance:

        def add(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            advance(done / 1e6)

        return jobs.found(job, advance=add) if is_there else jobs.write(job, advance=add)


def _tell(config: ConvertConfig, job: Job, written: dict[str, Written]) -> None:
    from dataclasses import asdict

    dtype = "fp16" if config.half else config.dtype or "as it was"
    if config.json:
        about: dict[str, Any] = {
            "path": str(job.path),
            "layout": job.layout,
            "dtype": dtype,
            "notes": job.notes,
        }
        files = {name: {**asdict(file), **_short_hashes(file)} for name, file in written.items()}
        show.out_json({**about, **(files[""] if "" in files else {"files": files})})
        return
    show.out(f"{job.path}: {job.layout}, {dtype}")
    for line in job.notes:
        show.out(f"  {line}")
    for name, file in written.items():
        head = f"{name}: " if name else ""
        show.out(f"  {head}{file.num_tensors} tensors, {file.num_bytes:,} bytes, read and equal to the model")
        hashes = "".join(f"  {word} {value}" for word, value in _short_hashes(file).items())
        show.out(f"{'    ' if name else '  '}sha256 {file.sha256}{hashes}")


def _short_hashes(file: Written) -> dict[str, str]:
    """What Civitai and A1111 show; a .ckpt has no AutoV3."""
    third = {"AutoV3": file.data_sha256[:12]} if file.data_sha256 else {}
    return {"AutoV2": file.sha256[:10], **third}
