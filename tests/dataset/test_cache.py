from __future__ import annotations

import contextlib
import os
from dataclasses import replace

import pytest
import torch
from PIL import Image

from sdlab.dataset import cache as cache_module
from sdlab.dataset.buckets import Item
from sdlab.dataset.cache import Cache, Pixels, ahead, fill, pictures_of, prompt_key, to_pixels, write_whole
from sdlab.dataset.tree import Sample, scan
from sdlab.keyed import keyed


class CountingEncoders:
    def __init__(self) -> None:
        self.pictures, self.prompts, self.opened = 0, [], 0

    @contextlib.contextmanager
    def __call__(self):
        self.opened += 1
        yield self

    def encode_pictures(self, pixels):
        self.pictures += len(pixels)
        return torch.nn.functional.avg_pool2d(pixels, 8)

    def encode_prompts(self, prompts):
        self.prompts += prompts
        return [{"e": torch.full((2,), float(len(p)))} for p in prompts]


@pytest.fixture
def filled(tmp_path, pictures):
    root = pictures({"a/1.png": (16, 16), "a/2.png": (16, 16), "b/3.png": (24, 16)})

    def again(fingerprint="x", size=(16, 16), **settings):
        encoders = CountingEncoders()
        items = [Item(sample, size) for sample in scan(root).samples]
        arguments = {"pixels": Pixels(), "num_workers": 0, **settings}
        result = fill(
            Cache(tmp_path / "cache"), items, [i.sample.prompt for i in items], fingerprint=fingerprint,
            encoders=encoders, **arguments,
        )  # fmt: skip
        return result, encoders, root

    return again


def counts(encoders):
    return encoders.opened, encoders.pictures, len(encoders.prompts)


def test_a_second_fill_opens_no_encoder(filled):
    assert counts(filled()[1]) == (1, 3, 2)
    assert counts(filled()[1]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"fingerprint": "y"}, (1, 3, 2)),
        ({"size": (16, 24)}, (1, 3, 0)),
        ({"pixels": Pixels(background=(0, 0, 0))}, (1, 3, 0)),
        ({"num_workers": 3}, (0, 0, 0)),
        ({"pixels": Pixels(max_pixels=1000)}, (0, 0, 0)),
    ],
)
def test_what_changes_the_pixels_or_the_encoders_changes_the_key(filled, change, expected):
    filled()
    assert counts(filled(**change)[1]) == expected


def test_a_replaced_picture_is_seen_even_with_the_old_size_and_time(filled):
    _, _, root = filled()
    path = root / "a" / "1.png"
    stat, size = path.stat(), path.stat().st_size
    for shade in range(256):
        Image.new("RGB", (16, 16), (shade, shade, 255 - shade)).save(path)
        path.write_bytes(path.read_bytes().ljust(size, b"\0")[:size] if path.stat().st_size <= size else b"")
        if path.stat().st_size == size:
            break
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert counts(filled()[1]) == (1, 1, 0)


def test_a_torn_entry_is_made_again(filled, tmp_path):
    result, _, _ = filled()
    key = next(iter(result.latents.values()))
    path = Cache(tmp_path / "cache").path("latents", key)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    assert counts(filled()[1]) == (1, 1, 0)
    assert path.read_bytes() == whole


def test_a_damaged_entry_is_made_again(filled, tmp_path):
    result, _, _ = filled()
    path = Cache(tmp_path / "cache").path("latents", next(iter(result.latents.values())))
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + bytes(3 * [whole[-1] ^ 1]))
    assert counts(filled()[1]) == (1, 1, 0)
    assert path.read_bytes() == whole


def test_copies_of_a_picture_are_encoded_once(filled, tmp_path):
    _, _, root = filled()
    for name in ("c/4.png", "c/5.png"):
        (root / "c").mkdir(exist_ok=True)
        (root / name).write_bytes((root / "a" / "1.png").read_bytes())
    assert counts(filled()[1]) == (1, 0, 1)


def test_shares_of_several_processes_make_up_the_whole(filled):
    parts = [filled(share=(rank, 2))[1] for rank in range(2)]
    assert sum(p.pictures for p in parts) == 3
    assert counts(filled()[1]) == (0, 0, 0)


def test_a_picture_that_breaks_on_decoding_is_refused_and_the_rest_goes_on(filled):
    _, _, root = filled()
    path = root / "b" / "3.png"
    path.write_bytes(path.read_bytes()[:60])
    result, _, _ = filled()
    assert [r.id for r in result.refused] == ["b/3.png"]
    assert sorted(i.sample.id for i in result.latents) == ["a/1.png", "a/2.png"]


def test_a_flipped_picture_has_latents_of_its_own(tmp_path, pictures):
    root = pictures({"a/1.png": (16, 32)})
    item = Item(scan(root).samples[0], (16, 32))
    cache = Cache(tmp_path / "cache")
    result = fill(
        cache, [item, replace(item, flip=True)], [], fingerprint="x", encoders=CountingEncoders(), pixels=Pixels(),
        num_workers=0,
    )  # fmt: skip
    straight, flipped = (
        cache.get("latents", result.latents[i])["latents"] for i in (item, replace(item, flip=True))
    )
    assert torch.allclose(straight.flip(-1), flipped) and not torch.equal(straight, flipped)


def edits(root, cache, *, flip=False, size=(16, 16), others=((16, 16),), pixels=None, **settings):
    """Fill the cache with the samples of a folder, every one with references of the sizes `others`."""
    encoders = CountingEncoders()
    items = [
        Item(s, size, flip=flip, reference_sizes=others if s.references else ()) for s in scan(root).samples
    ]
    result = fill(
        cache,
        items,
        [],
        fingerprint="x",
        encoders=encoders,
        pixels=pixels or Pixels(),
        num_workers=0,
        **settings,
    )
    return result, encoders, items


def test_references_are_encoded_and_given_with_their_sample_in_order(tmp_path, pictures):
    root = pictures({"a.png": (16, 16), "a.ref.png": (16, 32), "a.ref2.png": (16, 16), "b.png": (16, 16)})
    cache = Cache(tmp_path / "cache")
    result, encoders, (a, b) = edits(root, cache, others=((16, 32), (16, 16)))
    assert counts(encoders) == (1, 4, 0)
    assert result.references[b] == ()
    for key, name in zip(result.references[a], ("a.ref.png", "a.ref2.png"), strict=True):
        with Image.open(root / name) as image:
            direct = encoders.encode_pictures(to_pixels(image)[None])[0]
        assert torch.equal(cache.get("latents", key)["latents"], direct)


def test_a_picture_that_is_target_and_reference_is_encoded_once(tmp_path, pictures):
    root = pictures({"a.png": (16, 16), "b.png": (16, 16), "c.png": (16, 16)})
    for owner, source in (("a", "b"), ("b", "a"), ("c", "a")):
        (root / f"{owner}.ref.png").write_bytes((root / f"{source}.png").read_bytes())
    result, encoders, (a, b, c) = edits(root, Cache(tmp_path / "cache"))
    assert counts(encoders) == (1, 3, 0)
    assert result.references == {a: (result.latents[b],), b: (result.latents[a],), c: (result.latents[a],)}
    assert counts(edits(root, Cache(tmp_path / "cache"))[1]) == (0, 0, 0)


def test_a_reference_of_another_size_is_another_entry(tmp_path, pictures):
    root = pictures({"a.png": (16, 16)})
    (root / "a.ref.png").write_bytes((root / "a.png").read_bytes())
    assert counts(edits(root, Cache(tmp_path / "cache"), others=((16, 24),))[1]) == (1, 2, 0)


@pytest.mark.parametrize("break_it", ["cut", "text", "gone"])
def test_a_sample_with_a_bad_reference_is_refused_by_its_name_and_the_rest_goes_on(
    tmp_path, pictures, break_it
):
    root = pictures(
        {"x/a.png": (16, 16), "x/a.ref.png": (16, 16), "x/a.ref2.png": (16, 16), "x/b.png": (16, 16)}
    )
    bad = root / "x" / "a.ref2.png"
    samples = scan(root).samples
    items = [Item(s, (16, 16), reference_sizes=((16, 16),) * len(s.references)) for s in samples]
    if break_it == "gone":
        bad.unlink()
    else:
        bad.write_bytes(bad.read_bytes()[:60] if break_it == "cut" else b"not a picture")
    result = fill(
        Cache(tmp_path / "cache"), [*items, *(replace(i, flip=True) for i in items)], [], fingerprint="x",
        encoders=CountingEncoders(), pixels=Pixels(), num_workers=0,
    )  # fmt: skip
    ((name, reason),) = result.refused
    assert name == "x/a.png" and reason.startswith("its reference a.ref2.png: ")
    assert {i.sample.id for i in result.latents} == {i.sample.id for i in result.references} == {"x/b.png"}


def test_a_flip_mirrors_the_references_too(tmp_path, pictures):
    root = pictures({"a.png": (16, 16), "a.ref.png": (16, 32)})
    cache = Cache(tmp_path / "cache")
    ((straight,),) = edits(root, cache, others=((16, 32),))[0].references.values()
    ((flipped,),) = edits(root, cache, others=((16, 32),), flip=True)[0].references.values()
    straight, flipped = (cache.get("latents", key)["latents"] for key in (straight, flipped))
    assert torch.allclose(straight.flip(-1), flipped) and not torch.equal(straight, flipped)


def test_keys_of_prompts_go_by_their_own_fingerprint_and_those_of_pictures_do_not(tmp_path, pictures):
    root = pictures({"a.png": (16, 16)})
    cache, item = Cache(tmp_path / "cache"), Item(scan(root).samples[0], (16, 16))

    def again(**settings):
        encoders = CountingEncoders()
        fill(
            cache, [item], ["words"], fingerprint="x", encoders=encoders, pixels=Pixels(), num_workers=0, **settings
        )  # fmt: skip
        return counts(encoders)

    assert again() == (1, 1, 1)
    assert again(text_fingerprint="x bfloat16") == (1, 0, 1)
    assert again(text_fingerprint="x") == (0, 0, 0)
    assert cache.has("prompts", prompt_key("x bfloat16", "words"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool])
def test_tensors_of_any_type_come_back_with_the_same_bits_and_damage_is_seen(tmp_path, dtype):
    cache = Cache(tmp_path / "cache")
    numbers = torch.randn(6, 5, generator=keyed("numbers"))
    tensors = {
        "e": (numbers * 3).to(dtype).t(),
        "one": torch.tensor(1).to(dtype),
        "none": torch.zeros(0).to(dtype),
    }
    cache.put("prompts", "ab", tensors)
    got = cache.get("prompts", "ab")
    assert {name: t.dtype for name, t in got.items()} == dict.fromkeys(tensors, dtype)
    assert all(torch.equal(got[name], t) for name, t in tensors.items())
    path = cache.path("prompts", "ab")
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    assert not cache.has("prompts", "ab")


def test_keys_and_digests_of_earlier_versions_hold():
    """A cache that an earlier version filled is not filled again: these were written down before."""
    item = Item(Sample("a", "a", "", "folder"), (64, 48), flip=True)
    assert (
        cache_module._latent_key("c0ffee", pictures_of(item)[0], Pixels(), "f")
        == "e7fcc06e30b087cbf03a94834db3b85249a9f213162b2c8db7a2e7cc14add1fe"
    )
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([1, 2])}
    assert (
        cache_module._tensors_digest(tensors)
        == "82add1361506d9c25ed9b63434a388d1a59c2648f7c518e4733add40a8979621"
    )


def test_pixels_are_in_minus_one_to_one():
    image = Image.new("RGB", (2, 1))
    image.putpixel((1, 0), (255, 0, 127))
    assert to_pixels(image)[:, 0, 1].tolist() == pytest.approx([1.0, -1.0, -0.0039], abs=1e-4)


@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_reading_ahead_keeps_the_order_and_passes_errors_on(num_workers):
    assert list(ahead(lambda x: x * x, range(50), num_workers)) == [(x, x * x) for x in range(50)]
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda x: 1 // (x - 3), range(50), num_workers))


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_whole(path, b"old")
    monkeypatch.setattr(os, "replace", lambda a, b: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]
