"""What a written file says of the model is true of it, and comes back when it is read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from sdlab.convert import metadata
from sdlab.convert.wanted import Wanted, gathered
from sdlab.errors import SdlabError
from sdlab.models.bases import builtin_folder
from sdlab.models.files import Header, read_header
from sdlab.models.opening import open_family
from sdlab.models.parts import Part
from sdlab.models.pieces import Pieces, read_pieces
from sdlab.models.resolve import resolve
from sdlab.models.sniff import states_distilled
from tests.models.helpers import VAE, edit_tensors
from tests.program import sdlab

ARCHITECTURE, PREDICTION = "modelspec.architecture", "modelspec.prediction_type"


def pieces(*networks: str, own: Any = MappingProxyType({}), **changed: Any) -> Pieces:
    """Pieces with networks of no tensors; of the UNet, `channels` are what it reads."""
    channels = changed.pop("channels", 4)
    parts = {name: Part(name, "", {"in_channels": channels}, {}, Path()) for name in networks}
    made = Pieces("sd", "sd1", "sd15", parts, None, None, None, None, "file", Path(), own)
    return replace(made, **changed)


def fields(found: Pieces) -> dict[str, str]:
    return metadata.of_model(found, title="my-base-mix", merged=[])


@pytest.mark.parametrize(
    ("base", "is_distilled", "said"),
    [
        ("flux2-klein-base-4b", False, "flux-2-klein-base-4b"),
        ("flux2-klein-9b", True, "flux-2-klein-9b"),
        ("flux2-klein-base-4b", None, "flux-2-klein"),
        ("mini-flux2", False, "flux-2-klein"),
    ],
)
def test_klein_is_called_base_or_distilled_only_where_that_is_known(
    base: str, is_distilled: bool | None, said: str
) -> None:
    found = pieces("transformer", family="flux2", kind="flux2-klein", base=base, is_distilled=is_distilled)
    written = fields(found)
    assert written[ARCHITECTURE] == said
    again = states_distilled(Header(Path("x"), {}, written))
    assert again is (is_distilled if base in ("flux2-klein-base-4b", "flux2-klein-9b") else None)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (pieces("transformer", family="flux2", kind="flux2-dev", base="flux2-dev"), "flux-2-dev"),
        (pieces("vae", family="flux2", kind="flux2-klein", base="flux2-klein-base-4b"), "flux-2/vae"),
        (pieces("vae"), "stable-diffusion-v1/vae"),
        (pieces("unet", "vae", channels=9), "stable-diffusion-v1-inpainting"),
        (pieces("unet", kind="sd2"), "stable-diffusion-v2-512"),
    ],
)
def test_the_architecture_is_that_of_what_is_written(found: Pieces, said: str) -> None:
    assert fields(found)[ARCHITECTURE] == said


def test_a_lora_and_its_model_are_named_alike() -> None:
    assert metadata.of_lora("flux2-klein", {}, title="x")[ARCHITECTURE] == "flux-2-klein/lora"
    assert metadata.of_lora("sd1", {}, title="x")[ARCHITECTURE] == "stable-diffusion-v1/lora"


def test_a_vae_does_not_say_what_its_unet_predicted() -> None:
    own = {PREDICTION: "v", "sdlab.zero_terminal_snr": "true", "note": "kept"}
    alone = fields(pieces("vae", own=own))
    assert PREDICTION not in alone and "sdlab.zero_terminal_snr" not in alone and alone["note"] == "kept"
    assert fields(pieces("unet", own=own))[PREDICTION] == "v"


def test_zero_terminal_noise_comes_through_files_and_folders(tmp_path: Path) -> None:
    first, second, folder, third = (
        tmp_path / n for n in ("a.safetensors", "b.safetensors", "folder", "c.safetensors")
    )
    assert sdlab("convert", "--model-path", "mini-sd", "--checkpoint-path", first) == 0
    assert "sdlab.zero_terminal_snr" not in read_header(first).metadata
    edit_tensors(first, lambda t: t.update({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}))
    for source, target in ((first, second), (second, folder), (folder, third)):
        assert sdlab("convert", "--model-path", source, "--checkpoint-path", target) == 0
    for file in (second, third):
        said = read_header(file).metadata
        assert (said[PREDICTION], said["sdlab.zero_terminal_snr"]) == ("v", "true")
        scheduler = read_pieces(file).scheduler
        assert scheduler is not None and scheduler["rescale_betas_zero_snr"] is True
    written = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    assert written["rescale_betas_zero_snr"] is True and written["prediction_type"] == "v_prediction"


def test_mini_flux2_stays_undistilled_as_a_file(tmp_path: Path) -> None:
    file = tmp_path / "klein-distilled.safetensors"
    assert sdlab("convert", "--model-path", "mini-flux2", "--checkpoint-path", file) == 0
    whole: Any = open_family(resolve(str(file), training=False))
    swapped: Any = open_family(resolve("mini-flux2", training=False), unet=str(file))
    assert whole.parts.is_distilled is False and swapped.parts.is_distilled is False


def test_a_vae_of_another_form_is_not_put_in(tiny_sd_folder: Path, tmp_path: Path) -> None:
    other, mini = tiny_sd_folder / "vae", builtin_folder("mini-sd")
    whole, bare = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert sdlab("convert", "--model-path", mini, "--checkpoint-path", whole) == 0
    assert sdlab("convert", "--model-path", mini, "--no-vae", "--checkpoint-path", bare) == 0
    for source in (mini, whole, bare):
        with pytest.raises(SdlabError, match=r"channels with 4 latent ones; this model's is") as raised:
            gathered(source, Wanted(vae=other))
        assert str(raised.value).startswith(str(other)) and "\n" not in str(raised.value)
        assert "vae" in gathered(source, Wanted(vae=mini / VAE)).networks
    with pytest.raises(SdlabError, match="--with-vae takes no names"):
        gathered(mini, Wanted(vae=Path("mini-sd")))


def test_a_distilled_model_takes_the_vae_of_its_size(
    tiny_klein_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = pieces(
        "transformer", family="flux2", kind="flux2-klein", base="flux2-klein-4b", is_distilled=True
    )
    monkeypatch.setattr(
        "sdlab.convert.wanted.read_pieces",
        lambda path, **_: found if path == Path("klein") else read_pieces(path),
    )
    with pytest.raises(SdlabError, match=r"this model's is an AutoencoderKLFlux2 of 128-256-512-512"):
        gathered(Path("klein"), Wanted(vae=tiny_klein_folder / "vae"))


def test_a_lora_for_a_vae_alone_is_refused_in_clear_words() -> None:
    with pytest.raises(SdlabError, match="nothing that a LoRA changes is to be written"):
        gathered(builtin_folder("mini-sd"), Wanted(only="vae", loras=[(Path("x.safetensors"), 1.0)]))
