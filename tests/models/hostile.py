"""Model files and folders as an attacker, a broken download or an odd tool makes them; none is a model.

Small on disk: what is large is a hole in the file. The payloads, where they are run, make the file `marker(root)`.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.models.helpers import TEXT, UNET, VAE, edit_json, edit_tensors, single_file

AS_MODEL = ("generate", "convert", "check")
AS_ANY_FILE = (*AS_MODEL, "unet", "vae", "lora")
AS_LOADED = ("generate", "convert")  # whose values are looked at
AS_LORA = ("generate", "check", "lora")
AS_PICKLE = (*AS_ANY_FILE, "generate --allow-pickle", "convert --allow-pickle")


@dataclass(frozen=True)
class Hostile:
    """One of them, and the ways into sdlab that it is tried on."""

    name: str
    path: Path
    entries: tuple[str, ...]


def marker(root: Path) -> Path:
    """The file that is there when a payload was run."""
    return root / "PAYLOAD-WAS-RUN"


def make(
    root: Path, *, tiny: Path, klein: Path, mini: Path, every: int = 1
) -> tuple[list[Hostile], list[Hostile]]:
    """Each `every`-th of them below `root`, and good ones for comparison.

    `tiny`, `klein` and `mini` are good folders; of the shape of `mini` single files are known.
    """
    root.mkdir()
    good = _good(root, tiny=tiny, mini=mini)
    whole, made = good[0].path, []
    for number, (name, suffix, write, entries) in enumerate(_all(root, whole, tiny, klein)):
        if number % every == 0:
            path = root / f"{number:03d}" / f"model{suffix}"
            path.parent.mkdir()
            write(path)
            made.append(Hostile(name, path, entries))
    return made, good


def _all(
    root: Path, whole: Path, tiny: Path, klein: Path
) -> Iterator[tuple[str, str, Callable[[Path], object], tuple[str, ...]]]:
    for section in (_headers, _not_weights, _odd_files, _damaged, _adapters):
        for name, write, entries in section(whole):
            yield name, ".safetensors", write, entries
    for name, suffix, data, entries in _pickles(root):
        yield name, suffix, lambda path, data=data: path.write_bytes(data), entries
    for name, change, entries in _folders():
        yield name, "", lambda path, change=change: change(Path(shutil.copytree(tiny, path))), entries
    for name, change, entries in _flux2_folders():
        yield name, "", lambda path, change=change: change(Path(shutil.copytree(klein, path))), entries


def _good(root: Path, *, tiny: Path, mini: Path) -> list[Hostile]:
    """What is to be accepted on each of the ways: else a test would pass where nothing is."""
    whole = single_file(mini, root / "good.safetensors")
    tensors = load_file(whole)
    torch.save({"state_dict": tensors, "epoch": 3}, root / "good.ckpt")
    save_file(_lora(tensors), root / "lora.safetensors")
    return [
        Hostile("a good checkpoint", whole, (*AS_MODEL, "unet", "vae")),
        Hostile("a good pickle", root / "good.ckpt", ("generate --allow-pickle", "convert --allow-pickle")),
        Hostile("a good LoRA", root / "lora.safetensors", ("lora",)),
        Hostile("a good folder", tiny, AS_MODEL),
    ]


Written = Iterator[tuple[str, Callable[[Path], object], tuple[str, ...]]]
ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
FIRST = "model.diffusion_model.input_blocks.0.0.weight"


def packed(table: object, data: bytes = bytes(8), *, length: int | None = None) -> bytes:
    """A safetensors file of this header, which may lie about its `length`."""
    raw = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def _headers(whole: Path) -> Written:
    """Headers that lie, overflow, nest, repeat or never end."""

    def one(**changes: object) -> bytes:
        return packed({FIRST: {**ONE, **changes}})

    def named(name: str) -> bytes:
        return packed({name: ONE})

    def two(first: list[Any], second: list[Any], num: int = 16) -> bytes:
        return packed({"a": {**ONE, "data_offsets": first}, "b": {**ONE, "data_offsets": second}}, bytes(num))

    many = ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(250_000))
    files = {
        **{f"header of {n} bytes": packed({"a": ONE}, length=n) for n in (0, 1, 2, 7, 9, 100, 1 << 20, 1 << 31)},
        **{f"header of 2^{n} bytes": packed({"a": ONE}, length=(1 << n) - 1) for n in (32, 53, 63, 64)},
        "header in invalid UTF-8": packed(b'{"\xff\xfe": 1}'),
        "header in UTF-16": packed('{"a": 1}'.encode("utf-16")),
        "header with a byte order mark": packed(b"\xef\xbb\xbf{}"),
        "header nested in objects": packed(b'{"a":' * 200_000 + b"1" + b"}" * 200_000),
        "header nested in lists": packed(b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}"),
        "header nested 900 deep": packed(b'{"a":' * 900 + b"1" + b"}" * 900),
        "header of empty lists": packed(b'{"a":[' + b"[]," * 5_000_000 + b"[]]}"),
        "header with a name twice": packed(b'{"a":%s,"a":%s}' % ((json.dumps(ONE).encode(),) * 2)),
        "header with a key twice": packed(b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}'),
        "header with NaN": packed(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'),
        "header with Infinity": packed(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,Infinity]}}'),
        "header with a number of 10^5 digits": packed(
            b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % (b"9" * 100_000)
        ),
        "header is a list": packed([ONE]),
        "header is a text": packed("model"),
        "header is a number": packed(b"12345678"),
        "header is null": packed(b"null    "),
        "header of no tensors": packed({}, b""),
        "header of metadata only": packed({"__metadata__": {"format": "pt"}}, b""),
        "header followed by more": packed(json.dumps({"a": ONE}).encode() + b"{}"),
        "header not closed": packed(json.dumps({"a": ONE}).encode()[:-1]),
        "metadata is a tensor": packed({"__metadata__": ONE}),
        "ranges overlap": two([0, 8], [4, 12]),
        "ranges are the same": two([0, 8], [0, 8]),
        "ranges leave a gap": two([0, 8], [12, 20], 20),
        "range runs backward": one(data_offsets=[8, 0]),
        "range is negative": one(data_offsets=[-8, 0]),
        "range is beyond the end": one(data_offsets=[8, 16]),
        "range overflows": one(data_offsets=[(1 << 64) - 8, 1 << 64]),
        "range of floats": one(data_offsets=[0.0, 8.0]),
        "range of truth": one(data_offsets=[False, 8]),
        "range of texts": one(data_offsets=["0", "8"]),
        "range of three": one(data_offsets=[0, 8, 8]),
        "no range": one(data_offsets=None),
        "shape overflows": one(shape=[1 << 33, 1 << 33]),
        "shape multiplies to the right size by overflow": one(shape=[(1 << 64) + 2]),
        "shape is negative twice": one(shape=[-1, -2]),
        "shape of floats": one(shape=[2.0]),
        "shape is absurd": one(shape=[10**18]),
        "shape has a thousand dimensions": one(shape=[1] * 999 + [2]),
        "shape is a number": one(shape=2),
        "type is unknown": one(dtype="F31"),
        "type is a list": one(dtype=["F32"]),
        "type with escape codes": one(dtype="\x1b[2J"),
        "type is missing": one(dtype=None),
        "tensor is null": packed({"a": None}),
        "tensor is a list": packed({"a": [1, 2]}),
        "name climbs out": named("../../../etc/passwd"),
        "name is absolute": named("/etc/passwd"),
        "name has a NUL": named("a\0b"),
        "name has a newline": named("a\nb"),
        "name has escape codes": named("\x1b]0;owned\x07\x1b[31m"),
        "name runs from right to left": named("model\u202etxt"),
        "name is half a character": packed(b'{"\\ud800":%s}' % json.dumps(ONE).encode()),
        "name of 10^5 characters": named("a" * 100_000),
        "name is empty": named(""),
        "name of a template": named("{0.__class__}%s${HOME}$(touch x)"),
        "250,000 tensors": packed(b"{%s}" % many.encode(), b""),
        "a tensor of no numbers": packed({FIRST: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, b""),
        "a UNet of one tensor": packed(
            {FIRST: {"dtype": "F32", "shape": [1, 1, 1, 1], "data_offsets": [0, 4]},
             FIRST.replace("blocks.0", "blocks.1"): {"dtype": "F32", "shape": [], "data_offsets": [4, 8]}}
        ),
    }  # fmt: skip
    for name, data in files.items():
        yield name, lambda path, data=data: path.write_bytes(data), AS_ANY_FILE


def _not_weights(whole: Path) -> Written:
    """Other things under a model's name."""
    png = b"\x89PNG\r\n\x1a\n" + bytes(100)
    files = {
        "nothing": b"",
        "one byte": b"{",
        "a web page": b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>",
        "a web page after blanks": b"\xef\xbb\xbf\n\n  <HTML>" + b" " * 400,
        "an error in JSON": b'{"error":"Access to model is restricted and you are not in the list"}',
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4265380512\n",
        "GGUF": b"GGUF\x03\0\0\0" + bytes(200),
        "a picture": png,
        "gzip": b"\x1f\x8b\x08" + zlib.compress(bytes(1000)),
        "a program": b"\x7fELF\x02\x01\x01" + bytes(200),
        "a script": b"#!/bin/sh\ntouch PAYLOAD\n",
        "an archive of tar": b"model.ckpt" + bytes(247) + b"ustar\x0000" + bytes(300),
        "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(200),
        "numpy's npy": b"\x93NUMPY\x01\0v\0{'descr': '|O', 'fortran_order': False, 'shape': (1,)}"
        + bytes(100),
        "zeros": bytes(4096),
        "noise": np.random.default_rng(0).bytes(4096),
    }
    for name, data in files.items():
        yield name, lambda path, data=data: path.write_bytes(data), AS_ANY_FILE


def _odd_files(whole: Path) -> Written:
    """What is no regular file, and holes of a terabyte."""

    def hole(path: Path, head: bytes, num_bytes: int = 1 << 40) -> None:
        path.write_bytes(head)
        try:
            os.truncate(path, num_bytes)
        except OSError:  # this disk has no files of that size
            os.truncate(path, 1 << 33)

    huge = {FIRST: {"dtype": "F32", "shape": [1 << 19, 1 << 19], "data_offsets": [0, 1 << 40]}}
    head = packed(huge, b"")
    yield "a folder", Path.mkdir, AS_ANY_FILE
    yield "a pipe", os.mkfifo, AS_ANY_FILE
    yield "a link to nothing", lambda path: path.symlink_to(path.parent / "gone"), AS_ANY_FILE
    yield "a link to itself", lambda path: path.symlink_to(path), AS_ANY_FILE
    yield "a device", lambda path: path.symlink_to("/dev/zero"), AS_ANY_FILE
    yield "a terminal", lambda path: path.symlink_to("/dev/tty"), AS_ANY_FILE
    yield "a terabyte of zeros", lambda path: hole(path, b""), AS_ANY_FILE
    yield "a terabyte of one tensor", lambda path: hole(path, head, len(head) + (1 << 40)), AS_ANY_FILE
    yield (
        "a terabyte of header",
        lambda path: hole(path, struct.pack("<Q", (1 << 40) - 8) + b"{"),
        AS_ANY_FILE,
    )
    yield "a terabyte after 80 bytes", lambda path: hole(path, packed({"a": ONE})), AS_ANY_FILE
    yield "a terabyte of pickle", lambda path: hole(path, b"\x80\x02"), AS_PICKLE
    yield "a terabyte of zip", lambda path: hole(path, b"PK\x03\x04"), AS_PICKLE
    if os.geteuid() != 0:  # nothing is closed to root
        yield "a closed file", lambda path: (path.write_bytes(b"x"), path.chmod(0)), AS_ANY_FILE


def _damaged(whole: Path) -> Written:
    """A checkpoint of known shape that is cut, or has wrong tensors or values."""
    data = whole.read_bytes()
    head = 8 + struct.unpack("<Q", data[:8])[0]
    cuts = (4, 8, 9, 100, head // 2, head - 1, head, head + 1, len(data) // 2, len(data) - 1)
    for at in cuts:
        yield f"a checkpoint cut at {at} bytes", lambda path, at=at: path.write_bytes(data[:at]), AS_ANY_FILE
    yield "a checkpoint and a byte", lambda path: path.write_bytes(data + b"\0"), AS_ANY_FILE
    swapped = data[:head].replace(b'"F32"', b'"I32"').replace(b'"F16"', b'"I16"')
    yield "a checkpoint of whole numbers", lambda path: path.write_bytes(swapped + data[head:]), AS_ANY_FILE
    text = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
    vae = "first_stage_model.decoder.conv_in.weight"

    def put(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
        return lambda t: t[name].view(-1)[5:6].fill_(value)

    changes: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
        "a NaN in the UNet": put(FIRST, math.nan),
        "an infinity in the VAE": put(vae, math.inf),
        "a NaN in the text encoder": put(text, math.nan),
        "nothing but NaN": lambda t: [x.fill_(math.nan) for x in t.values() if x.is_floating_point()],
        "nothing but zeros": lambda t: [x.zero_() for x in t.values()],
        "a tensor missing": lambda t: t.pop(FIRST),
        "all of a block missing": lambda t: [t.pop(n) for n in list(t) if ".output_blocks.1." in n],
        "a tensor of another shape": lambda t: t.update({FIRST: torch.ones(1, 4, 3, 3)}),
        "a tensor turned": lambda t: t.update({FIRST: t[FIRST].transpose(0, 1).contiguous()}),
        "a tensor of no dimensions": lambda t: t.update({text: torch.tensor(1.0)}),
        "a tensor too many": lambda t: t.update({FIRST.replace("0.0", "99.0"): torch.ones(2)}),
        "a tensor of bytes": lambda t: t.update({FIRST: torch.ones_like(t[FIRST], dtype=torch.uint8)}),
        "a tensor of 8-bit floats": lambda t: t.update({FIRST: t[FIRST].to(torch.float8_e4m3fn)}),
        "scales of a quantised model": lambda t: t.update({FIRST + "_scale": torch.ones(1)}),
    }
    headers_tell = ("missing", "shape", "turned", "dimensions", "too many", "bytes", "8-bit", "scales")
    for name, change in changes.items():
        entries = AS_MODEL if any(word in name for word in headers_tell) else AS_LOADED
        if name == "nothing but zeros":
            entries = ("generate",)  # convert copies it: a file of zeros is whole, only of no use
        yield f"a checkpoint with {name}", _changed(whole, change), entries


def _changed(whole: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        tensors = load_file(whole)
        change(tensors)
        save_file(tensors, path)

    return write


LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def _lora(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A LoRA of one layer for this checkpoint."""
    to_q = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    width = len(tensors[to_q])
    down, up = torch.ones(4, width), torch.ones(width, 4)
    return {
        f"{LAYER}.lora_down.weight": down,
        f"{LAYER}.lora_up.weight": up,
        f"{LAYER}.alpha": torch.tensor(4.0),
    }


def _adapters(whole: Path) -> Written:
    """Tables with the names of a LoRA that is none."""
    down, up = f"{LAYER}.lora_down.weight", f"{LAYER}.lora_up.weight"
    good = _lora(load_file(whole))
    width = len(good[up])
    tables: dict[str, dict[str, torch.Tensor]] = {
        "half of a pair": {down: good[down]},
        "ranks that differ": {**good, up: torch.ones(width, 5)},
        "another width": {down: torch.ones(4, 7), up: torch.ones(9, 4)},
        "no rank": {down: torch.ones(0, width), up: torch.ones(width, 0)},
        "vectors": {down: torch.ones(width), up: torch.ones(width)},
        "five dimensions": {down: torch.ones(4, width, 1, 1, 1), up: torch.ones(width, 4, 1, 1, 1)},
        "a NaN": {**good, up: torch.full((width, 4), math.nan)},
        "an infinite alpha": {**good, f"{LAYER}.alpha": torch.tensor(math.inf)},
        "an alpha of many numbers": {**good, f"{LAYER}.alpha": torch.ones(3)},
        "whole numbers": {name: tensor.to(torch.int8) for name, tensor in good.items()},
        "a layer of no model": {name.replace("to_q", "to_x"): tensor for name, tensor in good.items()},
        "5,000 layers": {
            f"lora_unet_{i}.lora_{half}.weight": torch.ones(1, 1)
            for i in range(5000)
            for half in ("down", "up")
        },
        "a tensor beside": {**good, "evil": torch.ones(1)},
        "a DoRA's scale": {**good, f"{LAYER}.dora_scale": torch.ones(width)},
        "LoHa": {f"{LAYER}.hada_w1_a": torch.ones(4, 4)},
    }
    for name, table in tables.items():
        yield f"a LoRA with {name}", lambda path, table=table: save_file(table, path), (*AS_LORA, "convert")


class Payload:
    """An object whose pickle calls `function` when it is opened."""

    def __init__(self, function: Any, *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, tuple[object, ...]]:
        return self.function, self.args


def calling(name: str, *args: object) -> bytes:
    """A pickle that calls the function of this dotted name with `args`: it need not exist here."""
    module, _, word = name.rpartition(".")
    plain = pickle.dumps(args, 2)[2:-1]
    return b"\x80\x02}q\x00X\x01\x00\x00\x00ac" + f"{module}\n{word}\n".encode() + plain + b"Rs."


def zipped(
    table: bytes, *, top: str = "archive", more: dict[str, bytes] | None = None, pack: int = 0
) -> bytes:
    """A zip as torch.save makes it, around this pickle."""
    import io

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", pack) as archive:
        for name, data in {
            "data.pkl": table,
            "byteorder": b"little",
            "version": b"3\n",
            **(more or {}),
        }.items():
            archive.writestr(f"{top}/{name}" if top else name, data)
    return file.getvalue()


def tensor_of(
    *, size: bytes, stride: bytes, offset: bytes = b"K\x00", numel: bytes = b"K\x02", key: str = "0"
) -> bytes:
    """The pickle of a table with one tensor, in the words of torch.save."""
    place = b"X" + struct.pack("<I", len(key)) + key.encode()
    return (
        b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        + place + b"X\x03\x00\x00\x00cpu" + numel + b"tQ" + offset + size + stride + b"\x89}tRs."
    )  # fmt: skip


def _calls(root: Path) -> dict[str, bytes]:
    """Name to pickle of everything that is called to get at a computer."""
    touch, file = f"touch '{marker(root)}'", str(marker(root))
    python = f"open({file!r}, 'w')"
    calls: dict[str, tuple[object, ...]] = {
        "os.system": (touch,),
        "posix.system": (touch,),
        "nt.system": (touch,),
        "os.popen": (touch,),
        "os.execv": ("/usr/bin/touch", ("touch", file)),
        "os.posix_spawn": ("/usr/bin/touch", ("touch", file), {}),
        "subprocess.Popen": (touch, -1, None, None, None, None, None, True, True),
        "subprocess.getoutput": (touch,),
        "pty.spawn": (("touch", file),),
        "builtins.eval": (python,),
        "builtins.exec": (python,),
        "__builtin__.eval": (python,),
        "builtins.open": (file, "w"),
        "builtins.__import__": ("antigravity",),
        "builtins.getattr": ((), "__class__"),
        "builtins.breakpoint": (),
        "builtins.input": (),
        "importlib.import_module": ("antigravity",),
        "runpy.run_path": (file,),
        "code.interact": (),
        "timeit.timeit": (python,),
        "cProfile.run": (python,),
        "pdb.run": (python,),
        "shutil.rmtree": (str(root / "gone"),),
        "os.remove": (file,),
        "urllib.request.urlopen": ("http://127.0.0.1:9/",),
        "socket.create_connection": (("127.0.0.1", 9),),
        "webbrowser.open": ("http://127.0.0.1:9/",),
        "ctypes.CDLL": ("libc.so.6",),
        "torch.hub.load": ("evil/evil", "model"),
        "torch.jit.load": (file,),
        "torch.utils.cpp_extension.load": ("evil", file),
        "torch._inductor.codecache.compile_file": (file, file, ("touch", file)),
        "torch.storage._load_from_bytes": (pickle.dumps(Payload(os.system, touch), 2),),
        "numpy.load": (file, "r", True),
        "numpy.testing._private.utils.runstring": (python, {}),
        "pickle.loads": (pickle.dumps(Payload(os.system, touch), 2),),
        "joblib.load": (file,),
        "operator.methodcaller": ("system", touch),
        "functools.partial": (touch,),
        "types.FunctionType": ((), {}),
        "multiprocessing.util.spawnv_passfds": (b"/usr/bin/touch", (b"touch",), ()),
        "sdlab.cli.main": (("train-sd",),),
    }
    return {name: calling(name, *args) for name, args in calls.items()}


def _pickles(root: Path) -> Iterator[tuple[str, str, bytes, tuple[str, ...]]]:
    suffixes = (".ckpt", ".pt", ".bin", ".safetensors", ".pth")
    calls = _calls(root)
    for number, (name, table) in enumerate(calls.items()):
        suffix = suffixes[number % len(suffixes)]
        data = table if number % 3 == 2 else zipped(table, more={"data/0": bytes(8)})
        yield f"a pickle that calls {name}", suffix, data, AS_PICKLE
    system = calls["posix.system"]
    size, stride = b"K\x02\x85", b"K\x01\x85"
    plain = tensor_of(size=size, stride=stride)
    weights = {"data/0": bytes(8)}
    old = (
        pickle.dumps(0x1950A86A20F9469CFC6C, 2)
        + pickle.dumps(1001, 2)
        + pickle.dumps({"little_endian": True}, 2)
    )
    crafted = {
        "in torch's old format": old + system + pickle.dumps([], 2),
        "before torch's old format": system + old + pickle.dumps([], 2),
        "after the table": zipped(plain + system, more={"data/0": b""}),
        "of protocol 4": pickle.dumps({"a": Payload(os.system, f"touch '{marker(root)}'")}, 4),
        "of protocol 5 in a zip": zipped(pickle.dumps({"a": Payload(os.system, "true")}, 5), more=weights),
        "of protocol 0": pickle.dumps({"a": Payload(os.system, "true")}, 0),
        "by INST": zipped(b"\x80\x02(S'true'\niposix\nsystem\n.", more=weights),
        "by OBJ": zipped(b"\x80\x02(cposix\nsystem\nX\x04\x00\x00\x00trueo.", more=weights),
        "by an extension": zipped(b"\x80\x02\x82\x01.", more=weights),
        "by a name": zipped(b"\x80\x02Pevil\n.", more=weights),
        "cut in the table": zipped(plain[:40], more=weights),
        "that never stops": zipped(plain[:-1], more=weights),
        "that underflows": zipped(b"\x80\x02RRRR.", more=weights),
        "of a text of 4 GB": zipped(b"\x80\x02X\xff\xff\xff\xffa.", more=weights),
        "of a number of 2 GB": zipped(b"\x80\x02\x8b\xff\xff\xff\x7f1.", more=weights),
        "of 5 MB of nothing": zipped(b"\x80\x02" + b"N0" * 2_500_000 + b"}.", more=weights),
        "of no tensors": zipped(b"\x80\x02}.", more=weights),
        "of a list": zipped(b"\x80\x02].", more=weights),
        "compressed, a bomb": zipped(plain, more={"data/0": bytes(50_000_000)}, pack=zipfile.ZIP_DEFLATED),
        "in two tables": zipped(plain, more={"x/data.pkl": system}),
        "with names that climb out": zipped(plain, more={"../../../../tmp/evil": b"x", "data/0": bytes(8)}),
        "with other folders": zipped(plain, top="", more={"/etc/passwd": b"x", "../evil": b"x"}),
        "in a zip in a zip": zipped(b"", top="", more={"model.ckpt": zipped(system)}),
        "as TorchScript": zipped(plain, more={"constants.pkl": b"\x80\x02).", "code/__torch__.py": b"import os"}),
        "of a big-endian computer": zipped(plain, more={**weights, "byteorder": b"big"}),
        "with a link": zipped(plain, more={"data/0": b"/etc/passwd"})[:-30],
    }  # fmt: skip
    for name, data in crafted.items():
        yield f"a pickle {name}", suffixes[len(name) % 3], data, AS_PICKLE
    hashes = b"\x80\x02}" + b")" + b"q\x00h\x00\x86" * 60 + b"K\x01s."
    deep = b"\x80\x02}" + b"N" + b"\x85" * 200_000 + b"K\x01s."
    lies = {  # these are refused by torch, or after it: each takes its start of a second or two
        "whose key takes for ever to hash": hashes,
        "whose key is 200,000 deep": deep,
        "that calls torch.load": calling("torch.load", str(marker(root))),
        "that calls for 2 GB": b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
        "of a tensor larger than what is stored": tensor_of(size=b"K\x09\x85", stride=stride),
        "of a tensor without end": tensor_of(
            size=b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86", stride=b"K\x00K\x00\x86"
        ),
        "of a tensor before its storage": tensor_of(size=size, stride=stride, offset=b"J\xff\xff\xff\xff"),
        "of a storage larger than its record": tensor_of(
            size=b"M\xe8\x03\x85", stride=stride, numel=b"M\xe8\x03"
        ),
        "of a storage that climbs out": tensor_of(size=size, stride=stride, key="../../../etc/passwd"),
        "of a tensor that is no model": plain,
    }
    for name, table in lies.items():
        yield f"a pickle {name}", ".ckpt", zipped(table, more=weights), AS_PICKLE[:1] + AS_PICKLE[-2:]


def _folders() -> Iterator[tuple[str, Callable[[Path], object], tuple[str, ...]]]:
    """Pipeline folders that ask for foreign code, absurd sizes or files elsewhere."""
    code = "open('PAYLOAD', 'w')\nclass Evil: pass\n"

    def index(**parts: object) -> Callable[[Path], object]:
        return lambda folder: edit_json(folder / "model_index.json", **parts)

    def config(part: str, **values: object) -> Callable[[Path], object]:
        return lambda folder: edit_json(folder / part / "config.json", **values)

    def text(name: str, data: bytes | str) -> Callable[[Path], object]:
        raw = data.encode() if isinstance(data, str) else data
        return lambda folder: (folder / name).write_bytes(raw)

    def with_code(change: Callable[[Path], object]) -> Callable[[Path], object]:
        def write(folder: Path) -> None:
            for part in (".", "unet", "vae", "text_encoder", "tokenizer", "scheduler"):
                for name in (
                    "evil.py",
                    "pipeline.py",
                    "modeling_evil.py",
                    "__init__.py",
                    "unet.py",
                    "my_module.py",
                ):
                    (folder / part / name).write_text(code, encoding="utf-8")
            change(folder)

        return write

    def shards(weight_map: object, *others: Callable[[Path], object]) -> Callable[[Path], object]:
        def write(folder: Path) -> None:
            (folder / UNET).rename(folder / "unet" / "one.safetensors")
            path = folder / f"{UNET}.index.json"
            path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
            for other in others:
                other(folder)

        return write

    def twice(folder: Path) -> None:
        shutil.copy(folder / "unet" / "one.safetensors", folder / "unet" / "two.safetensors")

    evil: dict[str, Callable[[Path], object]] = {
        "names its own class": with_code(index(unet=["my_module", "Evil"])),
        "names a class of its own pipeline file": with_code(index(unet=["pipeline", "Evil"])),
        "names a class of its own unet file": with_code(index(unet=["unet", "UNet2DConditionModel"])),
        "names a module of the hub's": with_code(index(unet=["diffusers_modules", "UNet2DConditionModel"])),
        "names a known class of another library": with_code(index(scheduler=["evil", "DDIMScheduler"])),
        "names a class of transformers' pipelines": index(text_encoder=["transformers", "pipeline"]),
        "names a class of os": index(vae=["os", "system"]),
        "names a class by path": index(vae=["../../evil", "AutoencoderKL"]),
        "names a list for a pipeline": index(_class_name=["pipeline", "Evil"]),
        "names an object for a pipeline": index(_class_name={"a": 1}),
        "names a pipeline of its own": with_code(index(_class_name="EvilPipeline")),
        "names a pipeline with escape codes": index(_class_name="\x1b[2J\nEvil"),
        "names a part of its own": with_code(index(evil=["diffusers", "UNet2DConditionModel"])),
        "names a part outside": index(**{"../../evil": ["diffusers", "UNet2DConditionModel"]}),
        "names three words for a part": index(unet=["diffusers", "UNet2DConditionModel", "evil"]),
        "names an object for a part": index(unet={"diffusers": "UNet2DConditionModel"}),
        "names a text for a part": index(unet="UNet2DConditionModel"),
        "names lists for a class": index(unet=[["diffusers"], ["UNet2DConditionModel"]]),
        "has an index of a list": text("model_index.json", "[]"),
        "has an index nested without end": text("model_index.json", '{"a":' * 100_000),
        "has an index of 40 MB": text("model_index.json", b'{"a":"' + b"x" * 40_000_000 + b'"}'),
        "has an index of a million lists": text("model_index.json", b'{"a":[' + b"[]," * 1_000_000 + b"[]]}"),
        "asks for a UNet of a million layers": config("unet", layers_per_block=10**6),
        "asks for a UNet of 10^9 channels": config("unet", block_out_channels=[10**9] * 3),
        "asks for a UNet of 10^30 channels": config("unet", in_channels=10**30),
        "asks for a UNet of a million blocks": config("unet", down_block_types=["DownBlock2D"] * 10**6),
        "asks for a UNet of 64 wide blocks": config(
            "unet",
            block_out_channels=[8192] * 64,
            down_block_types=["CrossAttnDownBlock2D"] * 64,
            up_block_types=["CrossAttnUpBlock2D"] * 64,
            layers_per_block=16,
            transformer_layers_per_block=64,
            attention_head_dim=8,
        ),
        "asks for negative channels": config("unet", block_out_channels=[-32, -32, -32]),
        "asks for half a layer": config("unet", layers_per_block=1.5),
        "asks for blocks of its own": with_code(config("unet", down_block_types=["evil.Block"] * 3)),
        "asks for a UNet of texts": config("unet", block_out_channels="32, 32, 32"),
        "asks for a UNet of objects": config("unet", block_out_channels=[{"a": 1}] * 3),
        "asks for an activation of its own": config("unet", act_fn="__import__('os').system('true')"),
        "asks for an attention of its own": config("unet", attention_type="evil", dual_cross_attention=True),
        "asks for another class of UNet": with_code(config("unet", _class_name="Evil")),
        "asks for no groups": config("unet", norm_num_groups=0),
        "asks for an endless tokenizer": config("text_encoder", vocab_size=10**15),
        "asks for a million heads": config("text_encoder", num_attention_heads=10**6),
        "asks for an odd number of heads": config("text_encoder", num_attention_heads=7),
        "asks for a text encoder of texts": config("text_encoder", hidden_size="wide"),
        "asks for an activation by path": with_code(config("text_encoder", hidden_act="evil.act")),
        "asks for a VAE of a thousand blocks": config("vae", block_out_channels=[8] * 1000),
        "asks for a VAE of no channels": config("vae", latent_channels=0),
        "asks for a VAE of null": config("vae", block_out_channels=None),
        "has a configuration of NaN": text("unet/config.json", '{"sample_size": NaN}'),
        "has a configuration of a web page": text("unet/config.json", "<!doctype html><html></html>"),
        "has a configuration that is a pickle": text("unet/config.json", b"\x80\x02}."),
        "has a tokenizer of nothing": text("tokenizer/tokenizer.json", "{}"),
        "has a tokenizer of noise": text("tokenizer/tokenizer.json", np.random.default_rng(1).bytes(999)),
        "has a tokenizer of lists": text("tokenizer/tokenizer.json", '{"model": [[[[]]]], "version": "1.0"}'),
        "has a vocabulary of numbers": text("tokenizer/vocab.json", '{"1": "2", "3": []}'),
        "has a vocabulary beyond its encoder": text("tokenizer/vocab.json", '{"a": 999999999999}'),
        "has a scheduler of a million steps": lambda f: edit_json(
            f / "scheduler/scheduler_config.json", num_train_timesteps=10**9
        ),
        "has a scheduler of lists": lambda f: edit_json(
            f / "scheduler/scheduler_config.json", beta_start=[[1]]
        ),
        "has a scheduler of its own": with_code(index(scheduler=["evil", "Evil"])),
        "has shards outside": shards({"a": "../../good.safetensors"}),
        "has shards at the root": shards({"a": "/etc/passwd.safetensors"}),
        "has shards on a server": shards({"a": "https://127.0.0.1:9/model.safetensors"}),
        "has shards with a NUL": shards({"a": "a\0.safetensors"}),
        "has shards with escape codes": shards({"a": "\x1b[2J.safetensors"}),
        "has shards of half a character": shards({"a": "\ud800.safetensors"}),
        "has shards with backslashes": shards({"a": "..\\..\\one.safetensors"}),
        "has shards that are pickles": shards({"a": "one.bin"}),
        "has 10^5 shards": shards({str(i): f"{i}.safetensors" for i in range(100_000)}),
        "has shards that are not there": shards({"a": "one.safetensors", "b": "gone.safetensors"}),
        "has shards that hold the same": shards({"a": "one.safetensors", "b": "two.safetensors"}, twice),
        "has shards without what they list": shards({"no.such.tensor": "one.safetensors"}),
        "has shards of numbers": shards({"a": 1}),
        "has shards in a list": shards(["one.safetensors"]),
        "has an index that is its own shard": shards(
            {"a": "diffusion_pytorch_model.safetensors"}, lambda f: (f / UNET).symlink_to(f / UNET)
        ),
        "has a UNet that is a pickle": lambda f: (
            (f / UNET).unlink(),
            (f / "unet/diffusion_pytorch_model.bin").write_bytes(zipped(calling("posix.system", "true"))),
        ),
        "has a UNet of another part": lambda f: shutil.copy(f / VAE, f / UNET),
        "has a text encoder of whole numbers": lambda f: edit_tensors(
            f / TEXT, lambda t: t.update({n: x.to(torch.int32) for n, x in t.items()})
        ),
        "has a VAE of pipes": lambda f: ((f / VAE).unlink(), os.mkfifo(f / VAE)),
        "has a folder for a configuration": lambda f: (
            (f / "unet/config.json").unlink(),
            (f / "unet/config.json").mkdir(),
        ),
        "has parts in a circle": lambda f: (shutil.rmtree(f / "vae"), (f / "vae").symlink_to(f)),
        "says that it is a run of itself": lambda f: (
            (f / "model_index.json").unlink(),
            (f / "run.json").write_text(json.dumps({"base": "../model", "arguments": {"load_model": "."}})),
        ),
        "is empty": lambda f: (shutil.rmtree(f), f.mkdir()),
    }
    for name, change in evil.items():
        # a single file takes nothing from the tokenizer, so none of it is read for one
        no_file = "tokenizer" in name or "vocabulary" in name
        yield f"a folder that {name}", change, ("generate", "check") if no_file else AS_MODEL


def _flux2_folders() -> Iterator[tuple[str, Callable[[Path], object], tuple[str, ...]]]:
    """The same of FLUX.2."""

    def config(part: str, **values: object) -> Callable[[Path], object]:
        return lambda folder: edit_json(folder / part / "config.json", **values)

    evil: dict[str, Callable[[Path], object]] = {
        "names its own class": lambda f: edit_json(f / "model_index.json", transformer=["evil", "Evil"]),
        "names a class of another library": lambda f: edit_json(
            f / "model_index.json", text_encoder=["evil", "Qwen3ForCausalLM"]
        ),
        "asks for a million blocks": config("transformer", num_layers=10**6),
        "asks for many wide blocks": config(
            "transformer", num_layers=64, num_single_layers=128, num_attention_heads=256
        ),
        "asks for no heads": config("transformer", num_attention_heads=0),
        "asks for axes of objects": config("transformer", axes_dims_rope=[{"a": 1}] * 4),
        "asks for axes of texts": config("transformer", axes_dims_rope="32"),
        "asks for axes of another width": config("transformer", axes_dims_rope=[2, 2, 2, 2]),
        "asks for another text encoder": config("text_encoder", model_type="evil"),
        "asks for odd heads": config("text_encoder", num_attention_heads=7),
        "asks for a text encoder of texts": config("text_encoder", hidden_size="wide"),
        "asks for a vocabulary without end": config("text_encoder", vocab_size=10**12),
        "asks for a VAE of 10^9 channels": config("vae", latent_channels=10**9),
        "has a chat template of 100 MB": lambda f: os.truncate(f / "tokenizer/chat_template.jinja", 100_000_000),
        "has a tokenizer of lists": lambda f: (f / "tokenizer/tokenizer.json").write_text('{"model": [[[]]]}'),
        "has a tokenizer of a regular expression without end": lambda f: edit_json(
            f / "tokenizer/tokenizer.json",
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "(" * 5000}, "behavior": "Isolated", "invert": False},
        ),
        "has a scheduler of text": lambda f: edit_json(
            f / "scheduler/scheduler_config.json", num_train_timesteps="many"
        ),
        "has a cut transformer": lambda f: os.truncate(
            f / "transformer/diffusion_pytorch_model.safetensors", 5000
        ),
    }  # fmt: skip
    for name, change in evil.items():
        no_file = "token" in name or "template" in name
        yield f"a folder of FLUX.2 that {name}", change, ("generate", "check") if no_file else AS_MODEL
