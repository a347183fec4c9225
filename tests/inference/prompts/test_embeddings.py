"""Textual inversions of all makes, told apart from what is none, and found by name in prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdlab.errors import SdlabError
from sdlab.inference.prompts.embeddings import Embedding, named_in, on_the_shelf, read_embedding
from sdlab.inference.prompts.names import Names
from sdlab.models.bases import builtin_folder

VECTORS = torch.arange(6, dtype=torch.float32).reshape(2, 3) / 8


def read(path: Path) -> Embedding:
    return read_embedding(path, width=3, allow_pickle=True)


def safetensors(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, tmp_path / "inkwash.safetensors")
    return tmp_path / "inkwash.safetensors"


def pickled(tmp_path: Path, holds: Any) -> Path:
    torch.save(holds, tmp_path / "inkwash.pt")
    return tmp_path / "inkwash.pt"


A1111_PT = {
    "string_to_token": {"*": 265},
    "string_to_param": {"*": VECTORS},
    "name": "inkwash",
    "step": 500,
    "sd_checkpoint": None,
}


@pytest.mark.parametrize("key", ["emb_params", "<inkwash>"])
def test_safetensors_of_every_make_are_read(tmp_path: Path, key: str) -> None:
    path = safetensors(tmp_path, {key: VECTORS.half()})
    made = read(path)
    assert (made.name, made.path) == ("inkwash", path)
    assert made.vectors_ND.dtype == torch.float32
    assert torch.equal(made.vectors_ND, VECTORS)


def test_a_pickle_of_a1111_is_read_where_allowed(tmp_path: Path) -> None:
    path = pickled(tmp_path, A1111_PT)
    assert torch.equal(read(path).vectors_ND, VECTORS)
    with pytest.raises(SdlabError, match="allow-pickle"):
        read_embedding(path, width=3, allow_pickle=False)


def test_one_vector_may_stand_without_its_row(tmp_path: Path) -> None:
    assert read(safetensors(tmp_path, {"<x>": VECTORS[0].clone()})).vectors_ND.shape == (1, 3)


def test_a_pickle_that_runs_something_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (print, ("run",))

    with pytest.raises(SdlabError, match="holds more than tensors"):
        read(pickled(tmp_path, {"string_to_param": Evil()}))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}, "for SDXL"),
        ({"emb_params": torch.ones(2, 768)}, r"1.x \(width 768\); this model's prompts are 3 wide"),
        ({"emb_params": torch.ones(2, 1024)}, r"for Stable Diffusion 2.x"),
        ({"emb_params": torch.ones(2, 5)}, r"for another model \(width 5\)"),
        ({"a": torch.ones(2, 3), "b": torch.ones(2, 3)}, "it has 2 tensors"),
        ({"a": torch.ones(2, 3, 3)}, r"a is F32 of shape \[2, 3, 3\]"),
        ({"a": torch.ones(0, 3)}, "is no textual inversion"),
        ({"a": torch.ones(2, 3, dtype=torch.int32)}, "a is I32"),
        ({"a": torch.full((2, 3), float("nan"))}, "not finite"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_on_one_line_that_says_why(
    tmp_path: Path, tensors: dict[str, torch.Tensor], said: str
) -> None:
    path = safetensors(tmp_path, tensors)
    with pytest.raises(SdlabError, match=said) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_shelf_has_files_and_those_in_folders_by_name_sorted(tmp_path: Path) -> None:
    names = [
        "b/glow.pt",
        "b/deep/bad-hands.safetensors",
        "b/glow.safetensors",
        "b/.hidden.pt",
        "b/notes.txt",
        "a.pt",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = on_the_shelf([tmp_path / "b", tmp_path / "a.pt"])
    assert list(found) == ["a", "bad-hands", "glow"]
    assert found["glow"] == tmp_path / "b/glow.safetensors"


@pytest.mark.parametrize(("name", "said"), [("none.pt", "no such file"), ("notes.txt", "is none of")])
def test_a_path_that_is_no_embedding_is_refused(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(SdlabError, match=said):
        on_the_shelf([tmp_path / name])


@pytest.mark.parametrize(
    ("text", "used"),
    [
        ("a glow", ["glow"]),
        ("GLOW, (Glow:1.2)", ["glow"]),
        ("embedding:glow.", ["glow"]),
        ("(embedding:bad-hands.pt:1.2)", ["bad-hands"]),
        ("glowing aglow glow-worm", []),
        ("bad hands, bad", ["bad"]),
        ("bad-hands", ["bad-hands"]),
        (r"foo \(v2\)", ["foo (v2)"]),
        ("", []),
    ],
)
def test_a_name_is_used_as_a_whole_word_in_any_case(text: str, used: list[str]) -> None:
    assert named_in([text], ["glow", "bad", "bad-hands", "foo (v2)"]) == used


def test_letters_that_have_odd_other_cases_are_found_too() -> None:
    names = Names(["ink", "straße"])
    assert [found.name for found in names.find("\u0131nk STRASSE \u212a straße \u0130nk")] == [
        "ink",
        "straße",
        "ink",
    ]
    assert list(Names([]).find("ink")) == []


def test_one_for_the_built_in_model_is_called_so(tmp_path: Path) -> None:
    config = json.loads((builtin_folder("mini-sd") / "text_encoder" / "config.json").read_text())
    path = safetensors(tmp_path, {"a": torch.ones(1, config["hidden_size"])})
    with pytest.raises(SdlabError, match="for mini-sd"):
        read(path)
