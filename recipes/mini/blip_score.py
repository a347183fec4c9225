"""Does mini-blip say what pictures show? Draws scenes it has not met, saves and opens them as files, reads its words.

python -m recipes.mini.blip_score MODEL_FOLDER [--num 300] [--purpose blip-valid] [--wrong FOLDER]
exits with 1 below 95 %
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from recipes.mini.blip_pictures import as_a_file, junk, outline_like_a_scene, size_px, unknown
from recipes.mini.figures import Figure, failed
from transformers import BlipForConditionalGeneration, BlipProcessor

from sdlab.dataset.picture import open_picture
from sdlab.testing.scenes import SILHOUETTES, TEXTURES, Scene, Wanted, draw, generator, random_scene, wanted

SEED = 44
BAR = 0.95
BATCH = 32
REVIEW = 0.75  # what `sdlab categorize --review` asks for by default
IMAGES = Path(__file__).parents[2] / "images"
THRESHOLDS = (0.7, 0.75, 0.8, 0.85, 0.9)
UNKNOWN = {"unknown outlines": unknown, "the same, like scenes": outline_like_a_scene, "noise and blur": junk}


@dataclass(frozen=True)
class Said:
    """A caption, and exp of the mean log-probability of its words."""

    text: str
    confidence: float


def scene_of(number: int, purpose: str) -> tuple[Scene, Image.Image]:
    """Scene `number` of a purpose: any shape, size and aspect, as a camera or a file leaves it."""
    rng = generator(SEED, purpose, number)
    scene = random_scene(rng, shapes=tuple(SILHOUETTES))
    scene = replace(scene, size=float(rng.uniform(0.4, 0.85)))
    return scene, as_a_file(draw(scene, size_px(rng, low=64, high=512)), rng)


def through_a_file(picture: Image.Image, folder: Path, number: int) -> Image.Image:
    """The picture saved as a JPEG or a PNG and opened as sdlab opens pictures."""
    path = folder / f"{number:04d}{'.png' if number % 2 else '.jpg'}"
    picture.save(path, quality=60 + number * 7 % 36)
    return open_picture(str(path))


class Captioner:
    """The model and its processor, as transformers loads them."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.model = (
            BlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval().to(device)
        )
        self.processor = BlipProcessor.from_pretrained(folder)

    @torch.inference_mode()
    def __call__(self, pictures: list[Image.Image]) -> list[Said]:
        """A greedy caption of each picture."""
        said: list[Said] = []
        for start in range(0, len(pictures), BATCH):
            pixels = self.processor(images=pictures[start : start + BATCH], return_tensors="pt").pixel_values
            pixels = pixels.to(self.model.device)
            made = self.model.generate(
                pixels, do_sample=False, num_beams=1, max_new_tokens=15, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
            logs = torch.stack(made.logits, 1).log_softmax(-1)
            tokens = made.sequences[:, -logs.shape[1] :]
            chosen = logs.gather(-1, tokens[..., None])[..., 0]
            counted = tokens != self.model.config.text_config.pad_token_id
            mean = (chosen * counted).sum(1) / counted.sum(1)
            texts = self.processor.batch_decode(made.sequences, skip_special_tokens=True)
            said += [Said(*pair) for pair in zip(texts, mean.exp().tolist(), strict=True)]
        return said


def parts_right(said: Said, asked: Wanted) -> tuple[bool, bool, bool]:
    """Whether shape, colour and background are those of the scene."""
    heard = wanted(said.text)
    return heard.shape == asked.shape, heard.colour == asked.colour, heard.background == asked.background


def texture_of(text: str) -> str:
    """The texture that a caption names."""
    return next((name for name in TEXTURES if name in text.split()), "plain")


def of_folder(root: Path) -> list[tuple[Path, Wanted]]:
    """The sample dataset's pictures with what their folders say."""
    found = sorted(p for p in root.rglob("*") if p.suffix in (".jpg", ".png", ".webp"))
    paths = [p for p in found if "__" not in str(p) and ".ref." not in p.name]
    asked = [(p, wanted(str(p.parent.relative_to(root)).replace("_", " "))) for p in paths]
    return [(path, want) for path, want in asked if want.shape and want.background]


def show(name: str, confidences: list[float]) -> None:
    """One line: mean, quantiles and the shares under some thresholds."""
    if confidences:
        low, middle, high = np.quantile(confidences, (0.05, 0.5, 0.95))
        under = ", ".join(f"{np.mean(np.array(confidences) < bar):.0%} under {bar}" for bar in THRESHOLDS)
        print(
            f"{name}: {len(confidences)}, confidence mean {np.mean(confidences):.3f}, 5 % {low:.3f}, "
            f"50 % {middle:.3f}, 95 % {high:.3f}; {under}"
        )


@dataclass(frozen=True)
class Seen:
    """The held-out scenes, their pictures as files leave them, and what was said of them."""

    scenes: list[Scene]
    pictures: list[Image.Image]
    said: list[Said]

    @property
    def parts(self) -> NDArray[np.bool_]:
        """Shape, colour and background right, (scenes, 3)."""
        asked = [Wanted(scene.shape, scene.colour, scene.background) for scene in self.scenes]
        return np.array([parts_right(s, a) for s, a in zip(self.said, asked, strict=True)])


def look_at(caption: Captioner, purpose: str, num: int) -> Seen:
    """Captions of `num` scenes."""
    drawn = [scene_of(i, purpose) for i in range(num)]
    with tempfile.TemporaryDirectory() as folder:
        pictures = [through_a_file(picture, Path(folder), i) for i, (_, picture) in enumerate(drawn)]
    return Seen([scene for scene, _ in drawn], pictures, caption(pictures))


def figures_of(seen: Seen) -> list[Figure]:
    """The shares that are right, the first of them with its bar."""
    shape, colour, ground = seen.parts.mean(axis=0).tolist()
    pairs = zip(seen.said, seen.scenes, strict=True)
    textures = [texture_of(said.text) == scene.texture for said, scene in pairs]
    return [
        Figure(
            f"captions of {len(seen.scenes)} scenes: all three", float(seen.parts.all(1).mean()), at_least=BAR
        ),
        Figure("shape", shape),
        Figure("colour", colour),
        Figure("background", ground),
        Figure("texture", float(np.mean(textures))),
    ]


def unknown_figures(caption: Captioner, purpose: str, num: int = 100) -> list[Figure]:
    """How many unsure captions pictures of nothing known get: what `--review` looks at."""
    heard = {
        name: caption([make(generator(SEED, purpose, name, i))[0] for i in range(num)])
        for name, make in UNKNOWN.items()
    }
    return [
        Figure(f"{name}: confidence below {REVIEW}", float(np.mean([s.confidence < REVIEW for s in said])))
        for name, said in heard.items()
    ]


def measure(folder: Path, *, device: str = "cpu") -> list[Figure]:
    """All that mini-blip must reach, and how it doubts what it does not know."""
    caption = Captioner(folder, device)
    return [
        *figures_of(look_at(caption, "blip-score", 300)), *unknown_figures(caption, "blip-score"),
        *sample_figures(caption),
    ]  # fmt: skip


def sample_figures(caption: Captioner, root: Path = IMAGES) -> list[Figure]:
    """Of the sample dataset, where it is there."""
    files = of_folder(root)
    if not files:
        return []
    heard = caption([open_picture(str(path)) for path, _ in files])
    good = [all(parts_right(said, want)) for said, (_, want) in zip(heard, files, strict=True)]
    return [Figure(f"{root.name}/, {len(files)} pictures: all three", float(np.mean(good)))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--num", type=int, default=300)
    parser.add_argument(
        "--purpose", default="blip-score", help="blip-valid to choose by, blip-score to report"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--wrong", type=Path, help="where to leave the pictures that it gets wrong")
    args = parser.parse_args()
    caption = Captioner(args.model, args.device)
    seen = look_at(caption, args.purpose, args.num)
    figures = figures_of(seen)
    print(*figures, *unknown_figures(caption, args.purpose), *sample_figures(caption), sep="\n")
    right = seen.parts.all(axis=1)
    show("right", [s.confidence for s, r in zip(seen.said, right, strict=True) if r])
    show("wrong", [s.confidence for s, r in zip(seen.said, right, strict=True) if not r])
    for i in np.flatnonzero(~right):
        print(f"   wrong: {seen.said[i].text} ({seen.said[i].confidence:.2f}) for {seen.scenes[i]}")
        if args.wrong:
            args.wrong.mkdir(parents=True, exist_ok=True)
            seen.pictures[i].save(args.wrong / f"{i:03d} {seen.said[i].text}.png")
    return int(bool(failed(figures)))


if __name__ == "__main__":
    sys.exit(main())
