"""A part of another model in the place of a model's own: ``--unet``, ``--vae``, ``--text-encoder``; or a fresh one.

What is asked for is a single file, the folder of the part, a run that trained it, or whatever names a whole model:
`find` gives that one's pipeline folder, or raises SdlabError where it is of another family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sdlab.errors import SdlabError
from sdlab.models import flux2_folder, folder
from sdlab.models.bases import Init
from sdlab.models.flux2_file import read_transformer_file
from sdlab.models.flux2_folder import Flux2Parts, read_flux2_folder, with_transformer
from sdlab.models.folder import SdParts, check_tokenizer, read_folder, with_unet
from sdlab.models.fresh import fresh_part
from sdlab.models.parts import Part
from sdlab.models.runs import vae_run
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
    place = path if _is_part(path) else (vae_run(asked) or find(asked)) / "vae"
    part = read(place, allow_pickle=allow_pickle)
    found = str(part.config.get("_class_name", own.class_name))
    if found != own.class_name:
        raise SdlabError(
            f"its class is {found[:60]}, the model needs {own.class_name}",
            where=str(place),
            next_step="Give the VAE of a model of the same family",
        )
    return part


def swap_sd_text_encoder(parts: SdParts, asked: str, *, find: Find, allow_pickle: bool) -> SdParts:
    """Stable Diffusion with another text encoder and its tokenizer."""
    place = _text_encoder_of(asked, find)
    check_tokenizer(place / "tokenizer")
    text = folder.text_part(place / "text_encoder", allow_pickle=allow_pickle)
    return replace(parts, text_encoder=text, tokenizer=place / "tokenizer")


def swap_flux2_text_encoder(parts: Flux2Parts, asked: str, *, find: Find, allow_pickle: bool) -> Flux2Parts:
    """FLUX.2 with another text encoder of the same kind (klein's or dev's) and its tokenizer."""
    place = _text_encoder_of(asked, find)
    text = flux2_folder.own_text_part(place, parts.kind, allow_pickle=allow_pickle)
    return replace(parts, text_encoder=text, tokenizer=place / "tokenizer")


def _text_encoder_of(asked: str, find: Find) -> Path:
    """The folder that holds text_encoder/ and tokenizer/."""
    path = Path(asked).expanduser()
    if (path / "text_encoder").is_dir() and (path / "tokenizer").is_dir():
        return path
    if path.is_file() or _is_part(path) or (path / "text_encoder").is_dir():
        raise SdlabError(
            "is no text encoder with its tokenizer",
            where=asked,
            next_step="Give the folder that holds text_encoder/ and tokenizer/, or a model",
        )
    return find(asked)


def with_fresh_unet(parts: SdParts, init: Init) -> SdParts:
    """Stable Diffusion with an untrained UNet that fits its VAE and text encoder."""
    channels = parts.vae.config.get("latent_channels", 4)
    adapt = {
        "in_channels": channels,
        "out_channels": channels,
        "cross_attention_dim": parts.text_encoder.config.get("hidden_size", 512),
    }
    return with_unet(parts, fresh_part("unet", init.asked, seed=init.seed, adapt=adapt), None)


def with_fresh_transformer(parts: Flux2Parts, init: Init) -> Flux2Parts:
    """FLUX.2 with an untrained transformer that fits its VAE and text encoder."""
    adapt = {
        "in_channels": 4 * parts.vae.config.get("latent_channels", 32),
        "joint_attention_dim": len(parts.layers) * parts.text_encoder.config.get("hidden_size", 0),
    }
    fresh = fresh_part("transformer", init.asked, seed=init.seed, adapt=adapt)
    return with_transformer(parts, fresh, is_distilled=False)


def _is_part(path: Path) -> bool:
    return (path / "config.json").is_file() and not (path / "model_index.json").is_file()
