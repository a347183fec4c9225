"""A captioner learns what its captions say, by BLIP's own loss, and is saved so that every tool opens it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import BlipForConditionalGeneration, BlipProcessor

from sdlab.curate.categorize.captioning import _look
from sdlab.dataset.batches import Batch, Entry
from sdlab.dataset.cache import Pixels
from sdlab.errors import SdlabError
from sdlab.keyed import Draws
from sdlab.models.blip import opened
from sdlab.models.blip_fresh import fresh_captioner, fresh_side_px, vocabulary
from sdlab.models.blip_training import (
    TIED,
    TOKENS,
    CaptionedPictures,
    TrainableCaptioner,
    tokens_of,
    trainable,
)
from sdlab.models.captioner import resolve_captioner
from sdlab.training.checkpoint import trainable as trained_parameters
from tests.models.helpers import copied, edit_json, edit_tensors

CPU = torch.device("cpu")
CAPTIONS = ("a red fish", "a cat with a big black house .", "a man")
TINY = {
    "model_type": "blip",
    "text_config": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 12,
    },
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 8,
    },
}  # fmt: skip


@pytest.fixture
def tiny(tiny_blip_folder: Path) -> TrainableCaptioner:
    return trainable(resolve_captioner(str(tiny_blip_folder)))


@pytest.fixture
def tiny_config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


def batch_of(captioner: TrainableCaptioner, captions: tuple[str, ...] = CAPTIONS) -> Batch:
    tokens = tokens_of(captioner, captions)
    side_px = captioner.preparation.side_px
    pixels = torch.randn(len(captions), 3, side_px, side_px, generator=torch.Generator().manual_seed(3))
    ids_BT = torch.stack([tokens.ids[caption] for caption in captions])
    return Batch(pixels, {TOKENS: ids_BT}, torch.ones(len(captions)), captions)


def loss_of(captioner: TrainableCaptioner, batch: Batch) -> torch.Tensor:
    return captioner.loss(captioner.load(CPU, torch.float32), batch, Draws(0, 0)).detach()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_transformers(tiny_blip_folder: Path, tmp_path: Path, smoothing: float) -> None:
    folder = copied(tiny_blip_folder, tmp_path / "blip")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit_json(folder / "config.json", text_config={**text, "label_smoothing": smoothing})
    theirs = BlipForConditionalGeneration.from_pretrained(folder).eval()
    captioner = trainable(resolve_captioner(str(folder)), smoothing=smoothing)
    batch = batch_of(captioner)
    ours_B = loss_of(captioner, batch)
    assert ours_B.shape == (3,) and ours_B.dtype == torch.float32
    for row, ids_T in enumerate(batch.cond[TOKENS]):
        labels_T = ids_T.masked_fill(ids_T == captioner.tokenizer.pad_token_id, -100)
        made = theirs(
            pixel_values=batch.latents_BCHW[row : row + 1], input_ids=ids_T[None], labels=labels_T[None]
        )
        assert ours_B[row].item() == pytest.approx(made.loss.item(), rel=1e-5)


def test_a_longer_neighbour_changes_no_loss(tiny: TrainableCaptioner) -> None:
    together = loss_of(tiny, batch_of(tiny))
    ids_BT = batch_of(tiny).cond[TOKENS]
    assert (ids_BT[0] == tiny.tokenizer.pad_token_id).any()
    alone = batch_of(tiny)
    ends = (ids_BT != tiny.tokenizer.pad_token_id).sum(1)
    for row in range(3):
        cond = {TOKENS: ids_BT[row : row + 1, : ends[row]]}
        one = Batch(alone.latents_BCHW[row : row + 1], cond, torch.ones(1), ("a",))
        assert loss_of(tiny, one).item() == pytest.approx(together[row].item(), rel=1e-5)


def test_unknown_words_are_counted_and_not_learned(tiny: TrainableCaptioner) -> None:
    tokens = tokens_of(tiny, ("a ☃ cat", "a ☃ fish", "a red cat"))
    assert tokens.unknown == {"☃": 2} and not tokens.cut
    unknown = tiny.tokenizer.unk_token_id
    assert unknown in tokens.ids["a ☃ cat"]
    module, batch = tiny.load(CPU, torch.float32), batch_of(tiny, ("a ☃ cat",))
    logits_BTV, told_BT = tiny._guesses(module, batch)
    plain_T = torch.nn.functional.cross_entropy(
        logits_BTV[0], batch.cond[TOKENS][0, 1:], reduction="none", label_smoothing=0.1
    )
    assert told_BT[0, 1] == -100
    assert loss_of(tiny, batch)[0].item() == pytest.approx(plain_T[[0, 2, 3]].mean().item(), rel=1e-5)


def test_a_long_caption_is_cut_and_has_no_end_to_learn(tiny: TrainableCaptioner) -> None:
    long = " ".join(["red fish"] * 20)
    tokens = tokens_of(tiny, (long, "a man", "cat " * 14))
    end = tiny.part.config["text_config"]["sep_token_id"]
    assert tokens.cut == (long,)  # 14 tokens and an end are what 16 places have room for
    assert len(tokens.ids[long]) == 16 and end not in tokens.ids[long]
    assert tokens.ids["cat " * 14][-1] == end


def test_signs_of_the_tokenizer_in_a_caption_are_plain_text(tiny: TrainableCaptioner) -> None:
    end = tiny.part.config["text_config"]["sep_token_id"]
    assert (tokens_of(tiny, ("a [SEP] cat",)).ids["a [SEP] cat"] == end).sum() == 1


def test_captions_of_which_nothing_is_known_are_refused(tiny: TrainableCaptioner) -> None:
    with pytest.raises(SdlabError, match=r"none of the captions' words.*--init small"):
        tokens_of(tiny, ("☃ ☂", "漢字"))


def test_words_are_one_tensor_read_and_written(tiny: TrainableCaptioner, tmp_path: Path) -> None:
    module = tiny.load(CPU, torch.float32)
    named = trained_parameters(module)
    assert all(module.get_parameter(name) is module.get_parameter(owner) for name, owner in TIED.items())
    assert not set(TIED) & set(named)
    optimizer = torch.optim.SGD(named.values(), lr=0.1)
    tiny.loss(module, batch_of(tiny), Draws(0, 0)).sum().backward()
    assert all(p.grad is not None for p in named.values()), (
        "a weight that is never trained stops several processes"
    )
    optimizer.step()
    tiny.save(module, tmp_path / "out")
    assert not set(TIED) & set(load_file(tmp_path / "out" / "model.safetensors"))
    again = trainable(resolve_captioner(str(tmp_path / "out")))
    assert torch.equal(loss_of(again, batch_of(again)), loss_of_module(tiny, module))


def loss_of_module(captioner: TrainableCaptioner, module: torch.nn.Module) -> torch.Tensor:
    return captioner.loss(module.eval(), batch_of(captioner), Draws(0, 0)).detach()


def test_transformers_opens_what_is_saved_and_says_the_same(tiny: TrainableCaptioner, tmp_path: Path) -> None:
    module = tiny.load(CPU, torch.float32)
    tiny.save(module, tmp_path / "out")
    theirs, report = BlipForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    pixels_B3HW = batch_of(tiny).latents_BCHW
    processor = BlipProcessor.from_pretrained(tmp_path / "out")
    ids = theirs.eval().generate(pixels_B3HW, max_new_tokens=3, do_sample=False)
    assert processor.batch_decode(ids, skip_special_tokens=True)
    with opened(resolve_captioner(str(tmp_path / "out")), device="cpu", dtype=None) as speaker:
        assert speaker.captions(pixels_B3HW) == tiny.speaker(module).captions(pixels_B3HW)


def test_half_is_half_and_says_so(tiny: TrainableCaptioner, tmp_path: Path) -> None:
    tiny.save(tiny.load(CPU, torch.float32), tmp_path / "out", half=True)
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_words_that_were_apart_stay_apart(tiny_blip_folder: Path, tmp_path: Path) -> None:
    folder, (head, owner) = copied(tiny_blip_folder, tmp_path / "blip"), next(iter(TIED.items()))
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.update({head: tensors[owner] * 2}))
    captioner = trainable(resolve_captioner(str(folder)))
    module = captioner.load(CPU, torch.float32)
    assert {head, owner} <= set(trained_parameters(module))
    captioner.save(module, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    theirs = BlipForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert torch.equal(theirs.get_parameter(head), 2 * theirs.get_parameter(owner))


def test_exact_means_every_word(tiny: TrainableCaptioner) -> None:
    module, batch = tiny.load(CPU, torch.float32), batch_of(tiny)
    loss_B, exact_B = tiny.measure(module, batch)
    assert torch.equal(loss_B, loss_of(tiny, batch)) and not exact_B.any()
    logits_BTV, _ = tiny._guesses(module, batch)
    guessed = torch.cat([batch.cond[TOKENS][:, :1], logits_BTV.argmax(-1)], 1)
    first = Batch(batch.latents_BCHW, {TOKENS: guessed[:, :2]}, batch.weight_B, batch.ids)
    assert tiny.measure(module, first)[1].all()  # one word, and it is the likeliest


def test_pictures_are_seen_as_categorize_sees_them(tiny: TrainableCaptioner, tmp_path: Path) -> None:
    rng, paths = np.random.default_rng(1), []
    for name, size in (("a.png", (50, 70, 3)), ("b.jpg", (400, 300, 3)), ("c.png", (32, 32, 3))):
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(tmp_path / name)
        paths.append(str(tmp_path / name))
    tokens = tokens_of(tiny, CAPTIONS)
    entries = [Entry(p, (32, 32), prompt_key=c, path=p) for p, c in zip(paths, CAPTIONS, strict=True)]
    plain = CaptionedPictures(tiny.preparation, tokens, Pixels((255, 255, 255), 10**7))
    pixels_B3HW, cond = plain(entries, Draws(5, 0))
    for row, path in enumerate(paths):
        seen = _look(tiny.preparation, path, background=(255, 255, 255), max_pixels=10**7)
        assert not isinstance(seen, str) and torch.equal(pixels_B3HW[row], seen.pixels_3HW)
        assert torch.equal(cond[TOKENS][row], tokens.ids[CAPTIONS[row]])
    mirrored = CaptionedPictures(tiny.preparation, tokens, plain.pixels, flip=True)
    turned = {
        (row, step)
        for step in range(8)
        for row in range(3)
        if not torch.equal(mirrored(entries, Draws(5, step))[0][row], pixels_B3HW[row])
    }
    assert 0 < len(turned) < 24
    row, step = min(turned)
    assert torch.equal(mirrored(entries[row:], Draws(5, step))[0][0], pixels_B3HW[row].flip(-1))
    Path(paths[0]).write_bytes(b"")
    with pytest.raises(SdlabError, match=r"a\.png: cannot be used any more.*--resume"):
        plain(entries, Draws(5, 0))


def weights_of(captioner: TrainableCaptioner) -> dict[str, torch.Tensor]:
    return {name: stored.read() for name, stored in captioner.part.weights.items()}


def test_an_untrained_captioner_is_a_function_of_its_seed(tiny_config: Path) -> None:
    def fresh(seed: int) -> dict[str, torch.Tensor]:
        return weights_of(fresh_captioner(str(tiny_config), CAPTIONS, seed=seed, side_px=None))

    torch.manual_seed(1)
    before, one = torch.random.get_rng_state(), fresh(7)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(torch.equal(tensor, one[name]) for name, tensor in fresh(7).items())
    assert any(not torch.equal(tensor, one[name]) for name, tensor in fresh(8).items())
    looked = [t for name, t in one.items() if t.ndim > 1 and "vision" in name]
    assert all(0.01 < t.std() < 0.04 for t in looked), (
        "BLIP's own start of its pictures' side is nearly nothing"
    )


def test_a_layer_does_not_depend_on_those_before_it(tiny_config: Path) -> None:
    """Another block in the pictures' side changes nothing of the words' side, and no card is seeded."""
    seeded: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "manual_seed", seeded.append)
        one = weights_of(fresh_captioner(str(tiny_config), CAPTIONS, seed=7, side_px=None))
        edit_json(tiny_config, vision_config={**TINY["vision_config"], "num_hidden_layers": 2})  # type: ignore[dict-item]
        other = weights_of(fresh_captioner(str(tiny_config), CAPTIONS, seed=7, side_px=None))
    assert not seeded and len(other) > len(one)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    drawn = {n: t for n, t in one.items() if t.ndim > 1 and n not in TIED}
    starts = {t.flatten()[-4:].numpy().tobytes() for t in drawn.values()}
    assert len(starts) == len(drawn), "two layers that are the same"
    assert all(torch.equal(one[name], one[owner]) for name, owner in TIED.items())


def test_its_words_are_those_of_the_captions(tiny_config: Path, tmp_path: Path) -> None:
    captions = ("A Zebra, äußerst [SEP] selten", "猫 zebra 7")
    words = vocabulary(captions)
    assert words == vocabulary(captions[::-1])
    assert words[:6] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    assert words.index("zebra") < words.index("selten"), "the more frequent first"
    assert {"猫", "7", ",", "[", "##z"} <= set(words) and len(set(words)) == len(words)
    captioner = fresh_captioner(str(tiny_config), captions, seed=1, side_px=16)
    assert tokens_of(captioner, captions).unknown == {}
    assert captioner.preparation.side_px == 16
    captioner.save(captioner.load(CPU, torch.float32), tmp_path / "out")
    assert BlipProcessor.from_pretrained(tmp_path / "out").tokenizer("a zebra").input_ids[1:-1]
    saved = trainable(resolve_captioner(str(tmp_path / "out")))
    assert saved.fingerprint == captioner.fingerprint
    assert all(torch.equal(t, weights_of(saved)[name]) for name, t in weights_of(captioner).items())


def test_its_words_can_be_another_captioners(
    tiny: TrainableCaptioner, tiny_blip_folder: Path, tiny_config: Path
) -> None:
    like = resolve_captioner(str(tiny_blip_folder))
    made = fresh_captioner(str(tiny_config), ("zebra",), seed=1, side_px=None, like=like)
    assert made.tokenizer.get_vocab() == tiny.tokenizer.get_vocab()
    assert made.part.config["text_config"]["sep_token_id"] == tiny.part.config["text_config"]["sep_token_id"]


def test_the_known_size_is_that_of_mini_blip() -> None:
    assert fresh_side_px("small") == 96
    made = fresh_captioner("small", CAPTIONS, seed=1, side_px=None)
    mini = trainable(resolve_captioner("mini-blip"))
    shapes = {name: stored.shape for name, stored in made.part.weights.items()}
    own = {name: stored.shape for name, stored in mini.part.weights.items()}
    words = {*TIED, *TIED.values()}
    assert {n: s for n, s in shapes.items() if n not in words} == {
        n: s for n, s in own.items() if n not in words
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "bert"}, "a model of the kind 'bert'"),
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
        ({"vision_config": {**TINY["vision_config"], "image_size": 30}}, "30 is not a multiple of 8"),  # type: ignore[dict-item]
        ({"text_config": {**TINY["text_config"], "num_attention_heads": 3}}, "does not describe"),  # type: ignore[dict-item]
    ],
)  # fmt: skip
def test_a_configuration_of_something_else_is_refused(
    tiny_config: Path, change: dict[str, Any], said: str
) -> None:
    edit_json(tiny_config, **change)
    with pytest.raises(SdlabError, match=said) as refused:
        fresh_captioner(str(tiny_config), CAPTIONS, seed=1, side_px=None)
    assert "\n" not in str(refused.value)
