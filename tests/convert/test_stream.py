"""The writer: what it writes, what it proves, what it leaves when it is stopped, and what it needs."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sdlab.convert import cast, stream
from sdlab.convert.hashing import Sha256
from sdlab.convert.plan import Output
from sdlab.errors import OutOfResources, SdlabError
from sdlab.keyed import keyed
from sdlab.models.files import Stored, read_header
from tests.program import ENVIRONMENT

MORE_THAN_A_PIECE = cast.PIECE_BYTES // 2 + 1001
WORDS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=keyed(0, "drawn", *shape)).to(dtype)


def outputs(folder: Path, tensors: dict[str, torch.Tensor], dtype: str | None = None) -> list[Output]:
    """The tensors, saved in a file, as outputs in `dtype`."""
    path = folder / "source.safetensors"
    safetensors.torch.save_file(tensors, path)
    return [
        Output(name, dtype or stored.dtype, stored.shape, (stored,))
        for name, stored in read_header(path).tensors.items()
    ]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where the file goes; the sources lie elsewhere."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "x.safetensors"


def test_every_tensor_is_there_bit_by_bit_also_those_of_many_pieces(tmp_path: Path, target: Path) -> None:
    tensors = {
        "long": drawn(MORE_THAN_A_PIECE),
        "half": drawn(3, 5, dtype=torch.float16),
        "brain": drawn(7, dtype=torch.bfloat16),
        "whole": torch.arange(4),
        "one": torch.tensor(2.5),
        "none": torch.zeros(0, 3),
    }
    stream.write(target, outputs(tmp_path, tensors), metadata={"a": "b"})
    again = safetensors.torch.load_file(target)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(again[name], tensor) and again[name].dtype == tensor.dtype, name
    assert read_header(target).metadata["a"] == "b"


@pytest.mark.parametrize("before", WORDS)
@pytest.mark.parametrize("after", WORDS)
def test_a_cast_is_torchs_own(before: torch.dtype, after: torch.dtype, tmp_path: Path, target: Path) -> None:
    tensors = {"long": drawn(MORE_THAN_A_PIECE, dtype=before), "short": drawn(3, dtype=before)}
    stream.write(target, outputs(tmp_path, tensors, WORDS[after]), metadata={})
    again = safetensors.torch.load_file(target)
    for name, tensor in tensors.items():
        assert torch.equal(again[name], tensor.to(after)) and again[name].dtype == after, name


def test_an_output_of_many_sources_and_of_swapped_halves_stands_in_the_file_in_that_order(
    tmp_path: Path, target: Path
) -> None:
    long = drawn(2, MORE_THAN_A_PIECE)
    made = {o.name: o.sources[0] for o in outputs(tmp_path, {"q": drawn(2, 3), "k": drawn(2, 3), "s": long})}
    wanted = [
        Output("qk", "F32", (4, 3), (made["q"], made["k"])),
        Output("s", "F32", (2, MORE_THAN_A_PIECE), (replace(made["s"], halves_swapped=True),)),
    ]
    stream.write(target, wanted, metadata={})
    again = safetensors.torch.load_file(target)
    assert torch.equal(again["qk"], torch.cat([made["q"].read(), made["k"].read()]))
    assert torch.equal(again["s"], long.flip(0))


def test_what_is_in_memory_is_written_too(target: Path) -> None:
    tensor = drawn(MORE_THAN_A_PIECE)
    source = Stored("x", "F32", tuple(tensor.shape), Path("none"), nbytes=tensor.nbytes, tensor=tensor)
    stream.write(target, [Output("x", "F16", source.shape, (source,))], metadata={})
    assert torch.equal(safetensors.torch.load_file(target)["x"], tensor.half())


@pytest.mark.parametrize("dtype", [None, "F16"])
def test_the_hashes_are_those_of_the_file_its_tensors_and_its_source(
    dtype: str | None, tmp_path: Path, target: Path
) -> None:
    tensors = {"b": drawn(MORE_THAN_A_PIECE), "a": drawn(2)}
    written = stream.write(target, made := outputs(tmp_path, tensors, dtype), metadata={})
    data = target.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    source = hashlib.sha256(tensors["a"].numpy().tobytes() + tensors["b"].numpy().tobytes()).hexdigest()
    assert written.sha256 == hashlib.sha256(data).hexdigest()
    assert written.data_sha256 == hashlib.sha256(data[8 + length :]).hexdigest()
    assert read_header(target).metadata[stream.SOURCE_HASH] == source == stream.source_hash(made)
    assert (written.data_sha256 == source) == (dtype is None)
    assert (written.num_tensors, written.num_bytes) == (2, len(data))


def test_both_passes_are_told_byte_by_byte(tmp_path: Path, target: Path) -> None:
    told: list[int] = []
    made = outputs(tmp_path, {"x": drawn(MORE_THAN_A_PIECE)}, "F16")
    stream.write(target, made, metadata={}, advance=told.append)
    assert sum(told) == 2 * made[0].nbytes and max(told) <= cast.PIECE_BYTES


@pytest.mark.parametrize("dtype", WORDS)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), -float("nan")])
@pytest.mark.parametrize("at", [0, -1])
def test_what_is_not_finite_is_refused_wherever_it_is(
    dtype: torch.dtype, value: float, at: int, tmp_path: Path, target: Path
) -> None:
    tensor = drawn(MORE_THAN_A_PIECE, dtype=dtype)
    tensor[at] = value
    for wanted in (None, "F32"):
        with pytest.raises(SdlabError, match="tensor x: holds values that are not finite"):
            stream.write(target, outputs(tmp_path, {"x": tensor}, wanted), metadata={})
        assert not list(target.parent.iterdir())


@pytest.mark.parametrize("dtype", WORDS)
def test_the_largest_and_the_smallest_numbers_are_finite(
    dtype: torch.dtype, tmp_path: Path, target: Path
) -> None:
    limits = torch.finfo(dtype)
    edges = [limits.max, limits.min, limits.tiny, -limits.tiny, 0.0, -0.0]
    for number, tensor in enumerate((torch.tensor(edges), -torch.ones(3), torch.ones(3))):
        made = outputs(tmp_path, {"x": tensor.to(dtype) if number else torch.tensor(edges, dtype=dtype)})
        stream.write(target.with_name(f"{number}.safetensors"), made, metadata={})


def test_a_value_that_does_not_fit_is_told_from_one_that_is_not_finite(tmp_path: Path, target: Path) -> None:
    with pytest.raises(SdlabError, match="tensor x: holds 7e\\+04, which does not fit F16"):
        stream.write(target, outputs(tmp_path, {"x": torch.tensor([1.0, -7e4])}, "F16"), metadata={})
    assert not list(target.parent.iterdir())


@dataclass(frozen=True)
class Changing(Stored):
    """Gives other bytes whenever it is read again."""

    reads: tuple[bytes, ...] = ()

    def pieces(self) -> Iterator[bytes]:
        """The next of `reads`."""
        first, *rest = self.reads
        object.__setattr__(self, "reads", tuple(rest))
        yield first


def changing(*reads: bytes) -> Output:
    return Output("x", "U8", (4,), (Changing("x", "U8", (4,), Path("none"), nbytes=4, reads=reads),))


def test_a_file_that_reads_back_otherwise_is_not_kept(target: Path) -> None:
    with pytest.raises(SdlabError, match="differs from the model in tensor x"):
        stream.write(target, [changing(b"abcd", b"abce")], metadata={})
    assert not list(target.parent.iterdir())
    stream.write(target, [changing(b"abcd", b"abcd")], metadata={})


@dataclass(frozen=True)
class Failing(Stored):
    """Cannot be read: the fault stands for one of writing, which is hard to bring about."""

    number: int = 0

    def pieces(self) -> Iterator[bytes]:
        """A byte, and the fault."""
        yield b"a"
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENOSPC, OutOfResources, "no space left"),
        (errno.EDQUOT, OutOfResources, "no space left"),
        (errno.EFBIG, SdlabError, "cannot hold a file of that size"),
        (errno.EIO, SdlabError, "a disk has a fault"),
        (errno.ENAMETOOLONG, SdlabError, "name is too long"),
    ],
)
def test_a_disk_that_is_full_in_the_middle_is_said_in_one_line_and_nothing_is_left(
    number: int, kind: type[SdlabError], words: str, target: Path
) -> None:
    source = Failing("x", "U8", (4,), Path("none"), nbytes=4, number=number)
    with pytest.raises(kind, match=words) as said:
        stream.write(target, [Output("x", "U8", (4,), (source,))], metadata={})
    assert str(target.parent) in str(said.value) and "\n" not in str(said.value)
    assert not list(target.parent.iterdir())


def test_a_file_that_does_not_come_to_disk_is_not_kept(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(SdlabError, match="a disk has a fault"):
        stream.write(target, outputs(tmp_path, {"x": drawn(3)}), metadata={})
    assert not list(target.parent.iterdir())


def test_no_space_is_said_with_both_figures_before_anything_is_written(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(OutOfResources, match=r"2\.1 MB are needed and 1\.0 MB are free"):
        stream.write(target, outputs(tmp_path, {"x": drawn(MORE_THAN_A_PIECE)}), metadata={})
    assert not list(target.parent.iterdir())


def test_a_source_that_ends_early_is_said(tmp_path: Path, target: Path) -> None:
    made = outputs(tmp_path, {"x": drawn(100)})
    os.truncate(tmp_path / "source.safetensors", 200)
    with pytest.raises(SdlabError, match="the file ended while it was read"):
        stream.write(target, made, metadata={})
    assert not list(target.parent.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="other modes there")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_the_file_may_be_read_as_the_umask_says(mask: int, mode: int, tmp_path: Path, target: Path) -> None:
    before = os.umask(mask)
    try:
        stream.write(target, outputs(tmp_path, {"x": drawn(3)}), metadata={})
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == mode


def test_a_file_that_is_there_is_compared_to_the_last_byte_and_with_its_source(
    tmp_path: Path, target: Path
) -> None:
    tensors = {"a": drawn(MORE_THAN_A_PIECE), "b": drawn(3)}
    made = outputs(tmp_path, tensors, "F16")
    written = stream.write(target, made, metadata={"a": "b"})
    assert stream.compare(target, made, metadata={"a": "b"}) == written
    whole = bytearray(target.read_bytes())

    def where(content: bytes, metadata: dict[str, str], outputs: list[Output]) -> str:
        target.write_bytes(content)
        with pytest.raises(stream.Differs) as told:
            stream.compare(target, outputs, metadata=metadata)
        return str(told.value)

    assert where(whole[:-1] + bytes([whole[-1] ^ 1]), {"a": "b"}, made) == "tensor b"
    assert where(whole, {"a": "c"}, made) == "its header"
    assert where(whole, {}, made) == "its length"
    safetensors.torch.save_file(
        {**tensors, "b": tensors["b"] * (1 + 2**-20)}, tmp_path / "source.safetensors"
    )
    assert where(whole, {"a": "b"}, made) == "the hash of its source"


def test_torch_has_its_threads_again_afterwards(tmp_path: Path, target: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        stream.write(target, outputs(tmp_path, {"x": drawn(3)}, "F16"), metadata={})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_part_that_is_gone_before_it_has_its_name_is_said(target: Path) -> None:
    with stream.part_beside(target) as file:
        Path(file.name).unlink()
        with pytest.raises(SdlabError, match="was removed before it had its name"):
            stream.name(file, target)
    assert not list(target.parent.iterdir())


def test_what_killed_runs_left_stays_where_the_disk_has_no_locks(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = target.with_name(".x.safetensors.0a1b2c3d.sdlab-part")
    left.write_bytes(b"half")
    with monkeypatch.context() as patch:
        patch.setattr(stream, "hold", lambda handle: False)
        stream.sweep(target.parent)
        assert left.exists()
    stream.sweep(target.parent)
    assert not left.exists()


def test_a_part_of_nothing_but_zeros_is_refused_by_name_and_a_lora_is_not(
    tmp_path: Path, target: Path
) -> None:
    unet = {f"model.diffusion_model.{number}.weight": drawn(2, number + 1) for number in range(9)}
    for name, zeros in (("first_stage_model.weight", 1), ("lora_unet_x.lora_up.weight", 0)):
        made = outputs(tmp_path, {**unet, name: torch.zeros(2, 2)})
        if not zeros:
            stream.write(target, made, metadata={})
            continue
        with pytest.raises(
            SdlabError, match=r"source\.safetensors: 1 of the 1 weights of the VAE hold nothing"
        ):
            stream.write(target, made, metadata={})
        assert not list(target.parent.iterdir())


SPARSE = """
import pathlib, resource, sys
from sdlab.convert import stream
from sdlab.convert.hashing import Sha256
from sdlab.convert.plan import Output
from sdlab.models.files import Stored
source, size = pathlib.Path(sys.argv[1]), int(sys.argv[3])
stored = Stored("x", "F32", (size // 4,), source, 0, size)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
stream.write(pathlib.Path(sys.argv[2]), [Output("x", "F32", stored.shape, (stored,))], metadata={})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, "torch" in sys.modules)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is counted in other units elsewhere")
def test_memory_does_not_grow_with_the_model_and_torch_is_not_needed_without_a_cast(
    tmp_path: Path, target: Path
) -> None:
    source, size = tmp_path / "zeros", 200 << 20
    source.touch()
    os.truncate(source, size)
    command = [sys.executable, "-c", SPARSE, source, target, str(size)]
    said = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout.split()
    assert int(said[0]) < 40 << 10
    assert said[1] == "False"


STOPPED = """
import signal, sys, time
for name in ("SIGTERM", "SIGHUP"):
    signal.signal(signal.Signals[name], signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests started in the background hand on that it is ignored
from sdlab import cli
from sdlab.convert import stream
fill = stream._fill
def slowly(*args):
    fill(*args)
    print("written", flush=True)
    time.sleep(60)
stream._fill = slowly
cli.main(["convert", "--model-path", "mini-sd", "--checkpoint-path", sys.argv[1]])
"""


@pytest.mark.skipif(os.name == "nt", reason="no such signals there")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_it_and_leaves_no_file(name: str, target: Path) -> None:
    number = signal.Signals[name]
    command = [sys.executable, "-c", STOPPED, target]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == "written\n"
        assert len(list(target.parent.iterdir())) == 1
        child.send_signal(number)
        said = child.communicate(timeout=30)[1]
    assert child.returncode == 128 + number
    assert "Traceback" not in said and (name == "SIGINT" or "sdlab: error: stopped" in said)
    assert not list(target.parent.iterdir())


def test_signals_that_are_handled_already_stay_so(tmp_path: Path, target: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    told: list[Callable[[], None]] = [lambda: os.kill(os.getpid(), signal.SIGTERM)]
    try:
        made = outputs(tmp_path, {"x": drawn(3)})
        stream.write(target, made, metadata={}, advance=lambda num: told.pop()() if told else None)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM] and target.exists()


class Slow:
    """A digest that is much slower than reading."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def update(self, piece: memoryview) -> None:
        time.sleep(0.002)
        self.digest.update(piece)

    def hexdigest(self) -> str:
        return self.digest.hexdigest()


@pytest.mark.parametrize("dtype", [None, "F32"])
def test_memory_is_not_used_again_before_it_is_hashed(
    dtype: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cast, "PIECE_BYTES", 4096)
    tensor = drawn(50_001, dtype=torch.float16)
    (made,) = outputs(tmp_path, {"x": tensor}, dtype)
    with Sha256() as raw, Sha256() as data:
        raw._digest = Slow()  # type: ignore[assignment]
        data._digest = Slow()  # type: ignore[assignment]
        for piece in cast.pieces([made]):
            raw.update(piece.raw)
            data.update(piece.data)
        assert raw.hexdigest() == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        wanted = (tensor.float() if dtype else tensor).numpy().tobytes()
        assert data.hexdigest() == hashlib.sha256(wanted).hexdigest()
