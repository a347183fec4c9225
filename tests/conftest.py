"""Shared by all tests: one thread, no network, and factories for tiny models and pictures."""

from __future__ import annotations

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
STATE = tempfile.TemporaryDirectory(
    prefix="sdlab-state-"
)  # the user's own holds a key that tests must not make
os.environ["XDG_STATE_HOME"] = os.environ["LOCALAPPDATA"] = STATE.name

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # two busy threads on two busy cores can be ten times slower, and digits change

from sdlab.models.quiet import hush
from tests import factories

hush()


@pytest.fixture(scope="session")
def tiny_sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Stable Diffusion folder, made once; treat it as read-only."""
    return factories.tiny_sd(tmp_path_factory.mktemp("tiny") / "tiny-sd")


@pytest.fixture(scope="session")
def tiny_sd2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model of the Stable Diffusion 2.x kind, made once; treat it as read-only."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-sd2"
    return factories.tiny_sd(folder, second=True, prediction_type="v_prediction")


@pytest.fixture(scope="session")
def tiny_klein_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random FLUX.2 klein folder, made once; treat it as read-only."""
    return factories.tiny_flux2(tmp_path_factory.mktemp("tiny") / "tiny-klein")


@pytest.fixture(scope="session")
def tiny_dev_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random FLUX.2 dev folder, made once; treat it as read-only."""
    return factories.tiny_flux2(tmp_path_factory.mktemp("tiny") / "tiny-dev", kind="dev")


@pytest.fixture(scope="session")
def tiny_blip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BLIP folder, made once; treat it as read-only."""
    return factories.tiny_blip(tmp_path_factory.mktemp("tiny") / "tiny-blip")


@pytest.fixture
def tiny_flux2(tmp_path: Path) -> Callable[..., Path]:
    """A factory of tiny random FLUX.2 folders below tmp_path."""
    return lambda name="tiny-flux2", **settings: factories.tiny_flux2(tmp_path / name, **settings)


@pytest.fixture
def tiny_sd(tmp_path: Path) -> Callable[..., Path]:
    """A factory of tiny random Stable Diffusion folders below tmp_path."""
    return lambda name="tiny-sd", **settings: factories.tiny_sd(tmp_path / name, **settings)


@pytest.fixture
def pictures(tmp_path: Path) -> Callable[..., Path]:
    """A factory of folders of small coloured pictures: ``pictures({"girl/a.png": (64, 48)})``, sizes (h, w)."""
    return lambda files, name="images": factories.pictures(tmp_path / name, files)
