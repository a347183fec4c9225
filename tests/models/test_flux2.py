"""FLUX.2 klein and dev: what is cached, what is trained and what is drawn are diffusers' own numbers."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from PIL import Image
from torch import Tensor, nn

from sdlab.errors import SdlabError
from sdlab.keyed import Draws
from sdlab.models import flux2 as flux2_module
from sdlab.models.base import Batch
from sdlab.models.bases import FlowObjective
from sdlab.models.flux2 import Flux2
from sdlab.models.flux2_folder import read_flux2_folder
from tests.models.helpers import copied, edit_json, edit_tensors

CPU, F32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
KINDS = ["klein", "dev"]
PROMPTS = ["red star, blue background", ""]


@pytest.fixture
def folder(request: pytest.FixtureRequest, tiny_klein_folder: Path, tiny_dev_folder: Path) -> Path:
    return {"klein": tiny_klein_folder, "dev": tiny_dev_folder}[request.param]


def family_of(folder: Path, **objective: Any) -> Flux2:
    return Flux2(read_flux2_folder(folder), objective=FlowObjective(**objective))


def theirs_of(folder: Path) -> Any:
    """diffusers' pipeline of the folder, nothing of ours in it."""
    kind = Flux2KleinPipeline if "klein" in folder.name else Flux2Pipeline
    pipeline = kind.from_pretrained(folder, dtype=F32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def window_of(folder: Path) -> int:
    return 48 if "klein" in folder.name else 224


def pixels(batch: int, height: int, width: int) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(7)) * 2 - 1


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch_of(family: Flux2, num: int, *, references: int = 2) -> Batch:
    """`num` samples of random latents, with references of two other sizes."""
    length, width = 9, family.parts.transformer.config["joint_attention_dim"]
    cond = {"prompt_embeds": random(num, length, width, seed=1)}
    sizes = [(3, 4), (5, 2)][:references]
    cond |= {f"reference_{i}": random(num, 16, *size, seed=2 + i) for i, size in enumerate(sizes)}
    return Batch(random(num, 16, 4, 6), cond, torch.ones(num), tuple(f"sample {i}" for i in range(num)))


def rows(batch: Batch, *picked: int) -> Batch:
    index = list(picked)
    cond = {name: tensor[index] for name, tensor in batch.cond.items()}
    ids = tuple(batch.ids[i] for i in index)
    return Batch(batch.latents_BCHW[index], cond, batch.weight_B[index], ids)


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_cached_latents_are_diffusers_own(folder: Path) -> None:
    pixels_B3HW = pixels(2, 64, 96)
    with family_of(folder).load_encoders(CPU, BF16) as encoders:
        mine = encoders.encode_pictures(pixels_B3HW)
        alone = encoders.encode_pictures(pixels_B3HW[1:])
    wanted = theirs_of(folder)._encode_vae_image(pixels_B3HW, None)
    assert mine.dtype == F32 and mine.shape == (2, 16, 4, 6)
    assert torch.allclose(mine, wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(mine[1:], alone)


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_cached_prompts_are_diffusers_own(folder: Path) -> None:
    """Template, padding side, mask and layers, against the whole text encoder as transformers loads it."""
    with family_of(folder).load_encoders(CPU, F32) as encoders:
        mine = encoders.encode_prompts(PROMPTS)
    theirs = theirs_of(folder)
    for prompt, cond in zip(PROMPTS, mine, strict=True):
        wanted, _ = theirs.encode_prompt(prompt, max_sequence_length=window_of(folder))
        assert list(cond) == ["prompt_embeds"] and cond["prompt_embeds"].shape == (window_of(folder), 48)
        assert torch.allclose(cond["prompt_embeds"], wanted[0], atol=1e-6)
    assert not torch.equal(mine[0]["prompt_embeds"], mine[1]["prompt_embeds"])


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_prompts_come_in_the_type_that_was_asked_for(folder: Path) -> None:
    with family_of(folder).load_encoders(CPU, BF16) as encoders:
        assert encoders.encode_prompts(["a"])[0]["prompt_embeds"].dtype == BF16
        assert encoders.encode_pictures(pixels(1, 64, 64)).dtype == F32


def test_only_the_layers_that_are_read_are_loaded(tiny_flux2: Any) -> None:
    """What lies behind them may even be broken: it is not looked at."""
    folder = tiny_flux2("tiny-klein", extra_layers=8)

    def break_the_rest(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if any(f"layers.{layer}." in name for layer in range(28, 36)) or "lm_head" in name:
                tensors[name] = torch.full_like(tensors[name], torch.nan)

    family = family_of(folder)
    assert family.parts.text_encoder.config["num_hidden_layers"] == 28
    with family.load_encoders(CPU, F32) as encoders:
        before = encoders.encode_prompts(["a"])[0]["prompt_embeds"]
        assert len(encoders._loaded.layers) == 28 and not hasattr(encoders._loaded, "lm_head")
    edit_tensors(folder / "text_encoder/model.safetensors", break_the_rest)
    with family_of(folder).load_encoders(CPU, F32) as encoders:
        assert torch.equal(encoders.encode_prompts(["a"])[0]["prompt_embeds"], before)


def test_the_encoders_are_never_in_memory_together_and_gone_at_the_end(
    tiny_klein_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[nn.Module]] = []

    def watched(*args: Any) -> nn.Module:
        gc.collect()
        assert not [ref for ref in alive if ref() is not None], "one is loaded while another is there"
        module = real(*args)
        alive.append(weakref.ref(module))
        return module

    real = flux2_module.load
    monkeypatch.setattr(flux2_module, "load", watched)
    with family_of(tiny_klein_folder).load_encoders(CPU, F32) as encoders:
        encoders.encode_pictures(pixels(1, 64, 64))
        encoders.encode_prompts(["a", "b"])
        encoders.encode_prompts(["c"])
        encoders.encode_pictures(pixels(1, 64, 64))
    gc.collect()
    assert len(alive) == 3 and not [ref for ref in alive if ref() is not None]


class Recorder(nn.Module):
    """Stands where a transformer stands, answers with `answer`, and keeps what it was asked."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.answer, self.asked = answer, {}

    def forward(self, **asked: Any) -> tuple[Tensor]:
        self.asked = asked
        return (self.answer(asked),)


@pytest.mark.parametrize("folder", KINDS, indirect=True)
@pytest.mark.parametrize("references", [0, 1, 2])
def test_the_loss_is_the_one_spelled_out_with_diffusers_helpers(folder: Path, references: int) -> None:
    family = family_of(folder)
    transformer = family.load_denoiser(CPU, F32)
    batch, rng = batch_of(family, 3, references=references), Draws(5, 11)
    with torch.no_grad():
        mine = family.loss(transformer, batch, rng)

    noise = rng.normal("noise", batch.ids, (16, 4, 6))
    normal = rng.normal("sigma", batch.ids, ())
    mu = 0.5 + (1.15 - 0.5) * (24 - 256) / (4096 - 256)
    sigma = torch.sigmoid(normal) * np.exp(mu) / (1 + (np.exp(mu) - 1) * torch.sigmoid(normal))
    noisy = (1 - sigma.view(-1, 1, 1, 1)) * batch.latents_BCHW + sigma.view(-1, 1, 1, 1) * noise
    theirs = Flux2KleinPipeline
    extra = [batch.cond[f"reference_{i}"] for i in range(references)]
    ids = [theirs._prepare_latent_ids(noisy)[0]]
    ids += [theirs._prepare_image_ids([t[:1] for t in extra])[0]] if extra else []
    with torch.no_grad():
        output = transformer(
            hidden_states=torch.cat([theirs._pack_latents(t) for t in (noisy, *extra)], dim=1),
            encoder_hidden_states=batch.cond["prompt_embeds"],
            timestep=sigma,
            guidance=torch.ones(3) if folder.name == "tiny-dev" else None,
            img_ids=torch.cat(ids),
            txt_ids=theirs._prepare_text_ids(batch.cond["prompt_embeds"])[0],
            return_dict=False,
        )[0]
    wanted = (output[:, :24] - theirs._pack_latents(noise - batch.latents_BCHW)).square().mean(dim=(1, 2))
    assert mine.shape == (3,) and torch.allclose(mine, wanted, atol=1e-6)


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_a_batch_of_four_with_references_is_the_mean_of_four_singles(folder: Path) -> None:
    family = family_of(folder)
    transformer = family.load_denoiser(CPU, F32)
    batch, rng = batch_of(family, 4), Draws(0, 3)
    with torch.no_grad():
        together = family.loss(transformer, batch, rng)
        singles = torch.cat([family.loss(transformer, rows(batch, i), rng) for i in range(4)])
        turned = family.loss(transformer, rows(batch, 3, 1), rng)
    assert abs(together.mean() - singles.mean()) < 1e-5
    assert torch.allclose(together, singles, atol=1e-5) and torch.allclose(turned, singles[[3, 1]], atol=1e-5)
    assert len({round(x, 4) for x in together.tolist()}) == 4


def test_references_are_clean_apart_from_each_other_and_in_order(tiny_klein_folder: Path) -> None:
    family = family_of(tiny_klein_folder)
    recorder = Recorder(lambda asked: torch.zeros_like(asked["hidden_states"]))
    batch = batch_of(family, 2)
    family.loss(recorder, batch, Draws(0, 0))
    tokens = recorder.asked["hidden_states"]
    for i, (start, stop) in enumerate([(24, 36), (36, 46)]):
        reference = batch.cond[f"reference_{i}"]
        assert torch.equal(tokens[:, start:stop], reference.flatten(2).transpose(1, 2))
        assert set(recorder.asked["img_ids"][start:stop, 0].tolist()) == {10 * (i + 1)}
    assert tokens.shape[1] == 46 and recorder.asked["guidance"] is None


def test_a_transformer_that_knows_the_picture_has_no_loss(tiny_klein_folder: Path) -> None:
    """From x_s and s alone it can only answer (x_s - x0) / s: that must be what we ask for. References do not count."""
    family = family_of(tiny_klein_folder)
    batch = batch_of(family, 3)
    x0_BNC = batch.latents_BCHW.flatten(2).transpose(1, 2)

    def answer(asked: dict[str, Tensor]) -> Tensor:
        tokens, sigma = asked["hidden_states"], asked["timestep"].view(-1, 1, 1)
        velocity = (tokens[:, :24] - x0_BNC) / sigma
        return torch.cat([velocity, torch.full_like(tokens[:, 24:], 9.0)], dim=1)

    recorder = Recorder(answer)
    assert family.loss(recorder, batch, Draws(0, 0)).max() < 1e-9
    assert (recorder.asked["timestep"] > 0).all() and (recorder.asked["timestep"] < 1).all()


def test_dev_is_trained_at_guidance_one(tiny_dev_folder: Path) -> None:
    recorder = Recorder(lambda asked: torch.zeros_like(asked["hidden_states"]))
    family = family_of(tiny_dev_folder)
    family.loss(recorder, batch_of(family, 2), Draws(0, 0))
    assert recorder.asked["guidance"].tolist() == [1.0, 1.0]


def sigmas(family: Flux2, num: int = 4000, height: int = 4, width: int = 6) -> Tensor:
    recorder = Recorder(lambda asked: torch.zeros_like(asked["hidden_states"]))
    ids = tuple(str(i) for i in range(num))
    cond = {"prompt_embeds": torch.zeros(num, 1, 48)}
    family.loss(recorder, Batch(torch.zeros(num, 1, height, width), cond, torch.ones(num), ids), Draws(1, 1))
    return recorder.asked["timestep"]


def test_noise_levels_are_drawn_as_asked(tiny_klein_folder: Path) -> None:
    plain = sigmas(family_of(tiny_klein_folder, shift=1.0))
    logit = torch.logit(plain.double())
    assert abs(logit.mean()) < 0.06 and abs(logit.std() - 1) < 0.05
    uniform = sigmas(family_of(tiny_klein_folder, sampling="uniform", shift=1.0))
    assert abs(uniform.mean() - 0.5) < 0.02 and abs(uniform.std() - 12**-0.5) < 0.01
    assert 0 < uniform.min() and uniform.max() < 1
    fixed = sigmas(family_of(tiny_klein_folder, sampling="uniform", shift=3.0))
    assert torch.allclose(fixed, 3 * uniform / (1 + 2 * uniform), atol=1e-6)
    auto = sigmas(family_of(tiny_klein_folder))
    shift = np.exp(0.5 + 0.65 * (24 - 256) / 3840)
    assert torch.allclose(auto, shift * plain / (1 + (shift - 1) * plain), atol=1e-6)


@pytest.mark.parametrize(
    "objective", [{"sampling": "weighted"}, {"shift": 0.0}, {"shift": -1.0}, {"shift": 1e9}]
)
def test_an_objective_that_makes_no_sense_is_one_line(
    tiny_klein_folder: Path, objective: dict[str, Any]
) -> None:
    with pytest.raises(SdlabError, match="--shift"):
        family_of(tiny_klein_folder, **objective)


def test_the_denoiser_is_fresh_memory_in_the_asked_type(tiny_klein_folder: Path) -> None:
    family = family_of(tiny_klein_folder)
    transformer = family.load_denoiser(CPU, BF16)
    assert {p.dtype for p in transformer.parameters()} == {BF16}
    assert all(p.requires_grad and p.data_ptr() % 64 == 0 for p in transformer.parameters())
    batch, rng = batch_of(family, 1), Draws(0, 0)
    assert torch.equal(
        family.loss(transformer, batch, rng), family.loss(family.load_denoiser(CPU, BF16), batch, rng)
    )
    family.loss(transformer, batch, rng).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in transformer.parameters())


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_pictures_are_those_of_diffusers_pipeline(folder: Path) -> None:
    family = family_of(folder)
    mine, theirs = family.pipeline(family.load_denoiser(CPU, F32)), theirs_of(folder)
    reference = Image.effect_noise((64, 80), 90).convert("RGB")
    settings: dict[str, Any] = {"height": 64, "width": 96, "num_inference_steps": 3, "guidance_scale": 3.0}
    for image in (None, [reference], [reference, reference.rotate(90, expand=True)]):
        drawn = [
            pipeline(
                prompt=PROMPTS[0], image=image, generator=torch.Generator().manual_seed(3), output_type="np",
                max_sequence_length=window_of(folder), **settings,
            ).images[0]
            for pipeline in (mine, theirs)
        ]  # fmt: skip
        assert drawn[0].shape == (64, 96, 3)
        assert np.abs(drawn[0] - drawn[1]).max() < 1e-4
    plain = mine(
        prompt=PROMPTS[0], generator=torch.Generator().manual_seed(3), output_type="np", **settings
    ).images[0]
    edited = mine(
        prompt=PROMPTS[0],
        image=[reference],
        generator=torch.Generator().manual_seed(3),
        output_type="np",
        **settings,
    ).images[0]
    assert np.abs(plain - edited).max() > 1e-3


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_prompts_that_were_encoded_before_draw_the_same_without_a_text_encoder(folder: Path) -> None:
    family = family_of(folder)
    transformer = family.load_denoiser(CPU, F32)
    with family.load_encoders(CPU, F32) as encoders:
        conds = dict(zip(PROMPTS, encoders.encode_prompts(PROMPTS), strict=True))
    whole, lean = family.pipeline(transformer), family.pipeline(transformer, conds)
    assert lean.text_encoder is None
    settings: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 4.0}
    drawn = [
        np.asarray(p(prompt=PROMPTS[0], generator=torch.Generator().manual_seed(0), **settings).images[0])
        for p in (whole, lean)
    ]
    assert np.array_equal(*drawn)
    with pytest.raises(KeyError):
        lean(prompt="another", **settings)


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_a_bf16_model_draws_with_its_vae_in_float32(folder: Path) -> None:
    family = family_of(folder)
    pipeline = family.pipeline(family.load_denoiser(CPU, BF16))
    assert {p.dtype for p in pipeline.vae.parameters()} == {F32}
    assert {p.dtype for p in pipeline.text_encoder.parameters()} == {BF16}
    reference = Image.new("RGB", (64, 64), (200, 30, 30))
    for image in (None, [reference]):
        drawn = pipeline(
            prompt="a",
            image=image,
            height=64,
            width=64,
            num_inference_steps=2,
            guidance_scale=4.0,
            output_type="np",
        ).images[0]
        assert np.isfinite(drawn).all() and drawn.std() > 0


def test_distilled_klein_draws_without_guidance(tiny_flux2: Any) -> None:
    family = family_of(tiny_flux2("tiny-klein", is_distilled=True))
    assert family.parts.is_distilled
    pipeline = family.pipeline(family.load_denoiser(CPU, F32))
    settings: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "np"}
    one, four = (
        pipeline(prompt="a", guidance_scale=g, generator=torch.Generator().manual_seed(0), **settings).images[
            0
        ]
        for g in (1.0, 4.0)
    )
    assert np.array_equal(one, four)


def test_the_fingerprint_follows_what_the_cache_holds(tiny_klein_folder: Path, tmp_path: Path) -> None:
    print_of = family_of(tiny_klein_folder).fingerprint
    changes = {
        "vae": lambda f: edit_tensors(
            f / "vae/diffusion_pytorch_model.safetensors", lambda t: t["bn.running_mean"].add_(0.1)
        ),
        "text": lambda f: edit_tensors(
            f / "text_encoder/model.safetensors", lambda t: t["model.layers.3.mlp.up_proj.weight"].add_(0.1)
        ),
        "template": lambda f: (f / "tokenizer/chat_template.jinja").write_text(
            (f / "tokenizer/chat_template.jinja").read_text() + "\n"
        ),
        "window": lambda f: edit_json(f / "tokenizer/tokenizer_config.json", model_max_length=40),
        "epsilon": lambda f: edit_json(f / "vae/config.json", batch_norm_eps=0.1),
    }
    seen = {print_of}
    for name, change in changes.items():
        folder = copied(tiny_klein_folder, tmp_path / name)
        change(folder)
        seen.add(family_of(folder).fingerprint)
    assert len(seen) == 6
    other = copied(tiny_klein_folder, tmp_path / "other")
    edit_tensors(
        other / "transformer/diffusion_pytorch_model.safetensors", lambda t: t["proj_out.weight"].add_(1)
    )
    edit_tensors(
        other / "text_encoder/model.safetensors", lambda t: t["model.layers.28.mlp.up_proj.weight"].add_(1)
    )
    assert family_of(other).fingerprint == print_of
