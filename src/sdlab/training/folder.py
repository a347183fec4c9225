"""The files of a run: ``run.json``, ``log.jsonl``, ``loss.png``, ``samples/`` and ``checkpoints/``.

log.jsonl holds what the seed determines and nothing else (no times), so a run that was killed and resumed
writes the same lines as one that was not.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from torch import nn

from sdlab import show
from sdlab.dataset.cache import write_whole
from sdlab.errors import OutOfResources, SdlabError
from sdlab.models.captioner import CAPTIONER_FILES
from sdlab.models.runs import LORA_FILE
from sdlab.training import checkpoint
from sdlab.training.checkpoint import State
from sdlab.training.optim import Ema, Updater
from sdlab.training.report import Progress, loss_plot

OWN = frozenset(
    ("run.json", "dataset.json", "log.jsonl", "loss.png", "samples", "checkpoints", "model_index.json", "unet",
     "transformer", "vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor", LORA_FILE,
     ".lock", *CAPTIONER_FILES)
)  # fmt: skip


_LEFTOVER = re.compile(r"\.(export-\d+|.*\.[0-9a-f]+\.part)")  # staged by a process that was killed


class RunFolder:
    """One run's folder. Only the main process of a run holds one that writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.progress: Progress | None = None
        self.has_recorded = False  # has this start written down anything?
        self._log: IO[bytes] | None = None

    def recorded(self) -> dict[str, Any] | None:
        """run.json, or None where there is no run. Raises SdlabError if it cannot be read."""
        try:
            record = json.loads((self.path / "run.json").read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as reason:
            raise SdlabError(f"run.json cannot be read ({reason})", where=str(self.path)) from reason
        if not isinstance(record, dict):
            raise SdlabError("run.json is not a run's record", where=str(self.path))
        return record

    def began(self) -> bool:
        """True if a run has got as far as its first step here; one that was still encoding can simply start again."""
        return "dataset" in (self.recorded() or {}) or bool(checkpoint.found(self.checkpoints))

    def record(self, **facts: Any) -> None:
        """Add facts to run.json, whole or not at all."""
        merged = {**(self.recorded() or {}), **facts}
        text = json.dumps(merged, indent=2, ensure_ascii=False)
        write_whole(self.path / "run.json", text.encode("utf-8", "backslashreplace"), sync=True)
        self.has_recorded = True

    def refuse_strangers(self) -> None:
        """Raises SdlabError if the folder holds anything but a run: nothing of the user's is replaced.

        A diffusers model without a run.json is the user's, though its parts have the names that a run's have.
        """
        if self.path.exists() and not self.path.is_dir():
            raise SdlabError(
                "is a file", where=str(self.path), next_step="Name another folder with --save-model"
            )
        strangers = [p.name for p in self.path.iterdir() if p.name not in OWN] if self.path.is_dir() else []
        strangers = [name for name in strangers if not _LEFTOVER.fullmatch(name)]
        if self.path.is_dir() and self.recorded() is None and not checkpoint.found(self.checkpoints):
            names = {p.name for p in self.path.iterdir() if not _LEFTOVER.fullmatch(p.name)}
            strangers += sorted(names - {".lock", "dataset.json", "checkpoints"} - set(strangers))
        if strangers:
            raise SdlabError(
                f"holds files that are not a run's ({', '.join(sorted(strangers)[:3])})",
                where=str(self.path),
                next_step="Name another folder with --save-model",
            )

    def sweep(self) -> None:
        """Remove what killed writes left behind. Call with the run locked."""
        checkpoint.sweep(self.checkpoints)
        for folder in (self.path, self.path / "samples"):
            for path in folder.iterdir() if folder.is_dir() else ():
                if _LEFTOVER.fullmatch(path.name):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def clear(self) -> None:
        """Remove a former run's files, the checkpoints last."""
        for name in (*sorted(OWN - {".lock", "checkpoints"}), "checkpoints"):
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; a lock of a dead process does not count. Raises SdlabError."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / ".lock", os.O_CREAT | os.O_RDWR, 0o666)
        except OSError as reason:
            raise _unwritable(self.path, reason) from reason
        try:
            _lock(handle)
        except OSError as reason:
            os.close(handle)
            raise SdlabError(
                "another sdlab is training into it",
                where=str(self.path),
                next_step="Wait, or use --save-model",
            ) from reason
        try:
            yield
        finally:
            os.close(handle)  # first: Windows removes no open file
            (self.path / ".lock").unlink(missing_ok=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()  # nothing came of the run

    def check_space(self, needed_bytes: int) -> None:
        """Raises OutOfResources if the disk has less free than the run will write, besides what it has written."""
        free = shutil.disk_usage(self.path).free + self._size_bytes()
        if free < needed_bytes:
            raise OutOfResources(
                f"the run needs {needed_bytes / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free",
                where=str(self.path),
                next_step="Free some, lower --keep, or name another disk with --save-model",
            )

    def _size_bytes(self) -> int:
        return sum(p.stat().st_size for p in self.path.rglob("*") if p.is_file())

    def restore(self, module: nn.Module, updater: Updater, ema: Ema | None) -> State:
        """Load the newest checkpoint that verifies and cut the log to it; step 0 where there is none."""
        newest = checkpoint.newest_good(self.checkpoints)
        if not newest and checkpoint.found(self.checkpoints):
            raise SdlabError(
                "none of the checkpoints is as it was written",
                where=str(self.checkpoints),
                next_step="Restore them from a backup, or start over with --overwrite",
            )
        if not newest:
            return State(step=0, log_bytes=0, skipped_in_a_row=0)
        state = checkpoint.load(newest, module, updater, ema)
        show.note(f"goes on from {newest} (step {state.step})")
        return state

    def open_log(self, length: int) -> None:
        """Open log.jsonl for appending after its first `length` bytes; later lines are of lost steps."""
        path = self.path / "log.jsonl"
        if length > (path.stat().st_size if path.exists() else 0):
            raise SdlabError(
                "shorter than its checkpoint says", where=str(path), next_step="Restore it, or start anew"
            )
        self._log = path.open("ab")
        self._log.truncate(length)
        self._log.seek(length)

    def log(self, record: dict[str, Any], *, num_pictures: int) -> None:
        """Append one line and move the progress bar."""
        if self._log:
            self._log.write(
                (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
            )
            self._log.flush()
        if self.progress:
            self.progress.advance(record, num_pictures)

    def log_bytes(self) -> int:
        """Length of the log, after it has reached the disk."""
        if not self._log:
            return 0
        os.fsync(self._log.fileno())
        return self._log.tell()

    def save_checkpoint(
        self, state: State, module: nn.Module, updater: Updater, ema: Ema | None, *, keep: int
    ) -> None:
        """Save, verify, then prune. Raises OutOfResources where the disk is full or not writable."""
        try:
            newest = checkpoint.save(self.checkpoints, state, module, updater, ema)
            checkpoint.prune(self.checkpoints, newest=newest, keep=keep)
            self.record(step=state.step)
        except OSError as reason:
            raise _unwritable(self.checkpoints, reason, last=checkpoint.found(self.checkpoints)) from reason

    def num_skipped(self) -> int:
        """Steps of the log that were skipped because their loss was not finite."""
        path = self.path / "log.jsonl"
        return sum(b'"skipped"' in line for line in path.read_bytes().splitlines()) if path.exists() else 0

    def write_loss_plot(self) -> None:
        """Draw loss.png from log.jsonl; nothing where there are no steps yet."""
        path = self.path / "log.jsonl"
        records = [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
        points = [(r["step"], r["loss"]) for r in records if "loss" in r]
        if points:
            write_whole(self.path / "loss.png", loss_plot(points))

    def close(self) -> None:
        """Close the log and end the progress bar."""
        if self._log:
            self._log.close()
            self._log = None
        if self.progress:
            self.progress.close()


def _unwritable(path: Path, reason: OSError, last: list[Path] | None = None) -> SdlabError:
    kept = f"the last good checkpoint is {last[0]}" if last else "no checkpoint was written before"
    if reason.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutOfResources(f"no space left; {kept}", where=str(path), next_step="Free some, then --resume")
    return SdlabError(
        f"cannot write ({reason.strerror or reason})", where=str(path), next_step="Use --save-model"
    )


def _lock(handle: int) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
