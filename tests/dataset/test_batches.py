from __future__ import annotations

from collections import Counter

import pytest
import torch

from sdlab.dataset.batches import Batches, Entry
from sdlab.dataset.cache import Cache, prompt_key


def make(tmp_path, sizes, **settings):
    cache = Cache(tmp_path / "cache")
    cache.put("prompts", "empty", {"e": torch.zeros(3)})
    entries = []
    for index, (height, width) in enumerate(sizes):
        name = f"{index:03d}.png"
        cache.put("latents", name, {"latents": torch.full((4, height // 8, width // 8), float(index))})
        cache.put("prompts", f"p{index}", {"e": torch.full((3,), float(index + 1))})
        entries.append(Entry(name, (height, width), name, f"p{index}"))
    defaults = {"batch": 3, "accumulate": 1, "seed": 5, "caption_dropout": 0.0, "empty_prompt_key": "empty"}
    return Batches(entries, cache, **{**defaults, **settings})


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
