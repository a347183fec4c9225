"""Recipes in PNG, JPEG and WebP files, whole and broken."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdlab.errors import SdlabError
from sdlab.inference.record import metadata, segments
from sdlab.inference.record.container import LARGE_BYTES, check_fits, encoded, found_in, to_json
from sdlab.inference.record.segments import MAKER_NOTE, USER_COMMENT, exif_block, exif_values
from sdlab.inference.spec import FORMATS, Format
from tests.inference.record.recipes import INIT, SHOT, recipe


def noise(size: tuple[int, int] = (24, 16)) -> Image.Image:
    draw = random.Random(1)
    return Image.frombytes("RGB", size, bytes(draw.randrange(256) for _ in range(3 * size[0] * size[1])))


def written(tmp_path: Path, about: dict[str, Any], form: Format) -> Path:
    path = tmp_path / f"picture{form.suffix}"
    path.write_bytes(encoded(noise(), about, form))
    return path


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "prompt", ["red star", "猫 🐈", "nul \x00 \x1b[2J \u2028", "half \udce9", "x" * 10_000]
)
def test_recipe_comes_back_as_it_was(tmp_path: Path, prompt: str, name: str) -> None:
    about = recipe(prompt=prompt, init={**INIT, "name": "caf\udce9.png"}, strength=0.5)
    assert metadata.read(written(tmp_path, about, Format(name))) == about


@pytest.mark.parametrize("form", [Format(), Format("jpeg"), Format("webp"), Format("webp", 100)])
def test_same_recipe_gives_the_same_bytes(form: Format) -> None:
    assert encoded(noise(), recipe(), form) == encoded(noise(), recipe(), form)


def test_pixels_are_those_of_the_picture() -> None:
    for form in (Format(), Format("webp", 100)):
        with Image.open(io.BytesIO(encoded(noise(), recipe(), form))) as image:
            assert image.convert("RGB").tobytes() == noise().tobytes()
    with Image.open(io.BytesIO(encoded(noise(), recipe(), Format("jpeg")))) as image:
        assert "progressive" not in image.info and [layer[1:3] for layer in image.layer] == [(1, 1)] * 3
    sizes = [len(encoded(noise(), recipe(), Format(name, q))) for name in ("jpeg", "webp") for q in (30, 90)]
    assert sizes[0] < sizes[1] and sizes[2] < sizes[3]


def test_large_recipes_are_packed_and_too_large_ones_refused(tmp_path: Path) -> None:
    batch = [{**SHOT, "prompt": f"a picture of number {i}", "index": i} for i in range(1024)]
    about = recipe(batch=batch)
    assert len(to_json(about)) > 65536 > LARGE_BYTES
    for name in ("jpeg", "webp"):
        path = written(tmp_path, about, Format(name))
        assert metadata.read(path) == about and b"a picture of number 7" not in path.read_bytes()
    check_fits(about, Format("jpeg"))
    for prompt in ("x" * 40_000, "猫" * 40_000):  # the text for others cannot be packed
        with pytest.raises(SdlabError, match=r"holds 64 KB.*png or webp"):
            encoded(noise(), recipe(prompt=prompt), Format("jpeg"))
        with pytest.raises(SdlabError, match=r"holds 64 KB.*png or webp"):
            check_fits(recipe(prompt=prompt), Format("jpeg"))
        for name in ("png", "webp"):
            check_fits(recipe(prompt=prompt), Format(name))
        assert metadata.read(written(tmp_path, recipe(prompt=prompt), Format("webp")))["prompt"] == prompt


def test_picture_too_large_for_webp_is_refused() -> None:
    with pytest.raises(SdlabError, match="16384x1 is more than a WebP holds"):
        encoded(Image.new("RGB", (16384, 1)), recipe(), Format("webp"))


@pytest.mark.parametrize("order", "<>")
def test_exif_of_other_programs_is_read(order: str) -> None:
    entries = struct.pack(f"{order}HHHII", 1, USER_COMMENT, 7, 10, 44) + b"\0" * 4
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    block = head + struct.pack(f"{order}HHHIII", 1, 0x8769, 4, 1, 26, 0) + entries + b"ASCII\0\0\0hi"
    assert exif_values(block) == {USER_COMMENT: b"ASCII\0\0\0hi"}


def test_our_exif_is_read_by_others() -> None:
    values = {USER_COMMENT: b"UNICODE\0\0x", MAKER_NOTE: b"sdlab\0{}"}
    assert exif_values(exif_block(values)) == values
    read = Image.Exif()
    read.load(b"Exif\0\0" + exif_block(values))
    inner = read.get_ifd(0x8769)
    assert inner == {0x9000: b"0232", **values}


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    return segments.PNG + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


END = (b"IEND", b"")
BOMB = zlib.compress(b" " * (segments.MAX_BYTES + 1))


def in_jpeg(block: bytes) -> bytes:
    data = b"Exif\0\0" + block
    return b"\xff\xd8\xff\xe1" + struct.pack(">H", len(data) + 2) + data + b"\xff\xda"


def in_webp(block: bytes) -> bytes:
    return b"RIFF\0\0\0\0WEBPEXIF" + struct.pack("<I", len(block)) + block


HOSTILE = {
    "empty": b"",
    "text": b"no picture",
    "gif": b"GIF89a",
    "png signature": segments.PNG,
    "huge png chunk": segments.PNG + b"\xff\xff\xff\xffiTXt",
    "huge other chunk": segments.PNG + b"\x7f\xff\xff\xffIDAT",
    "wrong sum": png((b"iTXt", b"sdlab\0\0\0\0\0{}"), END)[:-14] + b"0000" + png(END)[8:],
    "not utf-8": png((b"iTXt", b"sdlab\0\0\0\0\0\xff"), END),
    "png bomb": png((b"iTXt", b"sdlab\0\1\0\0\0" + BOMB), END),
    "zTXt bomb": png((b"zTXt", b"sdlab\0\0" + BOMB), END),
    "bad zlib": png((b"zTXt", b"sdlab\0\0no"), END),
    "half a chunk": png((b"iTXt", b"sdlab\0"))[:-5],
    "jpeg bomb": in_jpeg(exif_block({MAKER_NOTE: b"sdlabz\0" + BOMB})),
    "webp bomb": in_webp(exif_block({MAKER_NOTE: b"sdlabz\0" + BOMB})),
    "jpeg note not utf-8": in_jpeg(exif_block({MAKER_NOTE: b"sdlab\0\xff\xff"})),
    "exif beyond the end": in_jpeg(b"MM\0*\xff\xff\xff\xff"),
    "value beyond the end": in_jpeg(exif_block({MAKER_NOTE: b"sdlab\0{}"})[:-3]),
    "directory of itself": in_jpeg(b"MM\0*\0\0\0\x08" + struct.pack(">HHHIII", 1, 0x8769, 4, 1, 8, 0)),
    "no exif": in_jpeg(b"XX"),
    "jpeg cut off": in_jpeg(exif_block({MAKER_NOTE: b"sdlab\0{}"}))[:30],
    "jpeg of zeros": b"\xff\xd8\xff" + b"\0" * 100,
    "jpeg of short segments": b"\xff\xd8" + b"\xff\xe1\0\0" * 10,
    "huge webp chunk": b"RIFF\0\0\0\0WEBPEXIF\xff\xff\xff\xff",
    "webp cut off": b"RIFF\0\0\0\0WEBPVP8 \xff\xff\xff\xff",
    "text without a key": png((b"tEXt", b""), (b"iTXt", b"x"), END),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_an_error_in_words(tmp_path: Path, name: str) -> None:
    path = tmp_path / "hostile.png"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(SdlabError, match=r"hostile\.png") as caught:
        metadata.read(path)
    assert "\n" not in str(caught.value) and metadata.peek(path) is None


def test_texts_that_are_large_together_are_refused_before_they_fill_the_memory() -> None:
    third = zlib.compress(b" " * (segments.MAX_BYTES // 3))
    data = png(*((b"zTXt", b"%d\0\0" % n + third) for n in range(4)), END)
    with pytest.raises(segments.Broken, match="too large"):
        segments.png_texts(io.BytesIO(data[len(segments.PNG) :]))


@pytest.mark.parametrize("name", FORMATS)
def test_no_damage_is_more_than_an_error(tmp_path: Path, name: str) -> None:
    whole = encoded(noise((8, 8)), recipe(), Format(name))
    path, draw = tmp_path / "damaged", random.Random(2)
    for _ in range(150):
        data = bytearray(whole[: draw.randrange(len(whole)) if draw.random() < 0.5 else None])
        for _ in range(draw.randrange(4)):
            data[draw.randrange(len(data))] = draw.randrange(256) if data else 0
            if not data:
                break
        path.write_bytes(data)
        found = metadata.peek(path)
        assert found is None or found["schema"] == 3


def test_text_behind_the_pixels_and_a_cut_off_end_are_no_matter(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    text = (b"iTXt", b"sdlab\0\0\0\0\0" + to_json(recipe()).encode())
    path.write_bytes(png((b"IDAT", b"x" * 1000), text, END))
    assert metadata.read(path) == recipe()
    path.write_bytes(encoded(noise(), recipe(), Format())[:-40])
    assert metadata.read(path) == recipe()
    packed = b"sdlab\0\1\0\0\0" + zlib.compress(to_json(recipe()).encode())
    path.write_bytes(png((b"iTXt", packed), END))
    assert metadata.read(path) == recipe()


def test_folders_and_pipes_are_not_opened(tmp_path: Path) -> None:
    with pytest.raises(SdlabError, match="no such picture"):
        found_in(tmp_path)
    with pytest.raises(SdlabError, match="no such picture"):
        found_in(tmp_path / "gone.png")


def test_nothing_is_unpacked_beyond_its_limit_or_in_part() -> None:
    for packed in (BOMB, zlib.compress(b"x" * 100)[:-6], b"", b"no"):
        with pytest.raises(segments.Broken):
            segments.unpacked(packed)
    assert segments.unpacked(zlib.compress(b"x" * 100)) == b"x" * 100
