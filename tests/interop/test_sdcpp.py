"""stable-diffusion.cpp, which shares no code with diffusers, reads converted models of full size and draws the same.

Needs `make test-interop`, which builds it. What it measured: benchmarks/interop.md.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdlab.models.bases import CONFIGS
from tests.convert.full_size import NUM_TENSORS, drawn_networks, random_sd, written_part
from tests.program import sdlab

PYTHON = os.environ.get("SDLAB_INTEROP_PYTHON", "")
pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="needs make test-interop"),
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings(
        "ignore:__array__ implementation"
    ),  # Pillow's, when diffusers makes the picture
]

DRAW = {"prompt": "a photo of a cat", "negative_prompt": "", "width": 64, "height": 64, "seed": 42}
NUM_STEPS, GUIDANCE = 2, 7.0
GATE = 0.5  # of 255, on average: 0.06 to 0.1 is what rounding to fp16 costs, 1.5 and more what a swap does
SWAPS = {
    "UNet": (
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_v.weight",
    ),
    "VAE": (
        "first_stage_model.decoder.up.0.block.2.conv1.weight",
        "first_stage_model.decoder.up.0.block.2.conv2.weight",
    ),
    "text encoder": (
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.v_proj.weight",
    ),
}


@dataclass(frozen=True)
class Kind:
    """A model of full size, and what stable-diffusion.cpp must say of its file."""

    configs: str
    version: str
    num_parameters: int  # of the networks it builds
    prediction_type: str


SD1 = Kind("sd15", "SD 1.x", NUM_TENSORS, "epsilon")
# Of 2.x it builds the last text layer as well, 12 tensors that it never reads, and does without them. Random weights
# pass for a model that predicts the noise.
SD2 = Kind("sd21", "SD 2.x", 1214 + 12, "epsilon")


@dataclass(frozen=True)
class Loaded:
    """What stable-diffusion.cpp made of a file."""

    picture: np.ndarray | None  # None: it did not load, or was not asked to draw
    log: str

    @property
    def num_parameters(self) -> int:
        """How many tensors its networks have."""
        return sum(int(n) for n in re.findall(r"params backend buffer size .*\((\d+) tensors\)", self.log))

    @property
    def faults(self) -> list[str]:
        """Its lines about tensors that it does not know, lacks, or expects otherwise."""
        words = ("unknown tensor", "not in model file", "wrong shape")
        return [line for line in self.log.splitlines() if any(word in line for word in words)]


def load(settings: dict[str, str], draw: dict[str, Any] | None, to: Path) -> Loaded:
    """Load files and draw with them, in a process of its own."""
    script = Path(__file__).with_name("draw.py")
    job = json.dumps({"load": settings, "draw": draw, "to": str(to)})
    ended = subprocess.run(
        [PYTHON, script, job], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert ended.returncode in (0, 3), ended.stdout
    return Loaded(pixels(Image.open(to)) if to.exists() else None, ended.stdout)


def drawn_with(file: Path, folder: Path) -> Loaded:
    """The picture of a checkpoint."""
    settings = {"sample_method": "euler", "scheduler": "discrete", "sample_steps": NUM_STEPS}
    draw = {**DRAW, **settings, "cfg_scale": GUIDANCE}
    return load({"model_path": str(file)}, draw, folder / f"{file.stem}.png")


def drawn_by_diffusers(folder: Path, prediction_type: str) -> np.ndarray:
    """The same picture from the folder, in float32."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, safety_checker=None
    )
    pipeline.scheduler = EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="linspace", prediction_type=prediction_type
    )
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        **{name: value for name, value in DRAW.items() if name != "seed"},
        num_inference_steps=NUM_STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator("cpu").manual_seed(int(str(DRAW["seed"]))),
    )
    picture = pixels(made.images[0])
    assert picture.std() > 20, "a flat picture would equal any other"
    return picture


def pixels(picture: Image.Image) -> np.ndarray:
    """(H, W, 3), 0 to 255."""
    return np.asarray(picture.convert("RGB"), dtype=np.float64)


def converted(kind: Kind, folder: Path) -> tuple[Path, np.ndarray]:
    """The file that `sdlab convert --half` makes of a random model of full size, and what diffusers draws with it."""
    model, file = random_sd(folder / kind.configs, configs=CONFIGS / kind.configs), folder / "x.safetensors"
    assert sdlab("convert", "--model-path", model, "--half", "--checkpoint-path", file) == 0
    picture = drawn_by_diffusers(model, kind.prediction_type)
    shutil.rmtree(model)
    return file, picture


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, np.ndarray]]:
    """A file of 2.1 GB and its picture."""
    folder = tmp_path_factory.mktemp("sd1")
    yield converted(SD1, folder)
    shutil.rmtree(folder)


def check(kind: Kind, file: Path, wanted: np.ndarray, folder: Path) -> None:
    """Assert that it is known for what it is, lacks nothing, and gives the picture."""
    loaded = drawn_with(file, folder)
    assert f"Version: {kind.version}" in loaded.log and not loaded.faults, loaded.log
    assert loaded.num_parameters == kind.num_parameters, loaded.log
    assert loaded.picture is not None, loaded.log
    difference = np.abs(loaded.picture - wanted)
    say(f"{kind.version}: mean difference {difference.mean():.3f} of 255, largest {difference.max():.0f}")
    assert difference.mean() < GATE


def say(line: str) -> None:
    """For the person who runs it."""
    print(f"\n{line}")  # noqa: T201


def test_every_tensor_of_a_full_size_sd1_is_found_and_the_picture_is_that_of_diffusers(
    sd1: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    check(SD1, *sd1, tmp_path)


@pytest.mark.parametrize("part", SWAPS)
def test_two_tensors_in_each_others_place_are_seen(
    part: str, sd1: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    file, wanted = sd1
    spoiled = with_swapped(file, *SWAPS[part], tmp_path / "swapped.safetensors")
    loaded = drawn_with(spoiled, tmp_path)
    spoiled.unlink()
    assert loaded.picture is not None, loaded.log
    difference = np.abs(loaded.picture - wanted).mean()
    say(f"two of the {part} swapped: mean difference {difference:.3f} of 255")
    assert difference > GATE


def test_a_missing_tensor_is_seen(sd1: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    name = "first_stage_model.post_quant_conv.bias"

    def renamed(table: dict[str, Any]) -> dict[str, Any]:
        return {f"{key}_old" if key == name else key: value for key, value in table.items()}

    spoiled = with_header(sd1[0], renamed, tmp_path / "missing.safetensors")
    loaded = drawn_with(spoiled, tmp_path)
    spoiled.unlink()
    assert loaded.picture is None and any(f"'{name}' not in model file" in line for line in loaded.faults)


def test_a_full_size_sd2_without_its_last_text_layer_gives_the_picture_of_diffusers(tmp_path: Path) -> None:
    """diffusers keeps 23 of OpenCLIP's 24 layers, as Stable Diffusion 2.x reads the last but one."""
    file, wanted = converted(SD2, tmp_path)
    check(SD2, file, wanted, tmp_path)
    file.unlink()


def test_a_flux2_transformer_and_vae_of_full_width_are_known_and_lack_nothing(tmp_path: Path) -> None:
    """Two blocks of either kind; only the text encoder, which is no part of these files, is missed."""
    files = {"transformer": tmp_path / "klein.safetensors", "vae": tmp_path / "ae.safetensors"}
    changed = {"num_layers": 2, "num_single_layers": 2}
    for name, part in {
        **drawn_networks("flux2-klein-base-4b", ["transformer"], dtype=torch.bfloat16, **changed),
        **drawn_networks("flux2-klein-base-4b", ["vae"], dtype=torch.bfloat16),
    }.items():
        folder = written_part(part, tmp_path / name)
        assert sdlab("convert", "--model-path", folder, "--checkpoint-path", files[name]) == 0
        shutil.rmtree(folder)
    settings = {"diffusion_model_path": str(files["transformer"]), "vae_path": str(files["vae"])}
    loaded = load(settings, None, tmp_path / "none.png")
    assert "Version: Flux.2 klein" in loaded.log and "context_in_dim = 7680" in loaded.log, loaded.log
    assert re.search(r"flux params .*\(41 tensors\)", loaded.log) and "depth = 2" in loaded.log, loaded.log
    assert re.search(r"vae params .*\(248 tensors\)", loaded.log), loaded.log
    assert loaded.faults and all("'text_encoders.llm." in line for line in loaded.faults), loaded.faults


def with_swapped(file: Path, one: str, other: str, to: Path) -> Path:
    """A copy in which each of two names stands for the numbers of the other."""

    def swapped(table: dict[str, Any]) -> dict[str, Any]:
        assert table[one]["shape"] == table[other]["shape"]
        return {**table, one: table[other], other: table[one]}

    return with_header(file, swapped, to)


def with_header(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]], to: Path) -> Path:
    """A copy with another header."""
    with file.open("rb") as source, to.open("xb") as target:
        (length,) = struct.unpack("<Q", source.read(8))
        raw = json.dumps(change(json.loads(source.read(length)))).encode()
        target.write(struct.pack("<Q", len(raw)) + raw)
        shutil.copyfileobj(source, target, 16 << 20)
    return to
