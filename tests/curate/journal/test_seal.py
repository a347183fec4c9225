"""The key that tells a user's own journals: made once, whole, for the user alone."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sdlab.curate.journal.seal import NO_SEAL, Seal
from sdlab.errors import SdlabError


def test_a_seal_fits_its_plan_and_no_other(tmp_path):
    seal, other = Seal(tmp_path / "a/b/journal.key"), Seal(tmp_path / "other.key")
    made = seal.of("plan")
    assert made == seal.of("plan") and seal.fits("plan", made)
    assert not seal.fits("plan 2", made) and not seal.fits("plan", "") and not seal.fits("plan", "\udcff")
    assert other.of("plan") != made and not other.fits("plan", made)
    assert NO_SEAL.of("plan") == "" and not NO_SEAL.fits("plan", "")


@pytest.mark.skipif(os.name == "nt", reason="there the folder is the user's")
def test_the_key_is_for_the_user_alone(tmp_path):
    path = tmp_path / "sdlab/journal.key"
    Seal(path).of("plan")
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o077 == 0
    assert len(path.read_bytes()) == 32
    assert [entry.name for entry in path.parent.iterdir()] == ["journal.key"]


def test_processes_that_start_together_have_one_key(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        seals = set(pool.map(lambda _: Seal(tmp_path / "journal.key").of("plan"), range(32)))
    assert len(seals) == 1


def test_a_damaged_key_is_named_and_not_replaced(tmp_path):
    path = tmp_path / "journal.key"
    path.write_bytes(b"short")
    for step in (lambda: Seal(path).of("plan"), lambda: Seal(path).fits("plan", "")):
        with pytest.raises(SdlabError, match="not a key"):
            step()
    assert path.read_bytes() == b"short"


def test_where_no_key_can_be_kept_it_goes_on_with_a_warning(tmp_path, capsys):
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    seal = Seal(Path(in_the_way) / "sdlab/journal.key")
    assert seal.of("plan") == "" and not seal.fits("plan", "")
    assert "cannot keep a key" in capsys.readouterr().err
