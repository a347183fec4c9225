"""The engine for Stable Diffusion: shots in, pictures out. No files, no messages.

Every picture has its own noise, drawn on the CPU in float32 from its own seed, and its own generator for
schedulers that draw more on the way. Prompts are encoded and pictures decoded one at a time. So who shares a
batch changes nothing beyond rounding in the denoiser, and pictures made one at a time are equal bit for bit.

Shapes: B pictures of a batch, C latent channels, H W picture sides and h w latent sides, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import InitVar, dataclass, field
from threading import Lock
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from sdlab.inference.engines import checks, schedulers
from sdlab.inference.engines.checks import Made as Made
from sdlab.inference.engines.denoise import Conditions, Known, denoise
from sdlab.inference.engines.hires import OnStep as OnStep
from sdlab.inference.engines.hires import Pass, first_pass, in_passes
from sdlab.inference.engines.placement import Placement
from sdlab.inference.prompts.clip import ClipPrompts
from sdlab.inference.prompts.embeddings import Embedding
from sdlab.inference.spec import Emphasis, Shot, Spec

KEPT = 64  # prompts whose embeddings are remembered: 0.2 to 1 MB each

_Read = tuple[str, Emphasis, int, int, bool]  # a text, and everything that changes how it is read


@dataclass
class Sampler:
    """A diffusers Stable Diffusion pipeline. Several threads may sample at once in float32, one in half precision."""

    pipeline: Any
    embeddings: InitVar[Sequence[Embedding]]
    placement: Placement
    _clip: ClipPrompts = field(init=False)
    _prompts: dict[_Read, Tensor] = field(default_factory=dict)
    _reading: Lock = field(default_factory=Lock)  # tokenizers are for one thread at a time

    def __post_init__(self, embeddings: Sequence[Embedding]) -> None:
        self._clip = ClipPrompts(self.pipeline, embeddings)

    @property
    def grid(self) -> int:
        """Picture sides are multiples of this many pixels."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def device(self) -> torch.device:
        """Where the numbers are computed, wherever weights wait."""
        return self.placement.device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.pipeline.unet.dtype
        return dtype

    def forget_prompts(self) -> None:
        """What was encoded no longer holds: the text encoder has other LoRAs now."""
        with self._reading:
            self._prompts.clear()

    @torch.no_grad()
    def sample(
        self,
        batch: Sequence[Shot],
        spec: Spec,
        *,
        init: Image.Image | None = None,
        mask: tuple[Image.Image, int] | None = None,
        references: Sequence[Image.Image] = (),
        on_step: OnStep | None = None,
    ) -> list[Made]:
        """One Made for each shot, in order. `init` is an RGB picture of the spec's size to start from.

        `mask` is a grey picture of that size, white where `init` is made anew, and by how many pixels its edge is
        softened. This kind of model looks at no `references`. Raises OutOfResources when the CPU's memory is too
        small.
        """
        assert not references
        whole = first_pass(batch, spec, init=init, mask=mask, references=(), on_step=on_step)
        with checks.memory_in_words(len(batch), spec):
            return in_passes(self._make, whole)

    def _make(self, one: Pass) -> list[Made]:
        latents_BChw, retried = self._denoise(one)
        return [self._picture(latents_1Chw, one, retried) for latents_1Chw in torch.split(latents_BChw, 1)]

    def _denoise(self, one: Pass) -> tuple[Tensor, bool]:
        """Latents (B, C, h, w), and whether the VAE had to work in float32 to encode the start pictures."""
        spec = one.spec
        scheduler = schedulers.planned(spec.scheduler, self.pipeline.scheduler, spec.steps, self.device)
        shape = (self.pipeline.vae.config.latent_channels, spec.height // self.grid, spec.width // self.grid)
        drawn, generators = one.noise(shape)
        noise_BChw = drawn.to(self.device, self.dtype)
        timesteps, known, retried = scheduler.timesteps, None, False
        if one.starts:
            clean_BChw, retried = self._encode_all(one)
            latents_BChw, timesteps = schedulers.started(
                scheduler, clean_BChw, noise_BChw, spec.steps, one.num_steps
            )
            if one.mask is not None:
                known = Known(clean_BChw, noise_BChw, one.mask.free(self.grid).to(self.device))
        else:
            latents_BChw = noise_BChw * scheduler.init_noise_sigma
        conditions = self._conditions(one.shots, spec)
        with self.placement.using(self.pipeline.unet):
            latents_BChw = denoise(
                self.pipeline.unet,
                scheduler,
                timesteps,
                latents_BChw,
                conditions,
                generators=generators,
                known=known,
                on_step=one.on_step,
            )
        return latents_BChw, retried

    def _conditions(self, shots: Sequence[Shot], spec: Spec) -> Conditions:
        """Prompts, and where guidance is above 1 negative prompts, of as many tokens: short ones are filled up."""
        width = self.pipeline.unet.config.time_cond_proj_dim
        guided = spec.guidance > 1 and width is None
        prompts, negatives = [shot.prompt for shot in shots], [shot.negative for shot in shots if guided]
        rows_BLD = self._read(prompts + negatives, spec)
        guidance_BD = None
        if width is not None:
            scale_B = torch.tensor(spec.guidance - 1).repeat(len(shots))
            guidance_BD = self.pipeline.get_guidance_scale_embedding(scale_B, embedding_dim=width)
            guidance_BD = guidance_BD.to(self.device, self.dtype)
        return Conditions(
            rows_BLD[: len(shots)], rows_BLD[len(shots) :] if guided else None, spec.guidance, guidance_BD
        )

    def _read(self, texts: list[str], spec: Spec) -> Tensor:
        """Embeddings (B, L, D), L being 77 for each chunk of the longest text."""
        long, emphasis = spec.long_prompts, spec.emphasis
        with self._reading:
            num = max(self._clip.num_chunks(text, emphasis) for text in texts) if long else 1
            wanted: list[_Read] = [(text, emphasis, spec.clip_skip, num, long) for text in texts]
            missing = [key for key in dict.fromkeys(wanted) if key not in self._prompts]
            if missing:
                with self.placement.using(self.pipeline.text_encoder):
                    self._prompts |= {key: self._embed(key) for key in missing}
            rows_BLD = torch.cat([self._prompts[key] for key in wanted])
            while len(self._prompts) > KEPT:
                del self._prompts[next(iter(self._prompts))]
        return rows_BLD

    def _embed(self, key: _Read) -> Tensor:
        text, emphasis, clip_skip, num_chunks, long = key
        embeds_1LD = self._clip.encode(
            text, emphasis=emphasis, clip_skip=clip_skip, num_chunks=num_chunks, long=long
        )
        return embeds_1LD.to(self.device, self.dtype)

    def _encode_all(self, one: Pass) -> tuple[Tensor, bool]:
        retries: list[bool] = []

        def encode(picture: Image.Image) -> Tensor:
            latents_1Chw, retried = self._encode(picture)
            retries.append(retried)
            return latents_1Chw

        return one.encoded(encode), any(retries)

    def _encode(self, picture: Image.Image) -> tuple[Tensor, bool]:
        """The picture's latents (1, C, h, w): the mean of the VAE's distribution, so nothing is drawn."""
        pixels_13HW = self.pipeline.image_processor.preprocess(picture)
        vae = self.pipeline.vae

        def work(dtype: torch.dtype) -> Tensor:
            return cast(Tensor, vae.encode(pixels_13HW.to(self.device, dtype)).latent_dist.mode())

        with self.placement.using(vae):
            latents_1Chw, retried = checks.with_range(vae, work)
        return latents_1Chw.mul(vae.config.scaling_factor).to(self.dtype), retried

    def _picture(self, latents_1Chw: Tensor, one: Pass, retried: bool) -> Made:
        if not checks.all_finite(latents_1Chw):
            return Made(None, fault="the denoiser gave numbers that are not finite")
        vae = self.pipeline.vae

        def work(dtype: torch.dtype) -> Tensor:
            scaled_1Chw = latents_1Chw.to(dtype) / vae.config.scaling_factor
            return cast(Tensor, vae.decode(scaled_1Chw, return_dict=False)[0])

        with self.placement.using(vae):
            pixels_13HW, again = checks.with_range(vae, work)
        retried = retried or again
        if not checks.all_finite(pixels_13HW):
            return Made(None, vae_float32=retried, fault="the VAE gave numbers that are not finite")
        if not one.last:
            return Made(self._image(pixels_13HW, one), vae_float32=retried)
        safety, image = self._checked(pixels_13HW, one)
        return checks.of_image(image, safety=safety, vae_float32=retried)

    def _image(self, pixels_13HW: Tensor, one: Pass) -> Image.Image:
        made: Image.Image = self.pipeline.image_processor.postprocess(pixels_13HW, output_type="pil")[0]
        image = made.convert("RGB")
        return one.mask.joined(image) if one.mask is not None else image

    def _checked(self, pixels_13HW: Tensor, one: Pass) -> tuple[checks.Safety, Image.Image]:
        """The safety checker's verdict and the picture, all black where it is flagged."""
        image, checker = self._image(pixels_13HW, one), self.pipeline.safety_checker
        if one.mask is not None:
            pixels_13HW = self.pipeline.image_processor.preprocess(image).to(pixels_13HW)
        with self.placement.using(checker) if checker is not None else nullcontext():
            _, flags = self.pipeline.run_safety_checker(pixels_13HW, self.device, self.dtype)
        if flags is None:
            return "none", image
        return ("flagged", Image.new("RGB", image.size)) if flags[0] else ("passed", image)
