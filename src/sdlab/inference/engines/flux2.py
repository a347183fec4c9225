"""The engine for FLUX.2: shots in, pictures out, as in sample.py.

Both kinds of it, klein (with classifier-free guidance, unless distilled) and dev (guidance is an input). Prompts
are encoded and pictures decoded one at a time, the noise of each is drawn on the CPU from its own seed, and the
VAE works in float32.

Shapes: B pictures of a batch, C channels of the packed latents (four times the VAE's), N tokens of a picture,
H W picture sides and h w sides of the packed latents (H/16, W/16), L tokens of a prompt, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from PIL import Image
from torch import Tensor

from sdlab.inference.engines import schedulers
from sdlab.inference.engines.sd import Made, OnStep, memory_in_words
from sdlab.inference.spec import Shot, Spec
from sdlab.models.flow import to_tokens
from sdlab.models.flux2_pipeline import look_as_they_are


@dataclass
class Flux2Sampler:
    """A diffusers FLUX.2 pipeline, used one batch at a time."""

    pipeline: Any
    _prompts: dict[str, Tensor] = field(default_factory=dict)

    @property
    def grid(self) -> int:
        """Picture sides are multiples of this many pixels."""
        return 2 * int(self.pipeline.vae_scale_factor)

    @property
    def device(self) -> torch.device:
        return torch.device(self.pipeline.transformer.device)

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
        """One Made for each shot, in order.

        `references` are RGB pictures that all shots look at; `init`, of the spec's size, is what they start from.
        Raises OutOfResources when the CPU's memory is too small.
        """
        with memory_in_words(len(batch), spec):
            latents_BChw = self._denoise(batch, spec, init, references, on_step)
            return [self._picture(latents_BChw[i : i + 1]) for i in range(len(batch))]

    def _denoise(
        self,
        batch: Sequence[Shot],
        spec: Spec,
        init: Image.Image | None,
        references: Sequence[Image.Image],
        on_step: OnStep | None,
    ) -> Tensor:
        """Normalised latents (B, C, h, w) in float32."""
        pipeline = _pipeline(self.pipeline)
        latents_BChw = self._noise(batch, spec)
        settings: dict[str, Any] = {
            "image": list(references) or None,
            "width": spec.width,
            "height": spec.height,
            "num_inference_steps": spec.steps,
            "guidance_scale": spec.guidance,
            "output_type": "latent",
            **self._conditions(batch, spec),
        }
        if init is not None:
            settings["sigmas"] = _last_sigmas(spec)
            latents_BChw = self._noised(init, latents_BChw, spec)
        packed_BNC = to_tokens(latents_BChw)

        def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal packed_BNC
            packed_BNC = tensors["latents"]
            if on_step is not None:
                on_step(step + 1, pipe.num_timesteps)
            return {}

        with schedulers.quiet():
            pipeline(latents=latents_BChw, callback_on_step_end=after_step, **settings)
        # not the call's own result: klein undoes the normalisation in half precision, dev leaves it to us
        last_BChw: Tensor = packed_BNC.float().transpose(1, 2).reshape(latents_BChw.shape)
        return last_BChw

    def _noise(self, batch: Sequence[Shot], spec: Spec) -> Tensor:
        channels = self.pipeline.transformer.config.in_channels
        shape = (channels, spec.height // self.grid, spec.width // self.grid)
        drawn = [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(s.seed)) for s in batch]
        return torch.stack(drawn).to(self.device)

    def _noised(self, init: Image.Image, noise_BChw: Tensor, spec: Spec) -> Tensor:
        """x_s = (1 - s) x_0 + s eps, with s the noise level of the first step that is made."""
        pixels_13HW = self.pipeline.image_processor.preprocess(init)
        vae = self.pipeline.vae
        latents_1Chw = self.pipeline._encode_vae_image(pixels_13HW.to(self.device, vae.dtype), None).float()
        scheduler = schedulers.fresh("", self.pipeline.scheduler)
        tokens = noise_BChw.shape[2] * noise_BChw.shape[3]
        mu = compute_empirical_mu(tokens, spec.steps)  # of all steps, so that the noise levels are the same
        with schedulers.quiet():
            scheduler.set_timesteps(sigmas=_last_sigmas(spec), mu=mu)
        first = float(scheduler.sigmas[0])
        noised_BChw: Tensor = (1 - first) * latents_1Chw + first * noise_BChw
        return noised_BChw

    def _conditions(self, batch: Sequence[Shot], spec: Spec) -> dict[str, Tensor]:
        """Embeddings of the prompts, and for classifier-free guidance of the negative prompts, (B, L, D) each."""
        klein = isinstance(self.pipeline, Flux2KleinPipeline)
        guided = klein and spec.guidance > 1 and not self.pipeline.config.is_distilled
        texts = [shot.prompt for shot in batch] + [shot.negative for shot in batch if guided]
        self._prompts = {t: self._prompts[t] if t in self._prompts else self._embed(t) for t in texts}
        rows = torch.cat([self._prompts[t] for t in texts])
        conditions = {"prompt_embeds": rows[: len(batch)]}
        return {**conditions, "negative_prompt_embeds": rows[len(batch) :]} if guided else conditions

    def _embed(self, text: str) -> Tensor:
        embeds_1LD: Tensor = self.pipeline.encode_prompt(prompt=text, device=self.device)[0]
        return embeds_1LD

    def _picture(self, latents_1Chw: Tensor) -> Made:
        if not torch.isfinite(latents_1Chw).all():
            return Made(None, fault="the transformer gave numbers that are not finite")
        pixels_13HW = self._decode(latents_1Chw)
        if not torch.isfinite(pixels_13HW).all():
            return Made(None, fault="the VAE gave numbers that are not finite")
        image = self.pipeline.image_processor.postprocess(pixels_13HW, output_type="pil")[0]
        return Made(image.convert("RGB"))

    def _decode(self, latents_1Chw: Tensor) -> Tensor:
        """Pixels (1, 3, H, W) in about [-1, 1]."""
        vae = self.pipeline.vae
        mean_1C11 = vae.bn.running_mean.view(1, -1, 1, 1).to(latents_1Chw)
        variance_1C11 = vae.bn.running_var.view(1, -1, 1, 1)
        std_1C11 = torch.sqrt(variance_1C11 + vae.config.batch_norm_eps).to(latents_1Chw)
        latents = self.pipeline._unpatchify_latents(latents_1Chw * std_1C11 + mean_1C11)
        pixels: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return pixels


def _last_sigmas(spec: Spec) -> list[float]:
    """The noise levels, before the shift, of the steps that are made from a picture to start from."""
    assert spec.strength is not None
    sigmas = np.linspace(1.0, 1 / spec.steps, spec.steps)
    return [float(sigma) for sigma in sigmas[spec.steps - int(spec.steps * spec.strength) :]]


def _pipeline(base: Any) -> Any:
    """The library's plain pipeline around the same modules, with a scheduler of its own; prompts come encoded."""
    klein = isinstance(base, Flux2KleinPipeline)
    settings = {"is_distilled": base.config.is_distilled} if klein else {}
    made = (Flux2KleinPipeline if klein else Flux2Pipeline)(
        scheduler=schedulers.fresh("", base.scheduler),
        vae=base.vae,
        text_encoder=None,
        tokenizer=None,
        transformer=base.transformer,
        **settings,
    )
    made.set_progress_bar_config(disable=True)
    look_as_they_are(made)
    return made
