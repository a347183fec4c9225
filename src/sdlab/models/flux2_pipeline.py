"""diffusers' pipelines for FLUX.2 around a transformer of ours, reading prompts the way the model was trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdlab.models.flux2_folder import Flux2Parts
from sdlab.models.flux2_text import PromptReader, embed
from sdlab.models.parts import load
from sdlab.models.quiet import hush

if TYPE_CHECKING:
    from sdlab.models.base import Cond


def make_pipeline(parts: Flux2Parts, denoiser: nn.Module, conds: Mapping[str, Cond] | None) -> Any:
    """The pipeline of the model's kind in the denoiser's dtype and on its device, the VAE in float32.

    Without `conds` it has the layers of the text encoder that are read; with them it looks prompts up.
    """
    hush()
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Pipeline

    weight = next(denoiser.parameters())
    settings: dict[str, Any] = {} if parts.kind == "dev" else {"is_distilled": parts.is_distilled}
    plain = {k: v for k, v in parts.scheduler.items() if not k.startswith("_")}
    reader, encoder = None, None
    if conds is None:
        reader = PromptReader(parts)
        encoder = load(parts.text_encoder, weight.device, weight.dtype).requires_grad_(False)
    pipeline = _reading(Flux2Pipeline if parts.kind == "dev" else Flux2KleinPipeline)(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(plain),
        vae=_full_precision(load(parts.vae, weight.device, torch.float32).requires_grad_(False)),
        text_encoder=encoder,
        tokenizer=reader.tokenizer if reader else None,
        transformer=denoiser,
        **settings,
    )
    pipeline.reader, pipeline.conds, pipeline.layers = reader, conds, parts.layers
    pipeline.set_progress_bar_config(disable=True)
    look_as_they_are(pipeline)
    return pipeline


def look_as_they_are(pipeline: Any) -> None:
    """Let the pipeline see reference pictures in the size they are given.

    diffusers shrinks those of more than 1024 x 1024 pixels once more: their places would not be the target's.
    """
    pipeline.image_processor._resize_to_target_area = lambda image, area: image


def _full_precision(vae: Any) -> Any:
    """The VAE, taking latents of any number type: half types shift a picture's colours."""
    first = vae.post_quant_conv if vae.post_quant_conv is not None else vae.decoder.conv_in
    first.register_forward_pre_hook(lambda module, args: (args[0].to(module.weight.dtype),))
    return vae


def _reading(base: Any) -> Any:
    """The pipeline class with an `encode_prompt` of ours."""

    class Reading(base):  # type: ignore[misc]
        reader: PromptReader | None
        conds: Mapping[str, Cond] | None
        layers: tuple[int, int, int]

        def read_prompt(self, prompt: str) -> Tensor:
            """(L, D) of one prompt, looked up or encoded."""
            if self.conds is not None:
                return self.conds[prompt]["prompt_embeds"]
            assert self.reader is not None
            return embed(self.text_encoder, self.reader.tokens(prompt), self.layers)

        @torch.no_grad()
        def encode_prompt(
            self,
            prompt: str | list[str] | None = "",
            device: torch.device | None = None,
            num_images_per_prompt: int = 1,
            prompt_embeds: Tensor | None = None,
            max_sequence_length: int | None = None,
            text_encoder_out_layers: tuple[int, ...] | None = None,
        ) -> tuple[Tensor, Tensor]:
            """(B, L, D) in the transformer's dtype and the places of the tokens, (B, L, 4).

            Window and layers are the model's own, whatever the last two say: diffusers passes its defaults there.
            """
            device = device or self._execution_device
            if prompt_embeds is None:
                prompts = [prompt or ""] if isinstance(prompt, str) or prompt is None else prompt
                prompt_embeds = torch.stack([self.read_prompt(one).to(device) for one in prompts])
            prompt_embeds = prompt_embeds.to(device, self.transformer.dtype)
            prompt_embeds = prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
            return prompt_embeds, self._prepare_text_ids(prompt_embeds).to(device)

    Reading.__name__ = Reading.__qualname__ = base.__name__
    return Reading
