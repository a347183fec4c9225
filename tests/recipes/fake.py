"""A program in sdlab's place: trains ten steps into --save-model, is killed at the step that FAKE_KILL_AT names."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import datetime, timezone
from pathlib import Path


def main() -> None:
    words = sys.argv[1:]
    folder = Path(words[words.index("--save-model") + 1])
    record = folder / "run.json"
    calls = Path(os.environ["FAKE_CALLS"])
    calls.write_text((calls.read_text() if calls.exists() else "") + " ".join(words) + "\n")
    if record.exists() != ("--resume" in words):
        sys.exit("a run is resumed, and nothing else")
    said = json.loads(record.read_text()) if record.exists() else {"step": 0}
    folder.mkdir(parents=True, exist_ok=True)
    for step in range(said["step"] + 1, 11):
        record.write_text(json.dumps({"state": "running", "step": step}))
        if os.environ.get("FAKE_KILL_AT") == f"{folder.name}:{step}":
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get("FAKE_WAIT_AT") == f"{folder.name}:{step}":
            _wait_for_a_signal(record)
    ended = datetime.now(timezone.utc).isoformat()
    record.write_text(json.dumps({"state": "finished", "step": 10, "ended": ended}))


def _wait_for_a_signal(record: Path) -> None:
    """As sdlab does: what there is is saved, which takes a moment, and then the program ends."""

    def save(signum: int, _: object) -> None:
        time.sleep(0.7)
        record.write_text(json.dumps({"state": "stopped", "step": 5}))
        sys.exit(128 + signum)

    signal.signal(signal.SIGINT, save)
    signal.signal(signal.SIGTERM, save)
    record.with_name("waits").touch()
    time.sleep(60)


if __name__ == "__main__":
    main()
