"""``sdlab train-transformer`` and ``train-sd --init`` as a user runs them, on tiny models and configurations."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdlab.models.opening import open_family, recommended, recommended_from_scratch
from sdlab.models.resolve import newest_run, resolve
from tests.models.helpers import edit_json
from tests.program import sdlab

FILES = {"red_cat/a.png": (64, 64), "red_cat/b.png": (64, 64), "dog/c.png": (48, 96)}
UNET = {
    "_class_name": "UNet2DConditionModel", "sample_size": 8, "block_out_channels": [16, 16], "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 4, "norm_num_groups": 4,
}  # fmt: skip
TRANSFORMER = {
    "_class_name": "Flux2Transformer2DModel", "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2,
    "attention_head_dim": 16, "axes_dims_rope": [4, 4, 4, 4], "timestep_guidance_channels": 32,
    "guidance_embeds": False,
}  # fmt: skip
COMMANDS = {"sd": ("train-sd", "unet", UNET), "flux2": ("train-transformer", "transformer", TRANSFORMER)}


@pytest.fixture
def folder(pictures) -> Path:
    return pictures(FILES)


@pytest.fixture
def train(tiny_sd_folder, tiny_klein_folder, folder, tmp_path, monkeypatch):
    """``train("sd", "name")`` trains tuned/name from a tiny config.json, ``init=""`` from the model itself."""
    monkeypatch.setattr("sdlab.commands.train_sd.PREVIEW_STEPS", 1)
    monkeypatch.chdir(tmp_path)

    def run(family: str, name: str, *args: object, init: object = None) -> int:
        command, _, config = COMMANDS[family]
        mine = tmp_path / "tiny.json"
        mine.write_text(json.dumps(config))
        base = tiny_sd_folder if family == "sd" else tiny_klein_folder
        options = [
            "--images", folder, "--load-model", base, "--image-size", 64, "--batch", 2, "--steps", 4, "--lr", "1e-3",
            "--warmup", 0, "--save-every", 2, "--device", "cpu", "--preview-every", 0, "--preview-prompt", "dog",
        ]  # fmt: skip
        where = ["--save-model", tmp_path / "tuned" / name] if name else []
        chosen = mine if init is None else init
        return sdlab(command, *options, *where, *(["--init", chosen] if chosen else []), *args)

    return run


def digests(run: Path) -> dict[str, str]:
    """sha256 of what a run's seed determines: the last checkpoint's tensors, the result and the log."""
    newest = sorted((run / "checkpoints").iterdir())[-1]
    result = [p for part in ("unet", "transformer") for p in (run / part).glob("*.safetensors")]
    files = [*sorted(newest.glob("*.safetensors")), *result, run / "log.jsonl"]
    assert len(files) >= 4
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def record(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def start_of(run: Path, part: str) -> dict[str, torch.Tensor]:
    return load_file(run / part / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("family", ["sd", "flux2"])
def test_a_run_from_nothing_leaves_a_whole_pipeline_that_generate_takes(train, family, tmp_path, capsys):
    assert train(family, "") == 0
    run = tmp_path / "tuned" / f"{family}-tiny"  # by the name of the config.json
    part = COMMANDS[family][1]
    names = {p.name for p in run.iterdir()}
    assert names >= {"model_index.json", part, "vae", "text_encoder", "tokenizer", "scheduler", "run.json"}
    said = record(run)
    assert (said["state"], said["base"], said["family"]) == ("finished", f"{family}-tiny", family)
    assert said["config"]["init"] == str(tmp_path / "tiny.json") and said["config"]["ema"] is True
    assert f"its {'UNet' if family == 'sd' else 'transformer'} is a new one" in capsys.readouterr().err
    model = resolve("", training=False, tuned=tmp_path / "tuned")
    assert model.path == run
    advice = recommended(model)
    assert advice.prefix == "" and advice.image_size == 64
    assert (
        sdlab("generate", "--prompt", "dog", "--steps", 1, "--output", tmp_path / "out", "--device", "cpu")
        == 0
    )
    [picture] = (tmp_path / "out").glob("*.png")
    assert pixels(picture).shape == (64, 64, 3)


@pytest.mark.parametrize("family", ["sd", "flux2"])
def test_a_stopped_run_from_nothing_resumes_exactly(train, family, monkeypatch, tmp_path):
    from sdlab.training import loop

    extra = ["--dtype", "bf16", "--optimizer", "muon"]
    assert train(family, "straight", *extra) == 0
    calls = iter([0, signal.SIGTERM])
    monkeypatch.setattr(loop, "_agreed", lambda stop, accelerator: next(calls))
    assert train(family, "a", *extra) == 143
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert sdlab(COMMANDS[family][0], "--save-model", tmp_path / "tuned" / "a", "--resume") == 0
    assert digests(tmp_path / "tuned" / "a") == digests(tmp_path / "tuned" / "straight")


def test_the_seed_names_the_weights_it_starts_from(train, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert train("flux2", name, "--seed", seed, "--steps", 1, "--lr", "1e-12", "--no-ema") == 0
    one, two, three = (record(tmp_path / "tuned" / name)["start_weights"] for name in "abc")
    assert one == two != three


def test_without_init_all_weights_of_the_models_own_transformer_go_on(train, tiny_klein_folder, tmp_path):
    assert train("flux2", "a", "--lr", "1e-9", "--no-ema", "--steps", 1, init="") == 0
    mine, base = start_of(tmp_path / "tuned" / "a", "transformer"), start_of(tiny_klein_folder, "transformer")
    assert mine.keys() == base.keys() and all(torch.allclose(mine[n], base[n], atol=1e-6) for n in base)
    said = record(tmp_path / "tuned" / "a")
    assert said["command"] == "train-transformer" and "adapter" not in said["config"]
    assert said["adapter"] == {"kind": "full"} and said["objective"]["sampling"] == "logit-normal"


def test_from_nothing_noise_is_shifted_by_the_pictures_size_and_edits_are_learnt(train, folder, tmp_path):
    Image.new("RGB", (64, 64), "white").save(folder / "red_cat" / "a.ref.png")
    assert train("flux2", "a", "--steps", 1) == 0
    said = record(tmp_path / "tuned" / "a")
    assert said["objective"] == {"sampling": "logit-normal", "shift": None}
    assert said["dataset"]["with_references"] == 1


@pytest.mark.parametrize("family", ["sd", "flux2"])
def test_a_new_denoiser_fits_any_vae_and_text_encoder(
    train, family, tiny_sd2_folder, tiny_klein_folder, tmp_path
):
    """Another text encoder, 48 wide instead of 32, and a train-vae run of 6 latent channels instead of 4."""
    run = vae_run(tmp_path / "tuned" / "my-vae", family, channels=6)
    text = tmp_path / "text"
    if family == "sd":
        for name in ("text_encoder", "tokenizer"):
            shutil.copytree(tiny_sd2_folder / name, text / name)
    else:
        text = tiny_klein_folder
    assert train(family, "a", "--vae", "my-vae", "--text-encoder", text, "--steps", 1) == 0
    made = tmp_path / "tuned" / "a"
    net = json.loads((made / COMMANDS[family][1] / "config.json").read_text())
    if family == "sd":
        assert (net["in_channels"], net["out_channels"], net["cross_attention_dim"]) == (6, 6, 48)
        assert (made / "tokenizer" / "tokenizer_config.json").read_bytes() == (
            text / "tokenizer" / "tokenizer_config.json"
        ).read_bytes()
    else:
        assert (net["in_channels"], net["joint_attention_dim"]) == (24, 48)
    theirs = load_file(run / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(t, theirs[n]) for n, t in start_of(made, "vae").items())
    assert sdlab("generate", "--load-model", made, "--prompt", "dog", "--steps", 1, "--output", tmp_path / "o",
                 "--device", "cpu") == 0  # fmt: skip


def vae_run(folder: Path, family: str, *, channels: int = 4) -> Path:
    """What train-vae leaves: a vae/ folder and a record, no model_index.json."""
    from diffusers import AutoencoderKL, AutoencoderKLFlux2

    shape = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "latent_channels": channels}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = (
        AutoencoderKL(**shape, **kinds) if family == "sd" else AutoencoderKLFlux2(**shape, layers_per_block=1)
    )
    vae.save_pretrained(folder / "vae")
    about = {"command": "train-vae", "state": "finished", "ended": "2999-01-01T00:00:00+00:00"}
    (folder / "run.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize("family", ["sd", "flux2"])
def test_a_part_that_is_given_by_name_is_never_replaced(
    train, family, tiny_sd_folder, tiny_klein_folder, tmp_path, capsys
):
    """Names are looked up in tuned/, which no path beside the working directory tells of."""
    run = vae_run(tmp_path / "tuned" / "my-vae", family)
    shutil.copytree(tiny_sd_folder if family == "sd" else tiny_klein_folder, tmp_path / "tuned" / "words")
    before = sorted((tmp_path / "tuned").rglob("*"))
    assert train(family, "my-vae", "--vae", "my-vae", "--overwrite") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "would be replaced" in said and str(run) in said
    assert train(family, "words", "--text-encoder", "words", "--overwrite") == 2
    assert "would be replaced" in capsys.readouterr().err.splitlines()[-1]
    if family == "sd":
        assert train(family, "words", "--unet", "words", "--overwrite", init="") == 2
        assert "would be replaced" in capsys.readouterr().err.splitlines()[-1]
    assert sorted((tmp_path / "tuned").rglob("*")) == before


def test_a_known_size_is_no_folder_that_would_be_replaced(train, tmp_path, capsys):
    (tmp_path / "none").mkdir()
    assert train("sd", "", "--images", tmp_path / "none", "--save-model", "small", init="small") == 2
    assert "would be replaced" not in capsys.readouterr().err.splitlines()[-1]


def test_dropout_of_a_model_is_switched_off_and_that_is_said(train, tiny_sd_folder, tmp_path, capsys):
    """It would draw from torch's own generator, and a resumed run would see other numbers."""
    model = tmp_path / "model"
    shutil.copytree(tiny_sd_folder, model)
    for name, rate in (("a", 0.5), ("b", 0.0)):
        edit_json(model / "unet" / "config.json", dropout=rate)
        assert train("sd", name, "--load-model", model, "--steps", 2, init="") == 0
        assert ("dropout of 0.5 is off" in capsys.readouterr().err) == (rate > 0)
    one, two = (start_of(tmp_path / "tuned" / name, "unet") for name in "ab")
    assert all(torch.equal(t, two[n]) for n, t in one.items())


def test_a_train_vae_run_is_no_model_and_goes_to_vae(tiny_sd_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = vae_run(tmp_path / "tuned" / "my-vae", "sd")
    assert newest_run(tmp_path / "tuned") is None
    for asked in ("my-vae", "tuned/my-vae", run):
        assert sdlab("generate", "--load-model", asked, "--prompt", "x") == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert "is a VAE, a part of a model" in last and "--vae" in last
    common = [
        "--load-model",
        tiny_sd_folder,
        "--prompt",
        "x",
        "--steps",
        1,
        "--image-size",
        64,
        "--device",
        "cpu",
    ]
    own = sdlab("generate", *common, "--output", tmp_path / "0")
    by_name = sdlab("generate", *common, "--vae", "my-vae", "--output", tmp_path / "1", "--seed", 5)
    by_path = sdlab("generate", *common, "--vae", run, "--output", tmp_path / "2", "--seed", 5)
    assert (own, by_name, by_path) == (0, 0, 0)
    one, two = (next((tmp_path / n).glob("*.png")) for n in "12")
    assert np.array_equal(pixels(one), pixels(two))
    assert sdlab("generate", "--from", one, "--output", tmp_path / "3") == 0
    assert sdlab("check", tmp_path / "0", "--load-model", tiny_sd_folder, "--vae", "my-vae") in (
        0,
        3,
    )
    assert sdlab("convert", "--model-path", run, "--checkpoint-path", tmp_path / "vae.safetensors") == 0
    whole = tmp_path / "whole.safetensors"
    assert (
        sdlab("convert", "--model-path", tiny_sd_folder, "--checkpoint-path", whole, "--with-vae", run) == 0
    )
    key = "first_stage_model.decoder.conv_in.weight"
    mine = load_file(run / "vae" / "diffusion_pytorch_model.safetensors")["decoder.conv_in.weight"]
    assert torch.equal(load_file(whole)[key].float(), mine)


def test_a_train_vae_run_of_the_other_family_or_without_a_result_is_refused_in_one_line(
    train, tmp_path, capsys
):
    vae_run(tmp_path / "tuned" / "flow", "flux2")
    assert train("sd", "a", "--vae", "flow") == 2
    assert (
        "class is AutoencoderKLFlux2, the model needs AutoencoderKL"
        in capsys.readouterr().err.splitlines()[-1]
    )
    shutil.rmtree(tmp_path / "tuned" / "flow" / "vae")
    assert train("flux2", "a", "--vae", "flow") == 2
    assert "no finished VAE yet" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("family", "extra", "init", "said"),
    [
        ("sd", ["--adapter", "lora"], None, "Leave out --adapter lora"),
        ("sd", ["--unet", "x.safetensors"], None, "Give one of the two"),
        ("sd", ["--adapter", "lora", "--text-encoder", "x"], "", "saved without a text encoder"),
        ("sd", ["--adapter", "lora", "--optimizer", "muon"], "", "not for the thin ones of a LoRA"),
        ("sd", [], "smal", "did you mean 'small'?"),
        ("flux2", [], "huge", "is no size that we know"),
        ("flux2", ["--text-encoder", "tiny.json"], None, "no text encoder with its tokenizer"),
        ("flux2", ["--shift", "never"], None, "is no shift"),
    ],
)
def test_options_that_do_not_go_together_are_refused_in_one_line(
    train, family, extra, init, said, tmp_path, capsys
):
    assert train(family, "a", *extra, init=init) == 2
    lines = capsys.readouterr().err.splitlines()
    assert said in lines[-1] and len(lines) <= 2
    assert not (tmp_path / "tuned" / "a").exists()


@pytest.mark.parametrize(
    ("family", "entry", "mine", "theirs"),
    [("sd", "in_channels", 8, 4), ("sd", "cross_attention_dim", 768, 32), ("flux2", "in_channels", 128, 16),
     ("flux2", "joint_attention_dim", 7680, 48)],
)  # fmt: skip
def test_a_configuration_that_does_not_fit_says_both_numbers(
    train, family, entry, mine, theirs, tmp_path, capsys
):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({**COMMANDS[family][2], entry: mine}))
    assert train(family, "a", init=path) == 2
    assert f"{entry} is {mine} and must be {theirs}" in capsys.readouterr().err.splitlines()[-1]


def test_a_model_of_another_family_names_its_command(train, tiny_sd_folder, capsys):
    assert train("flux2", "a", "--load-model", tiny_sd_folder) == 2
    assert "not a model for train-transformer. Use sdlab train-sd" in capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_of_an_unfinished_run_from_nothing_says_what_it_is(train, monkeypatch, tmp_path, capsys):
    from sdlab.training import loop

    monkeypatch.setattr(loop, "_agreed", lambda stop, accelerator: signal.SIGTERM)
    assert train("sd", "a") == 143
    [step] = (tmp_path / "tuned" / "a" / "checkpoints").iterdir()
    assert sdlab("generate", "--load-model", step, "--prompt", "x") == 2
    assert "no finished model yet" in capsys.readouterr().err.splitlines()[-1]


def test_a_run_from_nothing_is_a_model_to_go_on_with(train, tmp_path):
    assert train("sd", "a") == 0
    made = tmp_path / "tuned" / "a"
    assert train("sd", "b", "--load-model", made, "--adapter", "lora", "--rank", 2, init="") == 0
    assert resolve(str(tmp_path / "tuned" / "b"), training=False).path == made


def test_settings_from_nothing_go_by_the_size(tiny_sd_folder, tiny_klein_folder, tmp_path):
    model = resolve(str(tiny_sd_folder), training=True)
    small, large = (recommended_from_scratch(model, init) for init in ("small", "sd"))
    assert (small.image_size, large.image_size) == (128, 512) and small.lr > large.lr and small.ema
    assert small.lr_schedule == "cosine" and small.warmup and small.timestep_range == (0, 1000)
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**UNET, "sample_size": 24}))
    assert recommended_from_scratch(model, str(path)).image_size == 192
    flow = recommended_from_scratch(resolve(str(tiny_klein_folder), training=True), "medium")
    assert (flow.shift, flow.guidance) == ("auto", 4.0)


def test_small_pictures_in_bf16_on_a_cpu_take_plain_attention(tiny_sd_folder):
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    from sdlab.training.adapt import load_trained
    from sdlab.training.config import TrainConfig

    family, cpu = open_family(resolve(str(tiny_sd_folder), training=True)), torch.device("cpu")

    def kinds(compute: torch.dtype, size: int, weights: str = "fp32") -> set[type]:
        config = TrainConfig(image_size=size, weights=weights)
        unet = load_trained(family, config, cpu, compute).denoiser
        return {type(processor) for processor in unet.attn_processors.values()}

    assert kinds(torch.bfloat16, 128) == kinds(torch.float32, 128, "bf16") == {AttnProcessor}
    assert kinds(torch.float32, 128) == kinds(torch.bfloat16, 512) == {AttnProcessor2_0}
