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
from sdlab.models.files import FLOATS, Header, Stored, read_header, read_json
from sdlab.models.lora_family import family_of
from sdlab.models.lora_names import Place, look_up, names_of, split
from sdlab.models.runs import LORA_FILE

if TYPE_CHECKING:
    from torch import Tensor, nn

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_HEADER_KEY = "lora_adapter_metadata"  # where diffusers keeps PEFT's settings

_OTHER_KINDS = {
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "dora_scale": "DoRA",
    "oft_": "OFT",
    "lora_mid": "Tucker LoCon",
}


@dataclass(frozen=True)
class Adapter:
    """A and B for one layer, float32, named as diffusers names them: its weight grows by `scale` B A."""

    part: str  # transformer, unet or text_encoder
    layer: str
    down: Tensor  # A
    up: Tensor  # B
    scale: float = 1.0  # alpha / rank
    dtype: str = "F32"  # what the file has, a safetensors word

    @property
    def rank(self) -> int:
        """How many rows A has."""
        return self.down.shape[0]


def parse_lora(text: str) -> tuple[Path, float]:
    """``FILE`` or ``FILE:0.8`` as (file, weight), weight 1 if not given; a run's or PEFT's folder means its file.

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
        path = _file_in(path)
    check_lora(read_header(path))
    return path, weight


def _file_in(folder: Path) -> Path:
    for name in (LORA_FILE, PEFT_FILE):
        if (folder / name).is_file():
            return folder / name
    raise SdlabError(
        f"holds no {LORA_FILE}", where=str(folder), next_step="Give the LoRA's file, or its run's folder"
    )


def is_lora(header: Header) -> bool:
    """Does any tensor's name say that it is half of a LoRA?"""
    return any(split(name) for name in header.tensors)


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
    if not is_lora(header):
        raise SdlabError(
            f"is not a LoRA: none of its {len(header.tensors)} tensors belongs to one",
            where=str(header.path),
            next_step="A whole model is given as --load-model",
        )


def read_lora(
    path: Path, places: Mapping[str, Mapping[str, list[Place]]], *, shapes_only: bool = False
) -> list[Adapter]:
    """What the file adapts, in the layers' order. `places` is `names_of` by part.

    Raises SdlabError unless every tensor of the file is a LoRA's and has its place. With `shapes_only` the halves are
    not read but stand on the meta device, so that numbers which are not finite go unseen.
    """
    header = read_header(path)
    check_lora(header)
    pairs, alphas = _pairs(header)
    settings = _settings(header)
    meant = {base: look_up(base, places) for base in pairs}
    lost = [base for base, (_, layers) in meant.items() if not layers]
    if lost:
        _refuse_lost(header, lost, len(pairs), list(places))
    found = []
    for base, pair in pairs.items():
        part, layers = meant[base]
        down, up = (_read(pair[half], shape_only=shapes_only) for half in ("down", "up"))
        rank = down.shape[0] if down.ndim else 0
        if down.ndim not in (2, 4) or up.ndim != down.ndim or up.shape[1] != rank or rank == 0:
            raise SdlabError(f"the two halves of {base} do not fit each other", where=str(path))
        scale, dtype = _scale(base, rank, alphas, settings, path), pair["down"].dtype
        found += [
            Adapter(part, place.layer, down, _rows(up, place, base, path), scale, dtype) for place in layers
        ]
    return sorted(found, key=lambda adapter: (adapter.part, adapter.layer))


def fits(header: Header, modules: Mapping[str, nn.Module]) -> bool:
    """Has every layer of the file a place of its size in these networks? Told by the header alone."""
    places = {name: names_of(module) for name, module in modules.items()}
    for base, pair in _pairs(header)[0].items():
        part, layers = look_up(base, places)
        if not layers or not all(_fits(pair, place, modules[part]) for place in layers):
            return False
    return True


def _fits(pair: Mapping[str, Stored], place: Place, module: nn.Module) -> bool:
    shape = tuple(module.get_submodule(place.layer).weight.shape)  # type: ignore[arg-type]
    rank = pair["down"].shape[0] if pair["down"].shape else 0
    num_down, num_up = (math.prod(pair[half].shape) for half in ("down", "up"))
    return (num_down, num_up) == (rank * math.prod(shape[1:]), rank * shape[0] * place.num)


def _refuse_lost(header: Header, lost: list[str], num: int, parts: list[str]) -> None:
    what = (
        f"is a LoRA of another kind of model: 0 of its {num} layers have a place here"
        if len(lost) == num
        else f"{len(lost)} of {num} layers have no place"
    )
    raise SdlabError(
        f"{what}: there is no {lost[0]} in this model's {' or '.join(parts)}; it is for {family_of(header)}",
        where=str(header.path),
        next_step="Give it with the model that it was trained for",
    )


def _pairs(header: Header) -> tuple[dict[str, dict[str, Stored]], dict[str, Stored]]:
    """The halves by layer, and the alphas by layer. Raises SdlabError for a tensor that is neither, or a lone half."""
    pairs: dict[str, dict[str, Stored]] = {}
    alphas: dict[str, Stored] = {}
    for name, stored in header.tensors.items():
        half = split(name)
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


def _read(stored: Stored, *, shape_only: bool = False) -> Tensor:
    import torch

    if stored.dtype not in FLOATS:
        raise SdlabError(
            f"{stored.name} is of type {stored.dtype}, which sdlab does not read", where=str(stored.path)
        )
    if shape_only:
        return torch.empty(stored.shape, device="meta")
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
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= 1e9:
        raise SdlabError(f"its header says lora_alpha {str(alpha)[:20]!r}", where=str(path))
    return alpha / (math.sqrt(rank) if own.get("use_rslora") is True else rank)


def _ends(name: str, pattern: str) -> bool:
    """Does PEFT's pattern mean this layer? It is a name's end; a `^` in front of it makes it the whole name."""
    plain = re.sub(r"\\(.)", r"\1", pattern)
    return name == plain.removeprefix("^") or (not plain.startswith("^") and name.endswith(f".{plain}"))


def _settings(header: Header) -> dict[str, Any]:
    """PEFT's settings: from the header as diffusers keeps them, or the adapter_config.json beside PEFT's own file."""
    beside = header.path.with_name(PEFT_CONFIG)
    if header.path.name == PEFT_FILE and beside.is_file():
        return read_json(beside)
    try:
        settings = json.loads(header.metadata.get(_HEADER_KEY, "{}"))
    except (ValueError, RecursionError) as reason:
        raise SdlabError(f"its header's {_HEADER_KEY} is not JSON", where=str(header.path)) from reason
    return settings if isinstance(settings, dict) else {}
