"""Runs a recipe's commands as a user would type them, each from where it was stopped; finished ones are left alone."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType

from recipes.mini.disk import staged
from recipes.mini.inputs import marks, refuse_stale
from recipes.mini.journal import Entry, Journal
from recipes.mini.recipe import Command

from sdlab.errors import SdlabError
from sdlab.models.runs import about

ROOT = Path(__file__).parents[2]
PROGRAMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"sdlab": (sys.executable, "-m", "sdlab"), "python": (sys.executable,)}
)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(
    command: Command, work: Path, *, device: str | None, programs: Mapping[str, Sequence[str]] = PROGRAMS
) -> None:
    """Runs a command to its end, or says that it has been. Raises SdlabError where what is there was made by another
    command, or of something else than what is there now, and SystemExit with the command's code where it fails."""
    journal, folder = Journal(work / "commands.json"), command.folder(work)
    finished, begun = _is_finished(command, folder), (folder / "run.json").exists()
    if finished:
        _refuse_other(journal.of(command.name), command.typed, folder)
    if finished or begun:
        refuse_stale(command, work, journal)
    if finished:
        say(f"\n$ {command.typed}\n{folder} is finished")
        return
    if not begun:
        journal.write(command.name, Entry(command.typed, inputs=marks(command, work)))
    if command.program == "sdlab":
        extra = [*(["--device", device] if device else []), *(["--resume"] if begun else [])]
        say(f"\n$ {shlex.join([*shlex.split(command.typed), *extra])}")
        _timed([*programs["sdlab"], *command.words, *extra], work, command, journal)
    else:
        say(f"\n$ {command.typed}")
        with staged(folder) as made:
            _timed([*programs["python"], *command.words[:-1], str(made)], work, command, journal)


def _timed(argv: Sequence[str], work: Path, command: Command, journal: Journal) -> None:
    """Runs a program to its end and writes down how long that took, also where it fails or is stopped."""
    began, ended = time.monotonic(), None
    entry = journal.of(command.name) or Entry(command.typed)
    try:
        # Passive waiting: on a busy computer OpenMP's spinning can take ten times as long.
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": _python_path()}
        code = _waited(subprocess.Popen(argv, cwd=work, env=environment, stdout=subprocess.DEVNULL))
        ended = None if code else datetime.now(timezone.utc).isoformat()
    finally:
        seconds = round(entry.seconds + time.monotonic() - began, 3)
        journal.write(command.name, replace(entry, line=command.typed, seconds=seconds, ended=ended))
    if code:
        say(f"{command.name} ended with {code}; start again to go on")
        raise SystemExit(code if code > 0 else 128 - code)


def _waited(process: subprocess.Popen[bytes]) -> int:
    """The program's exit code. Ctrl-C reaches it by itself and SIGTERM is passed on: it saves before it ends."""
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue
    finally:
        signal.signal(signal.SIGTERM, before)


def _python_path() -> str:
    """With this repository on it: commands run in the folder for the work."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _is_finished(command: Command, folder: Path) -> bool:
    if command.program == "sdlab":
        return about(folder).get("state") == "finished"
    return folder.is_dir()


def _refuse_other(entry: Entry | None, line: str, folder: Path) -> None:
    """A folder without an entry was made by hand, which is taken as it is."""
    if entry and entry.line != line:
        raise SdlabError(
            f"was made by another command ({entry.line})",
            where=str(folder),
            next_step="Remove it to make it anew",
        )
