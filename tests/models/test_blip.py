"""BLIP says what its own class would say, without stutter; what is broken is refused in one line."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BlipForConditionalGeneration, LogitsProcessorList
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from sdlab.dataset.files import sha256_of
from sdlab.errors import SdlabError
from sdlab.models import captioner as captioner_module
from sdlab.models import hub
from sdlab.models.blip import Speaker, opened, repeats
from sdlab.models.blip_folder import preparation_of
from sdlab.models.captioner import Caption, Captioner, fingerprint_of, resolve_captioner
from sdlab.models.resolve import resolve
from tests.models.helpers import copied, edit_json, edit_tensors
from tests.models.hub import cached

pytestmark = pytest.mark.usefixtures("elsewhere")

WEIGHTS = "model.safetensors"
HEAD = "text_decoder.cls.predictions."
WORDS = "text_decoder.bert.embeddings.word_embeddings.weight"


@pytest.fixture
def broken(tiny_blip_folder: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return copied(tiny_blip_folder, tmp_path / "broken")


def noise(num: int) -> list[Image.Image]:
    """Pictures of many sizes, coarse noise in them."""
    rng = np.random.default_rng(7)
    made = []
    for i in range(num):
        small = rng.integers(0, 256, (3 + i % 4, 3, 3), dtype=np.uint8)
        made.append(Image.fromarray(small).resize((20 + 13 * (i % 7), 24 + 11 * (i % 5))))
    return made


def said(
    folder: Path, images: list[Image.Image], *, batch: int = 64, dtype: str | None = None
) -> list[Caption]:
    captioner = resolve_captioner(str(folder))
    preparation = preparation_of(captioner)
    with opened(captioner, device="cpu", dtype=dtype) as speaker:
        pixels = [preparation.prepare(image) for image in images]
        groups = [pixels[at : at + batch] for at in range(0, len(pixels), batch)]
        return [caption for group in groups for caption in speaker.captions(torch.stack(group))]


def test_pictures_are_prepared_as_transformers_does(tiny_blip_folder: Path) -> None:
    preparation = preparation_of(resolve_captioner(str(tiny_blip_folder)))
    theirs = BlipImageProcessorPil.from_pretrained(tiny_blip_folder)
    for image in noise(9):
        ours_3HW = preparation.prepare(image)
        assert ours_3HW.shape == (3, preparation.side_px, preparation.side_px)
        assert torch.equal(ours_3HW, theirs(image, return_tensors="pt")["pixel_values"][0])


def test_words_and_confidence_are_those_of_generate(tiny_blip_folder: Path) -> None:
    """transformers' own loop, with our rules as its logits processor."""
    model = BlipForConditionalGeneration.from_pretrained(tiny_blip_folder).eval()
    captioner = resolve_captioner(str(tiny_blip_folder))
    preparation = preparation_of(captioner)
    with opened(captioner, device="cpu", dtype=None) as speaker:
        pixels_B3HW = torch.stack([preparation.prepare(image) for image in noise(12)])
        made = model.generate(
            pixels_B3HW,
            max_new_tokens=15,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            logits_processor=LogitsProcessorList(
                [lambda ids, scores: speaker._ruled_out(scores.clone(), ids[:, 1:].tolist())]
            ),
        )
        log_BTV = torch.stack(made.logits, 1).log_softmax(-1)
        end = model.config.text_config.sep_token_id
        lengths = set()
        for row, caption in enumerate(speaker.captions(pixels_B3HW)):
            tokens = made.sequences[row, 1:].tolist()
            tokens = tokens[: tokens.index(end) + 1] if end in tokens else tokens
            lengths.add(len(tokens))
            text = speaker._tokenizer.decode(tokens, skip_special_tokens=True)
            assert caption.text == " ".join(text.split())
            mean = log_BTV[row, range(len(tokens)), tokens].mean()
            assert caption.confidence == pytest.approx(math.exp(mean), abs=1e-3)
    assert len(lengths) > 1, "all captions ended at the same place: nothing is seen of early ends"


def test_captions_do_not_depend_on_their_batch(tiny_blip_folder: Path) -> None:
    images = noise(32)
    together = said(tiny_blip_folder, images)
    assert len({caption.text for caption in together}) > 10
    assert said(tiny_blip_folder, images, batch=1) == together
    assert said(tiny_blip_folder, images[::-1], batch=7)[::-1] == together


def test_a_model_that_stutters_does_not(broken: Path) -> None:
    vocabulary = json.loads((broken / "tokenizer.json").read_text())["model"]["vocab"]

    def insist(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HEAD + "bias"][vocabulary["cat"]] += 1000
        tensors[HEAD + "bias"][vocabulary["and"]] += 900

    edit_tensors(broken / WEIGHTS, insist)
    words = said(broken, noise(1))[0].text.split()
    assert words[:3] == ["cat", "and", "cat"]
    assert all(a != b for a, b in pairwise(words))
    threes = list(zip(words, words[1:], words[2:], strict=False))
    assert len(set(threes)) == len(threes)


def test_repeats() -> None:
    assert repeats([]) == set()
    assert repeats([4]) == {4}
    assert repeats([4, 5]) == {5}
    assert repeats([4, 5, 6, 4, 5]) == {5, 6}
    assert repeats([4, 5, 4, 5]) == {5, 4}


def test_captions_are_never_empty(broken: Path) -> None:
    end = json.loads((broken / "tokenizer.json").read_text())["model"]["vocab"]["[SEP]"]
    edit_tensors(broken / WEIGHTS, lambda tensors: tensors[HEAD + "bias"][end].add_(1000))
    captions = said(broken, noise(3))
    assert all(caption.text and caption.confidence < 0.001 for caption in captions)


def test_a_caption_of_nothing_but_a_hash_is_one(broken: Path) -> None:
    """A caption file takes such a line for a remark: what becomes of it is up to the one who writes it."""
    path = broken / "tokenizer.json"
    table = json.loads(path.read_text())
    words = table["model"]["vocab"]
    words["#"] = words.pop("cat")
    path.write_text(json.dumps(table))
    edit_tensors(broken / WEIGHTS, lambda tensors: tensors[HEAD + "bias"][words["#"]].add_(1000))
    edit_tensors(broken / WEIGHTS, lambda tensors: tensors[HEAD + "bias"][words["[SEP]"]].add_(900))
    assert [caption.text for caption in said(broken, noise(2))] == ["#", "#"]


@pytest.mark.parametrize("special", ["[PAD]", "[UNK]", "[CLS]", "[MASK]", "[DEC]"])
def test_what_is_no_word_is_never_said(special: str, tiny_blip_folder: Path, broken: Path) -> None:
    number = json.loads((broken / "tokenizer.json").read_text())["model"]["vocab"][special]
    edit_tensors(broken / WEIGHTS, lambda tensors: tensors[HEAD + "bias"][number].add_(1000))
    words = [caption.text for caption in said(broken, noise(4))]
    assert words == [caption.text for caption in said(tiny_blip_folder, noise(4))]


def test_probabilities_are_summed_in_full_precision(
    tiny_blip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[torch.Tensor] = []
    following = Speaker._next

    def watched(self: Speaker, *args: Any) -> Any:
        log_BV, memory = following(self, *args)
        steps.append(log_BV)
        return log_BV, memory

    monkeypatch.setattr(Speaker, "_next", watched)
    said(tiny_blip_folder, noise(4), dtype="bf16")
    assert steps
    for log_BV in steps:
        assert log_BV.dtype is torch.float32
        assert (log_BV.exp().sum(-1) - 1).abs().max() < 1e-5


def test_half_types(tiny_blip_folder: Path, broken: Path) -> None:
    whole = load_file(broken / WEIGHTS)
    save_file({name: tensor.half() for name, tensor in whole.items()}, broken / WEIGHTS)
    images = noise(8)
    full, stored_half = said(tiny_blip_folder, images), said(broken, images)
    assert sum(a.text == b.text for a, b in zip(full, stored_half, strict=True)) >= 7
    assert all(0 < caption.confidence <= 1 for caption in said(tiny_blip_folder, images, dtype="bf16"))


def test_what_else_a_folder_says_is_not_heeded(tiny_blip_folder: Path, broken: Path) -> None:
    """No code is fetched or run, and another way of choosing words is not taken over."""
    edit_json(
        broken / "config.json",
        auto_map={"AutoModel": "evil.Model"},
        trust_remote_code=True,
        return_dict=False,
    )
    edit_json(
        broken / "generation_config.json", do_sample=True, max_length=10**9, num_beams=4096, temperature=1e9
    )
    (broken / "evil.py").write_text("raise SystemExit('run')\n")
    assert said(broken, noise(4)) == said(tiny_blip_folder, noise(4))


def change(name: str, how: Callable[[torch.Tensor], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        edit_tensors(folder / WEIGHTS, lambda tensors: tensors.update({name: how(tensors[name])}))

    return apply


def inner(part: str, **values: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        table = json.loads(path.read_text())
        table[part] |= values
        path.write_text(json.dumps(table))

    return apply


BREAKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "tensor missing": (lambda f: edit_tensors(f / WEIGHTS, lambda t: t.pop(WORDS)), "is missing"),
    "tensor of another": (
        lambda f: edit_tensors(f / WEIGHTS, lambda t: t.update(odd=torch.ones(2))),
        "'odd' has no place",
    ),
    "NaN": (
        change(WORDS, lambda t: t.index_fill(0, torch.tensor([3]), math.nan)),
        "not finite .* take another copy",
    ),
    "misshapen": (change(WORDS, lambda t: t[:-1].contiguous()), r"configured is \["),
    "whole numbers": (change(WORDS, lambda t: t.long()), "I64"),
    "zeros": (
        lambda f: edit_tensors(f / WEIGHTS, lambda t: [v.zero_() for v in t.values()]),
        "nothing but zeros",
    ),
    "too large for its type": (
        change("vision_model.post_layernorm.weight", lambda t: t.fill_(3e38)),
        "numbers are not finite",
    ),
    "LFS pointer": (
        lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    "web page": (lambda f: (f / WEIGHTS).write_text("<!DOCTYPE html><p>log in</p>"), "is a web page"),
    "cut short": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:9000]),
        "is cut short",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "there is no model.safetensors"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no vocab.txt or tokenizer.json"),
    "no preprocessor": (lambda f: (f / "preprocessor_config.json").unlink(), "no preprocessor_config.json"),
    "tokenizer is a page": (
        lambda f: (f / "tokenizer.json").write_text("<html>"),
        "tokenizer.json: is a web page",
    ),
    "tokenizer torn": (
        lambda f: (f / "tokenizer.json").write_text('{"version": "1.0", '),
        "the tokenizer cannot be read",
    ),
    "tokenizer of another": (
        lambda f: edit_json(
            f / "tokenizer.json",
            added_tokens=[
                {"id": 5000, "content": "[X]", "special": True, "single_word": False, "lstrip": False,
                 "rstrip": False, "normalized": False}
            ],
        ),
        "has token numbers up to|cannot be read",
    ),
    "other size": (
        lambda f: edit_json(f / "preprocessor_config.json", size={"height": 48, "width": 32}),
        "the model takes 32 x 32",
    ),
    "not normalised": (
        lambda f: edit_json(f / "preprocessor_config.json", do_normalize=False, image_std=[1, 0, 1]),
        "do_normalize is off; image_mean",
    ),
    "other resample": (lambda f: edit_json(f / "preprocessor_config.json", resample=9), "unknown resample 9"),
    "config torn": (lambda f: (f / "config.json").write_text("{"), "is not valid JSON"),
    "no text_config": (lambda f: edit_json(f / "config.json", text_config=3), "has no text_config"),
    "absurd": (inner("text_config", num_hidden_layers=10**7), "more than the 64 we allow"),
    "huge pictures": (inner("vision_config", image_size=8192), "no BLIP does"),
    "no patches": (inner("vision_config", patch_size=0), "no BLIP does"),
    "odd heads": (inner("text_config", num_attention_heads=7), "does not describe a BlipForCond"),
    "odd type": (inner("text_config", hidden_act=["gelu"]), "does not describe a BlipForCond"),
    "unknown word to end": (inner("text_config", sep_token_id=4096), "sep_token_id 4096 is none of"),
    "no room": (inner("text_config", max_position_embeddings=1), "no room for a caption"),
    "another kind": (lambda f: edit_json(f / "config.json", model_type="llama"), "of the kind 'llama'"),
    "answers questions": (
        lambda f: edit_json(f / "config.json", architectures=["BlipForQuestionAnswering"]),
        "is a BlipForQuestionAnswering, not a BlipForCond",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BREAKS)
def test_a_broken_folder_is_refused_in_one_line(kind: str, broken: Path) -> None:
    spoil, words = BREAKS[kind]
    spoil(broken)
    with pytest.raises(SdlabError, match=words) as raised:
        said(broken, noise(1))
    assert str(broken) in str(raised.value) and "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400 + len(str(broken))


def test_a_pickle_is_read_only_where_that_is_allowed(tiny_blip_folder: Path, broken: Path) -> None:
    """As the public folders have it: a pickle, with counts of positions that are no weights."""
    tensors = load_file(broken / WEIGHTS)
    tensors["text_decoder.bert.embeddings.position_ids"] = torch.arange(16)[None]
    torch.save(tensors, broken / "pytorch_model.bin")
    (broken / WEIGHTS).unlink()
    with pytest.raises(SdlabError, match=r"is a pickle.*--allow-pickle"):
        resolve_captioner(str(broken))
    allowed = resolve_captioner(str(broken), allow_pickle=True)
    preparation = preparation_of(allowed)
    with opened(allowed, device="cpu", dtype=None) as speaker:
        captions = speaker.captions(torch.stack([preparation.prepare(image) for image in noise(3)]))
    assert captions == said(tiny_blip_folder, noise(3))


def test_settings_within_a_processor_config_are_found(tiny_blip_folder: Path, broken: Path) -> None:
    table = json.loads((broken / "preprocessor_config.json").read_text())
    (broken / "preprocessor_config.json").rename(broken / "processor_config.json")
    (broken / "processor_config.json").write_text(json.dumps({"image_processor": table}))
    assert said(broken, noise(3)) == said(tiny_blip_folder, noise(3))


def fingerprint(folder: Path) -> str:
    return fingerprint_of(resolve_captioner(str(folder)), Path("cache"))


def test_the_fingerprint_follows_every_file(tiny_blip_folder: Path, broken: Path) -> None:
    prints = {fingerprint(tiny_blip_folder), fingerprint(broken)}
    assert len(prints) == 1
    for spoil in (
        lambda: change(WORDS, lambda t: t + 1)(broken),
        lambda: edit_json(broken / "preprocessor_config.json", resample=2),
        lambda: edit_json(broken / "tokenizer_config.json", model_max_length=15),
        lambda: inner("text_config", layer_norm_eps=1e-5)(broken),
    ):
        spoil()
        prints.add(fingerprint(broken))
    assert len(prints) == 5


def test_a_model_that_did_not_change_is_not_read_again_for_its_fingerprint(
    broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr("sdlab.dataset.cache.sha256_of", lambda path: read.append(path) or sha256_of(path))
    first = fingerprint(broken)
    assert str(broken / WEIGHTS) in read
    read.clear()
    assert fingerprint(broken) == first and not read
    change(WORDS, lambda t: t + 1)(broken)
    assert fingerprint(broken) != first and read == [str(broken / WEIGHTS)]


def test_names_and_hub_ids_are_taken_from_the_local_cache(tiny_blip_folder: Path, tmp_path: Path) -> None:
    base = cached(tiny_blip_folder, tmp_path / "hub", "Salesforce/blip-image-captioning-base")
    torch.save(load_file(base / WEIGHTS), base / "pytorch_model.bin")
    (base / WEIGHTS).unlink()
    found = resolve_captioner("BLIP-base")
    assert (found.name, found.folder, found.allow_pickle) == ("blip-base", base, True)
    assert "from the local cache" in found.why and found.review_below == 0.35
    own = cached(tiny_blip_folder, tmp_path / "hub", "me/my-blip")
    assert (resolve_captioner("me/my-blip@main").name, resolve_captioner("me/my-blip").folder) == (
        "my-blip",
        own,
    )


@pytest.mark.parametrize("has_safetensors", [True, False])
def test_the_hub_is_asked_for_a_pickle_only_where_there_is_nothing_else(
    has_safetensors: bool, broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(load_file(broken / WEIGHTS), broken / hub.PICKLED)
    if not has_safetensors:
        (broken / WEIGHTS).unlink()
    local = tmp_path / "snapshot"

    def fetcher(repo: str, patterns: tuple[str, ...], **_: Any) -> Callable[..., str]:
        def fetch(local_files_only: bool = False) -> str:
            if local_files_only and not local.exists():
                raise LocalEntryNotFoundError("nothing")
            local.mkdir(exist_ok=True)
            for path in broken.iterdir() if not local_files_only else ():
                if any(fnmatch(path.name, pattern) for pattern in patterns):
                    shutil.copy(path, local)
            return str(local)

        return fetch

    monkeypatch.setattr(hub, "_fetcher", fetcher)
    monkeypatch.setattr(hub, "_knock", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    if has_safetensors:
        assert "downloaded from the hub" in resolve_captioner("me/blip").why
    else:
        with pytest.raises(SdlabError, match=r"model.safetensors \(--allow-pickle would"):
            resolve_captioner("me/blip")
    found = resolve_captioner("blip-large")
    assert (local / hub.PICKLED).exists() is not has_safetensors
    assert "from the local cache" in resolve_captioner("blip-large").why
    assert preparation_of(found).side_px == 32
    with opened(found, device="cpu", dtype=None):
        pass


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("blip-base", "Salesforce/blip-image-captioning-base.*not in the local cache.*built-in mini-blip"),
        ("me/other-blip", "not in the local cache.*built-in mini-blip"),
        ("blip-bse", "no captioner of that name, did you mean 'blip-base'"),
        ("mini_blip", "no captioner of that name, did you mean 'mini-blip'"),
        ("mini-sd", "makes pictures and does not describe them.*Give mini-blip"),
        ("flux2-dev", "makes pictures and does not describe them"),
        ("./nowhere", "there is no such folder"),
        ("models/blip.safetensors", "there is no such folder"),
        ("one.safetensors", "is a file; a captioner is a folder"),
        ("sd-folder", "makes pictures and does not describe them"),
        ("empty", "is no captioner: there is no config.json"),
        ("tuned/ru", "there is no such folder, did you mean 'tuned/run'"),
        ("tuned/run", "makes pictures and does not describe them"),
    ],
)
def test_what_is_no_captioner_is_said_in_one_line(asked: str, words: str) -> None:
    Path("one.safetensors").write_bytes(b"x")
    for folder, file in (("sd-folder", "model_index.json"), ("tuned/run", "run.json"), ("empty", "a.txt")):
        Path(folder).mkdir(parents=True)
        (Path(folder) / file).write_text("{}")
    with pytest.raises(SdlabError, match=words) as raised:
        resolve_captioner(asked)
    assert "\n" not in str(raised.value)


def test_the_default_is_blip_base_with_a_card_and_mini_blip_without(
    tiny_blip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captioner_module, "builtin_folder", lambda name: tiny_blip_folder)
    small = resolve_captioner("")
    assert (small.name, small.review_below, small.folder) == (
        "mini-blip",
        captioner_module.REVIEW_BELOW["mini-blip"],
        tiny_blip_folder,
    )
    assert "no --load-model was given and there is no CUDA card" in small.why
    assert resolve_captioner("mini-blip").folder == small.folder
    cached(tiny_blip_folder, tmp_path / "hub", "Salesforce/blip-image-captioning-base")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    large: Captioner = resolve_captioner(" ")
    assert large.name == "blip-base" and "there is a CUDA card" in large.why


@pytest.mark.parametrize("asked", ["mini-blip", "blip-large", "Salesforce/blip-image-captioning-base", "own"])
def test_a_captioner_is_no_model_to_make_pictures_with(asked: str, tiny_blip_folder: Path) -> None:
    copied(tiny_blip_folder, Path("own"))
    with pytest.raises(SdlabError, match=f"describes pictures.*sdlab categorize --load-model {asked}"):
        resolve(asked, training=False)
