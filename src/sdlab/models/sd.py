"""Stable Diffusion 1.x, 2.x and everything of their shape: a UNet, a VAE, a CLIP text encoder.

Shapes: B batch, C latent channels, H W latent height and width, L 77 tokens, D width of the text embedding.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdlab.errors import SdlabError
from sdlab.keyed import Draws
from sdlab.models import noise
from sdlab.models.bases import Objective
from sdlab.models.folder import SdParts
from sdlab.models.parts import Part, check_tensors, load
from sdlab.models.quiet import hush
from sdlab.models.sniff import INPAINTING, inpainting
from sdlab.models.window import PromptWindow

if TYPE_CHECKING:
    from sdlab.models.base import Batch, Cond

__all__ = ["Objective", "StableDiffusion", "load_tokenizer"]


class StableDiffusion:
    """A Stable Diffusion 1.x or 2.x model: a Family of models/base.py. Holds paths and numbers, no weights."""

    def __init__(self, parts: SdParts, *, objective: Objective | None = None) -> None:
        """Check all parts against their configurations and each other; SdlabError before a weight is read."""
        for part in (parts.unet, parts.vae, parts.text_encoder, parts.safety_checker):
            if part is not None:
                check_tensors(part)
        _fit_together(parts)
        self.parts = parts
        self.grid = int(2 ** (len(parts.vae.config["block_out_channels"]) - 1))  # pixels of one latent: 8
        self.objective = objective or Objective((0, int(parts.scheduler.get("num_train_timesteps", 1000))))
        self.alphas_cumprod_T = noise.alphas_cumprod(parts.scheduler)
        low, high = self.objective.timestep_range
        if not 0 <= low < high <= len(self.alphas_cumprod_T):
            raise SdlabError(
                f"{low} to {high} is no range within 0 to {len(self.alphas_cumprod_T)}",
                where="--timestep-range",
            )

    @property
    def prediction_type(self) -> str:
        """``epsilon`` or ``v_prediction``: what the UNet predicts, and is trained to predict."""
        return str(self.parts.scheduler.get("prediction_type", "epsilon"))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of VAE, text encoder and tokenizer: names, shapes and bytes of all tensors, and settings.

        The same weights in a folder and in a single file give the same fingerprint. 0.9 GB/s on one core.
        """
        digest = hashlib.sha256()
        settings = (
            self.parts.vae.config.get("scaling_factor", 0.18215),
            self.parts.vae.config.get("shift_factor"),
        )
        digest.update(f"sd 1 {settings} {self.parts.text_encoder.config.get('hidden_act')}".encode())
        for part in (self.parts.vae, self.parts.text_encoder):
            for name in sorted(part.weights):
                stored = part.weights[name]
                digest.update(f"\0{part.name} {name} {stored.dtype} {stored.shape}\0".encode())
                for piece in stored.pieces():
                    digest.update(piece)
        if filler := _filler(self.parts.tokenizer):
            digest.update(f"\0filled up with {filler}".encode("utf-8", "backslashreplace"))
        for token, number in _vocabulary(self.parts.tokenizer):
            digest.update(f"\0{token} {number}".encode("utf-8", "backslashreplace"))
        return digest.hexdigest()

    @contextmanager
    def load_encoders(self, device: torch.device, dtype: torch.dtype) -> Iterator[SdEncoders]:
        """The VAE and the text encoder, each loaded when it is first needed; both are gone at the end.

        They run in float32 whatever `dtype` says: it is done once a picture and prompt, what is cached then
        does not depend on the type a run computes in, and half types round the VAE's colours.
        """
        encoders = SdEncoders(self.parts, device)
        try:
            yield encoders
        finally:
            encoders.close()

    def load_denoiser(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The UNet in eval mode with trainable, freshly allocated parameters."""
        return load(self.parts.unet, device, dtype)

    def loss(self, denoiser: nn.Module, batch: Batch, rng: Draws) -> Tensor:
        """Mean squared error of the noise (Ho et al. 2020, eq. 14) or the velocity (Salimans & Ho 2022).

        (B,) float32, weighted by min-SNR where the objective says so. Draws: ``noise`` and ``timestep`` in
        [low, high) per sample, and ``noise-offset`` per sample and channel.
        """
        weight = next(denoiser.parameters())
        x0_BCHW = batch.latents_BCHW.to(weight.device, torch.float32)
        noise_BCHW = self._noise(batch, rng).to(weight.device)
        timestep_B = rng.integers("timestep", batch.ids, *self.objective.timestep_range)
        bar_B = self.alphas_cumprod_T[timestep_B].to(weight.device)
        noisy_BCHW = noise.add_noise(x0_BCHW, noise_BCHW, bar_B)
        output_BCHW = denoiser(
            noisy_BCHW.to(weight.dtype),
            timestep_B.to(weight.device),
            encoder_hidden_states=batch.cond["prompt_embeds"].to(weight.device, weight.dtype),
            return_dict=False,
        )[0]
        if self.prediction_type == "v_prediction":
            target_BCHW = noise.velocity(x0_BCHW, noise_BCHW, bar_B)
        else:
            target_BCHW = noise_BCHW
        loss_B: Tensor = (output_BCHW.float() - target_BCHW).square().mean(dim=(1, 2, 3))
        if self.objective.snr_gamma > 0:
            loss_B = loss_B * noise.min_snr_weight(bar_B, self.objective.snr_gamma, self.prediction_type)
        return loss_B

    def _noise(self, batch: Batch, rng: Draws) -> Tensor:
        shape = batch.latents_BCHW.shape[1:]
        noise_BCHW = rng.normal("noise", batch.ids, shape)
        if self.objective.noise_offset:
            offset_BC11 = rng.normal("noise-offset", batch.ids, (shape[0], 1, 1))
            noise_BCHW = noise_BCHW + self.objective.noise_offset * offset_BC11
        return noise_BCHW

    def pipeline(self, denoiser: nn.Module, conds: Mapping[str, Cond] | None = None) -> Any:
        """A StableDiffusionPipeline around the given UNet, everything in its dtype and on its device.

        The scheduler is the model's own; the safety checker is there where the model has one. The text encoder is
        small and always loaded, so `conds` are not needed.
        """
        hush()
        from diffusers import StableDiffusionPipeline

        weight = next(denoiser.parameters())
        device, dtype = weight.device, weight.dtype
        checker = self.parts.safety_checker
        pipeline = StableDiffusionPipeline(
            vae=load(self.parts.vae, device, dtype),
            text_encoder=load(self.parts.text_encoder, device, dtype),
            tokenizer=load_tokenizer(self.parts),
            unet=denoiser,
            scheduler=_scheduler(self.parts.scheduler),
            safety_checker=load(checker, device, dtype) if checker else None,
            feature_extractor=_feature_extractor(self.parts),
            requires_safety_checker=checker is not None,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


class SdEncoders:
    """The frozen half of the model; see Encoders in models/base.py. One picture and one prompt at a time.

    Batches of another make-up change the last digits of a convolution or matrix product, so each result is
    computed alone and depends on its own picture or prompt only.
    """

    def __init__(self, parts: SdParts, device: torch.device) -> None:
        self._parts, self._device = parts, device
        self._loaded: dict[str, nn.Module] = {}
        self._tokenizer: Any = None
        self._open = True

    @torch.no_grad()
    def encode_pictures(self, pixels_B3HW: Tensor) -> Tensor:
        """Pixels in [-1, 1] to latents_BCHW, float32 on the CPU, times the VAE's scaling factor.

        The latent is the mean of the VAE's distribution, not a draw from it: then it follows from the picture
        alone and can be cached, and the spread that is left out is far below the noise that training adds.
        """
        vae: Any = self._module(self._parts.vae)
        scale = float(self._parts.vae.config.get("scaling_factor", 0.18215))
        rows = []
        for pixels_13HW in torch.split(pixels_B3HW, 1):
            posterior = vae.encode(pixels_13HW.to(self._device, torch.float32)).latent_dist
            rows.append((posterior.mode() * scale).cpu())
        return torch.cat(rows)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> list[Cond]:
        """One ``{"prompt_embeds": (L, D) float32}`` on the CPU for each prompt, cut after 77 tokens."""
        encoder: Any = self._module(self._parts.text_encoder)
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._parts)
        rows = []
        for prompt in prompts:
            tokens = self._tokenizer(
                prompt,
                padding="max_length",
                max_length=self._tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            hidden_1LD = encoder(tokens.to(self._device), return_dict=True).last_hidden_state
            rows.append({"prompt_embeds": hidden_1LD[0].float().cpu().clone()})
        return rows

    def _module(self, part: Part) -> nn.Module:
        assert self._open, "encoders are used after their `with` has ended"
        if part.name not in self._loaded:
            self._loaded[part.name] = load(part, self._device, torch.float32).requires_grad_(False)
        return self._loaded[part.name]

    def close(self) -> None:
        """Free everything, on the card too."""
        self._open = False
        self._loaded.clear()
        self._tokenizer = None
        gc.collect()  # modules hold cycles; the memory is wanted now
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _fit_together(parts: SdParts) -> None:
    unet, vae, text = parts.unet.config, parts.vae.config, parts.text_encoder.config
    if unet.get("in_channels") == INPAINTING:
        raise inpainting(str(parts.unet.where))
    latent = vae.get("latent_channels", 4)
    pairs = (
        ("input channels", unet.get("in_channels", 4), "latent channels of the VAE", latent),
        ("output channels", unet.get("out_channels", 4), "latent channels of the VAE", latent),
        (
            "prompt width",
            unet.get("cross_attention_dim", 1280),
            "width of the text encoder",
            text.get("hidden_size", 512),
        ),
    )
    for what, mine, other, theirs in pairs:
        if mine != theirs:
            raise SdlabError(
                f"the UNet's {what} ({mine}) differ from the {other} ({theirs})",
                where=str(parts.unet.where),
                next_step="Its parts are of different models",
            )
    numbers = [number for _, number in _vocabulary(parts.tokenizer)]
    size = text.get("vocab_size", 49408)
    if not numbers or max(numbers) >= size:
        raise SdlabError(
            f"has token numbers up to {max(numbers, default=-1)}, the text encoder knows {size}",
            where=str(parts.tokenizer),
            next_step="Tokenizer and text encoder are of different models",
        )


def _vocabulary(folder: Path) -> list[tuple[str, int]]:
    """All (token, number) of a tokenizer folder, sorted; read from its files without running anything."""
    from sdlab.models.files import read_json

    table: Any
    whole, plain = folder / "tokenizer.json", folder / "vocab.json"
    if plain.is_file():
        table = read_json(plain)
    else:
        model = read_json(whole).get("model")
        table = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(table, dict) or not all(type(n) is int and n >= 0 for n in table.values()):
        raise SdlabError("holds no vocabulary", where=str(plain if plain.is_file() else whole))
    return sorted(table.items())


def _filler(folder: Path) -> str:
    """What a short prompt is filled up with, where that is not the end mark: ``!`` in Stable Diffusion 2.x."""
    from sdlab.models.files import read_json

    path = folder / "tokenizer_config.json"
    token = read_json(path).get("pad_token") if path.is_file() else None
    word = str(token.get("content") if isinstance(token, dict) else token or "")
    return "" if word == "<|endoftext|>" else word


def load_tokenizer(parts: SdParts) -> Any:
    """The CLIP tokenizer, its length set to the text encoder's window (77); SdlabError for broken files."""
    hush()
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(parts.tokenizer, local_files_only=True)
    except Exception as reason:  # the tokenizers library raises bare Exception for a broken file
        said = " ".join(str(reason).split())[:160]
        raise SdlabError(f"the tokenizer cannot be read ({said})", where=str(parts.tokenizer)) from reason
    window = int(parts.text_encoder.config.get("max_position_embeddings", 77))
    tokenizer.model_max_length = window  # some saved ones say 10**30, and would never pad
    return tokenizer


def prompt_window(parts: SdParts) -> PromptWindow:
    """CLIP's window, 77 tokens with the two marks around a prompt."""
    tokenizer = load_tokenizer(parts)
    window = int(tokenizer.model_max_length)

    def lost(prompt: str) -> tuple[int, str]:
        ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
        rest = str(tokenizer.decode(ids[window - 1 : -1])).strip() if len(ids) > window else ""
        return len(ids), rest

    return PromptWindow(window, lost)


def _scheduler(config: dict[str, Any]) -> Any:
    import diffusers

    from sdlab.models.index import SCHEDULERS

    assert config["_class_name"] in SCHEDULERS
    plain = {k: v for k, v in config.items() if not k.startswith("_")}
    return getattr(diffusers, config["_class_name"]).from_config(plain)


def _feature_extractor(parts: SdParts) -> Any:
    if parts.safety_checker is None:
        return None
    from transformers import CLIPImageProcessorPil  # the variant that needs no torchvision

    known = (
        "size",
        "crop_size",
        "resample",
        "do_resize",
        "do_center_crop",
        "do_normalize",
        "image_mean",
        "image_std",
    )
    return CLIPImageProcessorPil(**{k: v for k, v in (parts.feature_extractor or {}).items() if k in known})
