"""What a UNet predicts is taken from what the file says, then from its weights, and the choice is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdlab.models.files import Header, Stored, read_header
from sdlab.models.prediction import Prediction, _spread, prediction_of, said, with_prediction

MARK = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
EMA_MARK = "model_ema.diffusion_modeloutput_blocks111transformer_blocks0norm1bias"
PATH = Path("second.safetensors")
V = {"prediction_type": "v_prediction"}


def header(
    spread: float | None = None, *, mark: str = MARK, metadata: Any = None, more: tuple[str, ...] = ()
) -> Header:
    """A file whose one bias has the population standard deviation `spread`."""
    tensors = {name: Stored(name, "F32", (0,), PATH) for name in more}
    if spread is not None:
        values = torch.tensor([spread, -spread] * 160).half()
        tensors[mark] = Stored(mark, "F16", (320,), PATH, nbytes=640, tensor=values)
    return Header(PATH, tensors, metadata or {})


@pytest.mark.parametrize(
    ("file", "kind", "told_by"),
    [
        (header(0.12), "v_prediction", "spread"),
        (header(0.12, mark=EMA_MARK), "v_prediction", "spread"),
        (header(0.05), "epsilon", "spread"),
        (header(0.12, metadata={"modelspec.prediction_type": "epsilon"}), "epsilon", "prediction_type says"),
        (
            header(0.12, metadata={"modelspec.architecture": "stable-diffusion-v2-512"}),
            "epsilon",
            "architecture",
        ),
        (
            header(0.05, metadata={"modelspec.architecture": "stable-diffusion-v2-768-v"}),
            "v_prediction",
            "architecture",
        ),
        (header(0.05, more=("v_pred",)), "v_prediction", "tensor 'v_pred'"),
        (header(), "v_prediction", ""),
    ],
)
def test_the_second_kind_is_told_by_what_it_states_then_by_its_weights(
    file: Header, kind: str, told_by: str
) -> None:
    found = prediction_of(file, V, openclip=True, channels=4)
    assert found.kind == kind and told_by in found.told_by and bool(found.told_by) == bool(told_by)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_spread_is_that_of_the_stored_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    values = (torch.randn(320, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.1).to(dtype)
    save_file({MARK: values}, tmp_path / "m.safetensors")
    stored = read_header(tmp_path / "m.safetensors").tensors[MARK]
    assert _spread(stored) == pytest.approx(values.double().std(unbiased=False).item(), rel=1e-12)


def test_the_first_kind_and_inpainting_models_predict_noise_unless_they_state_otherwise() -> None:
    assert prediction_of(header(0.12), {}, openclip=False, channels=4) == Prediction("epsilon")
    assert prediction_of(header(0.12), V, openclip=True, channels=9) == Prediction("epsilon")
    stated = header(metadata={"modelspec.prediction_type": "v"})
    assert prediction_of(stated, {}, openclip=False, channels=4).kind == "v_prediction"


def test_a_guess_comes_with_the_way_to_say_otherwise() -> None:
    guess = prediction_of(header(0.12), V, openclip=True, channels=4)
    line = said(guess, PATH)
    assert "v-prediction by the spread" in line
    assert line.endswith("sdlab convert --model-path second.safetensors --prediction-type epsilon")
    assert "convert" not in said(Prediction("epsilon", told_by="as it says"), PATH)
    assert said(Prediction("epsilon"), PATH) == ""


def test_zero_terminal_noise_goes_into_the_schedule() -> None:
    found = prediction_of(header(more=("v_pred", "ztsnr")), {}, openclip=False, channels=4)
    old = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1}
    assert with_prediction(old, found) == {
        "_class_name": "DDIMScheduler",  # PNDM would pass over it
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "steps_offset": 1,
    }
    assert with_prediction(old, Prediction("epsilon")) == old


def test_zero_terminal_noise_is_read_from_a_field_of_ours_too() -> None:
    def zero_snr(metadata: Any) -> bool:
        return prediction_of(header(metadata=metadata), {}, openclip=False, channels=4).zero_snr

    assert zero_snr({"modelspec.prediction_type": "v", "sdlab.zero_terminal_snr": "true"})
    assert not zero_snr({"modelspec.prediction_type": "v"})


def test_what_is_asked_for_goes_before_what_the_file_says() -> None:
    stated = header(0.05, metadata={"modelspec.prediction_type": "epsilon"}, more=("ztsnr",))
    found = prediction_of(stated, V, openclip=True, channels=4, asked="v_prediction")
    assert found == Prediction("v_prediction", True, "as --prediction-type says")
    assert said(found, PATH) == "v-prediction as --prediction-type says"
