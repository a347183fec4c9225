"""What a single file is, told from the names, shapes and types in its header."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path

from sdlab.errors import SdlabError
from sdlab.models import bfl
from sdlab.models.bases import known_configs, known_flux2
from sdlab.models.files import FLOATS, Header, read_json
from sdlab.models.index import LOADS
from sdlab.models.ldm import CLIP, UNET, VAE

BASE = "Give the model itself with --load-model"
ADAPTER = "It is an addition to a model; give a whole model"

_CHANNELS = {9: "an inpainting model", 8: "an instruct-pix2pix model", 5: "a depth-to-image model"}

_Test = Callable[[Collection[str]], bool]


def _any(*patterns: str) -> _Test:
    found = re.compile("|".join(patterns))
    return lambda names: any(found.search(name) for name in names)


_REFUSED: tuple[tuple[_Test, str, str], ...] = (
    (
        _any(r"^lora_(unet|te)", r"\.lora_[AB]\.", r"[._]lora[._](up|down)", r"\.hada_w", r"\.lokr_"),
        "is a LoRA",
        ADAPTER,
    ),
    (_any(r"^emb_params$", r"^string_to_param", r"^<.*>$"), "is a textual inversion embedding", ADAPTER),
    (
        _any(r"^control_model\.", r"input_hint_block\.", r"controlnet_cond_embedding\.", r"^controlnet_"),
        "is a ControlNet",
        ADAPTER,
    ),
    (
        _any(r"(^|\.)double_blocks\.\d+\.", r"(^|\.)single_transformer_blocks\.\d+\."),
        "is a FLUX model, which sdlab does not read",
        LOADS,
    ),
    (
        _any(r"(^|\.)joint_blocks\.\d+\.", r"^transformer_blocks\.\d+\."),
        "is a transformer model (SD 3 or a relative), which sdlab does not read",
        LOADS,
    ),
    (
        _any(
            r"^conditioner\.embedders\.", r"(^|\.)label_emb\.0\.0\.", r"^(unet\.)?add_embedding\.linear_1\."
        ),
        "is an SDXL model, which sdlab does not read",
        LOADS,
    ),
    (
        _any(r"^cond_stage_model\.model\.transformer\.resblocks\."),
        "is a Stable Diffusion 2 single file, which sdlab does not read",
        "Give its diffusers folder instead",
    ),
    (
        _any(r"\.weight_scale$", r"\.comfy_quant$", r"\.(absmax|quant_map|quant_state\..*)$"),
        "is a quantised model",
        BASE,
    ),
)

_ADDITIONS = ("is a LoRA", "is a textual inversion embedding", "is a ControlNet")
UNET_PREFIXES = (UNET, "diffusion_model.", "unet.", "")


def recognise(header: Header) -> str:
    """``checkpoint`` for a whole Stable Diffusion 1.x model, ``unet`` for its UNet alone, ``flux2`` for a transformer.

    Each in the original naming or diffusers'. Raises SdlabError, one line naming what the file is, for everything else.
    """
    names = header.tensors.keys()
    where = str(header.path)
    if not names:
        raise SdlabError("holds no tensors", where=where)
    transformer = flux2_prefix(names)
    for test, what, next_step in _REFUSED:
        if transformer is not None and what not in _ADDITIONS:
            break
        if test(names):
            raise SdlabError(what, where=where, next_step=next_step)
    if transformer is not None:
        _check_types(header, transformer)
        return "flux2"
    prefix = unet_prefix(names)
    if prefix is None:
        raise _without_unet(names, where)
    _check_types(header, prefix)
    _check_channels(header, prefix)
    parts = [any(n.startswith(p) for n in names) for p in (VAE, CLIP)]
    if prefix != UNET or not any(parts):
        return "unet"
    if all(parts):
        return "checkpoint"
    lost = "text encoder" if parts[0] else "VAE"
    raise SdlabError(f"holds no {lost}", where=where, next_step="Give it with --unet beside a whole model")


def unet_prefix(names: Collection[str]) -> str | None:
    """What stands before the names of a UNet in this file; None where there is no UNet."""
    for prefix in UNET_PREFIXES:
        if f"{prefix}input_blocks.0.0.weight" in names or f"{prefix}conv_in.weight" in names:
            if any(n.startswith((f"{prefix}input_blocks.1.", f"{prefix}down_blocks.0.")) for n in names):
                return prefix
    return None


def flux2_prefix(names: Collection[str]) -> str | None:
    """What stands before the names of a FLUX.2 transformer in this file; None where there is none."""
    marks = (bfl.MARK, bfl.DIFFUSERS_MARK)
    return next((p for p in bfl.PREFIXES if any(p + mark in names for mark in marks)), None)


def _check_types(header: Header, prefix: str) -> None:
    for name, stored in header.tensors.items():
        if name.startswith(prefix) and stored.dtype not in FLOATS and not name.endswith("position_ids"):
            raise SdlabError(
                f"is quantised or of an unusual type ({name!r} is {stored.dtype})",
                where=str(header.path),
                next_step="sdlab reads F32, F16 and BF16; take the fp16 version of the model",
            )


def _check_channels(header: Header, prefix: str) -> None:
    first = (
        header.tensors.get(f"{prefix}input_blocks.0.0.weight") or header.tensors[f"{prefix}conv_in.weight"]
    )
    channels = first.shape[1] if len(first.shape) == 4 else 0
    if channels in _CHANNELS:
        raise SdlabError(
            f"is {_CHANNELS[channels]} ({channels} input channels), which sdlab does not read",
            where=str(header.path),
            next_step="Give a text-to-image model",
        )


def _without_unet(names: Collection[str], where: str) -> SdlabError:
    if any(
        n.startswith((VAE, "encoder.conv_in.", "decoder.conv_in.", "encoder.down_blocks.")) for n in names
    ):
        return SdlabError("is a VAE alone", where=where, next_step="Give it with --vae beside a whole model")
    if any("embeddings.token_embedding." in n for n in names):
        return SdlabError("is a text encoder alone", where=where, next_step=BASE)
    first = min(names)
    return SdlabError(
        f"is no model that sdlab knows (its first tensor is {first[:60]!r})", where=where, next_step=BASE
    )


def known_by_shape(header: Header) -> tuple[str, Path]:
    """The known model whose UNet has the width of the one in this file: (base, folder of configurations)."""
    prefix = unet_prefix(header.tensors.keys())
    first = header.tensors.get(f"{prefix}input_blocks.0.0.weight") or header.tensors.get(
        f"{prefix}conv_in.weight"
    )
    cross = next((t for n, t in sorted(header.tensors.items()) if n.endswith("attn2.to_k.weight")), None)
    found = (first.shape[0] if first and first.shape else 0, cross.shape[-1] if cross and cross.shape else 0)
    for base, folder in known_configs().items():
        if (folder / "unet" / "config.json").is_file():
            config = read_json(folder / "unet" / "config.json")
            if found == (config["block_out_channels"][0], config["cross_attention_dim"]):
                return base, folder
    raise SdlabError(
        f"its UNet is {found[0]} channels wide with {found[1]}-wide prompts, neither Stable Diffusion 1.x "
        "(320, 768) nor a built-in model",
        where=str(header.path),
        next_step="Give its diffusers folder instead",
    )


def flux2_shape(header: Header) -> tuple[int, int, int, int]:
    """Blocks of either kind, attention heads and prompt width of a FLUX.2 transformer: as bases.FLUX2_SIGNATURE.

    Zeros for what cannot be told.
    """
    prefix = flux2_prefix(header.tensors.keys()) or ""
    names = [name.removeprefix(prefix) for name in header.tensors if name.startswith(prefix)]

    def size(name: str, other: str, axis: int) -> int:
        stored = header.tensors.get(prefix + name) or header.tensors.get(prefix + other)
        return stored.shape[axis] if stored and len(stored.shape) > axis else 0

    def blocks(*stems: str) -> int:
        found = (re.match(rf"({'|'.join(stems)})\.(\d+)\.", name) for name in names)
        return len({m[2] for m in found if m})

    width = size("img_in.weight", "x_embedder.weight", 0)
    head = size(
        "double_blocks.0.img_attn.norm.query_norm.scale", "transformer_blocks.0.attn.norm_q.weight", 0
    )
    joint = size("txt_in.weight", "context_embedder.weight", 1)
    doubles, singles = (
        blocks("double_blocks", "transformer_blocks"),
        blocks("single_blocks", "single_transformer_blocks"),
    )
    return doubles, singles, width // head if head else 0, joint


def known_flux2_by_shape(header: Header) -> str:
    """The FLUX.2 model whose transformer is of the shape of the one in this file; SdlabError for another shape."""
    found = flux2_shape(header)
    for base, shape in known_flux2().items():
        if shape == found:
            return base
    raise SdlabError(
        f"its transformer has {found[0]} and {found[1]} blocks with {found[3]}-wide prompts, no FLUX.2 that we know",
        where=str(header.path),
        next_step=f"Give the folder it belongs to with --load-model, and this file as --unet {header.path}",
    )


def states_distilled(header: Header) -> bool | None:
    """Whether the file's own description says that it is distilled to few steps; None where it does not say.

    klein and klein-base have the same tensors.
    """
    said = " ".join(v for k, v in sorted(header.metadata.items()) if k.startswith("modelspec.")).lower()
    if "base" in said or "undistilled" in said:
        return False
    return True if "klein" in said or "distill" in said else None
