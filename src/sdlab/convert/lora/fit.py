"""Which model a LoRA is for: the one among those we know by shape where each of its layers has a place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import nn

from sdlab.errors import SdlabError
from sdlab.models.bases import known_configs, known_flux2_configs
from sdlab.models.files import Header, read_json
from sdlab.models.lora import adaptable
from sdlab.models.lora_files import fits
from sdlab.models.parts import Part, build
from sdlab.models.pieces import read_pieces

_SDXL_NAMES = ("lora_te2_", "text_encoder_2.", "text_encoders.clip_g.")
_SDXL_WIDTH = 2048  # of the prompts that its UNet takes; 768 in 1.x, 1024 in 2.x


def models_of(
    header: Header, base: Path | None, *, allow_pickle: bool
) -> tuple[str, Mapping[str, nn.Module]]:
    """The kind (sd1, sd2, flux2-klein, flux2-dev) and the networks, without memory, of the model a LoRA is for.

    `base` is that model's folder or file, else the models that we know are tried. SdlabError where none of them fits.
    """
    if base is not None:
        pieces = read_pieces(base, allow_pickle=allow_pickle)
        return pieces.kind, adaptable(pieces.networks.values())
    tried = []
    for name, kind, modules in _known():
        if fits(header, modules):
            return kind, modules
        tried.append(name)
    if _is_sdxl(header):
        raise SdlabError(
            "is a LoRA of SDXL, which sdlab does not read",
            where=str(header.path),
            next_step="Take one of Stable Diffusion 1.x, 2.x or FLUX.2",
        )
    raise SdlabError(
        f"fits none of the models that are known by shape ({', '.join(tried)})",
        where=str(header.path),
        next_step="Name the model that it was trained for with --base",
    )


def _is_sdxl(header: Header) -> bool:
    return any(
        name.startswith(_SDXL_NAMES)
        or ("attn2" in name and "to_k" in name and len(stored.shape) > 1 and stored.shape[1] == _SDXL_WIDTH)
        for name, stored in header.tensors.items()
    )


def _known() -> Iterator[tuple[str, str, Mapping[str, nn.Module]]]:
    """Name, kind and networks of each model known by shape; each is built only when it is asked for."""
    for base, folder in known_configs().items():
        if (folder / "unet" / "config.json").is_file():  # a built-in may be left out of a package
            unet = _part("unet", "UNet2DConditionModel", folder)
            text = _part("text_encoder", "CLIPTextModel", folder)
            kind = "sd2" if unet.config.get("use_linear_projection") is True else "sd1"
            yield base, kind, {"unet": build(unet), "text_encoder": build(text)}
    for base, folder in known_flux2_configs().items():
        part = _part("transformer", "Flux2Transformer2DModel", folder)
        kind = "flux2-dev" if part.config.get("guidance_embeds", True) else "flux2-klein"
        yield base, kind, {"transformer": build(part)}


def _part(name: str, class_name: str, folder: Path) -> Part:
    path = folder / name / "config.json"
    return Part(name, class_name, read_json(path), {}, path)
