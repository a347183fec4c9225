"""What a kind of model does not take is said before anything is loaded."""

from __future__ import annotations

from types import SimpleNamespace

from sdlab.inference.engines import kinds


def test_stable_diffusion_takes_everything_but_references() -> None:
    encoder = SimpleNamespace(config={"num_hidden_layers": 12})
    engine = kinds.engine_of("sd", SimpleNamespace(parts=SimpleNamespace(text_encoder=encoder)))
    reasons = {name: value for name, value in vars(engine).items() if name.startswith("no_") and value}
    assert list(reasons) == ["no_references"]


def test_flux2_says_what_its_text_encoder_cannot_do() -> None:
    parts = SimpleNamespace(kind="klein", is_distilled=False)
    engine = kinds.engine_of("flux2", SimpleNamespace(parts=parts))
    assert "plain text" in engine.no_emphasis and "CLIP" in engine.no_clip_skip
    assert "textual inversions" in engine.no_embeddings and not engine.no_mask
