"""FLUX.2 klein and dev: a rectified flow on a transformer that sees prompt, picture and reference pictures as tokens.

Latents here are packed and normalised, as the transformer sees them (models/flow.py).

Shapes: B batch, C packed channels, H W packed height and width (1/16 of the pixels), N tokens of the target, L tokens
of the prompt, D width of its embedding.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdlab.dataset.batches import REFERENCE
from sdlab.errors import SdlabError
from sdlab.keyed import Draws
from sdlab.models import flow
from sdlab.models.bases import FlowObjective
from sdlab.models.flux2_folder import Flux2Parts, tokenizer_files
from sdlab.models.flux2_pipeline import make_pipeline
from sdlab.models.flux2_text import PromptReader, embed
from sdlab.models.parts import Part, check_tensors, load
from sdlab.models.size import DenoiserSize, size_of

if TYPE_CHECKING:
    from sdlab.models.base import Batch, Cond

__all__ = ["DenoiserSize", "Flux2", "Flux2Encoders", "size_of"]

TRAINED_GUIDANCE = 1.0  # what dev is told while it is trained; other numbers are for making pictures
SAMPLINGS = ("logit-normal", "uniform")


class Flux2:
    """A FLUX.2 model: a Family of models/base.py. Holds paths and numbers, no weights."""

    def __init__(self, parts: Flux2Parts, *, objective: FlowObjective | None = None) -> None:
        """Check all parts against their configurations and each other; SdlabError before a weight is read."""
        for part in (parts.transformer, parts.vae, parts.text_encoder):
            check_tensors(part)
        _fit_together(parts)
        self.parts = parts
        self.grid = int(
            2 ** len(parts.vae.config["block_out_channels"])
        )  # the VAE's 8, times patches of 2: 16
        self.objective = objective or FlowObjective()
        shift = self.objective.shift
        if self.objective.sampling not in SAMPLINGS or (shift is not None and not 0 < shift <= 100):
            raise SdlabError(
                f"noise levels cannot be drawn as {self.objective.sampling!r} with a shift of {shift}",
                where="--timestep-sampling, --shift",
                next_step="Use logit-normal or uniform, and a shift above 0 or auto",
            )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of VAE, the text encoder's layers that are read, the tokenizer's files, and how they are used."""
        digest = hashlib.sha256()
        text = json.dumps(self.parts.text_encoder.config, sort_keys=True)
        epsilon = self.parts.vae.config.get("batch_norm_eps", 1e-4)
        settings = (self.parts.kind, self.parts.layers, PromptReader(self.parts).window, "sdpa", epsilon)
        digest.update(f"flux2 1 {settings} {text}".encode())
        for part in (self.parts.vae, self.parts.text_encoder):
            for name in sorted(part.weights):
                stored = part.weights[name]
                digest.update(f"\0{part.name} {name} {stored.dtype} {stored.shape}\0".encode())
                if name != "bn.num_batches_tracked":
                    for piece in stored.pieces():
                        digest.update(piece)
        for path in tokenizer_files(self.parts.tokenizer):
            digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
        return digest.hexdigest()

    @contextmanager
    def load_encoders(self, device: torch.device, dtype: torch.dtype) -> Iterator[Flux2Encoders]:
        """The VAE in float32 and the text encoder in `dtype`, never both at a time; both are gone at the end."""
        encoders = Flux2Encoders(self.parts, device, dtype)
        try:
            yield encoders
        finally:
            encoders.close()

    def load_denoiser(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The transformer in eval mode with trainable, freshly allocated parameters."""
        return load(self.parts.transformer, device, dtype)

    def loss(self, denoiser: nn.Module, batch: Batch, rng: Draws) -> Tensor:
        """Mean squared error of the velocity, noise - x0, over the target's tokens (Liu et al. 2023, eq. 1).

        (B,) float32. Draws ``noise`` and ``sigma`` per sample. References are ``reference_0``, ``reference_1`` … of the
        batch's cond, (B, C, h, w): they are seen without noise, at the same noise level, and are not in the loss.
        """
        weight = next(denoiser.parameters())
        x0_BCHW = batch.latents_BCHW.to(weight.device, torch.float32)
        noise_BCHW = rng.normal("noise", batch.ids, x0_BCHW.shape[1:]).to(weight.device)
        num_tokens = x0_BCHW.shape[-2] * x0_BCHW.shape[-1]
        sigma_B = self._sigmas(batch.ids, rng, num_tokens).to(weight.device)
        noisy_BCHW = flow.add_noise(x0_BCHW, noise_BCHW, sigma_B)
        tokens_BNC, ids_N4 = flow.with_references(noisy_BCHW, references(batch.cond))
        prompt_BLD = batch.cond["prompt_embeds"].to(weight.device, weight.dtype)
        velocity_BNC = denoiser(
            hidden_states=tokens_BNC.to(weight.dtype),
            encoder_hidden_states=prompt_BLD,
            timestep=sigma_B,  # 0 to 1: the model multiplies by 1000 itself
            guidance=self._guidance(sigma_B),
            img_ids=ids_N4.to(weight.device),
            txt_ids=flow.text_ids(prompt_BLD.shape[1]).to(weight.device),
            return_dict=False,
        )[0][:, :num_tokens]
        target_BNC = flow.to_tokens(noise_BCHW - x0_BCHW)
        loss_B: Tensor = (velocity_BNC.float() - target_BNC).square().mean(dim=(1, 2))
        return loss_B

    def _sigmas(self, ids: Sequence[str], rng: Draws, num_tokens: int) -> Tensor:
        """Noise levels in (0, 1), (B,) float32."""
        if self.objective.sampling == "uniform":
            sigma_B = rng.uniform("sigma", ids).clamp(1e-6, 1 - 1e-6)
        else:
            sigma_B = rng.normal("sigma", ids, ()).double().sigmoid()
        shift = self.objective.shift
        return flow.shifted(sigma_B, flow.shift_of(num_tokens) if shift is None else shift).float()

    def _guidance(self, sigma_B: Tensor) -> Tensor | None:
        if not self.parts.transformer.config.get("guidance_embeds", True):
            return None
        return torch.full_like(sigma_B, TRAINED_GUIDANCE)

    def pipeline(self, denoiser: nn.Module, conds: Mapping[str, Cond] | None = None) -> Any:
        """A Flux2KleinPipeline or Flux2Pipeline around the given transformer, in its dtype and on its device.

        The VAE is in float32. With `conds` the text encoder is not loaded, and only their prompts can be drawn
        (and "" must be among them for guidance on klein); KeyError for others.
        """
        return make_pipeline(self.parts, denoiser, conds)


def references(cond: Cond) -> list[Tensor]:
    """The reference pictures of a batch, in order."""
    found: list[Tensor] = []
    while (name := REFERENCE.format(len(found))) in cond:
        found.append(cond[name])
    return found


class Flux2Encoders:
    """The frozen half of the model; see Encoders in models/base.py. One picture and one prompt at a time.

    Batches of another make-up change the last digits of a convolution or matrix product, so each result is
    computed alone and depends on its own picture or prompt only.
    """

    def __init__(self, parts: Flux2Parts, device: torch.device, dtype: torch.dtype) -> None:
        self._parts, self._device, self._dtype = parts, device, dtype
        self._loaded: nn.Module | None = None
        self._name = ""
        self._reader: PromptReader | None = None
        self._open = True

    @torch.no_grad()
    def encode_pictures(self, pixels_B3HW: Tensor) -> Tensor:
        """Pixels in [-1, 1] to packed, normalised latents (B, 4C, H/16, W/16), float32 on the CPU.

        The latent is the mean of the VAE's distribution, not a draw from it.
        """
        vae: Any = self._module(self._parts.vae, torch.float32)
        rows = []
        for pixels_13HW in torch.split(pixels_B3HW, 1):
            latents_1CHW = vae.encode(pixels_13HW.to(self._device, torch.float32)).latent_dist.mode()
            rows.append(normalised(vae, latents_1CHW).cpu())
        return torch.cat(rows)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> list[Cond]:
        """One ``{"prompt_embeds": (L, D)}`` on the CPU for each prompt, in the text encoder's dtype."""
        encoder = self._module(self._parts.text_encoder, self._dtype)
        if self._reader is None:
            self._reader = PromptReader(self._parts)
        made = (embed(encoder, self._reader.tokens(prompt), self._parts.layers) for prompt in prompts)
        return [{"prompt_embeds": embeds_LD.cpu().clone()} for embeds_LD in made]

    def _module(self, part: Part, dtype: torch.dtype) -> nn.Module:
        """The part, alone in memory: the other one goes first."""
        assert self._open, "encoders are used after their `with` has ended"
        if self._name != part.name or self._loaded is None:
            self._free()
            self._loaded, self._name = load(part, self._device, dtype).requires_grad_(False), part.name
        return self._loaded

    def _free(self) -> None:
        self._loaded, self._name = None, ""
        gc.collect()  # modules hold cycles; the memory is wanted now
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Free everything, on the card too."""
        self._open, self._reader = False, None
        self._free()


def normalised(vae: Any, latents_BCHW: Tensor) -> Tensor:
    """The VAE's latents (B, C, 2H, 2W) as the transformer sees them, (B, 4C, H, W)."""
    packed_BCHW = flow.patchify(latents_BCHW)
    epsilon = float(vae.config.batch_norm_eps)
    return flow.normalise(packed_BCHW, vae.bn.running_mean, vae.bn.running_var, epsilon)


def _fit_together(parts: Flux2Parts) -> None:
    net, vae, text = parts.transformer.config, parts.vae.config, parts.text_encoder.config
    channels, width = net.get("in_channels", 128), net.get("joint_attention_dim", 15360)
    pairs = (
        (
            "input channels",
            channels,
            "4 times the latent channels of the VAE",
            4 * vae.get("latent_channels", 32),
        ),
        ("output channels", net.get("out_channels") or channels, "input channels", channels),
        ("prompt width", width, "3 times the width of the text encoder", 3 * text.get("hidden_size", 0)),
        ("patch size", net.get("patch_size", 1), "one that FLUX.2 has", 1),
    )
    for what, mine, other, theirs in pairs:
        if mine != theirs:
            raise SdlabError(
                f"the transformer's {what} ({mine}) differ from the {other} ({theirs})",
                where=str(parts.transformer.where),
                next_step="Its parts are of different models, as klein 4B and 9B",
            )
