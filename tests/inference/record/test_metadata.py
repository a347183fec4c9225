"""Recipes read back: of this version and older ones, and those that are not to be trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdlab.errors import SdlabError
from sdlab.inference.record import metadata
from tests.inference.record.recipes import (
    HIRES,
    INIT,
    LORA,
    MASK,
    MODEL,
    REFERENCE,
    SHOT,
    SOURCE,
    old_recipe,
    recipe,
)


def picture_with(tmp_path: Path, **texts: str) -> Path:
    chunks = PngInfo()
    for key, value in texts.items():
        chunks.add_itxt(key, value)
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png", pnginfo=chunks)
    return tmp_path / "other.png"


def held(tmp_path: Path, about: Any) -> Path:
    return picture_with(tmp_path, sdlab=json.dumps(about))


OLD_SHOT = {name: value for name, value in SHOT.items() if name != "template"}
OLD_LORA = {name: value for name, value in LORA.items() if name not in ("autov3", "tag")}


@pytest.mark.parametrize("schema", [1, 2])
def test_pictures_of_older_versions_mean_what_they_meant(tmp_path: Path, schema: int) -> None:
    about = old_recipe(schema, batch=[OLD_SHOT, OLD_SHOT], init=INIT, strength=0.5)
    found = metadata.read(held(tmp_path, about))
    assert found["emphasis"] == "none" and found["long_prompts"] is False and found["clip_skip"] == 1
    assert found["hires"] is None and found["mask"] is None and found["template"] == ""
    assert found["embeddings"] == [] and found["vae_tiling"] is False and found["compile"] is False
    assert found["format"] == "png" and found["safety"] == "none" and found["schema"] == schema
    assert found["batch"] == [SHOT, SHOT] and found["vae"] is None and found["references"] == []
    assert all(found[name] == about[name] for name in about if name != "batch")


def test_older_loras_and_verdicts_come_along(tmp_path: Path) -> None:
    found = metadata.read(held(tmp_path, old_recipe(loras=[OLD_LORA], flagged=True)))
    assert found["loras"] == [{**LORA, "autov3": "", "tag": False}] and found["safety"] == "flagged"


def test_recipe_of_this_version_is_not_filled_up(tmp_path: Path) -> None:
    about = recipe()
    del about["emphasis"]
    with pytest.raises(SdlabError, match="damaged at emphasis"):
        metadata.read(held(tmp_path, about))


@pytest.mark.parametrize(
    "changes",
    [
        {"hires": HIRES},
        {"init": INIT, "strength": 0.5, "mask": MASK},
        {"loras": [LORA, {**LORA, "tag": True, "autov3": ""}], "embeddings": [SOURCE]},
        {"batch": [SHOT, SHOT], "batch_position": 1},
        {"model": {**MODEL, "lora": {**SOURCE, "autov3": "0" * 64}, "rest": SOURCE}},
        {"format": "webp", "quality": 100, "safety": "passed", "emphasis": "comfy", "clip_skip": 12},
    ],
)
def test_sane_recipes_are_taken(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert metadata.read(held(tmp_path, recipe(**changes))) == recipe(**changes)


def damaged(**changes: Any) -> str:
    return json.dumps(recipe(**changes))


@pytest.mark.parametrize(
    ("chunk", "word"),
    [
        ("not json", "damaged"),
        ("[" * 100_000, "damaged"),
        ('{"a":' * 100_000, "damaged"),
        ("1" * 100_000, "damaged"),
        ("[]", "another version"),
        (damaged(schema=4), "another version"),
        (damaged(schema="3"), "another version"),
        (damaged(schema=[3]), "another version"),
        (json.dumps({"schema": 1}), "damaged at prompt"),
        (json.dumps({"schema": 2, "loras": 3, "batch": {}}), "damaged at prompt"),
        (json.dumps({"schema": 1, "kind": "grid"}), "is a grid"),
        (damaged(loras=[SOURCE]), "damaged at loras.weight"),
        (damaged(loras=[{**LORA, "weight": float("nan")}]), "damaged at loras"),
        (damaged(loras=[{**LORA, "files": {"": 1}}]), "damaged at files"),
        (damaged(loras=[{**LORA, "autov3": "x"}]), "damaged at loras"),
        (damaged(loras=[{**LORA, "tag": 1}]), "damaged at loras.tag"),
        (damaged(loras=[LORA] * 1025), "damaged at loras"),
        (damaged(embeddings=[{"name": "x"}]), "damaged at embeddings.asked"),
        (damaged(embeddings=[{**SOURCE, "sha256": "\x1b[2J"}]), "damaged at sha256"),
        (damaged(vae={"name": "x"}), "damaged at vae.asked"),
        (damaged(references=[INIT]), "damaged at references.width"),
        (damaged(references=[None], loras=[None]), "damaged at loras.*references"),
        (damaged(references=[{**REFERENCE, "width": 2**20}]), "damaged at references"),
        (damaged(references=[REFERENCE] * 65), "damaged at references"),
        (damaged(model={**MODEL, "lora": {"name": "x"}}), "damaged at model"),
        (damaged(model={**MODEL, "files": {"a": 1}}), "damaged at files"),
        (damaged(model={**MODEL, "files": {"a": "0" * 63 + "\n"}}), "damaged at files"),
        (damaged(model={"name": "x"}), "damaged at model.asked"),
        (damaged(steps=10**9), "damaged at steps"),
        (damaged(steps=True), "damaged at steps"),
        (damaged(width=10**9), "damaged at width"),
        (damaged(width=513), "damaged at size"),
        (damaged(guidance=float("nan")), "damaged at guidance"),
        (damaged(index=-1), "damaged at index"),
        (damaged(quality=0), "damaged at quality"),
        (damaged(clip_skip=13), "damaged at clip_skip"),
        (damaged(emphasis="compel"), "damaged at emphasis"),
        (damaged(format="exe"), "damaged at format"),
        (damaged(format="../../x"), "damaged at format"),
        (damaged(safety=[]), "damaged at safety"),
        (damaged(compile=1), "damaged at compile"),
        (damaged(hires=[]), "damaged at hires"),
        (damaged(hires={**HIRES, "width": 2**20}), "damaged at hires"),
        (damaged(hires={**HIRES, "width": 1025}), "damaged at size"),
        (damaged(hires={**HIRES, "strength": 0.01}), "damaged at hires"),
        (damaged(hires={**HIRES, "steps": 10**6}), "damaged at hires"),
        (damaged(mask=MASK), "damaged at mask"),
        (damaged(init=INIT, strength=0.5, mask={**MASK, "blur_px": 10**6}), "damaged at mask"),
        (damaged(init=INIT, strength=0.5, mask=INIT), "damaged at mask.blur_px"),
        (damaged(init=INIT), "damaged at strength"),
        (damaged(init=INIT, strength=0.01), "damaged at strength"),
        (damaged(init={**INIT, "sha256": "x"}, strength=0.5), "damaged at sha256"),
        (damaged(batch=[1]), "damaged at batch"),
        (damaged(batch=[{**SHOT, "index": -1}]), "damaged at batch"),
        (damaged(batch=[SHOT] * 1025), "damaged at batch"),
        (damaged(batch_position=3), "batch_position"),
        (damaged(prompt="x" * 1_000_001), "damaged at texts"),
        (damaged(template=None), "damaged at template"),
        (damaged(scheduler={"name": "eval"}), "damaged at scheduler"),
        (damaged(scheduler={**recipe()["scheduler"], "name": "eval"}), r"damaged at scheduler\.name"),
    ],
)  # fmt: skip
def test_picture_from_anywhere_is_refused_not_trusted(tmp_path: Path, chunk: str, word: str) -> None:
    path = picture_with(tmp_path, sdlab=chunk)
    with pytest.raises(SdlabError, match=word) as caught:
        metadata.read(path)
    assert "other.png" in str(caught.value) and "\n" not in str(caught.value)
    assert metadata.peek(path) is None


def test_picture_without_recipe_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(SdlabError, match="of another program"):
        metadata.read(picture_with(tmp_path, parameters="x"))
    with pytest.raises(SdlabError, match="holds no sdlab recipe"):
        metadata.read(picture_with(tmp_path))
    for suffix in (".jpg", ".webp"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"a{suffix}")
        with pytest.raises(SdlabError, match="holds no sdlab recipe"):
            metadata.read(tmp_path / f"a{suffix}")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.bmp")
    with pytest.raises(SdlabError, match="not a PNG, JPEG or WebP"):
        metadata.read(tmp_path / "a.bmp")
