"""Prompts through CLIP: without weights equal to diffusers bit for bit, with weights as two programs define them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdlab.errors import SdlabError
from sdlab.inference.prompts.clip import ClipPrompts
from sdlab.inference.prompts.embeddings import Embedding

PLAIN = ["", "red star", "a red star, on a blue background!", "日本 ÿ", "x" * 75]


def pipeline_of(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)


def mini(dtype: torch.dtype = torch.float32) -> Any:
    from sdlab.models.opening import open_family
    from sdlab.models.resolve import resolve

    family = open_family(resolve("mini-sd", training=False))
    return family.pipeline(family.load_denoiser(torch.device("cpu"), dtype))


@pytest.fixture(scope="module")
def tiny(tiny_sd_folder: Path) -> Any:
    return pipeline_of(tiny_sd_folder)


def theirs(pipeline: Any, text: str, clip_skip: int = 1) -> Tensor:
    """As diffusers gives it; its own clip skip reads an attribute that transformers has no more."""
    if clip_skip == 1:
        made: Tensor = pipeline.encode_prompt(text, torch.device("cpu"), 1, False)[0]
        return made
    ids = pipeline.tokenizer(
        text, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        states = pipeline.text_encoder(ids, output_hidden_states=True).hidden_states
        skipped: Tensor = pipeline.text_encoder.final_layer_norm(states[-clip_skip])
    return skipped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["tiny", "tiny2", "mini"])
def test_without_weights_it_is_what_diffusers_gives_bit_for_bit(
    which: str, dtype: torch.dtype, tiny_sd_folder: Path, tiny_sd2_folder: Path
) -> None:
    folder = tiny_sd2_folder if which == "tiny2" else tiny_sd_folder
    pipeline = mini(dtype) if which == "mini" else pipeline_of(folder, dtype)
    prompts = ClipPrompts(pipeline)
    for text in [*PLAIN, "(red) [star]"]:
        emphasis = "none" if "(" in text else "a1111"
        made = prompts.encode(text, emphasis=emphasis)  # type: ignore[arg-type]
        assert made.dtype == dtype
        assert torch.equal(made, theirs(pipeline, text))


def test_the_attention_mask_is_used_where_diffusers_uses_it(tiny_sd_folder: Path) -> None:
    pipeline = pipeline_of(tiny_sd_folder)
    before = theirs(pipeline, "red star")
    pipeline.text_encoder.config.use_attention_mask = True
    made = ClipPrompts(pipeline).encode("red star", emphasis="a1111")
    assert torch.equal(made, theirs(pipeline, "red star"))
    assert not torch.equal(made, before)


def test_the_end_of_a_long_prompt_counts(tiny: Any) -> None:
    prompts = ClipPrompts(tiny)
    long = ", ".join(["red star"] * 40)
    one, other = (prompts.encode(long + end, emphasis="a1111") for end in (" a", " b"))
    assert one.shape == (1, 77 * prompts.num_chunks(long, "a1111"), 32)
    assert prompts.num_chunks(long, "a1111") >= 4
    assert torch.equal(one[:, :-77], other[:, :-77])
    assert not torch.equal(one[:, -77:], other[:, -77:])


def test_every_chunk_is_what_it_would_be_alone(tiny: Any) -> None:
    prompts = ClipPrompts(tiny)
    both = prompts.encode("red BREAK (blue:1.3)", emphasis="a1111")
    alone = [prompts.encode(text, emphasis="a1111") for text in ("red", "(blue:1.3)")]
    assert torch.equal(both, torch.cat(alone, dim=1))


def test_a_short_prompt_is_filled_up_with_empty_chunks(tiny: Any) -> None:
    made = ClipPrompts(tiny).encode("red", emphasis="a1111", num_chunks=3)
    empty = theirs(tiny, "")
    assert torch.equal(made, torch.cat([theirs(tiny, "red"), empty, empty], dim=1))


def test_cut_is_what_diffusers_cuts(tiny: Any) -> None:
    text = ", ".join(["red star"] * 40)
    assert torch.equal(ClipPrompts(tiny).encode(text, emphasis="none", long=False), theirs(tiny, text))


@pytest.mark.parametrize("clip_skip", [1, 2, 3])
def test_clip_skip_reads_an_earlier_layer(tiny: Any, clip_skip: int) -> None:
    made = ClipPrompts(tiny).encode("red star", emphasis="a1111", clip_skip=clip_skip)
    assert torch.equal(made, theirs(tiny, "red star", clip_skip))
    assert torch.equal(made, theirs(tiny, "red star")) == (clip_skip == 1)


def test_a_layer_that_is_not_there_is_refused(tiny: Any) -> None:
    with pytest.raises(SdlabError, match="2 layers"):
        ClipPrompts(tiny).encode("red", emphasis="a1111", clip_skip=4)


def weighted_by_hand(plain: Tensor) -> Tensor:
    """``ab(cd:1.5)`` without the scaling: byte tokens a b c d in places 1 to 4."""
    return torch.stack([plain[0, place] * (1.5 if place in (3, 4) else 1.0) for place in range(77)])[None]


def test_a1111s_weights_keep_the_mean(tiny_sd_folder: Path) -> None:
    pipeline = pipeline_of(tiny_sd_folder)
    with torch.no_grad():
        pipeline.text_encoder.final_layer_norm.bias.fill_(-0.2)  # CLIP's own has a mean below 0 too
    made = ClipPrompts(pipeline).encode("ab(cd:1.5)", emphasis="a1111")
    plain = theirs(pipeline, "ab cd")
    expected = weighted_by_hand(plain)
    assert torch.allclose(made, expected * (plain.sum() / expected.sum()), atol=1e-5)
    assert torch.allclose(made.mean(), plain.mean(), atol=1e-6)
    assert not torch.allclose(made, expected, atol=1e-3)


def test_a_mean_that_is_rounding_scales_nothing(tiny: Any) -> None:
    made = ClipPrompts(tiny).encode("ab(cd:1.5)", emphasis="a1111")
    assert torch.equal(made, weighted_by_hand(theirs(tiny, "ab cd")))


def test_comfys_weights_move_away_from_the_empty_prompt(tiny: Any) -> None:
    made = ClipPrompts(tiny).encode("ab(cd:1.5)", emphasis="comfy")
    plain, empty = theirs(tiny, "ab cd"), theirs(tiny, "")
    expected = plain.clone()
    for place in (3, 4):
        expected[0, place] = empty[0, place] + (plain[0, place] - empty[0, place]) * 1.5
    assert torch.allclose(made, expected, atol=1e-6)
    untouched = [place for place in range(77) if place not in (3, 4)]
    assert torch.equal(made[0, untouched], plain[0, untouched])


def test_weight_zero_and_weights_in_half_precision_are_finite(tiny_sd_folder: Path) -> None:
    prompts = ClipPrompts(pipeline_of(tiny_sd_folder, torch.bfloat16))
    for text in ("(a:0)", "(a:-1) [b]", "(poster:1984)"):
        made = prompts.encode(text, emphasis="a1111")
        assert made.dtype == torch.bfloat16
        assert torch.isfinite(made).all()


def inversions(width: int = 32) -> list[Embedding]:
    rng = torch.Generator().manual_seed(3)
    drawn = [("inkwash", 2), ("glow", 1)]
    return [Embedding(name, torch.randn(num, width, generator=rng), Path(name)) for name, num in drawn]


def test_a_textual_inversion_is_its_vectors_in_place_of_tokens(tiny_sd_folder: Path) -> None:
    pipeline = pipeline_of(tiny_sd_folder)
    made = ClipPrompts(pipeline, inversions()).encode("a inkwash b", emphasis="a1111")
    # the same by hand: three byte tokens are in the place of the name, and the table itself is changed
    by_hand = pipeline_of(tiny_sd_folder)
    table = by_hand.text_encoder.get_input_embeddings().weight
    numbers = by_hand.tokenizer("a xy b", add_special_tokens=False).input_ids
    with torch.no_grad():
        table[numbers[1]], table[numbers[2]] = inversions()[0].vectors_ND
    assert torch.equal(made, theirs(by_hand, "a xy b"))


def test_prompts_without_a_name_keep_their_bits(tiny_sd_folder: Path) -> None:
    pipeline = pipeline_of(tiny_sd_folder)
    before = [theirs(pipeline, text) for text in PLAIN]
    prompts = ClipPrompts(pipeline, inversions())
    prompts.encode("inkwash", emphasis="a1111")
    assert torch.equal(theirs(pipeline, "red star"), before[1])
    assert all(
        torch.equal(prompts.encode(t, emphasis="a1111"), b) for t, b in zip(PLAIN, before, strict=True)
    )
    assert all(torch.equal(theirs(pipeline, t), b) for t, b in zip(PLAIN, before, strict=True))


def test_several_threads_may_encode_at_once(tiny_sd_folder: Path) -> None:
    prompts = ClipPrompts(pipeline_of(tiny_sd_folder), inversions())
    texts = ["a inkwash b", "glow", "red (star:1.2)", "x" * 200, "inkwash glow", ""] * 10
    alone = [prompts.encode(text, emphasis="comfy", clip_skip=2) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda text: prompts.encode(text, emphasis="comfy", clip_skip=2), texts))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
