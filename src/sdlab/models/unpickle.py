"""Reads pickles (.ckpt, .bin, .pt) without opening one: a process of its own does, and its answer is only data.

What it hands over is a table of names, types, shapes and places, checked here like the header of any other file.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

from sdlab.errors import SdlabError
from sdlab.models import unpickle_child
from sdlab.models.files import SAFE_COPY, Header, Stored, checked, not_weights, readable, regular_size

MAX_ANSWER_BYTES = 16 << 20
START_S, BYTES_PER_S, MAX_S = 60, 20 << 20, 1800  # by the clock; the child's own limit is of processor time
KEPT = ("SYSTEMROOT", "PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TMPDIR", "TEMP")  # of the environment


def read_pickle(path: Path) -> Header:
    """The tensors of a .ckpt, .bin or .pt, where they lie.

    Raises SdlabError when the file holds anything but tensors and plain values, is damaged, or takes too much time
    or memory to read. It is opened by another process, with torch's restricted unpickler (``weights_only``).
    """
    size = regular_size(path)
    with open(path, "rb") as file:
        not_weights(file.read(512), path)
    about = path.stat()
    tensors = _tensors(path, (about.st_dev, about.st_ino, size, about.st_mtime_ns))
    return Header(path, dict(tensors), {})


@lru_cache(maxsize=8)
def _tensors(path: Path, _: tuple[int, ...]) -> dict[str, Stored]:
    """As `read_pickle`. The second argument tells one content of the file from another: each is read once."""
    folder = Path(tempfile.mkdtemp(prefix="sdlab-pickle-"))
    copy = folder / path.name
    try:
        rows = _rows(_answer(path, copy), path)
        tensors = {row[0]: _stored(row, path, copy) for row in rows}
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if copy.exists():
        atexit.register(shutil.rmtree, folder, ignore_errors=True)  # read from until this process ends
    else:
        folder.rmdir()
    return tensors


def _answer(path: Path, copy: Path) -> bytes:
    """What the child has to say about `path`. Raises SdlabError when it does not end well, or not in time."""
    asked = {
        "path": str(path.absolute()),
        "copy": str(copy),
        "sys_path": [entry for entry in sys.path if entry and os.path.isabs(entry)],
    }
    late = threading.Event()
    most_s = min(START_S + path.stat().st_size / BYTES_PER_S, MAX_S)
    with subprocess.Popen(
        [sys.executable, "-I", "-B", str(Path(unpickle_child.__file__).absolute())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=copy.parent,
        env={name: os.environ[name] for name in KEPT if name in os.environ} | {"OMP_NUM_THREADS": "1"},
    ) as child:
        clock = threading.Timer(most_s, _end, (child, late))
        clock.daemon = True
        clock.start()
        try:
            answer = _talk(child, json.dumps(asked).encode())
        finally:
            clock.cancel()
            child.kill()
    if child.returncode == 0:
        return answer
    raise _refused("reading it took too long" if late.is_set() else _how_it_ended(child.returncode), path)


def _end(child: subprocess.Popen[bytes], late: threading.Event) -> None:
    late.set()
    child.kill()


def _talk(child: subprocess.Popen[bytes], asked: bytes) -> bytes:
    assert child.stdin and child.stdout
    try:
        child.stdin.write(asked)
        child.stdin.close()
    except BrokenPipeError:
        pass  # it ended before it heard anything; how, its return code says
    answer = child.stdout.read(MAX_ANSWER_BYTES + 1)
    if len(answer) <= MAX_ANSWER_BYTES:
        child.wait()
    return answer


def _how_it_ended(code: int) -> str:
    if code in (-24, -9):  # SIGXCPU, SIGKILL
        return "reading it took too long, or too much memory"
    return f"the process that read it broke down with code {code}"


def _rows(answer: bytes, path: Path) -> list[list[Any]]:
    """The rows of the child's answer, each of the right types. Raises SdlabError for a fault, or another answer."""
    try:
        said = json.loads(answer)
    except (ValueError, RecursionError):
        said = None
    if isinstance(said, dict) and isinstance(said.get("fault"), str):
        raise _refused(readable(said["fault"]), path)
    rows = said.get("tensors") if isinstance(said, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == 6 for row in rows):
        raise _refused("the process that read it gave no proper answer", path)
    return rows


def _stored(row: list[Any], path: Path, copy: Path) -> Stored:
    name, dtype, shape, in_copy, offset, num_bytes = row
    stored = checked(name, dtype, shape, [offset, num_bytes], copy if in_copy is True else path)
    if stored.offset + stored.nbytes > stored.path.stat().st_size:
        raise _refused(f"tensor {stored.name[:80]!r} lies outside the file", path)
    return stored


def _refused(reason: str, path: Path) -> SdlabError:
    return SdlabError(
        f"is a pickle that holds more than tensors, or is damaged ({reason})",
        where=str(path),
        next_step=f"It was not run. {SAFE_COPY}",
    )
