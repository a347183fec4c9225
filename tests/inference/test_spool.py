"""Ten thousand prompts of FLUX.2 do not fill the memory, and come back as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdlab.inference.spool import Spool


def test_what_is_beyond_the_limit_lies_on_disk_and_comes_back_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    conds = {f"prompt {n}": {"prompt_embeds": torch.randn(4, 8).to(torch.bfloat16)} for n in range(5)}
    spool = Spool(kept_bytes=2 * 4 * 8 * 2)
    for prompt, cond in conds.items():
        spool.add(prompt, cond)
    assert list(spool) == list(conds) and len(spool) == 5
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    assert all(torch.equal(spool[p]["prompt_embeds"], cond["prompt_embeds"]) for p, cond in conds.items())
    del spool
    assert not list(tmp_path.iterdir())
