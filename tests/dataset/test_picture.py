"""Picture files: right pixels or a reason, whatever the file is."""

from __future__ import annotations

import io
import os
import struct
import threading
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, ImageOps, features

from sdlab.dataset.picture import Unusable, cover, looks_whole, open_picture, read_size, sha256_of

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def saved(path: Path, image: Image.Image, **settings: object) -> str:
    image.save(path, **settings)
    return str(path)


def quarter(mode: str = "RGB") -> Image.Image:
    """32x16, its top left quarter red, the rest blue."""
    image = Image.new("RGB", (32, 16), BLUE)
    image.paste(RED, (0, 0, 16, 8))
    return image.convert(mode)


def png(
    width: int, height: int, *, chunks: bytes = b"", depth: int = 8, colour: int = 2, after: bytes = b""
) -> bytes:
    """A PNG with any header, its pixels missing unless they are in `chunks`."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunks + after + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def near(image: Image.Image, xy: tuple[int, int], colour: tuple[int, int, int], within: int = 4) -> bool:
    pixel = image.getpixel(xy)
    assert isinstance(pixel, tuple)
    return all(abs(a - b) <= within for a, b in zip(pixel, colour, strict=True))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_every_format_opens_whatever_its_suffix(tmp_path: Path, kind: str, suffix: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path = saved(tmp_path / f"a{suffix}", Image.new("RGB", (40, 20), (200, 30, 40)), format=kind)
    image = open_picture(path)
    assert (image.mode, image.size, read_size(path)) == ("RGB", (40, 20), (20, 40))
    assert near(image, (5, 5), (200, 30, 40), 6)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_exif_orientation_is_applied_to_pixels_and_size(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    path = saved(tmp_path / "a", quarter(), format=kind, exif=exif, quality=100)
    with Image.open(path) as plain:
        expected = ImageOps.exif_transpose(plain).convert("RGB")
    image = open_picture(path)
    assert image.size == expected.size == read_size(path)[::-1]
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 2
    corners = {6: (-1, 0), 3: (-1, -1), 8: (0, -1)}
    if orientation in corners:  # the red corner, by the standard and not by Pillow
        x, y = corners[orientation]
        assert near(image, (x % image.width, y % image.height), RED, 60)


def test_exif_after_the_pixels_of_a_png_is_applied_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    file = io.BytesIO()
    quarter().save(file, "PNG")
    data = file.getvalue()
    path = tmp_path / "a.png"
    path.write_bytes(data[:-12] + chunk(b"eXIf", exif.tobytes()[6:]) + data[-12:])
    assert read_size(str(path)) == (32, 16)
    assert open_picture(str(path)).size == (16, 32)
    assert near(open_picture(str(path)), (15, 0), RED)


@pytest.mark.parametrize(
    "junk",
    [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02"],
)
def test_broken_exif_does_not_cost_the_picture(tmp_path: Path, junk: bytes) -> None:
    path = saved(tmp_path / "a.jpg", quarter(), exif=junk)
    assert read_size(path) == (16, 32)
    assert open_picture(path).size == (32, 16)


def with_alpha(mode: str) -> tuple[Image.Image, dict[str, object]]:
    """16x8, left half opaque dark grey, right half transparent; and what to save it with."""
    grey = Image.new("L", (16, 8), 60)
    alpha = Image.new("L", (16, 8), 255)
    alpha.paste(0, (8, 0, 16, 8))
    rgba = Image.merge("RGBA", (grey, grey, grey, alpha))
    if mode in ("RGBA", "LA"):
        return rgba.convert(mode), {}
    cut = Image.new("L", (16, 8), 60)
    cut.paste(200, (8, 0, 16, 8))
    if mode == "P":
        palette = cut.convert("RGB").quantize(4)
        return palette, {"transparency": palette.getpixel((12, 4))}
    if mode == "P bytes":
        palette = cut.convert("RGB").quantize(4)
        keep = palette.getpixel((2, 4))
        return palette, {"transparency": bytes(255 if index == keep else 0 for index in range(4))}
    if mode == "I;16":
        deep = np.full((8, 16), 60 * 257, np.uint16)
        deep[:, 8:] = 50_000
        return Image.fromarray(deep), {"transparency": 50_000}
    if mode == "1":
        return cut.point(lambda v: 255 * (v > 100)).convert("1"), {"transparency": 1}
    return cut.convert(mode), {"transparency": 200 if mode == "L" else (200, 200, 200)}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "P bytes", "L", "RGB", "I;16", "1"])
@pytest.mark.parametrize("background", [WHITE, (0, 128, 255)])
def test_transparent_parts_show_the_background(
    tmp_path: Path, mode: str, background: tuple[int, int, int]
) -> None:
    image, settings = with_alpha(mode)
    path = saved(tmp_path / "a.png", image, **settings)
    opened = open_picture(path, background=background)
    assert opened.mode == "RGB"
    assert opened.getpixel((12, 4)) == background
    assert near(opened, (2, 4), (0, 0, 0) if mode == "1" else (60, 60, 60), 2)


def test_half_transparent_is_mixed(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.webp", Image.new("RGBA", (8, 8), (255, 0, 0, 128)), lossless=True)
    assert near(open_picture(path, background=BLUE), (4, 4), (128, 0, 127), 2)


@pytest.mark.parametrize(
    "mode, kind",
    [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("L", "JPEG"), ("1", "PNG"), ("P", "GIF"), ("LAB", "TIFF")],
)
def test_other_colour_modes_become_rgb(tmp_path: Path, mode: str, kind: str) -> None:
    if mode == "LAB":
        image = ImageCms.profileToProfile(
            Image.new("RGB", (16, 16), (200, 40, 40)),
            ImageCms.createProfile("sRGB"),
            ImageCms.createProfile("LAB"),
            outputMode="LAB",
        )
        assert image is not None
    else:
        image = Image.new("RGB", (16, 16), (200, 40, 40))
        image = image.quantize(4) if mode == "P" else image.convert(mode)
    opened = open_picture(saved(tmp_path / "a", image, format=kind))
    assert opened.mode == "RGB"
    expected = {"L": (88, 88, 88), "1": None}.get(mode, (200, 40, 40))
    assert expected is None or near(opened, (8, 8), expected, 6)


RAMPS: list[tuple[str, Callable[[], np.ndarray], str]] = [
    ("I;16 png", lambda: np.linspace(0, 65535, 256).astype(np.uint16), "PNG"),
    ("I;16 tiff", lambda: np.linspace(0, 65535, 256).astype(np.uint16), "TIFF"),
    ("I tiff of 8 bits", lambda: np.arange(256, dtype=np.int32), "TIFF"),
    ("I tiff of 16 bits", lambda: np.linspace(0, 65535, 256).astype(np.int32), "TIFF"),
    ("I tiff of 31 bits", lambda: np.linspace(0, 2**31 - 1, 256).astype(np.int32), "TIFF"),
    ("F to 1", lambda: np.linspace(0, 1, 256).astype(np.float32), "TIFF"),
    ("F to 255", lambda: np.linspace(0, 255, 256).astype(np.float32), "TIFF"),
    ("F to 65535", lambda: np.linspace(0, 65535, 256).astype(np.float32), "TIFF"),
]


@pytest.mark.parametrize("name, ramp, kind", RAMPS, ids=[row[0] for row in RAMPS])
def test_deep_grey_is_scaled_and_not_clipped(
    tmp_path: Path, name: str, ramp: Callable[[], np.ndarray], kind: str
) -> None:
    path = saved(tmp_path / "a", Image.fromarray(np.tile(ramp(), (4, 1))), format=kind)
    grey = np.asarray(open_picture(path))[0, :, 0].astype(int)
    assert np.abs(grey - np.arange(256)).max() <= 1, name


def test_a_dark_16_bit_picture_stays_dark(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(np.full((4, 4), 2570, np.uint16)))
    assert open_picture(path).getpixel((1, 1)) == (10, 10, 10)


def test_float_pictures_with_nan_and_infinity_open_or_are_refused(tmp_path: Path) -> None:
    values = np.full((4, 4), 0.5, np.float32)
    values[0] = (np.nan, np.inf, -np.inf, -3)
    image = open_picture(saved(tmp_path / "a.tif", Image.fromarray(values)))
    assert image.getpixel((1, 1)) == (128, 128, 128) and image.getpixel((0, 0)) == (0, 0, 0)
    with pytest.raises(Unusable, match="no pixel is a finite number"):
        open_picture(saved(tmp_path / "b.tif", Image.fromarray(np.full((4, 4), np.nan, np.float32))))


def swapped_profile() -> bytes:
    """sRGB with the colorants of red and blue exchanged: whoever ignores it shows blue for red."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", profile[128:132])[0]
    places = {bytes(profile[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    red, blue = places[b"rXYZ"], places[b"bXYZ"]
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile)


@pytest.mark.parametrize(
    "kind, mode",
    [("JPEG", "RGB"), ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("TIFF", "RGB"), ("WEBP", "RGB")],
)
def test_colour_profiles_are_applied(tmp_path: Path, kind: str, mode: str) -> None:
    image = Image.new("RGB", (16, 16), (250, 10, 10))
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    path = saved(tmp_path / "a", image, format=kind, icc_profile=swapped_profile())
    assert near(open_picture(path), (8, 8), (10, 10, 250), 12)


@pytest.mark.parametrize("profile", [b"", b"junk" * 50, swapped_profile()[:300]])
def test_broken_profiles_are_ignored(tmp_path: Path, profile: bytes) -> None:
    path = saved(tmp_path / "a.png", Image.new("RGB", (8, 8), RED), icc_profile=profile)
    assert open_picture(path).getpixel((4, 4)) == RED


def test_the_srgb_profile_changes_no_pixel(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = saved(tmp_path / "a.png", noise, icc_profile=srgb)
    assert open_picture(path).tobytes() == noise.tobytes()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_counts(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE, WHITE)]
    path = saved(tmp_path / "a", frames[0], format=kind, save_all=True, append_images=frames[1:])
    assert near(open_picture(path), (8, 8), RED, 8)


def test_a_multi_picture_jpeg_gives_its_first(tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (32, 32), colour) for colour in (RED, BLUE))
    path = saved(tmp_path / "a.jpg", red, format="MPO", save_all=True, append_images=[blue])
    assert near(open_picture(path, at_least_px=(8, 8)), (4, 4), RED, 8)


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def gif(width: int, height: int) -> bytes:
    """A GIF of one small frame on a canvas of any size."""
    file = io.BytesIO()
    Image.new("P", (4, 4)).save(file, "GIF")
    return b"GIF89a" + struct.pack("<HH", width, height) + file.getvalue()[10:]


BAD: list[tuple[str, bytes, str]] = [
    ("empty.jpg", b"", "empty file"),
    ("text.jpg", b"just some text", "text"),
    ("page.jpg", b"<!DOCTYPE html><html>", "web page"),
    ("lfs.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:x", "Git LFS"),
    ("zeros.png", b"\0" * 5000, "zero bytes"),
    ("noise.jpg", bytes(range(200, 256)) * 9, "known format"),
    ("svg.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
    ("pdf.jpg", b"%PDF-1.7\n", "PDF"),
    ("postscript.jpg", b"%!PS-Adobe-3.0\n", "text"),
    ("video.jpg", b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "video"),
    ("zip.webp", b"PK\x03\x04" + b"\1" * 99, "zip"),
    ("half.jpg", jpeg()[:2000], "damaged JPEG"),
    ("head.jpg", jpeg()[:20], "damaged JPEG"),
    ("mark.jpg", b"\xff\xd8\xff", "damaged JPEG"),
    ("head.png", png(8, 8)[:20], "damaged PNG"),
    ("nopixels.png", png(8, 8), "damaged PNG"),
    (
        "badcrc.png",
        png(8, 8, chunks=chunk(b"IDAT", zlib.compress(b"\0" * 200)[:-2] + b"\7\7")),
        "damaged PNG",
    ),
    ("zero.png", png(0, 8), "damaged PNG"),
    ("bomb.png", png(13_000, 13_000), "169 megapixels"),
    ("huge.png", png(2**31 - 1, 2**31 - 1), "megapixels"),
    ("head.gif", b"GIF89a", "damaged GIF"),
    ("huge.gif", gif(65_535, 65_535), "4295 megapixels"),
    ("head.bmp", b"BM\0\0", "damaged BMP"),
    ("head.tif", b"II*\0\x08\0\0\0", "damaged TIFF"),
    ("loop.tif", b"II*\0\x08\0\0\0\x01\0" + b"\0" * 40, "damaged TIFF"),
    ("head.webp", b"RIFF\x10\0\0\0WEBPVP8 ", "damaged WEBP"),
    ("head.avif", b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf", "damaged AVIF"),
]


@pytest.mark.parametrize("name, data, words", BAD, ids=[row[0] for row in BAD])
def test_what_cannot_be_used_has_a_reason(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(Unusable, match=words):
        open_picture(str(path))


def test_heic_without_the_extra_names_it(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    path = tmp_path / "a.jpg"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 40)
    with pytest.raises(Unusable, match=r"sdlab\[heic\]|damaged HEIF"):
        open_picture(str(path))


def test_damage_at_any_place_ends_in_a_picture_or_a_reason(tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "a"
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        file = io.BytesIO()
        quarter().save(file, kind)
        for _ in range(60):
            data = bytearray(file.getvalue())
            for place in rng.integers(0, len(data), 3):
                data[place] = rng.integers(0, 256)
            path.write_bytes(data[: rng.integers(1, len(data) + 1)])
            try:
                assert open_picture(str(path), max_pixels=1_000_000).mode == "RGB"
            except Unusable as reason:
                assert str(reason)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_whole_files_look_whole_and_cut_ones_do_not(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path / "a", gradient(60, 40), format=kind)
    assert looks_whole(path)
    data = Path(path).read_bytes()
    for length in (len(data) - 1, len(data) // 2, 20):
        Path(path).write_bytes(data[:length])
        assert not looks_whole(path)


def test_pipes_folders_and_missing_files_are_refused_and_never_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    began = time.monotonic()
    for name, words in (("pipe.jpg", "pipe"), (".", "a folder"), ("gone.jpg", "No such file")):
        for look in (open_picture, read_size, sha256_of):
            with pytest.raises((Unusable, OSError), match=words):
                look(str(tmp_path / name))
    assert time.monotonic() - began < 2


def test_the_limit_of_pixels_holds_before_decoding_and_can_be_raised(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "a.png", Image.new("1", (10_000, 9_000))
    )  # 90 megapixels, over Pillow's own limit
    for look in (open_picture, read_size):
        with pytest.raises(Unusable, match=r"10000 x 9000 is 90 megapixels, over the 64 of --max-pixels"):
            look(path)
    assert read_size(path, max_pixels=90_000_000) == (9_000, 10_000)


def test_no_state_of_the_process_changes(tmp_path: Path) -> None:
    saved(tmp_path / "a.jpg", quarter(), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    (tmp_path / "b.png").write_bytes(png(13_000, 13_000))
    before = (list(warnings.filters), Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)

    def look() -> None:
        for _ in range(20):
            for name in ("a.jpg", "b.png"):
                try:
                    open_picture(str(tmp_path / name))
                except Unusable:
                    pass

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (list(warnings.filters), Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES) == before


def gradient(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


@pytest.mark.parametrize("wanted", [(100, 100), (300, 60), (16, 16)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_read_small_is_large_enough_and_shows_the_same(
    tmp_path: Path, wanted: tuple[int, int], orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    path = saved(tmp_path / "a.jpg", gradient(1600, 1200), quality=95, exif=exif)
    full, small = open_picture(path), open_picture(path, at_least_px=wanted)
    assert small.height >= 2 * wanted[0] and small.width >= 2 * wanted[1]
    assert small.width < full.width
    a, b = (np.asarray(cover(image, wanted)).astype(int) for image in (full, small))
    assert np.abs(a - b).mean() < 1


def test_a_small_jpeg_is_read_in_full(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", gradient(150, 100))
    assert open_picture(path, at_least_px=(100, 150)).size == (150, 100)


@pytest.mark.parametrize("size", [(64, 64), (1000, 30), (30, 1000), (333, 217), (1, 1), (7, 5000)])
@pytest.mark.parametrize("wanted", [(64, 64), (48, 88), (88, 48)])
def test_cover_fills_the_size_without_distortion(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    height, width = wanted
    image = cover(gradient(*size), wanted)
    assert image.size == (width, height)
    if min(size) < 30:
        return
    pixels = np.asarray(image).astype(float)
    scale = max(height / size[1], width / size[0])
    for channel, axis, length in ((0, 1, size[0]), (1, 0, size[1])):  # red runs with x, green with y
        per_pixel = np.diff(pixels[..., channel].mean(1 - axis))[2:-2].mean()
        assert per_pixel == pytest.approx(255 / (length * scale), rel=0.2)
    assert pixels[..., :2].mean((0, 1)) == pytest.approx([127.5, 127.5], abs=2.5)  # the centre


def test_cover_leaves_a_picture_of_that_size_alone() -> None:
    image = gradient(40, 30)
    assert cover(image, (30, 40)).tobytes() == image.tobytes()


def test_pictures_are_opened_read_only_and_stay_as_they_are(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.tif", quarter())
    before = (sha256_of(path), os.stat(path).st_mtime_ns)
    os.chmod(path, 0o400)
    open_picture(path)
    read_size(path)
    assert (sha256_of(path), os.stat(path).st_mtime_ns) == before
