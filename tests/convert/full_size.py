"""Models of the real sizes with random weights, written tensor by tensor: memory for the largest tensor only.

Linear and convolution weights are drawn as torch's layers draw them, uniform within 1 / sqrt(inputs), and norms around
1, so that activations stay of order 1 and a picture is not flat. Every tensor has a seed of its own, made of its name:
two tensors of one shape never hold the same numbers.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdlab.keyed import keyed
from sdlab.models.bases import CONFIGS
from sdlab.models.files import PIECE_BYTES, Stored, read_json, write_safetensors
from sdlab.models.parts import Part, build_module

WORDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
SD_PARTS = {
    "unet": ("UNet2DConditionModel", "diffusion_pytorch_model"),
    "vae": ("AutoencoderKL", "diffusion_pytorch_model"),
    "text_encoder": ("CLIPTextModel", "model"),
}
NUM_TENSORS = 1130  # of SD 1.5: 686 + 248 + 196


@dataclass(frozen=True)
class Drawn(Stored):
    """A tensor that is drawn when it is read."""

    seed: int = 0
    bound: float = 0.0  # uniform within `middle` -+ this
    middle: float = 0.0

    def read(self) -> torch.Tensor:
        """The numbers, the same at every call."""
        types = {word: dtype for dtype, word in WORDS.items()}
        drawn = torch.empty(self.shape).uniform_(
            self.middle - self.bound, self.middle + self.bound, generator=keyed(self.seed, self.name)
        )
        return drawn.to(types[self.dtype])

    def pieces(self) -> Iterator[bytes]:
        """Its bytes, 16 MiB at a time."""
        raw = self.read().reshape(-1).view(torch.uint8).numpy()
        for at in range(0, raw.size, PIECE_BYTES):
            yield raw[at : at + PIECE_BYTES].tobytes()


def drawn_part(
    class_name: str, config: Mapping[str, Any], *, seed: int, dtype: torch.dtype, where: Path
) -> dict[str, Stored]:
    """All tensors of a network: name -> Drawn. Whole numbers, such as a batch norm's count, are 0."""
    state = build_module(class_name, config, where).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    tensors: dict[str, Stored] = {}
    for name, shape in shapes.items():
        kind = dtype if state[name].is_floating_point() else torch.int64
        middle, bound = _scale(name, shape, shapes) if kind is dtype else (0.0, 0.0)
        nbytes = math.prod(shape) * kind.itemsize
        tensors[name] = Drawn(
            name, WORDS[kind], shape, where, nbytes=nbytes, seed=seed, bound=bound, middle=middle
        )
    return tensors


def _scale(name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> tuple[float, float]:
    """(middle, bound) of the numbers of a tensor."""
    if name.endswith("running_var"):
        return 1.0, 0.5
    if name.endswith(("token_embedding.weight", "position_embedding.weight")):
        return 0.0, 0.035  # a deviation of 0.02, as CLIP starts
    if len(shape) > 1:
        return 0.0, 1 / math.sqrt(math.prod(shape[1:]))
    if name.endswith("weight"):
        return 1.0, 0.2  # a norm
    weight = shapes.get(name.removesuffix("bias") + "weight", ())
    return 0.0, 1 / math.sqrt(math.prod(weight[1:])) if len(weight) > 1 else 0.05


def random_sd(
    folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float16, configs: Path = CONFIGS / "sd15"
) -> Path:
    """A Stable Diffusion folder of full size in `dtype`, by default 1.5: 859.5 M, 83.7 M and 123.1 M numbers.

    Text encoder names begin with ``text_model.``, as tools of all ages write them.
    """
    shutil.copytree(configs, folder)
    for name, (class_name, stem) in SD_PARTS.items():
        where = folder / name
        tensors = drawn_part(
            class_name, read_json(where / "config.json"), seed=seed, dtype=dtype, where=where
        )
        prefix = "text_model." if name == "text_encoder" else ""
        write_safetensors(where / f"{stem}.safetensors", {prefix + n: t for n, t in tensors.items()})
    return folder


def drawn_networks(
    base: str, names: Iterable[str], *, dtype: torch.dtype = torch.float16, **changed: Any
) -> dict[str, Part]:
    """Networks of a known model of full size; nothing is drawn until it is read.

    `changed` replaces settings of the first of `names`: ``in_channels=9`` for an inpainting UNet.
    """
    networks = {}
    for name in names:
        where = CONFIGS / base / name
        config = {**read_json(where / "config.json"), **(changed if not networks else {})}
        class_name = config.get("_class_name", "CLIPTextModel")
        weights = drawn_part(class_name, config, seed=0, dtype=dtype, where=where)
        networks[name] = Part(name, class_name, config, weights, where)
    return networks


def written_part(part: Part, folder: Path) -> Path:
    """The folder of one part of a pipeline: its configuration and its tensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(part.config), encoding="utf-8")
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", part.weights)
    return folder


def random_flux2_transformer(
    folder: Path, *, base: str = "flux2-klein-base-4b", dtype: torch.dtype = torch.bfloat16
) -> Path:
    """The folder of a FLUX.2 transformer of full size: 7.75 GB in bf16 for klein 4B."""
    return written_part(drawn_networks(base, ["transformer"], dtype=dtype)["transformer"], folder)
