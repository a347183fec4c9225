"""The hub's local cache as tests see it."""

from __future__ import annotations

from pathlib import Path

from tests.models.helpers import copied


def cached(source: Path, cache: Path, repo: str) -> Path:
    """A copy of the folder in the cache of the hub, as huggingface_hub lays it out."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("abc123")
    return copied(source, root / "snapshots" / "abc123")
