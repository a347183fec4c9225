"""The files that a recipe names, found again and compared by their sha256."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlab.errors import SdlabError
from sdlab.inference import identity
from sdlab.inference.choose import BY_NAME, Asked, Chosen, Source
from sdlab.inference.prompts.tags import loras_in, without_loras
from sdlab.inference.record.schema import Recipe
from sdlab.inference.spec import Init, Mask, Offload, Reference


@dataclass(frozen=True)
class Elsewhere:
    """Where things are now, if not where the recipe says; "" and "auto" mean as recorded."""

    load_model: str = ""
    unet: str = ""
    vae: str = ""
    loras: tuple[Path, ...] = ()  # in the recipe's order; their weights are the recipe's
    embeddings: tuple[Path, ...] = ()  # files or folders of them, found by name, also by a changed text
    init_image: Path | None = None
    mask: Path | None = None
    references: tuple[Path, ...] = ()  # in the recipe's order, after `init_image` where that is one of them
    device: str = "auto"
    dtype: str = "auto"
    offload: Offload = "none"


@dataclass(frozen=True)
class Tagged:
    """A LoRA that a prompt names; `part` is what the recipe says of its file, None for one that is new."""

    path: Path
    weight: float
    part: Mapping[str, Any] | None


class Finder:
    """Finds a recipe's files, and gathers in `faults` what is missing or has changed, in words."""

    def __init__(self, picture: Path, elsewhere: Elsewhere, values: Mapping[str, Any]) -> None:
        """`values` are those of `change.drawn`: a file that is set is not looked for.

        Raises SdlabError for a place of textual inversions that is not there.
        """
        from sdlab.inference.prompts.embeddings import on_the_shelf

        self.faults: list[str] = []
        self._bases = (Path(), *picture.absolute().parents)
        self._elsewhere, self._values = elsewhere, values
        self._words = on_the_shelf(elsewhere.embeddings)
        for name in ("load_model", "unet", "vae"):
            if name in values and getattr(elsewhere, name):
                self.faults.append(
                    f"--{name.replace('_', '-')} says where it is now, --set {name} takes another"
                )
        if "lora" in values and elsewhere.loras:
            self.faults.append("--lora says where it is now, --set lora takes others")

    def asked(self, recipe: Recipe, *, allow_pickle: bool) -> Asked:
        """What to load, from where it lies now, but for the LoRAs of the prompt."""
        return Asked(
            load_model=self._model(recipe),
            unet=self._swapped(recipe, "unet"),
            vae=self._swapped(recipe, "vae"),
            loras=self._loras(recipe),
            allow_pickle=allow_pickle,
            embeddings=self._embeddings(recipe),
        )

    def _model(self, recipe: Recipe) -> str:
        if "load_model" in self._values:
            return str(self._values["load_model"])
        return self._elsewhere.load_model or self._again(recipe["model"], "--load-model")

    def _swapped(self, recipe: Recipe, name: str) -> str:
        given = getattr(self._elsewhere, name)
        if name in self._values:
            return str(self._values[name])
        if recipe[name] is None:
            if given:
                self.faults.append(f"it was made without --{name}")
            return ""
        if "load_model" in self._values and recipe["model"].get("lora"):
            return ""  # it was, or may have been, what the run's LoRA was trained on
        return given or self._again(recipe[name], f"--{name}")

    def _loras(self, recipe: Recipe) -> tuple[tuple[Path, float], ...]:
        if "lora" in self._values:
            return self._set_loras()
        parts = [one for one in recipe["loras"] if not one["tag"]]
        moved = self._elsewhere.loras
        if moved and len(moved) != len(parts):
            self.faults.append(f"it was made with {len(parts)} --lora, not {len(moved)}")
            return ()
        paths = moved or [Path(self._again(one, "--lora")) for one in parts]
        return tuple((path, one["weight"]) for path, one in zip(paths, parts, strict=True))

    def _set_loras(self) -> tuple[tuple[Path, float], ...]:
        from sdlab.models.lora import parse_lora

        found = []
        for text in self._values["lora"]:
            try:
                found.append(parse_lora(text))
            except SdlabError as reason:
                self.faults.append(str(reason))
        return tuple(found)

    def _embeddings(self, recipe: Recipe) -> tuple[Path, ...]:
        parts = {one["name"]: one for one in recipe["embeddings"]}
        return tuple(
            self._words.get(name) or Path(self._again(parts[name], "--embedding"))
            for name in self._named(recipe)
        )

    def _named(self, recipe: Recipe) -> list[str]:
        """Its textual inversions. Where texts change: those still named, and those of `elsewhere` named anew."""
        from sdlab.inference.prompts.embeddings import named_in

        own = {one["name"] for one in recipe["embeddings"]}
        if not {"prompt", "prefix", "negative"} & self._values.keys():
            return sorted(own)
        new, names = {**recipe, **self._values}, own | self._words.keys()
        prompt, negative = without_loras(new["prefix"] + new["prompt"]), new["negative"]
        anew = [prompt] if {"prompt", "prefix"} & self._values.keys() else []
        anew += [negative] if "negative" in self._values else []
        kept = own & set(named_in((prompt, negative), names))
        return sorted(kept | set(named_in(anew, names)))  # what did not change means what it meant

    def tagged(self, recipe: Recipe, on_shelf: Callable[[str], Path], *, shelf_first: bool) -> list[Tagged]:
        """The LoRAs of <lora:name:weight>: as recorded, or those that a changed prompt names.

        Each is taken from where it was, or from the shelf, whichever comes first.
        """
        parts = [one for one in recipe["loras"] if one["tag"]]
        if not {"prompt", "prefix"} & self._values.keys():
            return [self._tag(one["name"], one["weight"], one, on_shelf, shelf_first) for one in parts]
        new = {**recipe, **self._values}
        known = {one["name"]: one for one in parts}
        return [
            self._tag(tag.name, tag.weight, known.get(tag.name.split("/")[-1]), on_shelf, shelf_first)
            for tag in loras_in(new["prefix"] + new["prompt"])
        ]

    def _tag(
        self,
        name: str,
        weight: float,
        part: Mapping[str, Any] | None,
        on_shelf: Callable[[str], Path],
        shelf_first: bool,
    ) -> Tagged:
        there = identity.found_again(part["asked"], self._bases) if part else None
        if there is None or shelf_first:
            try:
                there = on_shelf(name)
            except SdlabError as reason:
                if there is None:
                    self.faults.append(str(reason))
        return Tagged(there or Path(name), weight, part)

    def _again(self, part: Mapping[str, Any], option: str) -> str:
        """What to load: the name for a model found by name, else the path where it lies now."""
        if part["kind"] in BY_NAME:
            return str(part["asked"])
        path = identity.found_again(part["asked"], self._bases)
        if path is None:
            self.faults.append(
                f"{shown(part['asked'])} is no longer there; say where it is now with {option}"
            )
            return ""
        text = str(path)
        # a folder mini-sd is not the model mini-sd
        return text if os.sep in text else os.path.join(os.curdir, text)

    def init(self, recipe: Recipe) -> Init | None:
        """The picture that was noised."""
        return self._picture(recipe["init"], self._elsewhere.init_image) if recipe["init"] else None

    def mask(self, recipe: Recipe) -> Mask | None:
        """Its mask."""
        part = recipe["mask"]
        if part is None and self._elsewhere.mask is not None:
            self.faults.append("it was made without --mask")
        source = self._picture(part, self._elsewhere.mask) if part else None
        return Mask(source, part["blur_px"]) if source else None

    def references(self, recipe: Recipe) -> tuple[Reference, ...]:
        """The pictures that were looked at."""
        given, parts = list(self._elsewhere.references), recipe["references"]
        if recipe["init"] is None and self._elsewhere.init_image is not None:
            given.insert(0, self._elsewhere.init_image)  # what is edited is the first that is looked at
        if given and len(given) != len(parts):
            self.faults.append(
                f"it was made looking at {len(parts)} pictures, not {len(given)}; give all, in their order"
            )
            return ()
        found = [self._picture(part, given[i] if given else None) for i, part in enumerate(parts)]
        return tuple(
            Reference(one, part["width"], part["height"])
            for one, part in zip(found, parts, strict=True)
            if one
        )

    def _picture(self, part: Mapping[str, Any], given: Path | None) -> Init | None:
        path = given or identity.found_again(part["asked"], self._bases)
        if path is None or not path.is_file():
            self.faults.append(f"the picture it was made from, {shown(part['asked'])}, is no longer there")
            return None
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != part["sha256"]:
            self.faults.append(_other(path, part["sha256"], digest))
        return Init(path, digest, part["background"], part["max_pixels"])

    def compare(self, recipe: Recipe, chosen: Chosen, tagged: Sequence[tuple[Source, Tagged]]) -> None:
        """Adds a fault for each file that is not the recipe's, but for those that are set."""
        model = recipe["model"]
        pairs: list[tuple[Mapping[str, Any] | None, Source | None]] = []
        if "load_model" not in self._values:
            pairs += [(self._kept(model, chosen.source), chosen.source)]
            pairs += [(model.get("lora"), chosen.own_lora), (model.get("rest"), chosen.rest)]
            pairs += [(recipe[n], getattr(chosen, n)) for n in ("unet", "vae") if n not in self._values]
        elif not model.get("lora"):
            pairs += [
                (recipe[n], getattr(chosen, n))
                for n in ("unet", "vae")
                if recipe[n] and n not in self._values
            ]
        if "lora" not in self._values:
            loras = [one for one in recipe["loras"] if not one["tag"]]
            pairs += zip(loras, (source for source, _ in chosen.loras), strict=True)
        embeddings = {source.name: source for source in chosen.embeddings}
        named = self._named(recipe)
        pairs += [(one, embeddings.get(one["name"])) for one in recipe["embeddings"] if one["name"] in named]
        pairs += [(tag.part, source) for source, tag in tagged if tag.part is not None]
        self.faults += [fault for part, now in pairs for fault in _changed(part, now)]

    def _kept(self, model: Mapping[str, Any], now: Source) -> Mapping[str, Any]:
        """The model's files, without those that a changed UNet or VAE puts in the place of, or brings back."""
        if not {"unet", "vae"} & self._values.keys():
            return model
        gone = {name: digest for name, digest in now.files.items() if name not in model["files"]}
        return {**model, "files": {**{n: d for n, d in model["files"].items() if n in now.files}, **gone}}


def _changed(part: Mapping[str, Any] | None, now: Source | None) -> list[str]:
    if part is None:
        return [] if now is None else [f"{now.path} is new"]
    if now is None:
        return [f"{shown(part['name'])} is no longer part of the model"]
    faults = []
    for name, digest in sorted(part["files"].items()):
        path = now.path / name if name else now.path
        if name not in now.files:
            faults.append(f"{shown(str(path))} is no longer there")
        elif now.files[name] != digest:
            faults.append(_other(path, str(digest), now.files[name]))
    added = sorted(set(now.files) - set(part["files"]))
    return [*faults, *(f"{now.path / name} is new" for name in added)]


def _other(path: Path, was: str, now: str) -> str:
    return f"{path} has changed (sha256 was {was[:12]}, is {now[:12]})"


def shown(text: str) -> str:
    """A name out of a picture of anywhere, without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text)
