"""The engine for Stable Diffusion: shots in, pictures out. No files, no messages.

Every picture has its own noise, drawn on the CPU in float32 from its own seed, and its own generator for
schedulers that draw more on the way. Prompts are encoded and pictures decoded one at a time. So who shares a
batch changes nothing beyond rounding in the denoiser, and pictures made one at a time are equal bit for bit.

Shapes: B pictures of a batch, C latent channels, H W picture sides and h w latent sides, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from sdlab.errors import OutOfResources
from sdlab.inference.engines import schedulers
from sdlab.inference.spec import Shot, Spec

OnStep = Callable[[int, int], None]  # (steps done, steps in all)


@dataclass(frozen=True)
class Made:
    """A finished picture, or None in its place where the model gave numbers that are not finite."""

    image: Image.Image | None
    flagged: bool = False  # the model's safety checker blacked it out
    vae_float32: bool = False  # the VAE overflowed in its own dtype and decoded it in float32
    fault: str = ""


@dataclass
class Sampler:
    """A diffusers Stable Diffusion pipeline, used one batch at a time."""

    pipeline: Any
    _prompts: dict[str, Tensor] = field(default_factory=dict)

    @property
    def grid(self) -> int:
        """Picture sides are multiples of this many pixels."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def device(self) -> torch.device:
        return torch.device(self.pipeline.unet.device)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.pipeline.unet.dtype
        return dtype

    @torch.no_grad()
    def sample(
        self,
        batch: Sequence[Shot],
        spec: Spec,
        *,
        init: Image.Image | None = None,
        references: Sequence[Image.Image] = (),
        on_step: OnStep | None = None,
    ) -> list[Made]:
        """One Made for each shot, in order. `init` is an RGB picture of the spec's size to start from.

        This kind of model looks at no `references`. Raises OutOfResources when the CPU's memory is too small.
        """
        assert not references
        with memory_in_words(len(batch), spec):
            latents_BChw = self._denoise(batch, spec, init, on_step)
            return [self._picture(latents_BChw[i : i + 1]) for i in range(len(batch))]

    def _denoise(
        self, batch: Sequence[Shot], spec: Spec, init: Image.Image | None, on_step: OnStep | None
    ) -> Tensor:
        kind = StableDiffusionPipeline if init is None else _KeyedImg2Img
        pipeline = _pipeline(kind, self.pipeline, schedulers.fresh(spec.scheduler, self.pipeline.scheduler))
        generators = [torch.Generator("cpu").manual_seed(shot.seed) for shot in batch]
        shape = (self.pipeline.vae.config.latent_channels, spec.height // self.grid, spec.width // self.grid)
        noise_BChw = torch.stack([torch.randn(shape, generator=g) for g in generators])
        noise_BChw = noise_BChw.to(self.device, self.dtype)

        def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if on_step is not None:
                on_step(step + 1, pipe.num_timesteps)
            return {}

        settings: dict[str, Any] = {
            "num_inference_steps": spec.steps,
            "guidance_scale": spec.guidance,
            "generator": generators,
            "output_type": "latent",
            "callback_on_step_end": after_step,
            **self._conditions(batch),
        }
        if init is None:
            settings |= {"latents": noise_BChw, "width": spec.width, "height": spec.height}
        else:
            pipeline.noise_BChw = noise_BChw
            latents_1Chw = self._encode(init)
            settings |= {"image": latents_1Chw.repeat(len(batch), 1, 1, 1), "strength": spec.strength}
        with schedulers.quiet():
            latents_BChw: Tensor = pipeline(**settings).images
        return latents_BChw

    def _conditions(self, batch: Sequence[Shot]) -> dict[str, Tensor]:
        """Embeddings of the prompts and of the negative prompts, (B, L, D) each."""
        texts = [shot.prompt for shot in batch] + [shot.negative for shot in batch]
        self._prompts = {t: self._prompts[t] if t in self._prompts else self._embed(t) for t in texts}
        rows = torch.cat([self._prompts[t] for t in texts])
        return {"prompt_embeds": rows[: len(batch)], "negative_prompt_embeds": rows[len(batch) :]}

    def _embed(self, text: str) -> Tensor:
        embeds_1LD, _ = self.pipeline.encode_prompt(text, self.device, 1, False)
        return cast(Tensor, embeds_1LD)

    def _encode(self, picture: Image.Image) -> Tensor:
        """The picture's latents (1, C, h, w): the mean of the VAE's distribution, so nothing is drawn."""
        pixels_13HW = self.pipeline.image_processor.preprocess(picture)
        vae = self.pipeline.vae
        latents_1Chw: Tensor = vae.encode(pixels_13HW.to(self.device, vae.dtype)).latent_dist.mode()
        if not torch.isfinite(latents_1Chw).all() and vae.dtype != torch.float32:
            with _in_float32(vae):
                latents_1Chw = vae.encode(pixels_13HW.to(self.device, torch.float32)).latent_dist.mode()
        return latents_1Chw.mul(vae.config.scaling_factor).to(self.dtype)

    def _picture(self, latents_1Chw: Tensor) -> Made:
        if not torch.isfinite(latents_1Chw).all():
            return Made(None, fault="the denoiser gave numbers that are not finite")
        vae = self.pipeline.vae
        pixels_13HW = _decode(vae, latents_1Chw)
        retried = False
        if not torch.isfinite(pixels_13HW).all() and vae.dtype != torch.float32:
            retried = True  # half precision overflows in some VAEs; float32 has the range
            with _in_float32(vae):
                pixels_13HW = _decode(vae, latents_1Chw)
        if not torch.isfinite(pixels_13HW).all():
            return Made(None, vae_float32=retried, fault="the VAE gave numbers that are not finite")
        checked, flags = self.pipeline.run_safety_checker(pixels_13HW, self.device, self.dtype)
        flagged = bool(flags and flags[0])
        image = self.pipeline.image_processor.postprocess(
            checked, output_type="pil", do_denormalize=[not flagged]
        )[0]
        return Made(image.convert("RGB"), flagged=flagged, vae_float32=retried)


@contextmanager
def memory_in_words(count: int, spec: Spec) -> Iterator[None]:
    """Turns torch's error of too little CPU memory into OutOfResources."""
    try:
        yield
    except RuntimeError as reason:
        if "DefaultCPUAllocator" not in str(reason):
            raise
        size = f"{count} of {spec.width}x{spec.height}"
        raise OutOfResources(
            f"not enough memory for {size}", next_step="Try a smaller --batch or size"
        ) from reason


def _decode(vae: Any, latents_1Chw: Tensor) -> Tensor:
    """Pixels (1, 3, H, W) in about [-1, 1]."""
    pixels: Tensor = vae.decode(latents_1Chw.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
    return pixels


class _in_float32:
    """Hold a module in float32 for the length of a `with`."""

    def __init__(self, module: Any) -> None:
        self.module, self.dtype = module, module.dtype

    def __enter__(self) -> None:
        self.module.to(torch.float32)

    def __exit__(self, *_: object) -> None:
        self.module.to(self.dtype)


class _KeyedImg2Img(StableDiffusionImg2ImgPipeline):  # type: ignore[misc]
    """The library's pipeline, but for the noise: it is given, not drawn in the pipeline's dtype."""

    noise_BChw: Tensor

    def prepare_latents(self, image: Tensor, timestep: Tensor, *sizes: Any, **_: Any) -> Tensor:
        """The picture's latents (B, C, h, w), noised to where the denoising starts."""
        noised_BChw: Tensor = self.scheduler.add_noise(image.to(self.noise_BChw), self.noise_BChw, timestep)
        return noised_BChw


def _pipeline(kind: type[Any], base: Any, scheduler: Any) -> Any:
    """A pipeline of the given kind around the same modules; the base keeps its own scheduler."""
    needed = {"requires_safety_checker": base.config.requires_safety_checker, "scheduler": scheduler}
    made = kind(**{**base.components, **needed})
    made.set_progress_bar_config(disable=True)
    return made
