"""The engine for FLUX.2: shots in, pictures out, as in sd.py.

Both kinds of it, klein (with classifier-free guidance, unless distilled) and dev (guidance is an input). Prompts
are encoded and pictures decoded one at a time, the noise of each is drawn on the CPU from its own seed, and the
VAE works in float32.

Shapes: B pictures of a batch, C channels of the packed latents (four times the VAE's), N tokens of a picture,
H W picture sides and h w sides of the packed latents (H/16, W/16), L tokens of a prompt, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import InitVar, dataclass, field
from threading import Lock
from typing import Any

import numpy as np
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from PIL import Image
from torch import Tensor

from sdlab.inference.engines import checks, schedulers
from sdlab.inference.engines.checks import Made
from sdlab.inference.engines.hires import OnStep, Pass, first_pass, in_passes
from sdlab.inference.engines.placement import Placement
from sdlab.inference.prompts.embeddings import Embedding
from sdlab.inference.spec import Shot, Spec
from sdlab.models.flow import add_noise, to_tokens
from sdlab.models.flux2_pipeline import look_as_they_are


@dataclass
class Flux2Sampler:
    """A diffusers FLUX.2 pipeline. Several threads may sample at once in float32, one in half precision."""

    pipeline: Any
    embeddings: InitVar[Sequence[Embedding]]
    placement: Placement
    _reading: Lock = field(default_factory=Lock)

    def __post_init__(self, embeddings: Sequence[Embedding]) -> None:
        assert not embeddings

    @property
    def grid(self) -> int:
        """Picture sides are multiples of this many pixels."""
        return 2 * int(self.pipeline.vae_scale_factor)

    @property
    def device(self) -> torch.device:
        """Where the numbers are computed, wherever weights wait."""
        return self.placement.device

    def forget_prompts(self) -> None:
        """Nothing to forget: prompts were read before any LoRA came, and LoRAs touch the transformer alone."""

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
        """One Made for each shot, in order.

        `references` are RGB pictures that all shots look at; `init`, of the spec's size, is what they start from,
        from pure noise where the spec has no strength. `mask` is a grey picture of that size, white where `init` is
        made anew, and by how many pixels its edge is softened. Raises OutOfResources when the CPU's memory is too
        small.
        """
        whole = first_pass(batch, spec, init=init, mask=mask, references=references, on_step=on_step)
        with checks.memory_in_words(len(batch), spec):
            return in_passes(self._make, whole)

    def _make(self, one: Pass) -> list[Made]:
        return [self._picture(latents_1Chw, one) for latents_1Chw in torch.split(self._denoise(one), 1)]

    def _denoise(self, one: Pass) -> Tensor:
        """Normalised latents (B, C, h, w) in float32."""
        spec = one.spec
        channels = self.pipeline.transformer.config.in_channels
        noise_BChw, _ = one.noise((channels, spec.height // self.grid, spec.width // self.grid))
        noise_BChw = noise_BChw.to(self.device)
        if not one.starts:
            return self._flow(one, noise_BChw, known=None, noise_BChw=noise_BChw)
        clean_BChw = one.encoded(self._encode)
        if one.num_steps == 0:
            return clean_BChw
        level = torch.tensor([_first_level(self.pipeline.scheduler, one, noise_BChw)], device=self.device)
        start_BChw = add_noise(clean_BChw, noise_BChw, level)
        return self._flow(one, start_BChw, known=clean_BChw if one.mask else None, noise_BChw=noise_BChw)

    def _flow(self, one: Pass, start_BChw: Tensor, *, known: Tensor | None, noise_BChw: Tensor) -> Tensor:
        """The library's loop. `known` are clean latents that are put back after every step outside the mask."""
        spec = one.spec
        packed_BNC = to_tokens(start_BChw)
        free_1N1 = None
        if known is not None and one.mask is not None:
            free_1N1 = to_tokens(one.mask.free(self.grid).to(self.device)) > 0

        def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal packed_BNC
            packed_BNC = tensors["latents"]
            if known is not None and free_1N1 is not None:
                level = pipe.scheduler.sigmas[step + 1 : step + 2].to(known)
                stays_BNC = to_tokens(add_noise(known, noise_BChw, level)).to(packed_BNC)
                packed_BNC = torch.where(free_1N1, packed_BNC, stays_BNC)
            if one.on_step is not None:
                one.on_step(step + 1, pipe.num_timesteps)
            return {"latents": packed_BNC}

        parts = [self.pipeline.transformer, *([self.pipeline.vae] if one.references else [])]
        conditions = self._conditions(one.shots, spec)
        with ExitStack() as working:
            for part in parts:
                working.enter_context(self.placement.using(part))
            _pipeline(self.pipeline, self.placement)(
                image=list(one.references) or None,
                width=spec.width,
                height=spec.height,
                num_inference_steps=spec.steps,
                guidance_scale=spec.guidance,
                output_type="latent",
                latents=start_BChw,
                callback_on_step_end=after_step,
                sigmas=_last_sigmas(one) if one.starts else None,
                **conditions,
            )
        # not the call's own result: klein undoes the normalisation in half precision, dev leaves it to us
        last_BChw: Tensor = packed_BNC.float().transpose(1, 2).reshape(start_BChw.shape)
        return last_BChw

    def _encode(self, picture: Image.Image) -> Tensor:
        """Normalised latents (1, C, h, w) of the picture, in float32."""
        pixels_13HW = self.pipeline.image_processor.preprocess(picture).to(self.device)

        def work(dtype: torch.dtype) -> Tensor:
            latents_1Chw: Tensor = self.pipeline._encode_vae_image(pixels_13HW.to(dtype), None)
            return latents_1Chw

        with self.placement.using(self.pipeline.vae):
            return checks.with_range(self.pipeline.vae, work)[0].float()

    def _conditions(self, batch: Sequence[Shot], spec: Spec) -> dict[str, Tensor]:
        """Embeddings of the prompts, and for classifier-free guidance of the negative prompts, (B, L, D) each."""
        klein = isinstance(self.pipeline, Flux2KleinPipeline)
        guided = klein and spec.guidance > 1 and not self.pipeline.config.is_distilled
        texts = [shot.prompt for shot in batch] + [shot.negative for shot in batch if guided]
        with self._reading:
            read = {text: self._embed(text) for text in dict.fromkeys(texts)}
        rows = torch.cat([read[text] for text in texts])
        conditions = {"prompt_embeds": rows[: len(batch)]}
        return {**conditions, "negative_prompt_embeds": rows[len(batch) :]} if guided else conditions

    def _embed(self, text: str) -> Tensor:
        embeds_1LD: Tensor = self.pipeline.encode_prompt(prompt=text, device=self.device)[0]
        return embeds_1LD

    def _picture(self, latents_1Chw: Tensor, one: Pass) -> Made:
        if not checks.all_finite(latents_1Chw):
            return Made(None, fault="the transformer gave numbers that are not finite")
        with self.placement.using(self.pipeline.vae):
            pixels_13HW, retried = checks.with_range(
                self.pipeline.vae, lambda dtype: self._decode(latents_1Chw, dtype)
            )
        if not checks.all_finite(pixels_13HW):
            return Made(None, vae_float32=retried, fault="the VAE gave numbers that are not finite")
        made: Image.Image = self.pipeline.image_processor.postprocess(pixels_13HW, output_type="pil")[0]
        image = made.convert("RGB")
        image = one.mask.joined(image) if one.mask is not None else image
        return checks.of_image(image, vae_float32=retried) if one.last else Made(image, vae_float32=retried)

    def _decode(self, latents_1Chw: Tensor, dtype: torch.dtype) -> Tensor:
        """Pixels (1, 3, H, W) in about [-1, 1]."""
        vae = self.pipeline.vae
        mean_1C11 = vae.bn.running_mean.view(1, -1, 1, 1).to(latents_1Chw)
        variance_1C11 = vae.bn.running_var.view(1, -1, 1, 1)
        std_1C11 = torch.sqrt(variance_1C11 + vae.config.batch_norm_eps).to(latents_1Chw)
        latents = self.pipeline._unpatchify_latents(latents_1Chw * std_1C11 + mean_1C11)
        pixels: Tensor = vae.decode(latents.to(dtype), return_dict=False)[0]
        return pixels


def _last_sigmas(one: Pass) -> list[float]:
    """The noise levels, before the shift, of the steps that are made from a picture to start from."""
    steps = one.spec.steps
    return [float(sigma) for sigma in np.linspace(1.0, 1 / steps, steps)[steps - one.num_steps :]]


def _first_level(own: Any, one: Pass, noise_BChw: Tensor) -> float:
    """The noise level s of the first step that is made: x_s = (1 - s) x_0 + s eps."""
    scheduler = schedulers.fresh("", own)
    tokens = noise_BChw.shape[2] * noise_BChw.shape[3]
    mu = compute_empirical_mu(tokens, one.spec.steps)  # of all steps, so that the noise levels are the same
    scheduler.set_timesteps(sigmas=_last_sigmas(one), mu=mu)
    return float(scheduler.sigmas[0])


def _pipeline(base: Any, placement: Placement) -> Any:
    """The library's plain pipeline around the same modules, with a scheduler of its own; prompts come encoded."""
    klein = isinstance(base, Flux2KleinPipeline)
    settings = {"is_distilled": base.config.is_distilled} if klein else {}
    kind: type[Any] = Flux2KleinPipeline if klein else Flux2Pipeline
    made = placement.pipeline(kind)(
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
