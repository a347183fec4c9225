"""What --load-model means: names, folders, files, hub ids and the defaults, each with its reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sdlab.errors import SdlabError
from sdlab.models import bases
from sdlab.models import resolve as resolve_module
from sdlab.models.opening import open_family, prompt_window, recommended
from sdlab.models.resolve import newest_run, resolve
from tests.models.helpers import copied, edit_json
from tests.models.hub import cached

HUB_ID = "stable-diffusion-v1-5/stable-diffusion-v1-5"


pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def mini(tiny_sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model stands in for the built-in one."""
    monkeypatch.setattr(bases, "builtin_folder", lambda name: tiny_sd_folder)
    monkeypatch.setattr(resolve_module, "builtin_folder", lambda name: tiny_sd_folder)
    return tiny_sd_folder


def run(source: Path, name: str, **about: Any) -> Path:
    folder = copied(source, Path("tuned") / name)
    (folder / "run.json").write_text(json.dumps({"state": "finished", "base": "mini-sd", **about}))
    return folder


def test_a_builtin_by_name(mini: Path) -> None:
    model = resolve("mini-sd", training=True)
    assert (model.name, model.kind, model.base, model.family, model.path) == (
        "mini-sd",
        "builtin",
        "mini-sd",
        "sd",
        mini,
    )
    assert resolve("Mini-SD", training=True).kind == "builtin"


def test_a_builtin_wins_over_a_run_of_its_name_and_says_so(mini: Path) -> None:
    run(mini, "mini-sd")
    by_name, by_path = resolve("mini-sd", training=True), resolve("tuned/mini-sd", training=True)
    assert by_name.kind == "builtin" and "tuned/mini-sd is a run of that name" in by_name.why
    assert by_path.kind == "run" and by_path.path == Path("tuned/mini-sd")


def test_a_run_by_its_name_has_the_base_it_was_trained_from(tiny_sd_folder: Path) -> None:
    run(tiny_sd_folder, "cats", base="sd15")
    model = resolve("cats", training=False)
    assert (model.name, model.kind, model.base) == ("cats", "run", "sd15")
    assert model.why == "cats: the run tuned/cats" and model.source == "cats"


@pytest.mark.parametrize("base", ["../../etc", "", 7, "a/b", "x" * 300])
def test_a_hostile_base_in_run_json_names_no_folder(tiny_sd_folder: Path, base: Any) -> None:
    run(tiny_sd_folder, "cats", base=base)
    assert resolve("cats", training=False).base in ("cats", "7")


def test_a_folder_and_its_base_by_shape(tiny_sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied(tiny_sd_folder, Path("my model (v2)"))
    model = resolve("./my model (v2)", training=True)
    assert (model.kind, model.name, model.base) == ("folder", "my-model-v2", "my-model-v2")
    assert resolve("my model (v2)", training=True).kind == "folder"
    monkeypatch.setattr(bases, "known_configs", lambda: {"sd15": tiny_sd_folder})
    assert resolve("./my model (v2)", training=True).base == "sd15"


def test_left_out_training_takes_the_builtin_without_a_card(mini: Path) -> None:
    run(mini, "cats", ended="2026-01-01T00:00:00Z")
    model = resolve("", training=True)
    assert (
        model.kind == "builtin" and "no --load-model was given" in model.why and "no CUDA card" in model.why
    )


def test_left_out_training_takes_sd15_with_a_card(
    tiny_sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cached(tiny_sd_folder, tmp_path / "hub", HUB_ID)
    model = resolve(" ", training=True)
    assert (model.name, model.kind) == ("sd15", "hub") and "CUDA card" in model.why


def test_left_out_generate_takes_the_newest_finished_run(mini: Path) -> None:
    run(mini, "old", ended="2026-01-02T00:00:00+00:00")
    run(mini, "newest", ended="2026-01-02T03:00:00+02:00")
    run(mini, "unfinished", ended="2026-03-01T00:00:00Z", state="stopped")
    run(mini, "nonsense", ended="yesterday")
    run(mini, "naive", ended="2026-01-01T23:59:59")
    run(mini, ".partial", ended="2026-09-01T00:00:00Z")
    (run(mini, "no-model", ended="2026-09-01T00:00:00Z") / "model_index.json").unlink()
    (run(mini, "torn") / "run.json").write_text("{")
    assert newest_run(Path("tuned")) == Path("tuned/newest")
    model = resolve("", training=False)
    assert model.kind == "run" and "tuned/newest: the newest finished run" in model.why


def test_left_out_generate_without_runs_takes_the_builtin(mini: Path) -> None:
    model = resolve("", training=False)
    assert model.kind == "builtin" and "no finished run in tuned/" in model.why


def test_a_cached_hub_model_loads_offline(tiny_sd_folder: Path, tmp_path: Path) -> None:
    folder = cached(tiny_sd_folder, tmp_path / "hub", HUB_ID)
    for asked in ("sd15", HUB_ID, f"{HUB_ID}@main"):
        model = resolve(asked, training=True)
        assert model.kind == "hub" and model.path.samefile(folder) and "from the local cache" in model.why
    assert resolve("sd15", training=True).name == "sd15"
    assert open_family(model).grid == 8


def test_a_half_downloaded_hub_model_is_not_taken(tiny_sd_folder: Path, tmp_path: Path) -> None:
    folder = cached(tiny_sd_folder, tmp_path / "hub", HUB_ID)
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(SdlabError, match="not in the local cache"):
        resolve("sd15", training=True)


@pytest.mark.parametrize("asked", ["sd15", "org/name", "org/name@v1.0"])
def test_a_hub_model_that_cannot_be_had_names_the_three_ways_on(asked: str) -> None:
    with pytest.raises(SdlabError) as raised:
        resolve(asked, training=True)
    line = str(raised.value)
    assert "\n" not in line
    for way in ("local folder", "single file", "built-in model (mini-sd, mini-flux2)"):
        assert way in line


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("mini-ds", "did you mean 'mini-sd'"),
        ("sd1.5", "did you mean 'sd15'"),
        ("catz", "did you mean 'cats'"),
        ("tuned/catz", "no such file or folder, did you mean 'tuned/cats'"),
        ("no.safetensors", "no such file or folder"),
        ("./no", "no such file or folder"),
        ("/no/such/folder/at/all", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("flux2-klein-4b", "not in the local cache"),
        ("flux2-klein", "did you mean 'flux2-klein-"),
        ("zzz", "known: sd15, flux2-klein-base-4b, .*mini-sd, mini-flux2, cats"),
        ("org/na me", "no such file or folder"),
        ("../cats", "no such file or folder"),
        ("org/..name..", "no such file or folder"),
        ("no\x00body", "no model of that name"),
    ],
)
def test_what_is_no_model_is_one_line_with_a_way_on(tiny_sd_folder: Path, asked: str, said: str) -> None:
    run(tiny_sd_folder, "cats")
    with pytest.raises(SdlabError, match=said) as raised:
        resolve(asked, training=True)
    assert "\n" not in str(raised.value)


def checkpoint_of(folder: Path, *files: str) -> Path:
    made = folder / "checkpoints" / "step-000500"
    made.mkdir(parents=True)
    for name in ("manifest.json", "weights.safetensors", *files):
        (made / name).write_bytes(b"{}")
    return made


def test_a_checkpoint_is_its_run_with_the_weights_of_then(tiny_sd_folder: Path) -> None:
    base = {"model": {"kind": "folder", "path": str(tiny_sd_folder)}, "config": {"vae": "other.safetensors"}}
    folder = run(tiny_sd_folder, "cats", **base)
    asked = checkpoint_of(folder, "ema.safetensors")
    model = resolve(str(asked), training=False)
    assert (model.name, model.path, model.vae) == ("cats-step-000500", folder.resolve(), "")
    assert model.unet == str(asked / "ema.safetensors")  # as in the run's result
    (asked / "ema.safetensors").unlink()
    assert resolve(str(asked), training=False).unet == str(asked / "weights.safetensors")
    (folder / "model_index.json").unlink()  # the run has not ended
    model = resolve(str(asked), training=False)
    assert (model.path, model.vae, model.base) == (tiny_sd_folder, "other.safetensors", "mini-sd")
    with pytest.raises(SdlabError, match=r"training checkpoint.*--resume"):
        resolve(str(asked), training=True)
    with pytest.raises(SdlabError, match=r"no whole model of its own.*weights\.safetensors"):
        open_family(resolve(str(tiny_sd_folder), training=False), unet=str(asked))


def test_a_checkpoint_of_a_lora_is_its_base_model_with_that_lora(tiny_sd_folder: Path) -> None:
    base = {"kind": "folder", "path": str(tiny_sd_folder)}
    folder = Path("tuned/cats")
    asked = checkpoint_of(folder)
    about = {"model": base, "base": "mini-sd", "adapter": {"kind": "lora", "scale": 1.0}}
    (folder / "run.json").write_text(json.dumps(about))
    model = resolve(str(asked), training=False)
    assert (model.path, model.lora, model.name) == (
        tiny_sd_folder,
        asked / "weights.safetensors",
        "cats-step-000500",
    )
    about["adapter"] = {"kind": "lora", "scale": 2.0}
    (folder / "run.json").write_text(json.dumps(about))
    with pytest.raises(SdlabError, match=r"counts 2.0 times.*--lora .*weights\.safetensors:2\.0"):
        resolve(str(asked), training=False)


def test_folders_that_are_something_else_are_named(tiny_sd_folder: Path) -> None:
    folder = run(tiny_sd_folder, "cats")
    (folder / "model_index.json").rename(folder / "index.json")
    with pytest.raises(SdlabError, match=r"no finished model yet.*--resume"):
        resolve("cats", training=True)
    (folder / "checkpoints" / "step-000500").mkdir(parents=True)
    with pytest.raises(SdlabError, match="not a whole checkpoint"):
        resolve("tuned/cats/checkpoints/step-000500", training=False)
    with pytest.raises(SdlabError, match="--unet"):
        resolve("tuned/cats/unet", training=True)
    Path("empty").mkdir()
    with pytest.raises(SdlabError, match=r"no model_index\.json"):
        resolve("empty", training=True)
    lora = Path("lora")
    lora.mkdir()
    (lora / "pytorch_lora_weights.safetensors").touch()
    with pytest.raises(SdlabError, match="is a LoRA"):
        resolve("lora", training=True)


def test_the_family_is_read_from_the_files_not_the_name(tiny_sd_folder: Path) -> None:
    folder = copied(tiny_sd_folder, Path("sd15-fine"))
    edit_json(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")
    with pytest.raises(SdlabError, match="is a StableDiffusionXLPipeline, which sdlab does not load"):
        resolve("./sd15-fine", training=True)


def test_recommended_settings_follow_the_base(mini: Path) -> None:
    assert recommended(resolve("mini-sd", training=True)).image_size == 128
    run(mini, "cats", base="sd15")
    sd15 = recommended(resolve("cats", training=True))
    assert (sd15.image_size, sd15.batch, sd15.epoch, sd15.lr, sd15.timestep_range) == (
        512,
        4,
        20,
        1e-4,
        (0, 700),
    )
    assert (sd15.steps, sd15.guidance) == (50, 7.0)
    assert sd15.prefix == "(masterpiece), best quality, best composition, "


def test_the_picture_size_of_an_unknown_model_is_read_from_it(tiny_sd_folder: Path) -> None:
    assert recommended(resolve(str(tiny_sd_folder), training=True)).image_size == 64


def test_resolving_imports_no_model_library(tiny_sd_folder: Path) -> None:
    code = (
        "import sys; from sdlab.models.opening import recommended; from sdlab.models.resolve import resolve;"
        f"recommended(resolve({str(tiny_sd_folder)!r}, training=True));"
        "print([m for m in ('torch', 'numpy', 'diffusers', 'transformers', 'safetensors') if m in sys.modules])"
    )
    source = Path(bases.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(source)},
    )
    assert done.stdout.strip() == "[]"


def lora_run(name: str, base: dict[str, Any], /, **about: Any) -> Path:
    """A finished run that has trained a LoRA on `base`, its run.json's "model"."""
    folder = Path("tuned") / name
    folder.mkdir(parents=True)
    (folder / "pytorch_lora_weights.safetensors").touch()
    said = {"state": "finished", "adapter": {"kind": "lora", "rank": 4}, "model": base, **about}
    (folder / "run.json").write_text(json.dumps(said))
    return folder


def test_a_loras_run_is_its_base_model_with_the_lora(mini: Path) -> None:
    folder = lora_run("stars", {"name": "mini-sd", "kind": "builtin", "source": ""}, base="mini-sd")
    model = resolve("stars", training=False)
    assert (model.name, model.kind, model.path, model.base) == ("stars", "builtin", mini, "mini-sd")
    assert model.lora == folder / "pytorch_lora_weights.safetensors"
    assert model.why == "stars: the run tuned/stars, a LoRA on mini-sd: the built-in model"
    assert resolve("tuned/stars", training=False).lora == model.lora and open_family(model).grid == 8


def test_a_loras_run_on_a_run_or_folder_is_followed_by_its_absolute_path(mini: Path) -> None:
    cats = run(mini, "cats", base="sd15").resolve()
    lora_run("stars", {"name": "cats", "kind": "run", "source": "cats", "path": str(cats)})
    model = resolve("stars", training=False)
    assert (model.path, model.base, model.kind) == (cats, "sd15", "run") and model.lora is not None
    lora_run("more", {"name": "stars", "kind": "run", "path": str(Path("tuned/stars").resolve())})
    with pytest.raises(SdlabError, match="LoRA on top of another one"):
        resolve("more", training=False)


def test_a_loras_run_remembers_which_unet_and_vae_it_was_trained_on(mini: Path, tiny_sd: Any) -> None:
    other = tiny_sd("other", seed=1)
    config = {"unet": str(other), "vae": f"{other}/vae", "epoch": 3}
    lora_run("stars", {"name": "mini-sd", "kind": "builtin"}, config=config)
    model = resolve("stars", training=False)
    assert (model.unet, model.vae) == (str(other), f"{other}/vae")
    family: Any = open_family(model)
    assert family.parts.unet.where == other / "unet" and family.parts.vae.where == other / "vae"
    family = open_family(model, unet=str(mini))
    assert family.parts.unet.where == mini / "unet"


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ({"kind": "folder", "path": "/no/such/model"}, "its base model is not at /no/such/model any more"),
        ({"kind": "folder"}, "does not say of which model"),
        ({}, "does not say of which model"),
        ({"kind": "builtin", "name": "mini-ds"}, "did you mean 'mini-sd'"),
    ],
)
def test_a_lora_without_its_base_says_what_to_give(mini: Path, base: dict[str, Any], said: str) -> None:
    lora_run("stars", base)
    with pytest.raises(SdlabError, match=said) as raised:
        resolve("stars", training=False)
    assert "\n" not in str(raised.value)


def test_loras_runs_that_lie_on_each_other_end(mini: Path) -> None:
    for name, base in (("a", "b"), ("b", "a")):
        lora_run(name, {"kind": "run", "path": str(Path("tuned", base).resolve())})
    with pytest.raises(SdlabError, match="more than we follow"):
        resolve("a", training=False)


def test_the_newest_run_may_be_a_lora(mini: Path) -> None:
    run(mini, "old", ended="2026-01-01T00:00:00Z")
    lora_run("stars", {"kind": "builtin", "name": "mini-sd"}, ended="2026-01-02T00:00:00Z")
    lora_run("half", {"kind": "builtin", "name": "mini-sd"}, ended="2026-01-03T00:00:00Z", state="running")
    empty = lora_run("empty", {"kind": "builtin", "name": "mini-sd"}, ended="2026-01-04T00:00:00Z")
    (empty / "pytorch_lora_weights.safetensors").unlink()
    assert newest_run(Path("tuned")) == Path("tuned/stars")
    model = resolve("", training=False)
    assert model.lora is not None and "newest finished run" in model.why


def test_flux2_is_told_by_its_files(tiny_klein_folder: Path, tiny_dev_folder: Path) -> None:
    for folder, kind in ((tiny_klein_folder, "klein"), (tiny_dev_folder, "dev")):
        model = resolve(str(folder), training=True)
        assert (model.family, model.kind, model.base) == ("flux2", "folder", f"tiny-{kind}")
        family: Any = open_family(model)
        assert family.grid == 16 and family.parts.kind == kind


def test_known_flux2_models_are_told_by_their_shapes() -> None:
    def told(*shape: int, distilled: bool = False) -> str:
        return bases.flux2_base_of(
            dict(zip(bases.FLUX2_SIGNATURE, shape, strict=True)), distilled, "my model"
        )

    assert told(5, 20, 24, 7680) == "flux2-klein-base-4b"
    assert told(5, 20, 24, 7680, distilled=True) == "flux2-klein-4b"
    assert told(8, 24, 32, 12288, distilled=True) == "flux2-klein-9b"
    assert told(8, 48, 48, 15360) == "flux2-dev"
    assert told(5, 20, 24, 12288) == "my-model"


def test_the_default_of_a_flux2_command_is_flux2(
    tiny_klein_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolve_module, "builtin_folder", lambda name: tiny_klein_folder)
    model = resolve("", training=True, family="flux2")
    assert (model.name, model.family, model.kind) == ("mini-flux2", "flux2", "builtin")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    folder = cached(tiny_klein_folder, tmp_path / "hub", "black-forest-labs/FLUX.2-klein-base-4B")
    model = resolve("", training=True, family="flux2")
    assert (model.name, model.family, model.kind) == ("flux2-klein-base-4b", "flux2", "hub")
    (folder / "text_encoder/model.safetensors").unlink()
    with pytest.raises(SdlabError, match="not in the local cache"):
        resolve("", training=True, family="flux2")


def test_a_half_downloaded_shard_is_missed(tiny_klein_folder: Path, tmp_path: Path) -> None:
    folder = cached(tiny_klein_folder, tmp_path / "hub", "org/flux")
    assert resolve("org/flux", training=True).kind == "hub"
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "text_encoder/model.safetensors").rename(folder / "text_encoder" / places["a"])
    (folder / "text_encoder/model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(SdlabError, match="not in the local cache"):
        resolve("org/flux", training=True)


def test_recommended_settings_of_flux2(tiny_flux2: Any) -> None:
    small = recommended(resolve(str(tiny_flux2("small")), training=True))
    assert (small.image_size, small.optimizer, small.weights, small.guidance) == (64, "adamw", "fp32", 4.0)
    distilled = recommended(resolve(str(tiny_flux2("fast", is_distilled=True)), training=True))
    assert (distilled.guidance, distilled.steps) == (1.0, 4)
    large = bases.recommended_for("flux2-klein-base-9b", 1024, like="flux2-klein-base-4b")
    assert (large.image_size, large.guidance, large.steps, large.weights) == (1024, 4.0, 15, "bf16")
    assert large.fused_backward and large.grad_checkpointing
    lora = bases.recommended_for("flux2-dev", 1024, adapter="lora")
    assert (lora.optimizer, lora.fused_backward, lora.lr) == ("adamw", False, 1e-4)
    assert recommended(resolve(str(tiny_flux2("small2")), training=True), "lora").lr == 2e-3


def test_the_window_of_a_prompt_is_told_for_either_family(
    tiny_sd_folder: Path, tiny_klein_folder: Path
) -> None:
    clip = prompt_window(resolve(str(tiny_sd_folder), training=True))
    assert clip.window == 77 and clip.lost("ab") == (4, "")
    assert clip.lost("x" * 75 + " yz") == (79, "yz") or clip.lost("x" * 75 + " yz")[1].endswith("yz")
    qwen = prompt_window(resolve(str(tiny_klein_folder), training=True))
    count, lost = qwen.lost("x" * 60 + " tail")
    assert qwen.window == 48 and count > 48 and lost.endswith("tail")


def test_resolving_flux2_imports_no_model_library(tiny_klein_folder: Path) -> None:
    code = (
        "import sys; from sdlab.models.opening import recommended; from sdlab.models.resolve import resolve;"
        f"recommended(resolve({str(tiny_klein_folder)!r}, training=True));"
        "print([m for m in ('torch', 'numpy', 'diffusers', 'transformers', 'safetensors') if m in sys.modules])"
    )
    source = Path(bases.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(source)},
    )
    assert done.stdout.strip() == "[]"
