"""LoRAs by name: where they are found, and what is said where they are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdlab.errors import SdlabError
from sdlab.inference.shelf import LoraShelf
from sdlab.models.runs import LORA_FILE


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def run(folder: Path, kind: str = "lora") -> Path:
    put(folder / LORA_FILE)
    (folder / "run.json").write_text(json.dumps({"adapter": {"kind": kind}}))
    return folder / LORA_FILE


@pytest.fixture
def loras(tmp_path: Path) -> Path:
    (tmp_path / "loras").mkdir()
    (tmp_path / "tuned").mkdir()
    return tmp_path / "loras"


def shelf(loras: Path) -> LoraShelf:
    return LoraShelf([loras], loras.parent / "tuned")


def test_a_file_is_found_in_or_below_a_folder(loras):
    ink, style = put(loras / "ink.safetensors"), put(loras / "styles" / "deep" / "Water.1.safetensors")
    for name, path in [
        ("ink", ink),
        ("INK", ink),
        ("ink.safetensors", ink),
        ("Water.1", style),
        ("water.1", style),
        ("styles/deep/Water.1", style),
        ("styles\\deep\\Water.1", style),
    ]:
        assert shelf(loras).find(name) == path
    for name in ("deep/Water.1", "../loras/ink", "", "."):
        with pytest.raises(SdlabError, match="there is no such LoRA"):
            shelf(loras).find(name)


def test_runs_and_files_in_tuned_are_found(loras):
    tuned = loras.parent / "tuned"
    mine, file = run(tuned / "mine"), put(tuned / "other.safetensors")
    assert shelf(loras).find("mine") == mine and shelf(loras).find("other") == file
    assert LoraShelf([], tuned).find("mine") == mine
    assert LoraShelf([loras], tuned / "none").find  # no tuned/ yet
    run(tuned / "whole", kind="full")
    put(tuned / "whole" / "model_index.json")
    with pytest.raises(SdlabError, match=r"whole is a whole model.*--load-model"):
        shelf(loras).find("whole")


def test_upper_and_lower_case_count_where_both_are_there(loras):
    small, large = put(loras / "ink.safetensors"), put(loras / "Ink.safetensors")
    assert shelf(loras).find("ink") == small and shelf(loras).find("Ink") == large
    with pytest.raises(SdlabError, match="two LoRAs are called so"):
        shelf(loras).find("INK")


def test_two_of_one_name_are_both_named(loras):
    first, second = put(loras / "a" / "ink.safetensors"), put(loras / "b" / "ink.safetensors")
    with pytest.raises(SdlabError, match="<lora:ink>: two LoRAs") as refused:
        shelf(loras).find("ink")
    assert str(first) in str(refused.value) and str(second) in str(refused.value)
    assert shelf(loras).find("b/ink") == second
    run(loras.parent / "tuned" / "only")
    put(loras / "only.safetensors")
    with pytest.raises(SdlabError, match="two LoRAs"):
        shelf(loras).find("only")


def test_one_file_by_two_ways_is_one(loras):
    path = put(loras / "a" / "ink.safetensors")
    link = loras.parent / "link"
    link.symlink_to(loras / "a", target_is_directory=True)
    assert LoraShelf([loras, link], loras.parent / "tuned").find("ink") == path


def test_what_is_hidden_or_no_safetensors_is_not_found(loras):
    for name in (".hidden/ink", "__old/ink", ".ink"):
        put(loras / f"{name}.safetensors")
    put(loras / "ink.pt")
    (loras / "ink.safetensors").mkdir()
    with pytest.raises(SdlabError, match="there is no such LoRA"):
        shelf(loras).find("ink")


def test_a_missing_lora_is_told_with_the_nearest_and_where_was_looked(loras):
    put(loras / "inkwash.safetensors")
    put(loras / "inkwell.safetensors")
    with pytest.raises(SdlabError) as refused:
        shelf(loras).find("inkwas")
    said = str(refused.value)
    assert "inkwash, inkwell" in said and str(loras) in said and "tuned" in said and "--lora-dir" in said
    assert "\n" not in said and refused.value.exit_code == 2
    with pytest.raises(SdlabError, match=r"--lora-dir .*: is no folder"):
        LoraShelf([loras / "none"], loras.parent / "tuned")
