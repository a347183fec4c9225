"""The autoencoder that a training starts from: a new one, one that stands alone, or a model's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlab import show
from sdlab.models import flux2_folder, folder
from sdlab.models.bases import safe_name
from sdlab.models.files import read_json
from sdlab.models.fresh import fresh_name, fresh_part
from sdlab.models.opening import open_family
from sdlab.models.parts import Part
from sdlab.models.resolve import Model, resolve
from sdlab.models.runs import vae_run


@dataclass(frozen=True)
class VaeSource:
    """An autoencoder that was found, no weight of it read."""

    part: Part
    base: str  # a name for it
    model: Model | None = None  # whose it is
    place: Path | None = None  # its folder, where it stands alone


def vae_source(init: str, vae: str, load_model: str, *, seed: int, allow_pickle: bool) -> VaeSource:
    """Find the VAE to start from, and say which it is: a new one (`init`), `vae` alone, or that of a model.

    A model's is replaced by `vae` where both are given; `seed` draws a new one. Raises SdlabError where there is none.
    """
    if init:
        part = fresh_part("vae", init, seed=seed, adapt={})
        show.note(f"a new VAE ({init}), from nothing")
        return VaeSource(part, f"vae-{fresh_name(init)}")
    place = _alone(vae)
    if place and not load_model:
        show.note(f"the VAE in {place}")
        return VaeSource(_part_in(place, allow_pickle=allow_pickle), _name_of(place), place=place)
    model = resolve(load_model, training=True, allow_pickle=allow_pickle)
    show.note(f"{model.why}; of it the VAE" + (f", which {vae} takes the place of" if vae else ""))
    family: Any = open_family(model, vae=vae, allow_pickle=allow_pickle)
    return VaeSource(family.parts.vae, model.base, model=model)


def run_name(init: str, vae: str, load_model: str, *, allow_pickle: bool) -> str:
    """What a run that starts from this VAE is called where the user does not say."""
    if init:
        return f"vae-{fresh_name(init)}"
    place = _alone(vae)
    if place and not load_model:
        return f"{_name_of(place)}-vae"
    return f"{resolve(load_model, training=True, allow_pickle=allow_pickle).base}-vae"


def _alone(vae: str) -> Path | None:
    """The folder with the config.json of a VAE that is given alone, or as a train-vae run."""
    run = vae_run(vae) if vae else None
    place = run / "vae" if run else Path(vae).expanduser()
    alone = (place / "config.json").is_file() and not (place / "model_index.json").is_file()
    return place if vae and alone else None


def _part_in(place: Path, *, allow_pickle: bool) -> Part:
    """The VAE in a folder, of either kind."""
    is_flux2 = read_json(place / "config.json").get("_class_name") == "AutoencoderKLFlux2"
    read = flux2_folder.vae_part if is_flux2 else folder.vae_part
    return read(place, allow_pickle=allow_pickle)


def _name_of(place: Path) -> str:
    """A name for the VAE in a folder: the run's that made it, or the folder's own."""
    real = place.resolve()
    return safe_name(real.parent.name if real.name == "vae" else real.name)
