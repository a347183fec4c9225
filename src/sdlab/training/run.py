"""One training run from a folder of pictures to a pipeline in tuned/: the calls, in order.

scan -> buckets -> cache (encoders in and out) -> denoiser -> fit -> pipeline
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from torch import nn

from sdlab import __version__, show
from sdlab.dataset import buckets, cache
from sdlab.dataset.batches import Batches, Entry
from sdlab.dataset.cache import Cache, Filled, Pixels, prompt_key, write_whole
from sdlab.dataset.tree import Refused, Sample, Scan, scan, weigh
from sdlab.errors import SdlabError, Stopped
from sdlab.models.base import Family
from sdlab.models.bases import Recommended
from sdlab.models.memory import pick_device
from sdlab.models.resolve import Model
from sdlab.options import as_json
from sdlab.training import checkpoint
from sdlab.training.config import INCIDENTAL, TrainConfig, parse_colour
from sdlab.training.folder import RunFolder
from sdlab.training.loop import FitConfig, fit
from sdlab.training.preview import previewer
from sdlab.training.signals import StopRequest, stop_on_signals

Config = TypeVar("Config", bound=TrainConfig)

NUM_PREVIEW_PROMPTS = 4
RECOMMENDED = ("image_size", "batch", "epoch", "lr", "lr_schedule", "warmup", "ema", "snr_gamma")
PREVIEW_STEPS = 20
NUM_REFUSED_TOLD = 10


def with_recorded(config: Config, given: frozenset[str], folder: Path) -> Config:
    """The options of the run in `folder`, as it was started, for `--resume`; what is given now must agree.

    Raises SdlabError with every option that differs, or if there is no run.
    """
    record = RunFolder(folder).recorded()
    if record is None:
        raise SdlabError(
            "holds no run to resume", where=str(folder), next_step="Leave out --resume to start one"
        )
    old = record["config"]
    fields = {f.name for f in dataclasses.fields(config)}
    now = as_json(config)
    changed = [
        f"--{name.replace('_', '-')}: the run has {old[name]!r}, now {now[name]!r}"
        for name in sorted(given & fields - INCIDENTAL)
        if name in old and _plain(now[name]) != _plain(old[name])
    ]
    if changed:
        raise SdlabError(
            f"the run was started with other settings ({'; '.join(changed)})",
            where=str(folder),
            next_step="Resume it with its own, or start another with --save-model",
        )
    kept = {n: old[n] for n in fields - given - INCIDENTAL if n in old}
    return dataclasses.replace(config, **{n: _like(getattr(config, n), n, v) for n, v in kept.items()})


def settle(config: Config, recommended: Recommended) -> Config:
    """The options with every None that the model has an opinion on filled in."""
    own = {f.name for f in dataclasses.fields(config)}
    wanted = [n for n in RECOMMENDED if n in own and getattr(config, n) is None]
    return dataclasses.replace(config, **{n: getattr(recommended, n) for n in wanted})


def train(
    config: TrainConfig,
    family: Family,
    model: Model,
    *,
    folder: Path,
    command: str,
    save: Callable[..., None],
) -> None:
    """Train as the settled `config` says, and leave a diffusers pipeline in `folder`.

    `save(denoiser, folder)` writes the pipeline. Raises SdlabError before the first costly second where it can.
    """
    run = RunFolder(folder)
    _refuse_overlap(folder, config.images)
    found = scan(config.images, prompt_prefix=config.prompt_prefix, use_txt=config.txt)
    with _accelerated(config) as accelerator, stop_on_signals() as stop:
        main = accelerator.is_main_process
        with run.locked() if main else _unlocked():
            if main and _prepare(run, config):
                return
            accelerator.wait_for_everyone()
            try:
                _train(config, family, model, run, found, accelerator, stop, command=command, save=save)
            except Stopped:
                if main:
                    run.record(state="stopped")
                raise
            finally:
                run.close()


def _train(
    config: TrainConfig,
    family: Family,
    model: Model,
    run: RunFolder,
    found: Scan,
    accelerator: Accelerator,
    stop: StopRequest,
    *,
    command: str,
    save: Callable[..., None],
) -> None:
    main = accelerator.is_main_process
    store = Cache(config.cache_dir or run.path.parent / ".sdlab-cache")
    items, refused = _items(found, config, family.grid)
    if main:
        samples, prompts = {item.sample.id for item in items}, {item.sample.prompt for item in items}
        show.note(
            f"{found.root}: {len(samples)} pictures, {len(prompts)} prompts, {len(refused)} files refused"
        )
        _tell_refused(refused, found.root)
    previews = config.preview_prompt or _preview_prompts([item.sample for item in items])
    filled = _fill(store, items, family, config, accelerator, stop)
    items = [item for item in items if item in filled.latents]
    refused = [*refused, *filled.refused]
    if main:
        _tell_refused(filled.refused, found.root)
    if not items:
        raise _nothing_usable(config.images, refused)
    batches = _batches(items, filled, store, family, config, accelerator)
    steps = config.steps or (config.epoch or 1) * batches.steps_per_epoch
    denoiser = family.load_denoiser(accelerator.device, torch.float32)
    if config.grad_checkpointing:
        denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    facts = _facts(config, model, items, filled, refused, family, accelerator, steps, command)
    if main:
        _check_unchanged(run, facts, items, filled)
        state = checkpoint.size_bytes(denoiser, ema=bool(config.ema))
        run.check_space(int(((config.keep + 1) * state + _bytes_of(denoiser)) * 1.05))
        run.record(**facts, state="running", started=_now())
        show.note(_settings_line(config, batches, steps, accelerator, run))
    preview = previewer(
        family,
        denoiser,
        previews,
        run.path / "samples",
        seed=config.seed,
        image_size=config.image_size or 512,
        num_steps=PREVIEW_STEPS,
        guidance=7.0,
    )
    began = time.monotonic()
    ema = fit(
        denoiser,
        family.loss,
        batches,
        _fit_config(config, steps),
        run,
        accelerator=accelerator,
        stop=stop,
        preview=preview,
    )
    if main:
        run.close()
        plain = accelerator.unwrap_model(denoiser, keep_fp32_wrapper=False)
        if ema:
            with ema.applied():
                _export(run.path, plain, save)
        else:
            _export(run.path, plain, save)
        seconds = time.monotonic() - began
        run.record(state="finished", ended=_now(), seconds_of_last_start=round(seconds, 1))
        show.note(
            f"trained {steps} steps in {seconds:.0f} s; the model is {run.path}, previews in {run.path / 'samples'}"
        )


def _prepare(run: RunFolder, config: TrainConfig) -> bool:
    """Make the folder ready; True if the run in it is finished already."""
    run.refuse_strangers()
    record = run.recorded()
    if config.resume:
        if record and record.get("state") == "finished":
            show.note(f"{run.path} is finished; nothing to resume")
            return True
        checkpoint.sweep(run.checkpoints)
    elif record or checkpoint.found(run.checkpoints):
        if not config.overwrite:
            raise SdlabError(
                "holds a run already",
                where=str(run.path),
                next_step="Go on with it (--resume), replace it (--overwrite), or name another folder (--save-model)",
            )
        run.clear()
    _sweep_exports(run.path)
    return False


def _items(found: Scan, config: TrainConfig, grid: int) -> tuple[list[buckets.Item], list[Refused]]:
    """Every visit of every usable sample with its bucket, in the dataset's order, and what is refused."""
    from sdlab.dataset.picture import Unusable, read_size

    refused = list(found.refused)
    usable: list[Sample] = []
    sizes: list[tuple[int, int]] = []
    times: list[int] = []

    def look(sample: Sample) -> tuple[int, int] | str:
        try:
            return read_size(sample.path, max_pixels=config.max_pixels)
        except Unusable as reason:
            return str(reason)

    counts = weigh(found.samples, repeats=config.repeats, balance=config.balance)
    for (sample, size), count in zip(
        cache.ahead(look, found.samples, config.num_workers), counts, strict=True
    ):
        if isinstance(size, str):
            refused.append(Refused(sample.id, size))
        else:
            usable.append(sample)
            sizes.append(size)
            times.append(count)
    if not usable:
        raise _nothing_usable(config.images, refused)
    assert config.image_size
    return list(buckets.assign(usable, sizes, image_size=config.image_size, grid=grid, times=times)), refused


def _fill(
    store: Cache,
    items: list[buckets.Item],
    family: Family,
    config: TrainConfig,
    accelerator: Accelerator,
    stop: StopRequest,
) -> Filled:
    """Encode what the cache lacks, each process its share, then agree on what there is."""
    firsts = [item for item in items if item.repeat == 0]
    wanted = firsts + ([dataclasses.replace(item, flip=True) for item in firsts] if config.flip else [])
    prompts = {item.sample.prompt for item in items} | {""}

    def progress(what: str, done: int, total: int) -> None:
        if stop:
            raise Stopped(stop.signum, f"stopped with {done} of {total} {what}; they are kept")
        if accelerator.is_main_process and (done == total or done % 500 == 0):
            show.note(f"{what}: {done}/{total}")

    def once(share: tuple[int, int]) -> Filled:
        return cache.fill(
            store,
            wanted,
            prompts,
            fingerprint=family.fingerprint,
            encoders=lambda: family.load_encoders(accelerator.device, torch.float32),
            pixels=Pixels(parse_colour(config.background), config.max_pixels),
            num_workers=config.num_workers,
            share=share,
            progress=progress,
        )

    filled = once((accelerator.process_index, accelerator.num_processes))
    if accelerator.num_processes > 1:
        accelerator.wait_for_everyone()
        filled = once((0, 1))  # nothing is missing now but what nobody could read
        accelerator.wait_for_everyone()
    latents = dict(filled.latents)
    for item in items:  # further visits share the first one's latents
        first = dataclasses.replace(item, repeat=0)
        if first in latents:
            latents[item] = latents[first]
    return dataclasses.replace(filled, latents=latents)


def _batches(
    items: Sequence[buckets.Item],
    filled: Filled,
    store: Cache,
    family: Family,
    config: TrainConfig,
    accelerator: Accelerator,
) -> Batches:
    def entry(item: buckets.Item) -> Entry:
        mirrored = dataclasses.replace(item, repeat=0, flip=True)
        return Entry(
            id=f"{item.sample.id}#{item.repeat}" if item.repeat else item.sample.id,
            size_px=item.size_px,
            latents_key=filled.latents[item],
            prompt_key=prompt_key(family.fingerprint, item.sample.prompt),
            flipped_key=filled.latents[mirrored] if config.flip else "",
        )

    assert config.batch
    return Batches(
        [entry(item) for item in items],
        store,
        batch=config.batch,
        accumulate=config.grad_accum,
        seed=config.seed,
        caption_dropout=config.caption_dropout,
        empty_prompt_key=prompt_key(family.fingerprint, ""),
        process=(accelerator.process_index, accelerator.num_processes),
    )


def _fit_config(config: TrainConfig, steps: int) -> FitConfig:
    assert config.lr is not None and config.lr_schedule and config.warmup is not None
    return FitConfig(
        steps=steps,
        lr=config.lr,
        lr_schedule=config.lr_schedule,
        warmup=min(config.warmup, steps // 2),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        ema=bool(config.ema),
        seed=config.seed,
        save_every=config.save_every,
        keep=config.keep,
        preview_every=config.preview_every,
        num_workers=config.num_workers,
        compile=config.compile,
    )


def _facts(
    config: TrainConfig,
    model: Model,
    items: Sequence[buckets.Item],
    filled: Filled,
    refused: Sequence[Refused],
    family: Family,
    accelerator: Accelerator,
    steps: int,
    command: str,
) -> dict[str, Any]:
    """What run.json says of the run from its start on."""
    import accelerate
    import diffusers
    import transformers

    prompts = Counter(item.sample.prompt for item in items if item.repeat == 0)
    return {
        "sdlab": __version__,
        "command": command,
        "base": model.base,
        "family": model.family,
        "model": {"name": model.name, "kind": model.kind, "source": model.source},
        "image_size": config.image_size,
        "steps": steps,
        "weights": "ema" if config.ema else "raw",
        "config": as_json(config),
        "dataset": {
            "digest": _dataset_digest(items, filled),
            "pictures": sum(prompts.values()),
            "prompts": dict(sorted(prompts.items())),
            "refused": [{"path": r.id, "reason": r.reason} for r in refused],
        },
        "encoders": family.fingerprint,
        "machine": {
            "device": accelerator.device.type,
            "processes": accelerator.num_processes,
            "mixed_precision": accelerator.mixed_precision,
            "threads": torch.get_num_threads(),
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        },
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
        },
    }


def _check_unchanged(
    run: RunFolder, facts: dict[str, Any], items: Sequence[buckets.Item], filled: Filled
) -> None:
    """Refuse to continue a run with other data, encoders or arithmetic; a first start writes them down."""
    listing = {item.sample.id: _item_digest(item, filled) for item in items}
    path = run.path / "dataset.json"
    record = run.recorded() or {}
    if "dataset" not in record:
        write_whole(path, json.dumps(listing, indent=0).encode("utf-8", "surrogatepass"))
        return
    faults = []
    if record["dataset"]["digest"] != facts["dataset"]["digest"]:
        faults.append(f"the dataset ({_difference(path, listing)})")
    if record["encoders"] != facts["encoders"]:
        faults.append("the base model's VAE or text encoder")
    for key in ("device", "processes", "mixed_precision"):
        if record["machine"][key] != facts["machine"][key]:
            faults.append(f"{key}: {record['machine'][key]} is now {facts['machine'][key]}")
    if record["steps"] != facts["steps"]:
        faults.append(f"steps: {record['steps']} is now {facts['steps']}")
    if faults:
        raise SdlabError(
            f"changed since the run began: {'; '.join(faults)}",
            where=str(run.path),
            next_step="Put it back, or start another run with --save-model",
        )
    for key in ("threads",):
        if record["machine"][key] != facts["machine"][key]:
            show.warn(
                f"{key}: {record['machine'][key]} is now {facts['machine'][key]}; last digits will differ"
            )
    if record["versions"] != facts["versions"]:
        show.warn(
            f"library versions differ from the run's start ({record['versions']}); last digits may differ"
        )


def _difference(path: Path, now: dict[str, str]) -> str:
    try:
        old = json.loads(path.read_bytes().decode("utf-8", "surrogatepass"))
    except (OSError, ValueError):
        return "its list is missing"
    added, gone = sorted(now.keys() - old.keys()), sorted(old.keys() - now.keys())
    other = sorted(name for name in now.keys() & old.keys() if now[name] != old[name])
    parts = [("added", added), ("removed", gone), ("changed", other)]
    return (
        ", ".join(f"{len(names)} {what}: {', '.join(names[:3])}" for what, names in parts if names)
        or "weights"
    )


def _dataset_digest(items: Sequence[buckets.Item], filled: Filled) -> str:
    lines = [f"{item.sample.id}\x1f{item.repeat}\x1f{_item_digest(item, filled)}" for item in items]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def _item_digest(item: buckets.Item, filled: Filled) -> str:
    text = f"{filled.latents[item]}\x1f{item.sample.prompt}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _preview_prompts(samples: Sequence[Sample]) -> tuple[str, ...]:
    prompts = sorted({sample.prompt for sample in samples})
    apart = max(1, len(prompts) // NUM_PREVIEW_PROMPTS)
    return tuple(prompts[::apart][:NUM_PREVIEW_PROMPTS])


def _tell_refused(refused: Sequence[Refused], root: str | Path) -> None:
    for one in refused[:NUM_REFUSED_TOLD]:
        show.warn(f"{one.id}: {one.reason}")
    if len(refused) > NUM_REFUSED_TOLD:
        show.warn(f"{len(refused) - NUM_REFUSED_TOLD} more are refused; see: sdlab check {root} --deep")


def _settings_line(
    config: TrainConfig, batches: Batches, steps: int, accelerator: Accelerator, run: RunFolder
) -> str:
    precision = {"no": "fp32"}.get(str(accelerator.mixed_precision), str(accelerator.mixed_precision))
    return (
        f"{run.path}: {steps} steps of {batches.effective_batch}, {batches.steps_per_epoch} an epoch, "
        f"{config.image_size} px, lr {config.lr:g} {config.lr_schedule}, seed {config.seed}, "
        f"{accelerator.device.type} {precision}, {torch.get_num_threads()} threads"
    )


def _nothing_usable(root: Path, refused: Sequence[Refused]) -> SdlabError:
    seen = "; ".join(f"{r.id}: {r.reason}" for r in refused[:3]) or "it holds no files"
    return SdlabError(f"no usable picture ({seen})", where=str(root), next_step=f"See: sdlab check {root}")


def _refuse_overlap(folder: Path, images: Path) -> None:
    """Raises SdlabError if the run would be written into the dataset, or the dataset lies in the run."""
    run, data = folder.resolve(), images.resolve()
    if run == data or data in run.parents or run in data.parents:
        raise SdlabError(
            f"lies in the dataset folder {images}, or around it",
            where=str(folder),
            next_step="Name another folder with --save-model: nothing is ever written into a dataset",
        )


def _export(folder: Path, denoiser: nn.Module, save: Callable[..., None]) -> None:
    """Write the pipeline beside its place and move its parts in, the index that makes it one last."""
    staged = folder / f".export-{os.getpid()}"
    shutil.rmtree(staged, ignore_errors=True)
    save(denoiser, staged)
    parts = sorted(staged.iterdir(), key=lambda p: (p.name == "model_index.json", p.name))
    for part in parts:
        target = folder / part.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(part, target)
    staged.rmdir()
    checkpoint.sync_folder(folder)


def _sweep_exports(folder: Path) -> None:
    for leftover in folder.glob(".export-*"):
        shutil.rmtree(leftover)


@contextmanager
def _accelerated(config: TrainConfig) -> Iterator[Accelerator]:
    """An Accelerator for the options' device and precision. Its state is process-wide, so it ends with the `with`."""
    device = pick_device(config.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    bf16 = config.dtype == "bf16" or (
        config.dtype == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="bf16" if bf16 else "no",
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(days=7))
        ],  # the slowest share of the encoding
    )
    try:
        yield accelerator
    finally:
        accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def _unlocked() -> Iterator[None]:
    yield


def _bytes_of(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else value


def _like(default: Any, name: str, value: Any) -> Any:
    """A value of run.json in the type of its field."""
    if isinstance(default, Path) or (name in {"images", "save_model", "cache_dir"} and value is not None):
        return Path(value)
    return tuple(value) if isinstance(value, list) else value


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
