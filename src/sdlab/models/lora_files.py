"""LoRA files of all makes: which tensor belongs to which layer, and how strongly it counts.

Shapes: A (R, in), B (out, R); a convolution's have its kernel behind, (R, in, h, w) and (out, R, 1, 1).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlab.errors import SdlabError
from sdlab.models import bfl
from sdlab.models.files import FLOATS, Header, Stored, read_header, read_json
from sdlab.models.runs import LORA_FILE

if TYPE_CHECKING:
    from torch import Tensor, nn

_HEADER_KEY = "lora_adapter_metadata"  # where diffusers keeps PEFT's settings

_TENSOR = re.compile(r"(.+)\.(?:lora_|lora\.|lora_linear_layer\.)(A|B|down|up)(?:\.[A-Za-z_]\w*)?\.weight")
_PROCESSOR = re.compile(r"(.+)\.processor\.(to_\w+)_lora\.(down|up)\.weight")  # diffusers before 0.22
_PREFIX = re.compile(
    r"(base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|transformer\.|unet\.|lora_unet_"
    r"|lora_transformer_|lycoris_)*"
)
_TEXT_PREFIX = re.compile(r"text_encoder\.|lora_te1?_")
_OTHER_KINDS = {
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "dora_scale": "DoRA",
    "oft_": "OFT",
    "lora_mid": "Tucker LoCon",
}


@dataclass(frozen=True)
class Place:
    """A layer that a name in a file stands for, or the part `index` of `num` equal parts of its output."""

    layer: str
    index: int = 0
    num: int = 1
    swapped: bool = False  # shift and scale stand the other way round there


@dataclass(frozen=True)
class Halves:
    """A and B for one layer, of one file; its scale is in B."""

    part: str  # transformer, unet or text_encoder
    layer: str
    down: Tensor
    up: Tensor


def parse_lora(text: str) -> tuple[Path, float]:
    """``FILE`` or ``FILE:0.8`` as (file, weight), weight 1 if not given; a run's folder means the file in it.

    Raises SdlabError unless that file is there and its header is a LoRA's.
    """
    head, _, tail = text.rpartition(":")
    path, weight = Path(text).expanduser(), 1.0
    if head and not path.exists() and not re.search(r"[/\\]", tail):  # a drive's colon has a path behind it
        try:
            weight = float(tail)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise SdlabError(
                f"'{tail}' is not a weight", where=f"--lora {text}", next_step="Write FILE or FILE:0.8"
            )
        path = Path(head).expanduser()
    if path.is_dir():
        if not (path / LORA_FILE).is_file():
            raise SdlabError(
                f"holds no {LORA_FILE}",
                where=str(path),
                next_step="Give the LoRA's file, or its run's folder",
            )
        path = path / LORA_FILE
    check_lora(read_header(path))
    return path, weight


def check_lora(header: Header) -> None:
    """Raise SdlabError unless the file's names are those of a LoRA that we read."""
    for name in header.tensors:
        for word, kind in _OTHER_KINDS.items():
            if word in name:
                raise SdlabError(
                    f"is a {kind}, which sdlab does not read",
                    where=str(header.path),
                    next_step="Take a plain LoRA",
                )
    if not any(_split(name) for name in header.tensors):
        raise SdlabError(
            f"is not a LoRA: none of its {len(header.tensors)} tensors belongs to one",
            where=str(header.path),
            next_step="A whole model is given as --load-model",
        )


def names_of(module: nn.Module) -> dict[str, list[Place]]:
    """Every name that a file may use for a layer of `module`, dotted and with underscores, and what it means."""
    from torch import nn

    found: dict[str, list[Place]] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            found[name] = [Place(name)]
            if other := _in_bfl(name):
                found.setdefault(other[0], []).append(other[1])
            if name.startswith("encoder.layers."):  # transformers before 5.6 had a `text_model` around it
                found[f"text_model.{name}"] = [Place(name)]
    return found | {name.replace(".", "_"): places for name, places in found.items()}


def _in_bfl(name: str) -> tuple[str, Place] | None:
    """Black Forest Labs' name of a layer of FLUX.2, and which part of that matrix is meant; None for other layers."""
    try:
        there = bfl.place_of(f"{name}.weight")
    except KeyError:
        return None
    index, num = (0, 1) if there.third is None else (there.third, 3)
    return there.name.removesuffix(".weight"), Place(name, index, num, there.halves_swapped)


def read_lora(path: Path, places: Mapping[str, Mapping[str, list[Place]]]) -> list[Halves]:
    """Both halves for every layer that the file adapts, in the layers' order. `places` is `names_of` by part.

    Raises SdlabError unless every tensor of the file is a LoRA's and has its place.
    """
    header = read_header(path)
    check_lora(header)
    pairs, alphas = _pairs(header)
    settings = _settings(header)
    found, lost = [], []
    for base, pair in pairs.items():
        part, layers = _look_up(base, places)
        if not layers:
            lost.append(base)
            continue
        down, up = _read(pair["down"]), _read(pair["up"])
        rank = down.shape[0]
        if down.ndim not in (2, 4) or up.ndim != down.ndim or up.shape[1] != rank or rank == 0:
            raise SdlabError(f"the two halves of {base} do not fit each other", where=str(path))
        up = up * _scale(base, rank, alphas, settings, path)
        found += [Halves(part, place.layer, down, _rows(up, place, base, path)) for place in layers]
    if lost:
        _refuse_lost(path, lost, len(pairs), list(places))
    return sorted(found, key=lambda half: (half.part, half.layer))


def _refuse_lost(path: Path, lost: list[str], num: int, parts: list[str]) -> None:
    what = (
        "is a LoRA of another kind of model"
        if len(lost) == num
        else f"{len(lost)} of {num} layers have no place"
    )
    raise SdlabError(
        f"{what}: there is no {lost[0]} in this model's {' or '.join(parts)}",
        where=str(path),
        next_step="Give it with the model that it was trained for",
    )


def _split(name: str) -> tuple[str, str] | None:
    """(layer, ``down`` or ``up``) of a tensor's name; None if it is not a half of a LoRA."""
    match = _PROCESSOR.fullmatch(name)
    if match:
        layer = "to_out.0" if match[2] == "to_out" else match[2]
        return f"{match[1]}.{layer}", match[3]
    match = _TENSOR.fullmatch(name)
    return (match[1], {"A": "down", "B": "up"}.get(match[2], match[2])) if match else None


def _pairs(header: Header) -> tuple[dict[str, dict[str, Stored]], dict[str, Stored]]:
    """The halves by layer, and the alphas by layer. Raises SdlabError for a tensor that is neither, or a lone half."""
    pairs: dict[str, dict[str, Stored]] = {}
    alphas: dict[str, Stored] = {}
    for name, stored in header.tensors.items():
        half = _split(name)
        if half:
            pairs.setdefault(half[0], {})[half[1]] = stored
        elif name.endswith(".alpha"):
            alphas[name.removesuffix(".alpha")] = stored
        else:
            raise SdlabError(
                f"holds {name}, which is no part of a LoRA that sdlab reads", where=str(header.path)
            )
    alone = [base for base, pair in pairs.items() if len(pair) != 2] + sorted(alphas.keys() - pairs.keys())
    if alone:
        raise SdlabError(
            f"lacks one half of {alone[0]}", where=str(header.path), next_step="Download it again"
        )
    return pairs, alphas


def _look_up(base: str, places: Mapping[str, Mapping[str, list[Place]]]) -> tuple[str, list[Place]]:
    """The part and the layers that a name means; no layers where it has no place."""
    text = _TEXT_PREFIX.match(base)
    if text:
        table = places.get("text_encoder", {})
        return "text_encoder", table.get(base[text.end() :], [])
    rest = _PREFIX.sub("", base, count=1)
    for part, table in places.items():
        if part != "text_encoder" and rest in table:
            return part, table[rest]
    return "", []


def _read(stored: Stored) -> Tensor:
    import torch

    if stored.dtype not in FLOATS:
        raise SdlabError(
            f"{stored.name} is of type {stored.dtype}, which sdlab does not read", where=str(stored.path)
        )
    tensor = stored.read().float()
    if not torch.isfinite(tensor).all():
        raise SdlabError(f"{stored.name} holds numbers that are not finite", where=str(stored.path))
    return tensor


def _rows(up: Tensor, place: Place, base: str, path: Path) -> Tensor:
    """The rows of B that are for this layer."""
    import torch

    if up.shape[0] % place.num:
        raise SdlabError(f"{base} does not split into {place.num} parts", where=str(path))
    rows = up.chunk(place.num)[place.index]
    return torch.cat(rows.chunk(2)[::-1]) if place.swapped else rows


def _scale(
    base: str, rank: int, alphas: Mapping[str, Stored], settings: Mapping[str, Any], path: Path
) -> float:
    """alpha/rank: from a tensor beside the halves, else from PEFT's settings, else 1."""
    if base in alphas:
        tensor = _read(alphas[base])
        if tensor.numel() != 1:
            raise SdlabError(f"{base}.alpha is not one number", where=str(path))
        return float(tensor) / rank
    part = next((p for p in ("transformer", "unet", "text_encoder") if base.startswith(f"{p}.")), "")
    own = {k.removeprefix(f"{part}."): v for k, v in settings.items()}
    alpha = own.get("lora_alpha")
    patterns = own.get("alpha_pattern") or {}
    if isinstance(patterns, dict):
        name = base.removeprefix("base_model.model.").removeprefix(f"{part}.")
        alpha = next((v for k, v in patterns.items() if _ends(name, str(k))), alpha)
    if alpha is None:
        return 1.0
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise SdlabError(f"its header says lora_alpha {str(alpha)[:20]!r}", where=str(path))
    return alpha / (math.sqrt(rank) if own.get("use_rslora") is True else rank)


def _ends(name: str, pattern: str) -> bool:
    """Does PEFT's pattern mean this layer? It is a name's end; a `^` in front of it makes it the whole name."""
    plain = re.sub(r"\\(.)", r"\1", pattern)
    return name == plain.removeprefix("^") or (not plain.startswith("^") and name.endswith(f".{plain}"))


def _settings(header: Header) -> dict[str, Any]:
    """PEFT's settings: from the header as diffusers keeps them, or the adapter_config.json beside PEFT's own file."""
    beside = header.path.with_name("adapter_config.json")
    if header.path.name == "adapter_model.safetensors" and beside.is_file():
        return read_json(beside)
    try:
        settings = json.loads(header.metadata.get(_HEADER_KEY, "{}"))
    except (ValueError, RecursionError) as reason:
        raise SdlabError(f"its header's {_HEADER_KEY} is not JSON", where=str(header.path)) from reason
    return settings if isinstance(settings, dict) else {}
