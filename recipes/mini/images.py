"""Draws images/, the sample dataset: fish, houses and flowers, laid out to show the rules of directory prompts.

python -m recipes.mini.images images
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from PIL import Image

from sdlab.testing.scenes import COLOURS, NEW_SHAPES, Scene, draw, generator, prompt_of, random_scene

SEED = 23
# Left out on purpose: prompts for them tell whether a model has learnt the words and not the pictures.
LEFT_OUT_THINGS = frozenset({("fish", "green"), ("house", "purple"), ("flower", "black")})  # (thing, colour)
LEFT_OUT_GROUNDS = frozenset(  # (colour, background)
    {("red", "black"), ("orange", "purple"), ("yellow", "blue"), ("green", "white"), ("blue", "orange"),
     ("purple", "green"), ("white", "red"), ("black", "yellow")}
)  # fmt: skip
SIZES_PX = (
    (160, 160), (160, 144), (144, 160), (128, 192), (176, 176), (192, 128), (192, 256), (160, 160), (256, 192)
)  # fmt: skip
SUFFIXES = (".jpg", ".png", ".webp", ".jpg")
CAPTIONED_EVERY = 20  # so many pictures lie in _captioned/ with their prompts in files


def left_out(thing: str, colour: str, ground: str) -> bool:
    """Whether the dataset holds no such picture."""
    return (thing, colour) in LEFT_OUT_THINGS or (colour, ground) in LEFT_OUT_GROUNDS


def scenes() -> Iterator[Scene]:
    """The scenes of the dataset: every thing in every colour on every background, less what is left out."""
    for thing in NEW_SHAPES:
        for colour in COLOURS:
            for ground in COLOURS:
                if ground != colour and not left_out(thing, colour, ground):
                    rng = generator(SEED, thing, colour, ground)
                    scene = replace(random_scene(rng, shapes=[thing]), colour=colour, background=ground)
                    size = 0.65 + 0.5 * (scene.size - 0.45)  # 0.65 to 0.83 of the shorter side
                    yield replace(
                        scene, size=size, x=0.4 * scene.x, y=0.4 * scene.y, tilt_deg=0.5 * scene.tilt_deg
                    )


def save(picture: Image.Image, path: Path) -> None:
    """Writes a picture; its suffix names the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        picture.quantize(128, dither=Image.Dither.NONE).convert("RGB").save(path, optimize=True)
    else:
        picture.save(path, quality=92)


def folder_of(scene: Scene, number: int) -> Path:
    """Where a scene lies: its folders are its prompt."""
    folder = Path(f"{scene.colour}_{scene.shape}") / f"{scene.background}_background"
    if scene.texture != "plain":
        return folder / scene.texture
    return folder / "_v2" if number % 12 == 5 else folder


def write(root: Path) -> int:
    """Draws the dataset into `root`, which it replaces; gives the number of pictures."""
    shutil.rmtree(root, ignore_errors=True)
    drawn = list(scenes())
    for number, scene in enumerate(drawn):
        picture = draw(scene, SIZES_PX[number % len(SIZES_PX)])
        name = f"{scene.shape}_{number:03d}"
        suffix = SUFFIXES[number % len(SUFFIXES)]
        if number % CAPTIONED_EVERY == CAPTIONED_EVERY - 1:
            save(picture, root / "_captioned" / f"{name}{suffix}")
            _caption(scene, root / "_captioned" / name, number)
        else:
            save(picture, root / folder_of(scene, number) / f"{name}{suffix}")
    _reference(drawn[0], root)
    noise = generator(SEED, "review").integers(0, 256, (12, 12, 3)).astype("uint8")
    save(Image.fromarray(noise).resize((160, 160)), root / "white_flower" / "__review" / "out_of_focus.jpg")
    return len(drawn)


def _caption(scene: Scene, stem: Path, number: int) -> None:
    prompt = prompt_of(scene, "photo", extras=scene.texture != "plain")
    as_txt = number // CAPTIONED_EVERY % 3 == 2
    comment = "" if as_txt else "# the first line that is not a comment is the prompt\n"
    stem.with_suffix(".txt" if as_txt else ".cap").write_text(f"{comment}{prompt}\n", encoding="utf-8")


def _reference(scene: Scene, root: Path) -> None:
    """The scene's picture before an edit: the same thing, plain, in another colour."""
    path = root / folder_of(scene, 0) / f"{scene.shape}_000.ref.png"
    other = "white" if scene.colour != "white" else "red"
    save(draw(replace(scene, colour=other, texture="plain"), SIZES_PX[0]), path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    root = parser.parse_args().root
    num = write(root)
    print(f"{root}: {num} pictures, {sum(p.stat().st_size for p in root.rglob('*') if p.is_file()):,} bytes")
