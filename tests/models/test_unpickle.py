"""A pickle is opened by another process, which can be beaten up and lied to; here only a checked table arrives."""

from __future__ import annotations

import os
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdlab.errors import SdlabError
from sdlab.models import unpickle, unpickle_child
from sdlab.models.unpickle import read_pickle

STATE = {
    "single": torch.randn(3, 5),
    "half": torch.randn(7).half(),
    "brain": torch.randn(2, 2).bfloat16(),
    "count": torch.tensor(1 << 40),
    "bytes": torch.arange(200, dtype=torch.uint8),
    "flags": torch.tensor([True, False]),
    "turned": torch.randn(4, 6).T,
    "none": torch.zeros(0, 4),
}
STATE |= {"row": STATE["single"][1], "again": STATE["single"], "learned": torch.nn.Parameter(torch.randn(2))}  # type: ignore[dict-item]


def same(path: Path, state: dict[str, torch.Tensor]) -> None:
    header = read_pickle(path)
    assert list(header.tensors) == list(state)
    for name, tensor in state.items():
        read = header.tensors[name].read()
        assert read.dtype == tensor.dtype and torch.equal(read, tensor), name
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert b"".join(header.tensors[name].pieces()) == raw


@pytest.mark.parametrize("kind", ["zip", "before torch 1.6"])
def test_tensors_are_what_torch_saved(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.ckpt"
    beside = {"epoch": 3, "lr": np.float64(1e-4), "hooks": [1, ("a", None)], "state_dict": OrderedDict(STATE)}
    torch.save(beside, path, _use_new_zipfile_serialization=kind == "zip")
    same(path, STATE)
    header = read_pickle(path)
    in_place = {name for name, stored in header.tensors.items() if stored.path == path}
    assert in_place == (STATE.keys() - {"turned"} if kind == "zip" else set())
    assert all(stored.tensor is None for stored in header.tensors.values())


def test_what_lightning_leaves_in_a_checkpoint_is_never_imported(tmp_path: Path) -> None:
    """As the first checkpoints of Stable Diffusion have it: a class for a key."""
    path = tmp_path / "model.ckpt"
    name = b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n"
    repacked(path, {"state_dict": {"a": torch.ones(2)}, "callbacks": {"CLASS": {"best": 1}}}, b"CLASS", name)
    same(path, {"a": torch.ones(2)})


def repacked(path: Path, saved: Any, word: bytes, code: bytes) -> None:
    """Write `saved` with the pickled text `word` replaced by other pickle code."""
    torch.save(saved, path)
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    text = b"X" + struct.pack("<I", len(word)) + word
    with zipfile.ZipFile(path, "w") as file:
        for name, data in parts.items():
            file.writestr(name, data.replace(text, code) if name.endswith("data.pkl") else data)


def test_the_table_is_found_where_trainers_put_it() -> None:
    tensor = torch.ones(2)
    found = unpickle_child._state
    assert found({"state_dict": {"a": tensor}, "epoch": 3}) == {"a": tensor}
    assert found({"model": {"a": tensor}, "b": tensor}) == {"a": tensor}
    assert found({"string_to_param": {"*": tensor}, "step": 3}) == {"string_to_param.*": tensor}
    assert found({"epoch": 3}) == {}
    with pytest.raises(unpickle_child.Refused, match="no table"):
        found([tensor])
    with pytest.raises(unpickle_child.Refused, match="larger than what is stored"):
        found({"a": tensor[:1].expand(1 << 40)})
    for odd in (torch.ones(2).to_sparse(), torch.ones(2, dtype=torch.complex128), torch.ones(2) * 1j):
        with pytest.raises(unpickle_child.Refused, match="unusual kind"):
            found({"a": odd})


def test_a_file_is_opened_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Path] = []

    def answer(path: Path, copy: Path) -> bytes:
        started.append(path)
        return b'{"tensors": [["a", "F32", [1], false, 4, 4]]}'

    monkeypatch.setattr(unpickle, "_answer", answer)
    path = tmp_path / "model.ckpt"
    for num in (1, 2):
        path.write_bytes(b"PK\x03\x04" + bytes(4 * num))
        for _ in range(2):
            assert read_pickle(path).tensors["a"].read() == 0
    assert started == [path, path]


BAD_ENDS = {
    "no answer": ("pass", "no proper answer"),
    "nonsense": ("print('[1]')", "no proper answer"),
    "nested without end": ("print('[' * 100000)", "no proper answer"),
    "answer without end": (
        "import sys\nwhile True: sys.stdout.write('x' * 65536)",
        "too long, or too much memory",
    ),
    "crash": ("import os; os.abort()", "broke down with code -6"),
    "killed": ("import os; os.kill(os.getpid(), 9)", "too long, or too much memory"),
    "no type": ('print(\'{"tensors": [["a", "F7", [1], false, 0, 4]]}\')', "unknown type 'F7'"),
    "outside": ('print(\'{"tensors": [["a", "F32", [9], false, 0, 36]]}\')', "lies outside the file"),
    "before": ('print(\'{"tensors": [["a", "F32", [1], false, -4, 4]]}\')', "no proper range"),
    "too large": ('print(\'{"tensors": [["a", "F32", [9], false, 0, 4]]}\')', "does not fit its shape"),
    "bad name": ('print(\'{"tensors": [["a\\\\n", "F32", [1], false, 0, 4]]}\')', "impossible name"),
    "other row": ('print(\'{"tensors": [["a"]]}\')', "no proper answer"),
    "escape codes": ('print(\'{"fault": "\\\\u001b[2J \\\\n so"}\')', r"\(\?\[2J so\)"),
    "never": ("import time; time.sleep(60)", "took too long"),
}


@pytest.mark.parametrize("name", BAD_ENDS)
def test_a_child_that_lies_or_dies_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    script, said = BAD_ENDS[name]
    (tmp_path / "child.py").write_text(f"import sys; sys.stdin.read()\n{script}\n", encoding="utf-8")
    monkeypatch.setattr(unpickle_child, "__file__", str(tmp_path / "child.py"))
    monkeypatch.setattr(unpickle, "START_S", 0.2 if name == "never" else 20)
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(SdlabError, match=said) as raised:
        read_pickle(path)
    assert "\n" not in str(raised.value) and str(raised.value).isprintable()


def test_the_child_inherits_no_secrets_and_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(unpickle.tempfile, "tempdir", None)
    (tmp_path / "child.py").write_text(
        "import json, os\n"
        "words = 'inherited' if 'HF_TOKEN' in os.environ else 'clean', os.path.basename(os.getcwd())\n"
        "print(json.dumps({'fault': ' '.join(words)}))",
        encoding="utf-8",
    )
    monkeypatch.setattr(unpickle_child, "__file__", str(tmp_path / "child.py"))
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(SdlabError) as raised:
        read_pickle(path)
    assert "clean sdlab-pickle-" in str(raised.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["child.py", "model.ckpt"]
    assert os.environ["HF_TOKEN"] == "secret"


ESCAPING = """
import io, json, sys
asked = sys.stdin.read()
sys.stdin = io.StringIO(asked)
sys.path[:] = json.loads(asked)["sys_path"]
import os, socket, subprocess
import torch
from sdlab.models import unpickle_child

TRIED = {
    "append": lambda: open("mine.txt", "a"),
    "change": lambda: os.open("mine.txt", os.O_RDWR),
    "program": lambda: subprocess.run(["touch", "made"]),
    "shell": lambda: os.system("touch made"),
    "fork": lambda: os.fork(),
    "connection": lambda: socket.create_connection(("127.0.0.1", 9), timeout=1),
}

def load(*args, **options):
    said = []
    for name, attempt in TRIED.items():
        try:
            attempt()
            said.append(name + " went")
        except unpickle_child.Refused:
            said.append(name + " refused")
        except BaseException as reason:
            said.append(name + " " + type(reason).__name__)
    raise unpickle_child.Refused(", ".join(said))

torch.load = load
unpickle_child.main()
"""


@pytest.mark.skipif(os.name == "nt", reason="no fork there")
def test_code_that_got_into_the_child_writes_no_file_starts_no_program_and_connects_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of torch's unpickler, as if that had been talked into it."""
    (tmp_path / "child.py").write_text(ESCAPING, encoding="utf-8")
    monkeypatch.setattr(unpickle_child, "__file__", str(tmp_path / "child.py"))
    torch.save({"a": torch.ones(2)}, tmp_path / "model.ckpt")
    with pytest.raises(SdlabError) as raised:
        read_pickle(tmp_path / "model.ckpt")
    wanted = ("append", "change", "program", "shell", "fork", "connection")
    assert ", ".join(f"{name} refused" for name in wanted) in str(raised.value)


def bomb_of_hashes() -> bytes:
    """A key whose hash takes 2^60 steps: a tuple of twice the same tuple of twice the same tuple ..."""
    nested = b")" + b"q\x00h\x00\x86" * 60
    return b"\x80\x02}" + nested + b"K\x01s."


def zipped(path: Path, table: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", table)
        file.writestr("archive/version", b"3\n")
    return path


COSTLY = {
    "hashes": (bomb_of_hashes(), "too long"),
    "memory": (
        b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
        "more memory than such a file needs",
    ),
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_pickle_that_would_take_for_ever_is_stopped(tmp_path: Path, name: str) -> None:
    table, said = COSTLY[name]
    with pytest.raises(SdlabError, match=said):
        read_pickle(zipped(tmp_path / "model.ckpt", table))
