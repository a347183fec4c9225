"""The process that opens a pickle: started by unpickle.py with ``python -I``, alone and with nothing to give away.

It looks at the pickle's own words first and refuses what names anything but tensors. Then torch's restricted
unpickler (``weights_only``) builds the table; the weights are not read. One JSON document comes out on stdout:
``{"tensors": [[name, dtype, shape, in_copy, offset, num_bytes], ...]}`` or ``{"fault": reason}``. A tensor's bytes
lie in the file itself or, where they stand there in another order, in a copy that this process writes.
"""

from __future__ import annotations

import io
import json
import os
import pickletools
import re
import sys
import zipfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Records = dict[str, tuple[int, int]]  # name in a zip -> (offset in the file, number of bytes)

MAX_PICKLE_BYTES = 4 << 20  # the table of SD 1.5 with its EMA has 0.3 MB
MAX_OLD_BYTES = 1 << 30  # torch's format before 1.6 is read whole; there are no large models in it
MAX_TENSORS = 20_000
SCAN_S, LOAD_S = 2, 1  # of processor time
READ_BYTES_PER_S, COPIED_BYTES_PER_S = 200 << 20, 50 << 20
ROOM_BYTES = 1 << 30  # memory beyond what torch itself takes

PLAIN = (
    re.compile(  # what torch.save writes about tensors; torch's own list, which comes after it, is narrower
        r"collections OrderedDict|_codecs encode|(builtins|__builtin__) (set|bytearray|complex)"
        r"|torch (\w+Storage|Size|Tensor|device|strided|\w*(float|int|bool|complex)\w*)"
        r"|torch\.storage \w+Storage|torch\._utils _rebuild_\w+|torch\._tensor _rebuild_from_type_v2"
        r"|torch\.nn\.parameter Parameter|torch\.serialization _get_layout"
    )
)
IGNORED = (  # what trainers leave beside the weights: never imported, something inert takes its place
    "pytorch_lightning.callbacks.model_checkpoint ModelCheckpoint",
    "numpy dtype",
    "numpy ndarray",
    "numpy.core.multiarray scalar",
    "numpy.core.multiarray _reconstruct",
    "numpy._core.multiarray scalar",
    "numpy._core.multiarray _reconstruct",
)
SUMMONING = ("INST", "STACK_GLOBAL", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID")
FORBIDDEN_EVENTS = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.",
    "socket.",
    "pty.",
)


class Refused(Exception):
    """In words: why."""


class Nothing:
    """Takes the place of an object that is no tensor, whatever it is made of."""

    def __new__(cls, *_: object) -> Nothing:
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        pass


def main() -> None:
    asked = json.loads(sys.stdin.read())
    sys.path[:] = asked["sys_path"]
    answer: dict[str, Any]
    try:
        limit(cpu_s=SCAN_S, room_bytes=ROOM_BYTES)
        answer = {"tensors": table(Path(asked["path"]), Path(asked["copy"]))}
    except MemoryError:
        answer = {"fault": "it asks for more memory than such a file needs"}
    except Exception as reason:  # noqa: BLE001  (the end of this process: the reason is handed on)
        answer = {"fault": _in_short(reason)}
    json.dump(answer, sys.stdout)


def _in_short(reason: Exception) -> str:
    """The reason without the advice that torch gives with it, to load the file without its restriction."""
    text = str(reason).rpartition("WeightsUnpickler error: ")[2] or type(reason).__name__
    return text.partition("\n")[0].partition(" Please ")[0].strip()


def table(path: Path, copy: Path) -> list[list[Any]]:
    """The rows of the answer. Raises Refused, or what torch raises, unless all is tensors and plain values."""
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
        records = _records(file) if is_zip else {}
        _scan(file, records)
    import torch

    _lock_up(copy)
    whole = 0 if is_zip else path.stat().st_size
    limit(cpu_s=LOAD_S + whole / READ_BYTES_PER_S, room_bytes=ROOM_BYTES + whole)
    torch.serialization.add_safe_globals([(Nothing, name.replace(" ", ".")) for name in IGNORED])
    with path.open("rb") as file:
        loaded = torch.load(file, map_location="meta" if is_zip else "cpu", weights_only=True)
    state = _state(loaded)
    offsets = {name: _offset(name, tensor, records) for name, tensor in state.items()}
    odd = [name for name, offset in offsets.items() if offset is None]
    copied = dict(zip(odd, _copied(path, copy, odd, loaded if not is_zip else None), strict=True))
    return [
        [
            name,
            _word(tensor),
            list(tensor.shape),
            name in copied,
            copied.get(name, offsets[name]),
            tensor.nbytes,
        ]
        for name, tensor in state.items()
    ]


def _records(file: IO[bytes]) -> Records:
    """What a zip holds, below its one folder. Raises Refused for a zip that torch.save does not write."""
    try:
        entries = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as reason:
        raise Refused(f"it is damaged or cut short: {reason}") from reason
    tops = {entry.filename.partition("/")[0] for entry in entries}
    pickles = [entry.filename.partition("/")[2] for entry in entries if entry.filename.endswith(".pkl")]
    if len(tops) != 1 or pickles != ["data.pkl"]:  # a program of TorchScript has constants.pkl as well
        raise Refused("it is a zip of other things, not a file of torch.save")
    records: Records = {}
    for entry in entries:
        if (
            entry.compress_type != zipfile.ZIP_STORED
            or entry.flag_bits & 1
            or entry.file_size != entry.compress_size
        ):
            raise Refused("it is a compressed zip, which torch.save does not write")
        file.seek(entry.header_offset + 26)
        lengths = file.read(4)
        start = entry.header_offset + 30 + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
        records[entry.filename.partition("/")[2]] = (start, entry.file_size)
    _check_apart(records, file.seek(0, 2))
    return records


def _check_apart(records: Records, size: int) -> None:
    at = 0
    for start, num_bytes in sorted(records.values()):
        if start < at or start + num_bytes > size:
            raise Refused("it is damaged: what it holds overlaps, or is longer than the file")
        at = start + num_bytes


def _scan(file: IO[bytes], records: Records) -> None:
    """Refuse a pickle by its own words, before torch is asked; nothing is built here."""
    if not records:
        if file.seek(0, 2) > MAX_OLD_BYTES:
            raise Refused("it is of a format from before torch 1.6, and larger than we read of those")
        file.seek(0)
        head = io.BytesIO(file.read(MAX_PICKLE_BYTES))
        for _ in range(5):  # a number, a version, about the computer, the table, the order of the weights
            _scan_one(head)
        return
    start, num_bytes = records.get("byteorder", (0, 0))
    file.seek(start)
    if num_bytes and file.read(min(num_bytes, 16)) != b"little":
        raise Refused("it was written by a big-endian computer")
    start, num_bytes = records["data.pkl"]
    if num_bytes > MAX_PICKLE_BYTES:
        raise Refused(f"its table of contents has {num_bytes:,} bytes, more than any model we know")
    file.seek(start)
    whole = io.BytesIO(file.read(num_bytes))
    _scan_one(whole)
    if whole.read(1):
        raise Refused("there is more after its table of contents")


def _scan_one(data: IO[bytes]) -> None:
    """Read one pickle from `data`. Raises Refused where it names something that is not a tensor's."""
    try:
        for code, argument, _ in pickletools.genops(data):
            if code.name in SUMMONING:
                raise Refused(f"it calls for things in a way that torch.save does not, {code.name}")
            if code.name == "GLOBAL":
                _check_global(str(argument))
    except (ValueError, OverflowError) as reason:
        raise Refused(f"it is damaged or cut short: {reason}") from reason


def _check_global(name: str) -> None:
    if not PLAIN.fullmatch(name) and name not in IGNORED:
        raise Refused(f"it calls for {name.replace(' ', '.')[:60]!r}, which is not a tensor's")


def limit(*, cpu_s: float, room_bytes: int) -> None:
    """At most so much processor time and memory from now on, where the system has such limits."""
    try:
        import resource
    except ImportError:  # Windows; the parent's clock remains
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    limits = {
        resource.RLIMIT_CPU: int(used.ru_utime + used.ru_stime + cpu_s) + 1,
        resource.RLIMIT_DATA: _data_bytes() + room_bytes,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _data_bytes() -> int:
    """Memory that this process has asked for so far."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 16 << 30
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmData:")), 16 << 30)


def _lock_up(copy: Path) -> None:
    """From here on no other program, no connection, and no file but `copy` can be opened by way of Python."""

    def refuse(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(FORBIDDEN_EVENTS):
            raise Refused(f"it tried to do what a model never does: {event}")
        if event == "open" and args[0] != str(copy) and isinstance(args[2], int) and args[2] & _WRITING:
            raise Refused("it tried to write a file")

    sys.addaudithook(refuse)


_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _state(loaded: object) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, those of its ``state_dict`` where it has one, each checked."""
    import torch

    if not isinstance(loaded, dict):
        raise Refused("it holds no table of tensors")
    inner = loaded.get("state_dict", loaded.get("model"))
    state = inner if isinstance(inner, dict) else loaded
    found = {str(name): value for name, value in state.items() if isinstance(value, torch.Tensor)}
    for outer, values in state.items() if not found else ():  # a table of tables, as embeddings have
        if isinstance(values, dict):
            found |= {f"{outer}.{name}": v for name, v in values.items() if isinstance(v, torch.Tensor)}
    if len(found) > MAX_TENSORS:
        raise Refused(f"it holds {len(found):,} tensors, more than any model we know")
    for name, tensor in found.items():
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.is_quantized or tensor.is_neg() or tensor.is_conj() or not _word(tensor):
            raise Refused(f"tensor {name[:80]!r} is of an unusual kind")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise Refused(f"tensor {name[:80]!r} is larger than what is stored for it")
    return found


def _word(tensor: Tensor) -> str:
    """The type in safetensors' words; empty for one that it does not have."""
    import torch

    return {
        torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
        torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
        torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    }.get(tensor.dtype, "")  # fmt: skip


def _offset(name: str, tensor: Tensor, records: Records) -> int | None:
    """Where the tensor's bytes lie in the file; None where they do not stand in it in one row."""
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None or not tensor.is_contiguous():
        return None
    num_bytes = dict(records.values()).get(start, -1)
    begin = int(tensor.storage_offset()) * tensor.element_size()
    if tensor.nbytes and begin + tensor.nbytes > num_bytes:
        raise Refused(f"tensor {name[:80]!r} is larger than what is stored for it")
    return int(start) + begin


def _copied(path: Path, copy: Path, odd: list[str], loaded: object) -> list[int]:
    """Writes the tensors named in `odd` to `copy`, each in its plain order, and says where each begins."""
    import torch

    if not odd:
        return []
    size = path.stat().st_size
    limit(cpu_s=LOAD_S + 2 * size / COPIED_BYTES_PER_S, room_bytes=ROOM_BYTES + size)
    if loaded is None:
        loaded = torch.load(
            str(path), map_location="cpu", weights_only=True, mmap=path.suffix != ".safetensors"
        )
    state, places = _state(loaded), []
    if sum(state[name].nbytes for name in odd) > 2 * size:
        raise Refused("its tensors are larger than the file")
    with copy.open("wb") as file:
        for name in odd:
            places.append(file.tell())
            flat = state[name].detach().contiguous().reshape(-1).view(torch.uint8)
            file.write(flat.numpy().tobytes())
    return places


if __name__ == "__main__":
    main()
