"""A heap with sixty nasty files in it, and what is to be said of each."""

from __future__ import annotations

import io
import os
import socket
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from sdlab.testing.scenes import draw, generator, random_scene

SUFFIXES = (".jpg", ".png", ".webp", ".bmp")


class Heap(NamedTuple):
    """Where the heap is, and the ids of what is in it."""

    root: Path
    good: frozenset[str]  # pictures that can be used, odd ones among them
    refused: frozenset[str]  # to be named with a reason
    num_nasty: int


def heap(root: Path, *, num_good: int = 200) -> Heap:
    """Draws `num_good` scenes below `root` and mixes the nasty files in."""
    good = {_scene(root, number) for number in range(num_good)}
    refused, odd = _broken(root), _odd_but_good(root)
    refused |= _not_files(root) | _orphans(root)
    num_captions = _captions(root)
    return Heap(root, frozenset(good | odd), frozenset(refused), len(refused) + len(odd) + num_captions)


def _scene(root: Path, number: int) -> str:
    rng = generator(7, "heap", number)
    size = tuple(int(side) for side in rng.integers(64, 200, 2))
    id = f"{('', 'phone/', 'phone/2024_05/')[number % 3]}IMG_{number:04d}{SUFFIXES[number % len(SUFFIXES)]}"
    return _save(root, id, draw(random_scene(rng), size))


def _save(root: Path, id: str, image: Image.Image, **settings: object) -> str:
    path = root / id
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **settings)
    return id


def _put(root: Path, id: str, data: bytes) -> str:
    (root / id).parent.mkdir(parents=True, exist_ok=True)
    (root / id).write_bytes(data)
    return id


def _encoded(kind: str, **settings: object) -> bytes:
    noise = generator(7, "noise").integers(0, 256, (96, 96, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind, **settings)
    return file.getvalue()


def png_of(width: int, height: int) -> bytes:
    """A PNG of one colour with true checksums: small on disk, large in memory."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(b"\0" * (width + 1)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _broken(root: Path) -> set[str]:
    """Files with a picture's name that are none, or only half of one."""
    jpeg, png, webp, gif = _encoded("JPEG"), _encoded("PNG"), _encoded("WEBP"), _encoded("GIF")
    scrambled = bytearray(png)
    scrambled[len(png) // 2 : len(png) // 2 + 40] = b"\xa5" * 40
    files = {
        "zero.jpg": b"",
        "zero.png": b"",
        "phone/zero.webp": b"",
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated.png": png[: len(png) // 2],
        "truncated.webp": webp[: len(webp) // 2],
        "truncated.bmp": _encoded("BMP")[:4000],
        "only_a_header.jpg": jpeg[:20],
        "only_a_header.gif": gif[:10],
        "scrambled.png": bytes(scrambled),
        "text.jpg": b"this is a note, not a picture\n",
        "web_page.jpg": b"<!DOCTYPE html><html><body>403</body></html>",
        "pointer.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n",
        "archive.jpg": b"PK\x03\x04" + b"\0" * 60,
        "manual.png": b"%PDF-1.7\n" + b"\0" * 60,
        "film.jpg": b"\0\0\0\x20ftypisom" + b"\0" * 60,
        "drawing.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "layers.png": b"8BPS" + b"\0" * 60,
        "zeros.jpg": b"\0" * 5000,
        "noise.webp": generator(7, "bytes").bytes(5000),
        "bomb.png": png_of(13_000, 13_000),
        "wide_bomb.png": png_of(90_000_000, 1),
        "lying_bomb.gif": b"GIF89a\xff\xff\xff\xff\x80\0\0" + b"\0" * 40,
        "no_suffix": jpeg,
        "program.exe": b"MZ" + b"\0" * 60,
        "notes.docx": b"PK\x03\x04" + b"\0" * 60,
        "film.mp4": b"\0\0\0\x20ftypisom" + b"\0" * 60,
        "camera.heic": b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + b"\0" * 60,
    }
    return {_put(root, id, data) for id, data in files.items()}


def _odd_but_good(root: Path) -> set[str]:
    """Strange to a careless reader, and pictures all the same."""
    scene = draw(random_scene(generator(7, "odd")), (90, 120))
    exif = Image.Exif()
    exif[0x0112] = 6
    still = [draw(random_scene(generator(7, "frame", i)), (64, 64)) for i in range(3)]
    odd = {
        _save(root, "turned.jpg", scene, exif=exif),
        _save(root, "ink.jpg", scene.convert("CMYK")),
        _save(root, "clear.png", scene.convert("RGBA")),
        _save(root, "deep.png", Image.fromarray(np.full((64, 64), 40_000, np.uint16))),
        _save(root, "moving.gif", still[0], save_all=True, append_images=still[1:]),
        _save(root, "moving.webp", still[0], save_all=True, append_images=still[1:]),
        _save(root, "LOUD.JPG", scene),
        _save(root, "with space and, comma.png", scene),
        _save(root, "-rf.png", scene),
        _save(root, "$(touch pwned).png", scene),
        _save(root, "new\nline.png", scene),
        _save(root, "絵.png", scene),
        _save(root, "e\u0301te\u0301.png", scene),
        _save(root, "con.png", scene),
        _save(root, "trailing. .png", scene),
        _save(root, "a" * 200 + ".png", scene),
        _save(root, "[red] {blue}%s.png", scene),
        _put(root, "really_a_png.jpg", _encoded("PNG")),
        _put(root, "really_a_jpeg.png", _encoded("JPEG")),
    }
    latin = os.fsencode(root) + b"/caf\xe9.png"
    scene.save(os.fsdecode(latin), "PNG")
    return odd | {os.fsdecode(b"caf\xe9.png")}


def _not_files(root: Path) -> set[str]:
    """Links that lead nowhere or round in circles, pipes, sockets, folders with a picture's name."""
    (root / "dangling.png").symlink_to(root / "gone.png")
    (root / "itself.png").symlink_to(root / "itself.png")
    (root / "circle").symlink_to(root)
    (root / "phone" / "up").symlink_to("..")
    os.mkfifo(root / "pipe.jpg")
    here = os.getcwd()
    os.chdir(root)  # a socket's path may be 108 bytes long at most
    try:
        with socket.socket(socket.AF_UNIX) as plug:
            plug.bind("plug.png")
    finally:
        os.chdir(here)
    (root / "folder.png").mkdir()
    closed = {"circle", "phone/up", "dangling.png", "itself.png", "pipe.jpg", "plug.png"}
    if os.geteuid() != 0:  # nothing is closed to root
        (root / "locked").mkdir(mode=0)
        closed.add("locked")
    return closed


def _orphans(root: Path) -> set[str]:
    """A caption and a reference without their pictures."""
    return {_put(root, "orphan.cap", b"whose am I?"), _put(root, "orphan.ref.png", _encoded("PNG"))}


def _captions(root: Path) -> int:
    """Captions in encodings and states that people really have; how many."""
    captions = {
        "IMG_0000.cap": "\ufeffa red fish\n".encode(),
        "IMG_0003.cap": "a blue house".encode("utf-16"),
        "IMG_0006.txt": "赤い魚".encode("cp932"),
        "IMG_0009.cap": b"\xff\xfe\x00\xd8\x00",
        "IMG_0012.cap": b"",
        "IMG_0015.cap": b"# only a comment\n",
        "IMG_0018.cap": b"\0\x01\x02" * 100,
        "IMG_0021.cap": b"a long one " * 20_000,
    }
    for id, data in captions.items():
        _put(root, id, data)
    return len(captions)
