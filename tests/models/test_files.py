"""A model file is data: whatever it holds, it is read within limits or refused in one line that names it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdlab.errors import SdlabError
from sdlab.models.files import read_header, read_json, read_weights, write_safetensors
from sdlab.models.unpickle import read_pickle

ONE = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def packed(table: Any, data: bytes = bytes(8)) -> bytes:
    raw = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(**changes: Any) -> bytes:
    return packed({"a": {**ONE["a"], **changes}})


REFUSED = {
    "empty": (b"", "is empty"),
    "short": (b"{}", "too short"),
    "text": (b"hello, this is a model, honestly", "not a safetensors file"),
    "git lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
        "git lfs pull",
    ),
    "web page": (b"<!DOCTYPE html><html><body>login</body></html>", "web page"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(64), "GGUF"),
    "zip": (b"PK\x03\x04" + bytes(64), "is a pickle"),
    "pickle": (b"\x80\x02}q\x00." + bytes(64), "is a pickle"),
    "cut in the header": (packed(ONE)[:30], "cut short within its header"),
    "cut in the data": (packed(ONE, bytes(3)), "5 of 83 bytes are missing|cut short"),
    "bytes left over": (packed(ONE, bytes(9)), "1 bytes after"),
    "huge header": (struct.pack("<Q", 1 << 62) + b"{" + bytes(20), "cut short within its header"),
    "header starts with a space": (packed(b" " + json.dumps(ONE).encode()), "not a safetensors file"),
    "header is no JSON": (packed(b"{nonsense}"), "damaged header"),
    "header is nested without end": (packed(b'{"a":' * 100_000), "damaged header"),
    "name twice": (packed(b'{"a":1,"a":2}'), "damaged header"),
    "infinite number": (packed(b'{"a":Infinity}'), "damaged header"),
    "entry is a number": (packed({"a": 1}), "is not described"),
    "unknown type": (entry(dtype="F7"), "unknown type 'F7'"),
    "no type": (entry(dtype=None), "unknown type"),
    "negative size": (entry(shape=[-2]), "no proper shape"),
    "size is true": (entry(shape=[True, 2]), "no proper shape"),
    "shape is text": (entry(shape="2"), "no proper shape"),
    "nine dimensions": (entry(shape=[1] * 8 + [2]), "no proper shape"),
    "range backwards": (entry(data_offsets=[8, 0]), "does not fit its shape"),
    "range of one": (entry(data_offsets=[8]), "no proper range"),
    "range too small": (entry(data_offsets=[0, 4]), "does not fit its shape"),
    "gap": (entry(data_offsets=[8, 16]), "gap or overlap"),
    "overlap": (packed({**ONE, "b": ONE["a"]}), "gap or overlap"),
    "name of control characters": (packed({"a\x1b[2J": ONE["a"]}), "impossible name"),
    "name too long": (packed({"a" * 300: ONE["a"]}), "impossible name"),
    "too many tensors": (
        packed({str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_001)}, b""),
        "20,001 tensors",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_file_is_refused_in_one_line_that_names_it(tmp_path: Path, name: str) -> None:
    data, said = REFUSED[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(SdlabError, match=said) as raised:
        read_header(path)
    line = str(raised.value)
    assert line.startswith(str(path)) and "\n" not in line and len(line) < 300


@pytest.mark.parametrize("make", ["missing", "folder", "fifo"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, make: str) -> None:
    import os

    path = tmp_path / "model.safetensors"
    if make == "folder":
        path.mkdir()
    if make == "fifo":
        os.mkfifo(path)
    for read in (read_header, read_json):
        with pytest.raises(SdlabError, match=r"cannot be read|not a regular file"):
            read(path)


def test_a_header_of_640_bytes_is_not_taken_for_a_pickle(tmp_path: Path) -> None:
    """Its first two bytes are 0x80 0x02, as those of a pickle."""
    raw = json.dumps(ONE).encode().ljust(640)
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed(raw))
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert list(read_header(path).tensors) == ["a"]


def test_tensors_are_read_as_safetensors_reads_them(tmp_path: Path) -> None:
    given = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).half(),
        "c": torch.randn(2, 2, 2).bfloat16(),
        "scalar": torch.tensor(3.5),
        "none": torch.zeros(0, 4),
    }
    path = tmp_path / "x.safetensors"
    save_file(given, path, {"modelspec.title": "x"})
    header = read_header(path)
    assert header.metadata == {"modelspec.title": "x"}
    assert header.tensors.keys() == given.keys()
    for name, tensor in given.items():
        read = header.tensors[name].read()
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)
        assert (
            b"".join(header.tensors[name].pieces()) == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        )


def test_a_written_file_is_byte_for_byte_that_of_safetensors(tmp_path: Path) -> None:
    given = {"b": torch.randn(3), "a": torch.randn(5).half(), "c": torch.randn(2, 2).bfloat16()}
    save_file(given, tmp_path / "theirs.safetensors", {"format": "pt"})
    write_safetensors(tmp_path / "ours.safetensors", read_header(tmp_path / "theirs.safetensors").tensors)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_writing_never_replaces_a_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(FileExistsError):
        write_safetensors(tmp_path / "x.safetensors", {})


JSON_REFUSED = {
    "list": (b"[1]", "JSON object"),
    "nan": (b'{"a": NaN}', "NaN is not a number"),
    "broken": (b'{"a": ', "not valid JSON"),
    "latin-1": (b'{"a": "\xe4"}', "not valid JSON"),
    "nested without end": (b'{"a":' * 100_000, "not valid JSON"),
    "empty": (b"", "is empty"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
}


@pytest.mark.parametrize("name", JSON_REFUSED)
def test_a_bad_json_file_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    data, said = JSON_REFUSED[name]
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(SdlabError, match=said) as raised:
        read_json(tmp_path / "config.json")
    assert "\n" not in str(raised.value)


class Payload:
    """What a hostile pickle does when it is opened."""

    def __reduce__(self) -> Any:
        return (print, ("the payload ran",))


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".safetensors"])
def test_a_pickle_is_refused_by_content_unless_allowed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, path)
    with pytest.raises(SdlabError, match="--allow-pickle"):
        read_weights(path, allow_pickle=False)
    header = read_weights(path, allow_pickle=True)
    assert torch.equal(header.tensors["a"].read(), torch.ones(2))


@pytest.mark.parametrize("legacy", [True, False])
def test_a_hostile_pickle_is_never_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], legacy: bool
) -> None:
    path = tmp_path / "evil.ckpt"
    torch.save({"a": torch.ones(2), "x": Payload()}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(SdlabError, match="holds more than tensors") as raised:
        read_pickle(path)
    assert "the payload ran" not in capfd.readouterr().out
    assert "\n" not in str(raised.value) and "It was not run" in str(raised.value)


@pytest.mark.parametrize("damage", ["cut", "noise", "zip of nothing"])
def test_a_damaged_pickle_is_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"a": torch.ones(2000)}, path)
    data = path.read_bytes()
    path.write_bytes(
        {"cut": data[:3000], "noise": data[:200] + bytes(800), "zip of nothing": b"PK\x03\x04" * 9}[damage]
    )
    with pytest.raises(SdlabError, match=r"model\.ckpt: is a pickle"):
        read_pickle(path)
