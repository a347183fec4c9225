"""From a folder with references to batches: whose tensors are where, what is refused, what the digest sees."""

from __future__ import annotations

import contextlib
import random
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sdlab.dataset.buckets import bucket_sizes
from sdlab.dataset.cache import Cache, prompt_key
from sdlab.dataset.tree import scan
from sdlab.errors import SdlabError, Stopped
from sdlab.keyed import Draws
from sdlab.signals import StopRequest
from sdlab.training.config import TrainConfig
from sdlab.training.data import batches_of, conds_of, encode, visits
from sdlab.training.record import _item_digest, cached_dataset

SIZES = bucket_sizes(64, grid=8)


class FakeFamily:
    """Encoders that a test can do by hand: the mean of each 8x8 patch, and a prompt's letters as numbers."""

    grid, fingerprint = 8, "fake"

    def __init__(self) -> None:
        self.num_pictures, self.prompts, self.dtypes = 0, [], []

    @contextlib.contextmanager
    def load_encoders(self, device, dtype):
        self.dtypes.append(dtype)
        yield self

    def encode_pictures(self, pixels):
        self.num_pictures += len(pixels)
        return torch.nn.functional.avg_pool2d(pixels, 8)

    def encode_prompts(self, prompts):
        self.prompts += prompts
        return [{"prompt_embeds": letters(prompt).to(self.dtypes[-1])} for prompt in prompts]


def letters(prompt: str) -> torch.Tensor:
    codes = [ord(c) for c in prompt[:32]]
    return torch.tensor(codes + [0] * (32 - len(codes)), dtype=torch.float32)


def by_hand(path: Path, *, mirrored: bool) -> torch.Tensor:
    """What FakeFamily makes of a picture that has its bucket's size already, without any code of the package."""
    pixels_HW3 = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 127.5 - 1
    if mirrored:
        pixels_HW3 = pixels_HW3[:, ::-1]
    height, width, _ = pixels_HW3.shape
    patches = pixels_HW3.reshape(height // 8, 8, width // 8, 8, 3)
    return torch.from_numpy(patches.mean(axis=(1, 3))).permute(2, 0, 1)


def machine(rank: int = 0, num: int = 1, mixed_precision: str = "no") -> SimpleNamespace:
    """What of an Accelerator is looked at."""
    return SimpleNamespace(
        device=torch.device("cpu"),
        process_index=rank,
        num_processes=num,
        is_main_process=rank == 0,
        mixed_precision=mixed_precision,
        wait_for_everyone=lambda: None,
    )


def drawn(root: Path, rng: random.Random, count: int) -> Path:
    """`count` noisy pictures of random bucket sizes, each with 0 to 3 references; some are copies of others."""
    made: list[bytes] = []

    def picture(path: Path) -> None:
        if made and rng.random() < 0.2:
            path.write_bytes(rng.choice(made))
            return
        height, width = rng.choice(SIZES)
        pixels = np.frombuffer(rng.randbytes(height * width * 3), np.uint8).reshape(height, width, 3)
        Image.fromarray(pixels).save(path)
        made.append(path.read_bytes())

    for index in range(count):
        folder = root / rng.choice(["make_it_red", "turn_it"])
        folder.mkdir(parents=True, exist_ok=True)
        picture(folder / f"{index:03d}.png")
        if rng.random() < 0.3:
            (folder / f"{index:03d}.cap").write_text(f"instruction {index}")
        for number in range(rng.choice([0, 1, 1, 1, 2, 3])):
            picture(folder / f"{index:03d}.ref{number + 1}.png")
    return root


def prepared(root, tmp_path, *, references=True, accelerator=None, family=None, **settings):
    """(Batches, items, Filled, FakeFamily) of a folder, as a run would have them."""
    config = TrainConfig(images=root, image_size=64, num_workers=0, **{"batch": 3, **settings})
    family, accelerator, stop = family or FakeFamily(), accelerator or machine(), StopRequest()
    store = Cache(tmp_path / "cache")
    items, _ = visits(scan(root), config, 8, stop, references=references, tell=False)
    filled = encode(store, items, family, config, accelerator, stop)
    items = [item for item in items if item in filled.latents]
    return batches_of(items, filled, store, family, config, accelerator), items, filled, family


@pytest.mark.parametrize("case", range(8))
def test_every_batch_has_one_geometry_and_only_tensors_of_its_own_samples(tmp_path, case):
    rng = random.Random(case)
    root = drawn(tmp_path / "images", rng, rng.randint(4, 14))
    flip, dropout = bool(case % 2), rng.choice([0.0, 0.5, 1.0])
    batches, items, _, family = prepared(
        root,
        tmp_path,
        flip=flip,
        caption_dropout=dropout,
        batch=rng.randint(1, 4),
        grad_accum=rng.randint(1, 3),
        repeats=("make_it_red=2",) if (root / "make_it_red").is_dir() and case % 3 == 0 else (),
        seed=case,
    )
    samples = {sample.id: sample for sample in scan(root).samples}
    seen: Counter[str] = Counter()
    for step in range(batches.steps_per_epoch):
        draws = Draws(case, step)
        for batch in batches.load(step):
            seen.update(batch.ids)
            mirrored = (draws.uniform("flip", batch.ids) < 0.5) & flip
            dropped = draws.uniform("caption-dropout", batch.ids) < dropout
            owners = [samples[id_.partition("#")[0]] for id_ in batch.ids]
            num_references = len(owners[0].references)
            assert set(batch.cond) == {"prompt_embeds", *(f"reference_{i}" for i in range(num_references))}
            assert all(len(tensor) == len(owners) for tensor in batch.cond.values())
            for row, (owner, mirror, drop) in enumerate(zip(owners, mirrored, dropped, strict=True)):
                # by_hand has the sample's own size: equal shapes say that the batch has one geometry
                target = by_hand(Path(owner.path), mirrored=bool(mirror))
                torch.testing.assert_close(batch.latents_BCHW[row], target, rtol=0, atol=1e-5)
                assert len(owner.references) == num_references
                for number, path in enumerate(owner.references):
                    direct = by_hand(Path(path), mirrored=bool(mirror))
                    torch.testing.assert_close(
                        batch.cond[f"reference_{number}"][row], direct, rtol=0, atol=1e-5
                    )
                assert torch.equal(batch.cond["prompt_embeds"][row], letters("" if drop else owner.prompt))
    assert seen == Counter(f"{i.sample.id}#{i.repeat}" if i.repeat else i.sample.id for i in items)
    contents = {Path(path).read_bytes() for s in samples.values() for path in (s.path, *s.references)}
    assert family.num_pictures == len(contents) * (2 if flip else 1)  # copies are encoded once


def test_references_of_any_size_and_format_are_taken_at_the_bucket_of_their_shape(tmp_path, pictures):
    root = pictures(
        {"a.png": (64, 64), "a.ref.jpg": (30, 59), "a.ref2.webp": (700, 500), "a.ref10.bmp": (5, 5)}
    )
    batches, *_ = prepared(root, tmp_path)
    (batch,) = batches.load(0)
    shapes = [tuple(batch.cond[f"reference_{i}"].shape) for i in range(3)]
    assert shapes == [(1, 3, 6, 11), (1, 3, 9, 7), (1, 3, 8, 8)]


def test_processes_that_share_the_work_have_the_batches_of_one(tmp_path):
    root = drawn(tmp_path / "images", random.Random(3), 9)
    alone, *_ = prepared(root, tmp_path / "one", batch=2)
    for rank in (1, 0):  # each encodes its share; the last one also what nobody has yet
        shared, *_ = prepared(root, tmp_path / "two", batch=1, accelerator=machine(rank, 2))
        assert shared.steps_per_epoch == alone.steps_per_epoch
        for step in range(alone.steps_per_epoch):
            for whole, part in zip(alone.load(step), shared.load(step), strict=True):
                if part.weight_B[0]:
                    row = whole.ids.index(part.ids[0])
                    assert torch.equal(whole.latents_BCHW[row], part.latents_BCHW[0])
                    assert all(torch.equal(whole.cond[name][row], part.cond[name][0]) for name in whole.cond)


def test_a_run_that_goes_on_has_the_same_batches(tmp_path):
    root = drawn(tmp_path / "images", random.Random(4), 8)
    first, *_ = prepared(root, tmp_path, flip=True, caption_dropout=0.3)
    steps = range(2 * first.steps_per_epoch)
    expected = [first.load(step) for step in steps]
    again, _, _, family = prepared(root, tmp_path, flip=True, caption_dropout=0.3)
    assert family.num_pictures == 0 and family.prompts == []
    for step in reversed(steps):
        for one, other in zip(again.load(step), expected[step], strict=True):
            assert one.ids == other.ids and torch.equal(one.latents_BCHW, other.latents_BCHW)
            assert one.cond.keys() == other.cond.keys()
            assert all(torch.equal(one.cond[name], other.cond[name]) for name in one.cond)


def test_a_model_that_learns_no_edits_leaves_references_out_and_says_how_many(tmp_path, pictures, capsys):
    files = {"a.png": (64, 64), "b.png": (48, 88), "c.png": (64, 64)}
    plain = pictures(files, name="plain")
    with_them = pictures(files, name="with")
    (with_them / "a.ref.png").write_text("broken, and never opened")
    (with_them / "a.ref2.png").write_bytes((plain / "b.png").read_bytes())
    config = TrainConfig(images=with_them, image_size=64)
    items, refused = visits(scan(with_them), config, 8, StopRequest())
    assert "(2)" in capsys.readouterr().err
    assert refused == [] and [(i.sample.references, i.reference_sizes) for i in items] == [((), ())] * 3
    visits(scan(with_them), config, 8, StopRequest(), tell=False)
    visits(scan(plain), config, 8, StopRequest())
    assert capsys.readouterr().err == ""
    one, one_items, one_filled, _ = prepared(plain, tmp_path / "1", references=False)
    two, two_items, two_filled, _ = prepared(with_them, tmp_path / "2", references=False)
    assert (
        cached_dataset(one_items, one_filled, ()).digest == cached_dataset(two_items, two_filled, ()).digest
    )
    for step in range(one.steps_per_epoch):
        assert [[e.id for e in c] for c in one.plan(step)] == [[e.id for e in c] for c in two.plan(step)]


@pytest.mark.parametrize("name, bad", [("a.ref2.png", "a.png"), ("b.png", "b.png"), ("b.ref.png", "b.png")])
def test_a_sample_whose_reference_has_no_readable_header_is_refused_with_its_name(
    tmp_path, pictures, name, bad
):
    root = pictures({f"{n}.png": (64, 64) for n in ("a", "a.ref", "a.ref2", "b", "b.ref", "c", "c.ref")})
    (root / name).write_text("not a picture")
    config = TrainConfig(images=root, image_size=64, num_workers=0)
    items, refused = visits(scan(root), config, 8, StopRequest(), references=True)
    assert {i.sample.id for i in items} == {"a.png", "b.png", "c.png"} - {bad}
    assert [r.id for r in refused] == [bad]
    assert refused[0].reason == ("" if name == bad else f"its reference {name}: ") + "not a picture but text"


def test_where_every_sample_has_a_bad_reference_the_error_says_so(tmp_path, pictures):
    root = pictures({"a.png": (64, 64)})
    (root / "a.ref.png").write_bytes(b"")
    config = TrainConfig(images=root, image_size=64)
    with pytest.raises(SdlabError, match=r"its reference a\.ref\.png: an empty file"):
        visits(scan(root), config, 8, StopRequest(), references=True)


def test_reading_the_sizes_stops_at_a_signal(tmp_path, pictures):
    root = pictures({"a.png": (64, 64), "a.ref.png": (64, 64)})
    stop = StopRequest()
    stop.signum = signal.SIGTERM
    with pytest.raises(Stopped):
        visits(scan(root), TrainConfig(images=root, image_size=64), 8, stop, references=True)


def test_the_digest_of_the_dataset_sees_references_and_their_order(tmp_path, pictures):
    root = pictures({"a.png": (64, 64), "a.ref.png": (64, 64), "a.ref2.png": (64, 64), "b.png": (64, 64)})

    def digests():
        _, items, filled, _ = prepared(root, tmp_path)
        return cached_dataset(items, filled, ()).digest, [_item_digest(item, filled) for item in items]

    seen = [digests()]
    assert digests() == seen[0]
    one, two = (root / "a.ref.png").read_bytes(), (root / "a.ref2.png").read_bytes()
    (root / "a.ref.png").write_bytes(two)
    (root / "a.ref2.png").write_bytes(one)
    seen.append(digests())  # other order
    (root / "a.ref2.png").unlink()
    seen.append(digests())  # one less
    (root / "a.ref.png").unlink()
    seen.append(digests())  # none
    assert len({whole for whole, _ in seen}) == len({of_a for _, (of_a, _) in seen}) == 4
    assert len({of_b for _, (_, of_b) in seen}) == 1


def test_prompts_of_previews_are_encoded_too_and_given_by_prompt(tmp_path, pictures):
    root, config = pictures({"red/a.png": (64, 64)}), TrainConfig(image_size=64)
    store, family, accelerator = Cache(tmp_path / "cache"), FakeFamily(), machine()
    items, _ = visits(scan(root), config, 8, StopRequest(), references=True)
    encode(store, items, family, config, accelerator, StopRequest(), extra_prompts=["a preview", "red"])
    assert sorted(family.prompts) == ["", "a preview", "red"]
    conds = conds_of(store, ["a preview", ""], family, accelerator)
    assert list(conds) == ["a preview", ""]
    assert torch.equal(conds["a preview"]["prompt_embeds"], letters("a preview"))


def test_in_mixed_precision_prompts_are_encoded_in_bf16_beside_those_in_float32(tmp_path, pictures):
    root = pictures({"red/a.png": (64, 64), "red/a.ref.png": (64, 64)})
    plain, _, _, first = prepared(root, tmp_path)
    half, _, _, second = prepared(root, tmp_path, accelerator=machine(mixed_precision="bf16"))
    assert (first.dtypes, second.dtypes) == ([torch.float32], [torch.bfloat16])
    assert (first.num_pictures, second.num_pictures) == (2, 0)  # pictures are in float32 either way
    assert sorted(second.prompts) == ["", "red"]
    dtypes = [batches.load(0)[0].cond["prompt_embeds"].dtype for batches in (plain, half)]
    assert dtypes == [torch.float32, torch.bfloat16]
    assert half.load(0)[0].cond["reference_0"].dtype == torch.float32
    assert Cache(tmp_path / "cache").has("prompts", prompt_key("fake", "red"))  # the key it always had
