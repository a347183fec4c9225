"""Which files a model consists of, and their hashes."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from sdlab.inference import identity
from sdlab.inference.identity import Hasher


def old(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    os.utime(path, (time.time() - 100,) * 2)
    return path


def test_large_files_are_hashed_once_and_again_when_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "LARGE_BYTES", 1)
    path, hasher = old(tmp_path / "a", b"one"), Hasher(tmp_path / "cache")
    first = hasher.sha256(path)
    assert first == hashlib.sha256(b"one").hexdigest()
    table = json.loads((tmp_path / "cache" / "hashes.json").read_text())
    entry = table[os.path.realpath(path)]
    (tmp_path / "cache" / "hashes.json").write_text(
        json.dumps({os.path.realpath(path): [*entry[:3], "kept"]})
    )
    assert hasher.sha256(path) == "kept"
    old(tmp_path / "b", b"other")
    assert hasher.unknown_bytes(tmp_path, ["a", "b"]) == 5  # the known one need not be read
    old(path, b"two")  # same size
    assert hasher.sha256(path) == hashlib.sha256(b"two").hexdigest()


@pytest.mark.parametrize("damage", ["{", "[]", "[1", '{"a": 3}', ""])
def test_damaged_or_missing_cache_is_no_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(identity, "LARGE_BYTES", 1)
    path = old(tmp_path / "a", b"one")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "hashes.json").write_text(damage)
    (tmp_path / "file").write_text("in the way")
    for cache in (tmp_path / "cache", tmp_path / "none" / "deep", tmp_path / "file" / "below", None):
        assert Hasher(cache).sha256(path) == hashlib.sha256(b"one").hexdigest()


def test_files_of_a_folder_are_those_that_are_loaded(tiny_sd_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for path in tiny_sd_folder.rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(tiny_sd_folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    before = identity.model_files(folder)
    for name in (
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "loss.png",
    ):
        (folder / name).write_bytes(b"x")
    (folder / "samples").mkdir()
    (folder / "samples" / "a.json").write_text("{}")
    assert identity.model_files(folder) == before
    assert "unet/diffusion_pytorch_model.safetensors" in before and "model_index.json" in before
    assert "tokenizer/tokenizer.json" in before and "scheduler/scheduler_config.json" in before
    assert identity.swapped_files(folder, ("scheduler", "unet", "transformer")) == [
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    alone = ["config.json", "diffusion_pytorch_model.safetensors"]
    assert identity.swapped_files(folder, ("vae",)) == [f"vae/{name}" for name in alone]
    assert identity.swapped_files(folder / "unet", ("scheduler", "unet", "transformer")) == alone
    assert identity.swapped_files(folder / "vae" / "config.json", ("vae",)) == [""]
    assert identity.model_files(folder / "unet" / "config.json") == [""]


def test_one_file_goes_by_its_own_hash() -> None:
    assert identity.combined({"": "ab"}) == "ab"
    assert identity.combined({"a": "1", "b": "2"}) == identity.combined({"b": "2", "a": "1"})
    assert identity.combined({"a": "1", "b": "2"}) != identity.combined({"a": "2", "b": "1"})


def test_paths_are_kept_relative_and_found_again(tmp_path: Path) -> None:
    project = tmp_path / "home" / "project"
    (project / "tuned" / "mine").mkdir(parents=True)
    asked = identity.portable(project / "tuned" / "mine", base=project)
    assert asked == "tuned/mine"
    picture = project / "output" / "a.png"
    assert identity.found_again(asked, (tmp_path, *picture.parents)) == project / "tuned" / "mine"
    assert identity.found_again("tuned/other", (tmp_path, *picture.parents)) is None


def test_loras_are_known_by_what_stands_behind_their_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header, tensors = b'{"a":1}', b"tensors"
    digest = hashlib.sha256(tensors).hexdigest()
    path = old(tmp_path / "a.safetensors", len(header).to_bytes(8, "little") + header + tensors)
    noted = old(tmp_path / "b.safetensors", (len(header) + 1).to_bytes(8, "little") + header + b" " + tensors)
    hasher = Hasher(tmp_path / "cache")
    assert hasher.autov3(path) == hasher.autov3(noted) == digest
    assert hasher.sha256(path) != hasher.sha256(noted)
    for other in (b"", b"PK\3\4 a pickle of another kind", (10**9).to_bytes(8, "little") + b"{"):
        assert hasher.autov3(old(tmp_path / "c.pt", other)) == ""
    monkeypatch.setattr(identity, "LARGE_BYTES", 1)  # both hashes of a file are remembered, each as its own
    assert [hasher.autov3(path), hasher.sha256(path)] == [
        digest,
        hashlib.sha256(path.read_bytes()).hexdigest(),
    ]
    monkeypatch.setattr(identity, "_sha256_of_tensors", lambda path: pytest.fail("read again"))
    assert [hasher.autov3(path), hasher.sha256(path)] == [
        digest,
        hashlib.sha256(path.read_bytes()).hexdigest(),
    ]
