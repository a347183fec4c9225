from __future__ import annotations

from pathlib import Path

import pytest

from sdlab.inference.engines.sd import Sampler
from tests.inference.engines.making import sampler_of


@pytest.fixture(scope="package")
def sampler(tiny_sd_folder: Path) -> Sampler:
    """Of a tiny Stable Diffusion model; treat it as read-only."""
    return sampler_of(tiny_sd_folder)


@pytest.fixture
def fresh_sampler(tiny_sd_folder: Path) -> Sampler:
    """One to be broken."""
    return sampler_of(tiny_sd_folder)
