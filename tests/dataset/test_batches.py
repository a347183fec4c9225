from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image

from sdlab.dataset.batches import Batches, CachedSource, Entry, PixelSource
from sdlab.dataset.cache import Cache, Pixels, prompt_key
from sdlab.errors import SdlabError


def batches_of(entries, cache, *, caption_dropout=0.0, **settings):
    source = CachedSource(cache, caption_dropout, "empty")
    return Batches(entries, source, **{"batch": 3, "accumulate": 1, "seed": 5, **settings})


def make(tmp_path, sizes, **settings):
    cache = Cache(tmp_path / "cache")
    cache.put("prompts", "empty", {"e": torch.zeros(3)})
    entries = []
    for index, (height, width) in enumerate(sizes):
        name = f"{index:03d}.png"
        cache.put("latents", name, {"latents": torch.full((4, height // 8, width // 8), float(index))})
        cache.put("prompts", f"p{index}", {"e": torch.full((3,), float(index + 1))})
        entries.append(Entry(name, (height, width), name, f"p{index}"))
    return batches_of(entries, cache, **settings)


MIXED = [(64, 64)] * 7 + [(64, 32)] * 4 + [(32, 64)]


@pytest.mark.parametrize("accumulate", [1, 2, 5])
@pytest.mark.parametrize("batch", [1, 3, 4, 50])
def test_every_epoch_visits_every_entry_once_and_batches_share_a_size(tmp_path, batch, accumulate):
    batches = make(tmp_path, MIXED, batch=batch, accumulate=accumulate)
    for epoch in range(3):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        chunks = [chunk for step in steps for chunk in batches.plan(step)]
        assert Counter(entry.id for chunk in chunks for entry in chunk) == {e.id: 1 for e in batches.entries}
        assert all(len({entry.size_px for entry in chunk}) == 1 for chunk in chunks)
        assert {batches.epoch_of(step) for step in steps} == {epoch}


def test_without_references_the_order_is_what_it_always_was(tmp_path):
    """Runs of earlier versions are resumed exactly: this order was written down before references were there."""
    batches = make(tmp_path, MIXED, accumulate=2)
    assert [[[int(e.id[:3]) for e in chunk] for chunk in batches.plan(step)] for step in range(6)] == [
        [[2, 0, 5], [9]], [[4, 3, 6], [1]], [[11], [10, 7, 8]],
        [[8, 10, 7], [1, 0, 2]], [[9], [3]], [[6, 4, 5], [11]],
    ]  # fmt: skip


def with_references(tmp_path, **settings):
    """Pictures of one size with none, one or two references; values tell whose tensor and which it is."""
    plain = make(tmp_path, [(64, 64)] * 12, **settings)
    cache, entries = plain.source.cache, []
    shapes = ((), ((64, 64),), ((64, 32),), ((64, 64), (64, 32)), ((64, 32), (64, 64)))
    for index, entry in enumerate(plain.entries):
        sizes, keys = shapes[index % 5], []
        for number, (height, width) in enumerate(sizes):
            keys.append(f"{entry.id}.ref{number}")
            value = index + (number + 1) / 10
            cache.put("latents", keys[-1], {"latents": torch.full((4, height // 8, width // 8), value)})
        entries.append(replace(entry, reference_sizes=sizes, reference_keys=tuple(keys)))
    return batches_of(entries, cache, **settings)


@pytest.mark.parametrize("batch", [1, 2, 3, 50])
def test_pictures_share_a_batch_only_with_references_of_the_same_sizes_in_the_same_order(tmp_path, batch):
    batches = with_references(tmp_path, batch=batch)
    seen: Counter[str] = Counter()
    for step in range(batches.steps_per_epoch):
        for chunk in batches.plan(step):
            assert len({(e.size_px, e.reference_sizes) for e in chunk}) == 1
            seen.update(e.id for e in chunk)
    assert seen == {e.id: 1 for e in batches.entries}
    assert len(batches.shapes()) >= 5


def test_references_belong_to_their_picture_in_their_order_and_a_dropped_caption_leaves_them(tmp_path):
    batches, num_dropped = with_references(tmp_path, caption_dropout=0.5), 0
    sizes = {e.id: e.reference_sizes for e in batches.entries}
    for part in (p for step in range(30) for p in batches.load(step)):
        assert set(part.cond) == {"e", *(f"reference_{i}" for i in range(len(sizes[part.ids[0]])))}
        for row, name in enumerate(part.ids):
            for number, (height, width) in enumerate(sizes[name]):
                reference = part.cond[f"reference_{number}"][row]
                assert reference.shape == (4, height // 8, width // 8)
                value = torch.tensor(int(name[:3]) + (number + 1) / 10)
                assert torch.equal(reference, value.expand_as(reference))
            num_dropped += bool(sizes[name]) and not part.cond["e"][row].any()
    assert num_dropped > 10


def test_the_orders_of_two_buckets_that_differ_in_references_are_different_draws(tmp_path):
    plain = make(tmp_path, [(64, 64)] * 9, batch=9)
    edits = [replace(e, reference_sizes=((64, 64),), reference_keys=("r",)) for e in plain.entries]
    turned = batches_of(edits, plain.source.cache, batch=9)
    assert [e.id for e in turned.plan(0)[0]] != [e.id for e in plain.plan(0)[0]]


def test_an_entry_cannot_lose_a_reference():
    with pytest.raises(AssertionError):
        Entry("a", (8, 8), "k", "p", reference_sizes=((8, 8),))
    with pytest.raises(AssertionError):
        Entry("a", (8, 8), "k", "p", flipped_key="f", reference_sizes=((8, 8),), reference_keys=("r",))


def test_the_order_changes_from_epoch_to_epoch_and_follows_the_seed(tmp_path):
    def order(batches, epoch):
        first = epoch * batches.steps_per_epoch
        steps = range(first, first + batches.steps_per_epoch)
        return [e.id for step in steps for c in batches.plan(step) for e in c]

    one = make(tmp_path, MIXED)
    assert order(one, 0) != order(one, 1)
    assert order(one, 0) == order(make(tmp_path, MIXED), 0)
    assert order(one, 0) != order(make(tmp_path, MIXED, seed=6), 0)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_reading_ahead_changes_nothing(tmp_path, num_workers):
    batches = make(tmp_path, MIXED, caption_dropout=0.5)
    expected = [(step, batches.load(step)) for step in range(2, 11)]
    got = list(make(tmp_path, MIXED, caption_dropout=0.5).steps(2, 11, num_workers=num_workers))
    assert [step for step, _ in got] == [step for step, _ in expected]
    for (_, parts), (_, others) in zip(got, expected, strict=True):
        assert [p.ids for p in parts] == [p.ids for p in others]
        assert all(torch.equal(p.cond["e"], o.cond["e"]) for p, o in zip(parts, others, strict=True))


def test_rows_belong_to_their_ids(tmp_path):
    for parts in (make(tmp_path, MIXED).load(step) for step in range(6)):
        for part in parts:
            for row, name in enumerate(part.ids):
                assert part.latents_BCHW[row].unique().tolist() == [float(name[:3])]
                assert part.cond["e"][row].unique().tolist() == [float(name[:3]) + 1]


@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_share_each_batch_and_an_empty_share_weighs_nothing(tmp_path, num_processes):
    whole = make(tmp_path, MIXED, batch=num_processes)
    shares = [make(tmp_path, MIXED, batch=1, process=(rank, num_processes)) for rank in range(num_processes)]
    for step in range(whole.steps_per_epoch):
        ids = Counter(i for part in whole.load(step) for i in part.ids)
        counted: Counter[str] = Counter()
        for share in shares:
            parts = share.load(step)
            assert len(parts) == len(whole.plan(step))
            for part in parts:
                counted += Counter(
                    {i: int(w) for i, w in zip(part.ids, part.weight_B.tolist(), strict=True) if w}
                )
        assert counted == ids


def test_dropout_takes_the_empty_prompt_at_its_rate_and_by_name(tmp_path):
    batches = make(tmp_path, [(64, 64)] * 40, batch=8, caption_dropout=0.25)
    seen, dropped = 0, 0
    for step in range(100):
        for part in batches.load(step):
            seen += len(part.ids)
            dropped += int((part.cond["e"] == 0).all(dim=1).sum())
    assert seen == 800
    assert abs(dropped / seen - 0.25) < 3 * (0.25 * 0.75 / seen) ** 0.5


def test_a_prompts_key_follows_the_encoders():
    assert prompt_key("a", "x") != prompt_key("b", "x")
    assert prompt_key("a", "x") != prompt_key("a", "y")


def drawn(folder, sizes, *, opened=None, cut=None):
    """Entries of noisy pictures of these sizes, and their pixels; opened at `opened`, of which `cut` is taken."""
    folder.mkdir(exist_ok=True)
    entries, pixels = [], {}
    for index, (height, width) in enumerate(sizes):
        path = folder / f"{index:03d}.png"
        bytes_HW3 = torch.randint(
            0, 256, (height, width, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8
        )
        Image.fromarray(bytes_HW3.numpy()).save(path)
        pixels[path.name] = bytes_HW3.permute(2, 0, 1).float() / 127.5 - 1
        size = (cut, cut) if cut else (height, width)
        entries.append(Entry(path.name, size, path=str(path), whole_px=(height, width) if cut else None))
    return entries, pixels


def test_pixels_are_those_of_the_pictures_and_half_of_the_visits_are_mirrored_where_that_is_allowed(tmp_path):
    entries, pixels = drawn(tmp_path, MIXED)
    for flip in (False, True):
        batches = Batches(entries, PixelSource(Pixels(), flip=flip), batch=3, accumulate=1, seed=5)
        num_mirrored = 0
        for part in (p for step in range(40) for p in batches.load(step)):
            assert part.cond == {}
            for row, name in enumerate(part.ids):
                seen, whole = part.latents_BCHW[row], pixels[name]
                num_mirrored += torch.allclose(seen, whole.flip(2), atol=1e-6)
                assert torch.allclose(seen, whole, atol=1e-6) or (
                    flip and torch.allclose(seen, whole.flip(2), atol=1e-6)
                )
        assert (25 < num_mirrored < 55) if flip else num_mirrored == 0  # of 80 visits


def test_crops_of_pictures_of_all_sizes_share_batches_and_lie_everywhere_in_them(tmp_path):
    entries, pixels = drawn(tmp_path, [(12, 20), (20, 12), (16, 16), (8, 8)], cut=8)
    batches = Batches(entries, PixelSource(Pixels(), crop_px=8), batch=4, accumulate=1, seed=5)
    assert batches.steps_per_epoch == 1
    corners: dict[str, set[tuple[int, int]]] = {name: set() for name in pixels}
    for step in range(150):
        (part,) = batches.load(step)
        for row, name in enumerate(part.ids):
            windows = pixels[name].unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4)
            found = (windows - part.latents_BCHW[row]).abs().amax((2, 3, 4)) < 1e-6
            corners[name].add(tuple(found.nonzero()[0].tolist()))
    for name, found in corners.items():
        down, across = ({corner[way] for corner in found} for way in (0, 1))
        _, height, width = pixels[name].shape
        assert (down, across) == (set(range(height - 7)), set(range(width - 7)))


@pytest.mark.parametrize("num_workers", [0, 3])
def test_pixels_depend_on_the_step_and_the_picture_alone(tmp_path, num_workers):
    entries, _ = drawn(tmp_path, [(12, 20), (20, 12), (16, 16)], cut=8)
    source = PixelSource(Pixels(), crop_px=8, flip=True)
    whole = Batches(entries, source, batch=2, accumulate=1, seed=5)
    shares = [Batches(entries, source, batch=1, accumulate=1, seed=5, process=(rank, 2)) for rank in range(2)]
    for step, (part,) in whole.steps(3, 9, num_workers=num_workers):
        rows = {
            i: pixels
            for p in (s.load(step)[0] for s in shares)
            for i, pixels in zip(p.ids, p.latents_BCHW, strict=True)
        }
        assert all(torch.equal(rows[name], part.latents_BCHW[row]) for row, name in enumerate(part.ids))


def test_a_picture_that_has_gone_is_named(tmp_path):
    entries, _ = drawn(tmp_path, [(8, 8)])
    (tmp_path / "000.png").unlink()
    with pytest.raises(SdlabError, match=r"000\.png: cannot be used any more"):
        Batches(entries, PixelSource(Pixels()), batch=1, accumulate=1, seed=5).load(0)
