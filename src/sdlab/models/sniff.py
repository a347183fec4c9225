"""What a single file is, told from the names, shapes and types in its header."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from sdlab.errors import SdlabError
from sdlab.models import bfl
from sdlab.models.bases import ALIASES, DISTILLED, known_configs, known_flux2, known_flux2_configs
from sdlab.models.files import FLOATS, Header, Stored, read_json
from sdlab.models.index import LOADS
from sdlab.models.ldm import CLIP, EMA, OPENCLIP, UNET, VAE, ema_name

ARCHITECTURE_KEY = "modelspec.architecture"
BASE = "Give the model itself with --load-model"
ADAPTER = "It is an addition to a model; give a whole model"
LORA = "It is an addition to a model: give it with --lora beside one"
SMALLER = "sdlab reads F32, F16 and BF16; take the fp16 version of the model"

INPAINTING = 9
_CHANNELS = {8: "an instruct-pix2pix model", 5: "a depth-to-image model"}

_Test = Callable[[Collection[str]], bool]


def _any(*patterns: str) -> _Test:
    found = re.compile("|".join(patterns))
    return lambda names: any(found.search(name) for name in names)


_REFUSED: tuple[tuple[_Test, str, str], ...] = (
    (
        _any(
            *(r"^lora_", r"^lycoris_", r"\.lora_[AB]\.", r"[._]lora[._](up|down)", r"\.hada_w", r"\.lokr_"),
            *(r"\.oft_(blocks|diag)", r"\.dora_scale$", r"\.lora_magnitude_vector"),
        ),
        "is a LoRA",
        LORA,
    ),
    (_any(r"^emb_params$", r"^string_to_param", r"^<.*>$"), "is a textual inversion embedding", ADAPTER),
    (_any(r"^clip_[lg]$"), "is a textual inversion embedding of SDXL", ADAPTER),
    (
        _any(r"^control_model\.", r"input_hint_block\.", r"controlnet_cond_embedding\.", r"^controlnet_"),
        "is a ControlNet",
        ADAPTER,
    ),
    (
        _any(
            r"\.(weight_scale|scale_weight)$",
            r"\.comfy_quant$",
            r"^scaled_fp8$",
            r"\.(absmax|quant_map|quant_state\..*)$",
        ),
        "is a quantised model",
        SMALLER,
    ),
    (
        _any(r"(^|\.)double_blocks\.\d+\.", r"(^|\.)single_transformer_blocks\.\d+\."),
        "is a FLUX.1 model, which sdlab does not read",
        LOADS,
    ),
    (_any(r"(^|\.)joint_blocks\.\d+\."), "is a Stable Diffusion 3 model, which sdlab does not read", LOADS),
    (
        _any(r"^(transformer\.)?transformer_blocks\.\d+\."),
        "is a transformer model (SD 3 or a relative), which sdlab does not read",
        LOADS,
    ),
    (
        _any(r"^conditioner\.embedders\.1\.", r"^(unet\.)?add_embedding\.linear_1\."),
        "is an SDXL model, which sdlab does not read",
        LOADS,
    ),
    (_any(r"^conditioner\.embedders\.0\.model\."), "is an SDXL refiner, which sdlab does not read", LOADS),
    (
        _any(r"^conditioner\.embedders\.", r"(^|\.)label_emb\.0\.0\."),
        "is an SDXL model, which sdlab does not read",
        LOADS,
    ),
)

_ADDITIONS = 4  # so many of these go before all else
UNET_PREFIXES = (UNET, "diffusion_model.", "unet.", "")
VAE_PREFIXES = ("", VAE, "vae.")
_PART_ROOTS = {"vae": (VAE,), "text_encoder": (CLIP, OPENCLIP)}
FIRST_EMA = ema_name("input_blocks.0.0.weight")


@dataclass(frozen=True)
class Found:
    """What a single file holds of a model, as far as we read it."""

    family: str  # sd or flux2
    parts: tuple[str, ...]  # of unet, transformer, vae, text_encoder
    channels: int = 4  # that the UNet reads: 9 of an inpainting model
    ema_only: bool = False  # of the UNet only the moving averages are there


def look(header: Header) -> Found:
    """Which networks the file holds, in the original naming or diffusers'.

    Raises SdlabError, one line naming what the file is, where there is none that we read.
    """
    names, where = header.tensors.keys(), str(header.path)
    if not names:
        raise SdlabError("holds no tensors", where=where)
    transformer = flux2_prefix(names)
    for test, what, next_step in _REFUSED[: _ADDITIONS + 1 if transformer is not None else None]:
        if test(names):
            raise SdlabError(what, where=where, next_step=next_step)
    if transformer is not None:
        _check_types(header, transformer)
        return Found("flux2", ("transformer",))
    prefix = unet_prefix(names)
    if prefix is None and FIRST_EMA not in names:
        return _vae_alone(header)
    if prefix is None:
        return Found("sd", ("unet", *_others(names)), _channels(header), ema_only=True)
    _check_types(header, prefix)
    channels = _channels(header)
    _check_middle(names, prefix, where)
    return Found("sd", ("unet", *(_others(names) if prefix == UNET else ())), channels)


def recognise(header: Header) -> str:
    """``checkpoint`` for a Stable Diffusion model to draw with, ``unet`` for a UNet alone, ``flux2`` for a transformer.

    A checkpoint may lack its VAE. Raises SdlabError as `look` does, and for what cannot be drawn with by itself.
    """
    found, where = look(header), str(header.path)
    if found.parts == ("vae",):
        raise SdlabError("is a VAE alone", where=where, next_step="Give it with --vae beside a whole model")
    if found.family == "flux2":
        return "flux2"
    if found.channels == INPAINTING:
        raise inpainting(where)
    if found.parts == ("unet",):
        return "unet"
    if "text_encoder" not in found.parts:
        raise SdlabError(
            "holds no text encoder", where=where, next_step=f"Give it as --unet {where} beside a whole model"
        )
    return "checkpoint"


def inpainting(where: str) -> SdlabError:
    """The error for a model that we convert, but neither draw with nor train."""
    return SdlabError(
        f"is an inpainting model ({INPAINTING} input channels), which sdlab neither draws with nor trains",
        where=where,
        next_step="Give a text-to-image model; only sdlab convert takes this one",
    )


def _others(names: Collection[str]) -> tuple[str, ...]:
    """The parts of a checkpoint that are there beside its UNet."""
    return tuple(part for part, roots in _PART_ROOTS.items() if any(n.startswith(roots) for n in names))


def _vae_alone(header: Header) -> Found:
    names = header.tensors.keys()
    prefix = vae_prefix(names)
    if prefix is None:
        raise _unknown(names, str(header.path))
    if any(n.startswith((UNET, EMA, CLIP, OPENCLIP)) for n in names):
        raise SdlabError(
            "is a checkpoint without a UNet, or with one that lacks its first tensor",
            where=str(header.path),
            next_step="The file is incomplete; download it again",
        )
    _check_types(header, prefix)
    return Found("flux2" if f"{prefix}bn.running_mean" in names else "sd", ("vae",))


def vae_prefix(names: Collection[str]) -> str | None:
    """What stands before the names of a VAE in this file; None where there is no VAE."""
    return next((p for p in VAE_PREFIXES if f"{p}encoder.conv_in.weight" in names), None)


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
        if name.startswith(prefix) and stored.dtype not in FLOATS and not name.endswith(_NUMBERS):
            raise SdlabError(
                f"is quantised or of an unusual type ({name!r} is {stored.dtype})",
                where=str(header.path),
                next_step=SMALLER,
            )


_NUMBERS = ("position_ids", "num_batches_tracked", "num_updates")


def _check_middle(names: Collection[str], prefix: str, where: str) -> None:
    middle = (f"{prefix}middle_block.1.", f"{prefix}mid_block.attentions.")
    if not any(name.startswith(middle) for name in names):
        raise SdlabError(
            "has a reduced UNet, without attention in its middle block, or is incomplete",
            where=where,
            next_step="sdlab reads whole UNets of Stable Diffusion 1.x and 2.x; give one of those",
        )


def first_of_unet(header: Header) -> Stored | None:
    """The UNet's first convolution: (channels out, channels in, 3, 3)."""
    prefix = unet_prefix(header.tensors.keys())
    names = (
        (f"{prefix}input_blocks.0.0.weight", f"{prefix}conv_in.weight")
        if prefix is not None
        else (FIRST_EMA,)
    )
    return next((header.tensors[name] for name in names if name in header.tensors), None)


def _channels(header: Header) -> int:
    """How many channels the UNet reads: 4, or 9. Raises SdlabError for those of models that we do not read."""
    first = first_of_unet(header)
    channels = first.shape[1] if first is not None and len(first.shape) == 4 else 4
    if channels in _CHANNELS:
        raise SdlabError(
            f"is {_CHANNELS[channels]} ({channels} input channels), which sdlab does not read",
            where=str(header.path),
            next_step="Give a text-to-image model",
        )
    return channels


def _unknown(names: Collection[str], where: str) -> SdlabError:
    if any("embeddings.token_embedding." in n or n.startswith(OPENCLIP) for n in names):
        return SdlabError("is a text encoder alone", where=where, next_step=BASE)
    if any(n.startswith((VAE, "decoder.conv_in.")) for n in names):
        return SdlabError("is half a VAE, or a damaged one", where=where, next_step="Download it again")
    if any(n.startswith(EMA) for n in names):
        return SdlabError("holds moving averages of no model that sdlab knows", where=where, next_step=BASE)
    first = min(names)
    return SdlabError(
        f"is no model that sdlab knows (its first tensor is {first[:60]!r})", where=where, next_step=BASE
    )


def known_by_shape(header: Header) -> tuple[str, Path]:
    """The known model whose UNet has the width of the one in this file: (base, folder of configurations)."""
    first = first_of_unet(header)
    cross = next((t for n, t in sorted(header.tensors.items()) if _CROSS.search(n)), None)
    found = (first.shape[0] if first and first.shape else 0, cross.shape[-1] if cross and cross.shape else 0)
    for base, folder in known_configs().items():
        if (folder / "unet" / "config.json").is_file():
            config = read_json(folder / "unet" / "config.json")
            if found == (config["block_out_channels"][0], config["cross_attention_dim"]):
                return base, folder
    raise SdlabError(
        f"its UNet is {found[0]} channels wide with {found[1]}-wide prompts, neither Stable Diffusion 1.x "
        "(320, 768) or 2.x (320, 1024) nor a built-in model",
        where=str(header.path),
        next_step="Give its diffusers folder instead",
    )


_CROSS = re.compile(r"attn2\.?to_k\.?weight$")  # in a moving average the dots are gone


def known_vae_by_shape(header: Header, family: str) -> tuple[str, Path]:
    """The known model whose VAE has the width and the latent channels of the one in this file, as `known_by_shape`."""
    prefix = vae_prefix(header.tensors.keys()) or ""
    first, last = (header.tensors.get(f"{prefix}{half}.conv_in.weight") for half in ("encoder", "decoder"))
    found = (
        first.shape[0] if first and first.shape else 0,
        last.shape[1] if last and len(last.shape) > 1 else 0,
    )
    for base, folder in (known_configs() if family == "sd" else known_flux2_configs()).items():
        if (folder / "vae" / "config.json").is_file():
            config = read_json(folder / "vae" / "config.json")
            if found == (config["block_out_channels"][0], config.get("latent_channels", 4)):
                return base, folder
    raise SdlabError(
        f"is a VAE {found[0]} channels wide with {found[1]} latent channels, of no model that sdlab reads",
        where=str(header.path),
        next_step="sdlab reads those of Stable Diffusion 1.x and 2.x (128, 4) and of FLUX.2 (128, 32)",
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


def architecture_of(kind: str) -> str:
    """The word for a FLUX.2 model, or a kind of them, in a file's header: ``flux-2-klein-base-4b``."""
    return kind.replace("flux2", "flux-2")


def states_distilled(header: Header) -> bool | None:
    """Whether the file's ``modelspec.architecture`` says that it is distilled to few steps; None where it does not.

    klein and klein-base have the same tensors. Titles are the user's own words and say nothing; "Flux.2-klein-4b",
    as trainers write, means either of the two.
    """
    return _KLEINS.get(header.metadata.get(ARCHITECTURE_KEY, "").lower())


_KLEINS = {architecture_of(base): base in DISTILLED for base in ALIASES if "klein" in base}
