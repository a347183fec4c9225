"""A part of another model in the place of a model's own: ``--unet`` and ``--vae``.

What is asked for is a single file, the folder of the part, or whatever names a whole model: `find` gives that one's
pipeline folder, or raises SdlabError where it is of another family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sdlab.models import flux2_folder, folder
from sdlab.models.flux2_file import read_transformer_file
from sdlab.models.flux2_folder import Flux2Parts, read_flux2_folder, with_transformer
from sdlab.models.folder import SdParts, read_folder, with_unet
from sdlab.models.parts import Part
from sdlab.models.single_file import read_single_unet
from sdlab.models.vae_file import read_vae_file

Find = Callable[[str], Path]


def swap_unet(parts: SdParts, asked: str, *, find: Find, allow_pickle: bool) -> SdParts:
    """Stable Diffusion with another UNet; of a whole model its noise schedule comes along."""
    path = Path(asked).expanduser()
    if path.is_file():
        return with_unet(parts, read_single_unet(path, parts.unet.config, allow_pickle=allow_pickle), None)
    if _is_part(path):
        return with_unet(parts, folder.unet_part(path, allow_pickle=allow_pickle), None)
    other = read_folder(find(asked), allow_pickle=allow_pickle)
    return with_unet(parts, other.unet, other.scheduler)


def swap_transformer(parts: Flux2Parts, asked: str, *, find: Find, allow_pickle: bool) -> Flux2Parts:
    """FLUX.2 with another transformer, distilled or not as its file or model says; else as it was."""
    path = Path(asked).expanduser()
    if path.is_file():
        part, is_distilled = read_transformer_file(path, parts.transformer.config, allow_pickle=allow_pickle)
        return with_transformer(parts, part, is_distilled=is_distilled)
    if _is_part(path):
        part = flux2_folder.transformer_part(path, allow_pickle=allow_pickle)
        return with_transformer(parts, part, is_distilled=None)
    other = read_flux2_folder(find(asked), allow_pickle=allow_pickle)
    return with_transformer(parts, other.transformer, is_distilled=other.is_distilled)


def swap_sd_vae(parts: SdParts, asked: str, *, find: Find, allow_pickle: bool) -> SdParts:
    """Stable Diffusion with another VAE."""
    return replace(parts, vae=_vae(parts.vae, asked, folder.vae_part, find, allow_pickle))


def swap_flux2_vae(parts: Flux2Parts, asked: str, *, find: Find, allow_pickle: bool) -> Flux2Parts:
    """FLUX.2 with another VAE."""
    return replace(parts, vae=_vae(parts.vae, asked, flux2_folder.vae_part, find, allow_pickle))


def _vae(own: Part, asked: str, read: Callable[..., Part], find: Find, allow_pickle: bool) -> Part:
    path = Path(asked).expanduser()
    if path.is_file():
        return read_vae_file(path, own, allow_pickle=allow_pickle)
    return read(path if _is_part(path) else find(asked) / "vae", allow_pickle=allow_pickle)


def _is_part(path: Path) -> bool:
    return (path / "config.json").is_file() and not (path / "model_index.json").is_file()
