"""The .ckpt: what torch.save would have written, without the memory for it."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from pathlib import Path

import pytest
import torch

from sdlab.convert import ckpt, stream
from sdlab.convert.stream import Written
from sdlab.errors import SdlabError
from tests.convert.test_stream import MORE_THAN_A_PIECE, changing, drawn, outputs

TENSORS = {
    "long": drawn(MORE_THAN_A_PIECE),
    "b.half": drawn(3, 5, 2, dtype=torch.float16),
    "a.brain": drawn(7, dtype=torch.bfloat16),
    "whole": torch.arange(4),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "one": torch.tensor(2.5),
    "none": torch.zeros(0, 3),
}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where the file goes; the sources lie elsewhere."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "x.ckpt"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Written]:
    """The file of TENSORS."""
    folder = tmp_path_factory.mktemp("made")
    return folder / "x.ckpt", ckpt.write(folder / "x.ckpt", outputs(folder, TENSORS))


@pytest.fixture
def not_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process, which imports torch, reads the file: that is tried often enough."""
    monkeypatch.setattr(ckpt, "_compare", lambda *args: None)


def state(path: Path) -> dict[str, torch.Tensor]:
    loaded = torch.load(path, weights_only=True)
    assert list(loaded) == ["state_dict"]
    return loaded["state_dict"]


def test_torch_loads_every_tensor_bit_by_bit(made: tuple[Path, Written]) -> None:
    path, written = made
    again = state(path)
    assert again.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(again[name], tensor) and again[name].dtype == tensor.dtype, name
        assert again[name].stride() == tensor.stride()
    assert written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (written.num_tensors, written.num_bytes) == (len(TENSORS), path.stat().st_size)
    assert written.data_sha256 == ""


def test_a_cast_is_torchs_own(tmp_path: Path, target: Path) -> None:
    ckpt.write(target, outputs(tmp_path, {"long": TENSORS["long"]}, "F16"))
    assert torch.equal(state(target)["long"], TENSORS["long"].half())


def test_the_pickle_in_it_is_the_one_that_torch_writes(made: tuple[Path, Written]) -> None:
    theirs = io.BytesIO()
    torch.save({"state_dict": {name: TENSORS[name] for name in sorted(TENSORS)}}, theirs)
    with zipfile.ZipFile(theirs) as one, zipfile.ZipFile(made[0]) as other:
        assert one.read("archive/data.pkl") == other.read("archive/data.pkl")
        records = {i.filename: one.read(i) for i in one.infolist() if "/data/" in i.filename}
        assert records == {i.filename: other.read(i) for i in other.infolist() if "/data/" in i.filename}
        assert other.testzip() is None


@pytest.mark.usefixtures("not_read_back")
@pytest.mark.parametrize("big", [1 << 31, 1000])
def test_tensors_are_aligned_so_that_they_can_be_mapped(
    big: int, tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ckpt, "_BIG_BYTES", big)  # and so the fields for records of more than 2 GB are tried
    ckpt.write(target, outputs(tmp_path, TENSORS))
    mapped = torch.load(target, weights_only=True, mmap=True)["state_dict"]
    for name, tensor in TENSORS.items():
        assert torch.equal(mapped[name], tensor)
        assert not tensor.numel() or mapped[name].data_ptr() % 64 == 0, name


@pytest.mark.usefixtures("not_read_back")
def test_equal_input_gives_equal_bytes(made: tuple[Path, Written], tmp_path: Path, target: Path) -> None:
    ckpt.write(target, outputs(tmp_path, TENSORS)[::-1])
    assert target.read_bytes() == made[0].read_bytes()


def test_a_file_that_reads_back_otherwise_is_not_kept(target: Path) -> None:
    with pytest.raises(SdlabError, match="differs from the model in tensor x"):
        ckpt.write(target, [changing(b"abcd", b"abce")])
    assert not list(target.parent.iterdir())


def test_what_is_not_finite_or_does_not_fit_is_refused(tmp_path: Path, target: Path) -> None:
    for value, words in ((float("nan"), "not finite"), (1e6, "does not fit F16")):
        with pytest.raises(SdlabError, match=words):
            ckpt.write(target, outputs(tmp_path, {"x": torch.tensor([1.0, value])}, "F16"))
        assert not list(target.parent.iterdir())


def test_a_part_of_nothing_but_zeros_is_refused(tmp_path: Path, target: Path) -> None:
    made = {"model.diffusion_model.a": drawn(3, 3), "first_stage_model.b": torch.zeros(3, 3)}
    with pytest.raises(SdlabError, match="1 of the 1 weights of the VAE hold nothing but zeros"):
        ckpt.write(target, outputs(tmp_path, made))
    assert not list(target.parent.iterdir())


@pytest.mark.usefixtures("not_read_back")
def test_a_lock_that_moves_the_place_in_the_file_makes_no_gap(
    made: tuple[Path, Written], tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        stream, "hold", lambda handle: bool(os.lseek(handle, 1 << 20, os.SEEK_SET))
    )  # Windows'
    ckpt.write(target, outputs(tmp_path, TENSORS))
    assert target.read_bytes() == made[0].read_bytes()


@pytest.mark.usefixtures("not_read_back")
def test_a_file_that_is_there_is_not_replaced(tmp_path: Path, target: Path) -> None:
    target.write_bytes(b"mine")
    with pytest.raises(SdlabError, match="is there already"):
        ckpt.write(target, outputs(tmp_path, {"x": drawn(3)}))
    assert target.read_bytes() == b"mine" and len(list(target.parent.iterdir())) == 1


def test_what_a_killed_run_left_is_swept_away(target: Path) -> None:
    left = target.with_name(".x.ckpt.0a1b2c3d.sdlab-part")
    for path in (left, other := target.with_name(".x.other.0a1b2c3d.sdlab-part")):
        path.write_bytes(b"half")
    stream.sweep(target.parent)
    assert list(target.parent.iterdir()) == [other]
