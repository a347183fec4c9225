"""What has been run in a folder for the work: each command's line, its time and what it was made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Entry:
    """What is known of one command."""

    line: str
    seconds: float = 0.0  # of all its starts together
    ended: str | None = None  # in ISO 8601; None until it has ended well
    inputs: Mapping[str, str] = field(default_factory=dict)  # each one's mark at the first start (inputs.py)


@dataclass(frozen=True)
class Journal:
    """commands.json in the folder for the work."""

    path: Path

    def of(self, name: str) -> Entry | None:
        """None for a command that was not started from here: what it leaves was made by hand."""
        found = self._read().get(name)
        return None if found is None else Entry(**found)

    def seconds(self, name: str) -> float | None:
        """What a command has taken until now; None where that is not known."""
        entry = self.of(name)
        return entry.seconds if entry else None

    def ended(self, name: str) -> datetime | None:
        """When a command ended well; None where that is not known."""
        entry = self.of(name)
        return datetime.fromisoformat(entry.ended) if entry and entry.ended else None

    def write(self, name: str, entry: Entry) -> None:
        """Whole or not at all."""
        text = json.dumps({**self._read(), name: asdict(entry)}, indent=2)
        made = self.path.with_suffix(".tmp")
        made.write_text(text + "\n", encoding="utf-8")
        made.replace(self.path)

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            found: dict[str, dict[str, Any]] = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return found
