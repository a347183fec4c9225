"""What came of a job: for people as a line, for programs as report.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sdlab import __version__
from sdlab.errors import ItemsFailed
from sdlab.inference.jobs import output

STEM, OURS = "report", b'{\n "sdlab": '
SHOWN = 10  # failures that are named on the terminal; report.json has all


@dataclass(frozen=True)
class Picture:
    """A picture that this run has made."""

    path: Path
    index: int  # place in the whole job
    seed: int
    where: str = ""  # "prompts.txt:5"; "" for what was typed on the command line


@dataclass(frozen=True)
class Failure:
    """What is not as it was asked for, and why."""

    where: str
    why: str
    index: int | None = None
    prompt: str = ""
    seed: int | None = None
    file: str = ""  # of a picture that is there, but not good

    def __str__(self) -> str:
        seed = "" if self.seed is None else f" (seed {self.seed})"
        place = "" if self.index is None else f"picture {self.index}{seed}"
        what = self.file or " ".join(part for part in (self.where, place) if part)
        return f"{what}: {self.why}" if what else self.why


@dataclass
class Report:
    """What came of a job so far."""

    command: str = ""  # as it was typed, for report.json; "" leaves it out
    pictures: list[Picture] = field(default_factory=list)
    already: dict[int, Path] = field(default_factory=dict)  # made by an earlier run of the job, by index
    failed: list[Failure] = field(default_factory=list)
    stopped: str = ""  # why it ended early, or what may help, where something failed
    seconds: float = 0.0  # spent making pictures

    @property
    def paths(self) -> list[Path]:
        """Of all pictures of the job that are there, in its order."""
        there = self.already | {one.index: one.path for one in self.pictures}
        return [there[index] for index in sorted(there)]

    @property
    def is_whole(self) -> bool:
        """Whether every picture that was asked for is on disk."""
        return not self.stopped and all(one.file for one in self.failed)

    def fail(
        self,
        where: str,
        why: str,
        *,
        index: int | None = None,
        prompt: str = "",
        seed: int | None = None,
        file: str = "",
    ) -> None:
        """Note what failed: `where` names a line or a picture, "" if there is no better name than the index."""
        self.failed.append(Failure(where, why, index, prompt, seed, file))

    def summary(self) -> str:
        """As ``20 pictures in 12.3 s: 0.62 s a picture, 1.6 pictures/s``."""
        num, already = len(self.pictures), len(self.already)
        there = f"; {_num(already)} there already" if already else ""
        if not num:
            return f"no new picture{there}"
        pace = f": {self.seconds / num:.2g} s a picture, {num / max(self.seconds, 1e-9):.2g} pictures/s"
        return f"{_num(num)} in {self.seconds:.1f} s{pace}{there}"

    def write(self, folder: Path) -> Path | None:
        """Write report.json, if there was more than one picture or something failed; the path, else None.

        Replaces only a report of sdlab's, all at once; beside a file of another it is report_2.json and so on.
        Raises OutOfResources when the disk is full, SdlabError when the folder takes no file.
        """
        if len(self.pictures) + len(self.already) < 2 and not self.failed:
            return None
        return output.write_over(folder, output.mirrored(STEM, ".json"), self._json(folder), ours=OURS)

    def _json(self, folder: Path) -> bytes:
        made = sorted(self.pictures, key=lambda one: one.index)
        failed = [
            asdict(replace(one, file=_within(Path(one.file), folder) if one.file else ""))
            for one in sorted(self.failed, key=_place)
        ]
        about: dict[str, Any] = {
            "sdlab": __version__,
            **({"command": self.command} if self.command else {}),
            "made": [
                {"file": _within(one.path, folder), "index": one.index, "seed": one.seed, "where": one.where}
                for one in made
            ],
            "already": len(self.already),
            "failed": failed,
            **({"stopped": self.stopped} if self.stopped else {}),
            "seconds": round(self.seconds, 3),
            "seconds_per_picture": round(self.seconds / len(made), 4) if made else None,
        }
        text = json.dumps(about, indent=1, ensure_ascii=False)
        return text.encode("utf-8", "backslashreplace") + b"\n"

    def close(self) -> None:
        """Raises ItemsFailed, naming them, if anything failed."""
        if not self.failed:
            return
        shown = "; ".join(str(one) for one in sorted(self.failed, key=_place)[:SHOWN])
        more = f"; and {len(self.failed) - SHOWN} more" if len(self.failed) > SHOWN else ""
        good = f"{_num(len(self.paths))} made, {len(self.failed)} failed"
        raise ItemsFailed(f"{good}: {shown}{more}", next_step=self.stopped)


def _num(count: int) -> str:
    return f"{count} picture{'s' * (count != 1)}"


def _place(failure: Failure) -> int:
    return -1 if failure.index is None else failure.index


def _within(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
