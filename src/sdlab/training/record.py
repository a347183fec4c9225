"""What run.json says of a run, and what a continued run must agree with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from sdlab import __version__, show
from sdlab.dataset.buckets import Item
from sdlab.dataset.cache import Filled, write_whole
from sdlab.dataset.tree import Refused
from sdlab.errors import SdlabError
from sdlab.models.bases import Recommended
from sdlab.models.resolve import Model
from sdlab.options import as_json
from sdlab.training.checkpoint import bytes_of
from sdlab.training.config import INCIDENTAL, OF_THE_MOMENT, RunConfig, TrainConfig
from sdlab.training.folder import RunFolder

Config = TypeVar("Config", bound=RunConfig)

RECOMMENDED = (
    "image_size", "batch", "epoch", "lr", "lr_schedule", "warmup", "ema", "snr_gamma", "shift", "optimizer",
    "weights", "fused_backward", "grad_checkpointing",
)  # fmt: skip


def with_recorded(config: Config, given: frozenset[str], folder: Path, *, command: str) -> Config:
    """The options of the run in `folder`, as it was started, for `--resume`; what is given now must agree.

    Raises SdlabError with every option that differs, if it is a run of another command, or if there is none.
    """
    record = RunFolder(folder).recorded()
    if record is None:
        raise SdlabError(
            "holds no run to resume", where=str(folder), next_step="Leave out --resume to start one"
        )
    if (began_by := record.get("command", command)) != command:
        raise SdlabError(
            f"is a run of {began_by}, not of {command}",
            where=str(folder),
            next_step=f"Go on with it: sdlab {began_by} --save-model {folder} --resume",
        )
    old = record.get("config", {})  # none yet: stopped before its first step
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
    kept = {n: old[n] for n in fields - given - OF_THE_MOMENT if n in old}
    return dataclasses.replace(config, **{n: _like(getattr(config, n), n, v) for n, v in kept.items()})


def settle(config: Config, recommended: Recommended) -> Config:
    """The options with every None that the model has an opinion on filled in. A LoRA's weights are always fp32."""
    own = {f.name for f in dataclasses.fields(config)}
    wanted = [n for n in RECOMMENDED if n in own and getattr(config, n) is None]
    settled = dataclasses.replace(config, **{n: getattr(recommended, n) for n in wanted})
    if not isinstance(settled, TrainConfig) or settled.adapter == "full":
        return settled
    alpha = float(settled.rank) if settled.alpha is None else settled.alpha
    return dataclasses.replace(settled, alpha=alpha, weights="fp32")


@dataclass(frozen=True)
class Dataset:
    """What a run trains on, as its record has it."""

    listing: dict[str, str]  # a digest of every sample, by id: dataset.json
    digest: str  # of all visits in their order
    facts: dict[str, Any]  # counts and names


def dataset_of(items: Sequence[Item], digest_of: Callable[[Item], str], facts: dict[str, Any]) -> Dataset:
    """The record of these visits; `digest_of` says what an item's sample is trained on."""
    digests = {item: digest_of(item) for item in items}
    lines = [f"{item.sample.id}\x1f{item.repeat}\x1f{digest}" for item, digest in digests.items()]
    whole = hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()
    return Dataset({item.sample.id: digest for item, digest in digests.items()}, whole, facts)


def cached_dataset(items: Sequence[Item], filled: Filled, refused: Sequence[Refused]) -> Dataset:
    """The record of samples that are trained on by their cached latents and prompts."""
    prompts = Counter(item.sample.prompt for item in items if item.repeat == 0)
    facts = {
        "pictures": sum(prompts.values()),
        "with_references": sum(bool(item.reference_sizes) for item in items if item.repeat == 0),
        "prompts": dict(sorted(prompts.items())),
        "refused": as_refused(refused),
    }
    return dataset_of(items, lambda item: _item_digest(item, filled), facts)


def as_refused(refused: Sequence[Refused]) -> list[dict[str, str]]:
    """For run.json."""
    return [{"path": r.id, "reason": r.reason} for r in refused]


def model_facts(model: Model) -> dict[str, Any]:
    """What run.json says of the model that a run starts from."""
    return {
        "base": model.base,
        "family": model.family,
        "model": {
            "name": model.name,
            "kind": model.kind,
            "source": model.source,
            "path": str(model.path.resolve()),
        },
    }


def facts_of(
    config: RunConfig, dataset: Dataset, module: nn.Module, accelerator: Accelerator, steps: int
) -> dict[str, Any]:
    """What run.json says of every run from its start on; `module` as it was loaded."""
    import accelerate
    import diffusers
    import peft
    import transformers

    return {
        "sdlab": __version__,
        "image_size": config.image_size,
        "steps": steps,
        "weights": "ema" if config.ema else "raw",
        "config": as_json(config),
        "dataset": {"digest": dataset.digest, **dataset.facts},
        "start_weights": _weights_digest(module),
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
            "peft": peft.__version__,
        },
    }


def check_unchanged(run: RunFolder, facts: dict[str, Any], listing: dict[str, str]) -> None:
    """Refuse to continue a run with other data, encoders or arithmetic; a first start writes them down."""
    path = run.path / "dataset.json"
    record = run.recorded() or {}
    if "dataset" not in record:
        write_whole(path, json.dumps(listing, indent=0).encode("utf-8", "surrogatepass"))
        return
    faults = []
    if record["dataset"]["digest"] != facts["dataset"]["digest"]:
        faults.append(f"the dataset ({_difference(path, listing)})")
    if record.get("encoders") != facts.get("encoders"):
        faults.append("the base model's VAE or text encoder")
    if record["start_weights"] != facts["start_weights"]:
        faults.append("the weights it started from")
    if record["objective"] != facts["objective"]:
        faults.append(f"the objective ({record['objective']} is now {facts['objective']})")
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
    threads = record["machine"]["threads"], facts["machine"]["threads"]
    if threads[0] != threads[1]:
        show.warn(f"the run has used {threads[0]} threads, now {threads[1]}; last digits will differ")
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


def _weights_digest(module: nn.Module) -> str:
    """sha256 over the module's tensors as loaded, before a step or a checkpoint has changed them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def _item_digest(item: Item, filled: Filled) -> str:
    text = "\x1f".join((filled.latents[item], item.sample.prompt, *filled.references.get(item, ())))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else value


def _like(default: Any, name: str, value: Any) -> Any:
    """A value of run.json in the type of its field."""
    if isinstance(default, Path) or (name in {"images", "save_model", "cache_dir"} and value is not None):
        return Path(value)
    return tuple(value) if isinstance(value, list) else value


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
