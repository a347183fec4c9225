"""`sdlab generate`: pictures from prompts, or a picture again from its own recipe."""

from __future__ import annotations

import dataclasses
import math
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sdlab import show
from sdlab.errors import SdlabError, gathered
from sdlab.inference.spec import MAX_SEED
from sdlab.options import normalise, opt

if TYPE_CHECKING:
    from PIL import Image

    from sdlab.inference.load import Loaded, Opened
    from sdlab.inference.spec import Reference

WHAT, HOW, MODEL, FILES = "What to draw", "How", "Model and computer", "Files"
GRID = 8  # no model takes sides that are not a multiple of this; FLUX.2 needs 16
TUNED = Path("tuned")
PLACES = ("load_model", "unet", "vae", "lora", "ref", "init_image")  # with --from: where things are now
WITH_FROM = ("from_picture", "output", "device", "dtype", "allow_pickle", *PLACES)


@dataclass(frozen=True)
class GenerateConfig:
    """Options of `sdlab generate`."""

    prompt: Annotated[
        tuple[str, ...],
        opt('What to draw; repeat for more: --prompt "red star" --prompt "blue fish".', group=WHAT),
    ] = ()
    prompt_file: Annotated[
        Path | None, opt("Text file of prompts, one a line; # starts a comment line.", group=WHAT)
    ] = None
    negative: Annotated[str, opt("What to keep out of the picture.", group=WHAT)] = ""
    prefix: Annotated[
        str | None,
        opt(
            'Put before every prompt as it is, so end it with ", ". Default: what suits the model.',
            group=WHAT,
        ),
    ] = None
    no_prefix: Annotated[
        bool, opt("Send prompts as typed, without a prefix.", flag="--no-prefix", group=WHAT)
    ] = False
    ref: Annotated[tuple[Path, ...], opt("Picture for FLUX.2 to look at; repeat for more.", group=WHAT)] = ()
    from_picture: Annotated[
        Path | None,
        opt("Make this picture again, bit for bit, from the recipe in it.", flag="--from", group=WHAT),
    ] = None
    num: Annotated[int, opt("Pictures of each prompt.", min=1, max=100_000, group=HOW)] = 1
    seed: Annotated[
        int | None,
        opt("Picture i uses seed + i. Default: a random one, printed.", min=0, max=MAX_SEED, group=HOW),
    ] = None
    steps: Annotated[
        int | None,
        opt("Denoising steps. Default: what suits the model (50; FLUX.2 15).", min=1, max=1000, group=HOW),
    ] = None
    guidance: Annotated[
        float | None,
        opt(
            "How closely to follow the prompt. Default: what suits the model (7; FLUX.2 4).",
            min=0,
            max=100,
            group=HOW,
        ),
    ] = None
    width: Annotated[
        int | None, opt("Pixels, a multiple of 8 (FLUX.2: 16).", min=32, max=4096, group=HOW)
    ] = None
    height: Annotated[
        int | None, opt("Pixels, a multiple of 8 (FLUX.2: 16).", min=32, max=4096, group=HOW)
    ] = None
    image_size: Annotated[
        int | None,
        opt(
            "Width and height at once. Default: the model's own (SD 1.5: 512, FLUX.2: 1024).",
            min=32,
            max=4096,
            group=HOW,
        ),
    ] = None
    scheduler: Annotated[
        str,
        opt('ddim, "euler a", "dpm++ 2m karras", unipc, lcm ... Default: the model\'s own.', group=HOW),
    ] = ""
    batch: Annotated[
        int, opt("Pictures made at once: more need more memory.", min=1, max=1024, group=HOW)
    ] = 1
    exact: Annotated[
        bool, opt("Make pictures one at a time: the same bits for any --batch.", flag="--exact", group=HOW)
    ] = False
    load_model: Annotated[
        str,
        opt(
            "Alias, run in tuned/, folder, .safetensors file or hub id. Default: your newest run.",
            group=MODEL,
        ),
    ] = ""
    unet: Annotated[
        str,
        opt(
            "Take the UNet or transformer from this file or folder instead.",
            old=("--transformer",),
            group=MODEL,
        ),
    ] = ""
    vae: Annotated[str, opt("Take the VAE from this file or folder instead.", group=MODEL)] = ""
    lora: Annotated[
        tuple[str, ...],
        opt("LoRA to add, FILE or FILE:weight; repeat for more.", group=MODEL),
    ] = ()
    device: Annotated[str, opt("auto, cpu, cuda, cuda:1 or mps.", group=MODEL)] = "auto"
    dtype: Annotated[str, opt("Number type: auto, fp32, bf16 or fp16.", group=MODEL)] = "auto"
    allow_pickle: Annotated[
        bool, opt("Read tensors from .ckpt and .bin files too.", flag="--allow-pickle", group=MODEL)
    ] = False
    output: Annotated[Path, opt("Folder for the pictures, made if missing.", group=FILES)] = Path("output")
    grid: Annotated[bool, opt("Also write one sheet with all pictures.", flag="--grid", group=FILES)] = False


def generate(config: GenerateConfig) -> None:
    """Make pictures from prompts.

    Each picture is written to output/sd_{time}_{number}.png and holds its whole recipe; none is overwritten.
    Its path goes to stdout. With several prompts, --num pictures are made of each in turn; the seeds run on.
    """
    if config.from_picture is not None:
        remake(config, config.from_picture)
        return
    from sdlab.inference.jobs import output
    from sdlab.inference.prompts import lines

    check(config)
    typed = lines.gather(config.prompt, config.prompt_file)
    seed = seed_for(config, len(typed) * config.num)
    output.make_folder(config.output)

    from sdlab.inference.engines import kinds
    from sdlab.inference.jobs import job
    from sdlab.inference.spec import Spec, in_batches, shots

    opened, advice = open_model(config)
    prefix = prefix_for(config, advice.prefix)
    wanted = shots(typed, num=config.num, prefix=prefix, negative=config.negative, seed=seed)
    seen = references(config, model_size=advice.image_size, grid=opened.family.grid)
    width, height = _size(config, seen, advice.image_size)
    spec = Spec(
        steps=config.steps or advice.steps,
        guidance=advice.guidance if config.guidance is None else config.guidance,
        width=width,
        height=height,
        scheduler=scheduler_for(config),
    )
    sent = kinds.texts(opened.engine, wanted)
    job.warn_of_lost_words(opened.chosen.model, sent)
    loaded = load(opened, config, prompts=sent)
    rehearse(loaded, opened, spec.scheduler, spec.steps)
    show.note(f"seed {seed}, {spec.width}x{spec.height}, {spec.steps} steps, guidance {spec.guidance:g}")
    stamp = stamp_now()
    batches = (
        job.Batch(
            group,
            spec,
            config.output,
            lambda shot: output.numbered(stamp, shot.index),
            references=tuple(reference for reference, _ in seen),
            looked_at=tuple(picture for _, picture in seen),
        )
        for group in in_batches(wanted, 1 if config.exact else config.batch)
    )
    report = job.Report()
    job.make(loaded, batches, total=len(wanted), exact=config.exact, report=report)
    if config.grid:
        job.write_grid(report, folder=config.output, stamp=stamp)
    report.close()


def _size(
    config: GenerateConfig, seen: list[tuple[Reference, Image.Image]], model_size: int
) -> tuple[int, int]:
    """(width, height): what was asked for, else that of the first picture looked at, else the model's own."""
    if seen and not (config.width or config.height or config.image_size):
        return seen[0][1].size
    side = config.image_size or model_size
    return config.width or side, config.height or side


def check(config: GenerateConfig) -> None:
    """Raises SdlabError for every fault that shows without a model, all at once."""
    from sdlab.inference.prompts import lines

    faults = _off_grid(config, GRID)
    if config.guidance is not None and not math.isfinite(config.guidance):
        faults.append(f"--guidance {config.guidance} is not a number")
    if config.prefix is not None and config.no_prefix:
        faults.append("--prefix and --no-prefix exclude each other")
    for check_one in (
        lambda: scheduler_for(config),
        lambda: lines.check_text(config.negative, where="--negative"),
        lambda: lines.check_text(config.prefix or "", where="--prefix"),
    ):
        try:
            check_one()
        except SdlabError as reason:
            faults.append(str(reason))
    if faults:
        raise gathered(faults, where="")


def _off_grid(config: GenerateConfig, grid: int) -> list[str]:
    """One fault for each side that is no multiple of `grid`."""
    faults = []
    for side in ("width", "height", "image_size"):
        value = getattr(config, side)
        if value is not None and value % grid:
            low = value // grid * grid
            near = f"{low} or {low + grid}" if low >= 32 else f"{low + grid}"
            faults.append(f"--{normalise(side)} {value} is not a multiple of {grid}; the nearest is {near}")
    return faults


def seed_for(config: GenerateConfig, count: int) -> int:
    """The seed of picture 0. Raises SdlabError where the last picture's would pass 2**53 - 1."""
    if config.seed is None:
        return secrets.randbelow(2**32)
    if config.seed + count - 1 > MAX_SEED:
        raise SdlabError(f"picture {count - 1} would pass the largest seed, {MAX_SEED}", where="--seed")
    return config.seed


def scheduler_for(config: GenerateConfig) -> str:
    """The scheduler's name in sdlab's table, "" for the model's own."""
    from sdlab.inference.engines.schedulers import canonical

    return canonical(config.scheduler)


def prefix_for(config: GenerateConfig, advised: str) -> str:
    """What goes before every prompt."""
    return "" if config.no_prefix else advised if config.prefix is None else config.prefix


def stamp_now() -> str:
    """The time as it stands in file names."""
    return time.strftime("%Y%m%d-%H%M%S")


def open_model(config: GenerateConfig) -> tuple[Opened, Any]:
    """The model, its headers read, and what is recommended for it.

    Raises SdlabError for everything asked that this kind of model does not take.
    """
    from sdlab.inference import load
    from sdlab.models.lora import parse_lora
    from sdlab.models.opening import recommended

    asked = load.Asked(
        config.load_model,
        config.unet,
        config.vae,
        tuple(parse_lora(text) for text in config.lora),
        config.allow_pickle,
    )
    opened = load.open_chosen(load.choose(asked, tuned=TUNED, hasher=hasher()))
    _fits(config, opened)
    return opened, recommended(opened.chosen.model)


def _fits(config: GenerateConfig, opened: Opened) -> None:
    engine = opened.engine
    faults = [
        f"--{option}: {reason}"
        for option, given, reason in (
            ("scheduler", config.scheduler, engine.no_scheduler),
            ("negative", config.negative, engine.no_negative),
            ("ref", config.ref, engine.no_references),
        )
        if given and reason
    ]
    faults += _off_grid(config, opened.family.grid)
    if faults:
        raise gathered(faults, where=opened.chosen.model.name)
    if config.guidance is not None and engine.no_guidance:
        show.warn(f"--guidance: {engine.no_guidance}")


def load(opened: Opened, config: GenerateConfig, *, prompts: list[str]) -> Loaded:
    """The engine, ready to make pictures of these prompts."""
    from sdlab.inference import load

    return load.load(opened, device=config.device, dtype=config.dtype, prompts=prompts)


def references(config: GenerateConfig, *, model_size: int, grid: int) -> list[tuple[Reference, Image.Image]]:
    """The pictures of --ref, opened. Raises SdlabError for all that cannot be used, at once."""
    from sdlab.inference import edit

    found, faults = [], []
    for path in config.ref:
        try:
            found.append(edit.looked_at(path, model_size=model_size, grid=grid))
        except SdlabError as reason:
            faults.append(str(reason))
    if faults:
        raise gathered(faults, where="--ref")
    return found


def hasher() -> Any:
    """Hashes of large files, remembered in the user's cache folder where there is one."""
    from sdlab.inference.identity import Hasher

    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    folder = Path(home) if home else Path("~/.cache").expanduser() if os.environ.get("HOME") else None
    return Hasher(folder / "sdlab" if folder else None)


def rehearse(loaded: Loaded, opened: Opened, scheduler: str, steps: int) -> None:
    """Raises SdlabError where the scheduler cannot take so many steps."""
    from sdlab.inference.engines import schedulers

    if opened.engine.no_scheduler:
        return  # its one scheduler takes any number
    made = schedulers.fresh(scheduler, loaded.sampler.pipeline.scheduler)
    schedulers.set_steps(made, steps, name=scheduler)


def remake(config: GenerateConfig, picture: Path) -> None:
    """Make one picture again. Raises SdlabError for options that would make it another picture."""
    defaults = type(config)()
    changed = [
        f"--{normalise(f.name)}"
        for f in dataclasses.fields(config)
        if f.name not in WITH_FROM and getattr(config, f.name) != getattr(defaults, f.name)
    ]
    if changed:
        raise SdlabError(
            f"the picture's recipe settles everything, so leave out {', '.join(changed)}",
            where="--from",
            next_step="Allowed beside it: --output, --device, --dtype, --allow-pickle, and where files are now: "
            "--load-model, --unet, --vae, --lora, --ref, --init-image",
        )
    from sdlab.inference.jobs import output
    from sdlab.inference.record import metadata

    recipe = metadata.read(picture)
    output.make_folder(config.output)

    from sdlab.inference.record.remake import Elsewhere
    from sdlab.inference.record.remake import remake as again
    from sdlab.models.lora import parse_lora

    elsewhere = Elsewhere(
        load_model=config.load_model,
        unet=config.unet,
        vae=config.vae,
        loras=tuple(parse_lora(text)[0] for text in config.lora),
        init_image=getattr(config, "init_image", None),
        references=config.ref,
        device=config.device,
        dtype=config.dtype,
    )
    report = again(
        picture,
        recipe,
        elsewhere=elsewhere,
        folder=config.output,
        names=output.numbered(stamp_now(), recipe["index"]),
        allow_pickle=config.allow_pickle,
        tuned=TUNED,
        hasher=hasher(),
    )
    report.close()
