"""`sdlab generate`: pictures from prompts, or a picture again from its own recipe."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlab import show
from sdlab.errors import SdlabError
from sdlab.inference.config import GenerateConfig
from sdlab.options import normalise

if TYPE_CHECKING:
    from sdlab.inference.jobs.plan import Plan
    from sdlab.inference.jobs.session import Session
    from sdlab.inference.prompts.lines import Line

TUNED = Path("tuned")
PLACES = ("load_model", "unet", "vae", "lora", "lora_dir", "embedding", "ref", "init_image", "mask")
WITH_FROM = ("from_picture", "change", "output", "device", "dtype", "offload", "allow_pickle", *PLACES)


def generate(config: GenerateConfig) -> None:
    """Make pictures from prompts.

    Each picture is written to output/sd_{time}_{number}.png and holds its whole recipe; none is overwritten.
    Its path goes to stdout. With several prompts, --num pictures are made of each in turn; the seeds run on.
    A job that was stopped, also by a power cut, goes on when the same command is given again.
    """
    if config.from_picture is not None:
        remake(config, config.from_picture)
        return
    from sdlab.inference.jobs import session as sessions
    from sdlab.inference.prompts import lines

    sessions.check(config)
    typed = lines.gather(config.prompt, config.prompt_file, config_type=type(config))
    if config.explain:
        explain(config, typed)
        return
    from sdlab.inference.jobs import drawing, output, plan
    from sdlab.inference.jobs.report import Report

    num = plan.num_of(config, typed)
    plan.check_seeds(config, num)
    output.make_folder(config.output)
    session = sessions.open_session(config, tuned=TUNED, hasher=hasher())
    begun = drawing.begin(session, num, config.output)
    asked = plan.planned(session, typed, seed=begun.seed, spec_for=specs(session))
    tell(session, asked, begun.seed)
    names = drawing.numbered(begun.stamp, sessions.format_of(config).suffix)

    report = Report()
    drawing.draw(
        session,
        asked,
        begun,
        report,
        lambda todo: plan.batches(session, todo, folder=config.output, names=names),
    )
    drawing.finish(session, begun, report, config.output)


def specs(session: Session) -> Callable[[GenerateConfig], Any]:
    """What says how a picture is made that starts from noise."""
    from sdlab.inference.jobs.session import size_of, spec_of

    return lambda config: spec_of(session, config, size=size_of(session, config))


def tell(session: Session, plan: Plan, seed: int) -> None:
    """One line on stderr: seed, and what is the same for all pictures."""
    said = [f"seed {seed}"]
    specs = {item.spec for item in plan.items}
    if len(specs) == 1 and (spec := next(iter(specs))) is not None:
        said += [f"{spec.width}x{spec.height}", f"{spec.steps} steps", f"guidance {spec.guidance:g}"]
        if spec.hires:
            said.append(f"then {spec.hires.width}x{spec.hires.height}")
    show.note(", ".join(said))


def explain(config: GenerateConfig, asked_for: Sequence[Line]) -> None:
    """Show on stdout how the prompts are read. Nothing but headers and the tokenizer is loaded."""
    from sdlab.inference.jobs import plan
    from sdlab.inference.jobs.session import open_session
    from sdlab.inference.prompts.explain import as_lines

    session = open_session(config, tuned=TUNED, hasher=hasher())
    asked = plan.planned(session, asked_for, seed=config.seed or 0, spec_for=specs(session))
    reading = plan.reading(session.opened, asked.items)
    seen = set()
    for item in asked.items:
        typed, emphasis = item.shot.prefix + item.shot.typed, item.config.emphasis
        for text, is_negative in ((typed, False), (item.shot.negative, True)):
            if (text, emphasis, is_negative) in seen or (is_negative and not text):
                continue
            seen.add((text, emphasis, is_negative))
            if is_negative:
                show.out("the negative prompt:")
            for line in as_lines(reading.explain(text, emphasis, is_negative=is_negative)):
                show.out(line)
            show.out("")
    for fault in asked.faults:
        show.warn(f"{fault.where}: {fault.why}")


def hasher() -> Any:
    """Hashes of large files, remembered in the user's cache folder where there is one."""
    from sdlab.inference.identity import Hasher

    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    folder = Path(home) if home else Path("~/.cache").expanduser() if os.environ.get("HOME") else None
    return Hasher(folder / "sdlab" if folder else None)


def remake(config: GenerateConfig, picture: Path) -> None:
    """Make one picture again. Raises SdlabError for options that would make it another picture."""
    from sdlab.inference.record.change import SETTABLE

    defaults = type(config)()
    changed = [
        f"--{normalise(f.name)}"
        for f in dataclasses.fields(config)
        if f.name not in WITH_FROM and getattr(config, f.name) != getattr(defaults, f.name)
    ]
    if changed:
        first = next((name for name in changed if name[2:].replace("-", "_") in SETTABLE), "--steps")
        raise SdlabError(
            f"the picture's recipe settles everything, so leave out {', '.join(changed)}",
            where="--from",
            next_step=f"To change one thing: --set {first[2:]}=VALUE. Allowed beside it: --output, --device, --dtype, "
            "--allow-pickle, and where files are now: --load-model, --unet, --vae, --lora, --lora-dir, --embedding, "
            "--ref, --init-image, --mask",
        )
    from sdlab.inference.jobs import output
    from sdlab.inference.record import metadata

    recipe = metadata.read(picture)
    output.make_folder(config.output)

    from sdlab.inference.record.remake import Elsewhere
    from sdlab.inference.record.remake import remake as again
    from sdlab.models.lora import parse_lora

    loras = tuple(parse_lora(text) for text in config.lora)
    if any(weight != 1 for _, weight in loras):
        raise SdlabError(
            "the weight is the recipe's", where="--lora", next_step="To change it: --set lora=FILE:weight"
        )
    elsewhere = Elsewhere(
        load_model=config.load_model,
        unet=config.unet,
        vae=config.vae,
        loras=tuple(path for path, _ in loras),
        embeddings=config.embedding,
        init_image=getattr(config, "init_image", None),
        mask=getattr(config, "mask", None),
        references=config.ref,
        device=config.device,
        dtype=config.dtype,
        offload=config.offload,
    )
    report = again(
        picture,
        recipe,
        elsewhere=elsewhere,
        changes=config.change,
        folder=config.output,
        lora_dirs=config.lora_dir,
        allow_pickle=config.allow_pickle,
        tuned=TUNED,
        hasher=hasher(),
    )
    report.close()
