"""Errors a user can mend, and the exit code each ends with.

    SdlabError            2  refused input or settings
    ├─ ItemsFailed        3  ended, but not all of it is good; a report names what failed
    ├─ OutOfResources     4  no space or memory left
    └─ Stopped      130/143  a signal asked us to stop; what could be saved has been saved

0 is success; 1 is kept for faults of our own.
"""

from __future__ import annotations


class SdlabError(Exception):
    """Something the user can mend: what is wrong, where, and what to do or type next, on one line."""

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", next_step: str = "") -> None:
        self.what, self.where, self.next_step = what, where, next_step
        head = f"{where}: {what}" if where else what
        gap = " " if head.endswith(("?", ".", "!")) else ". "
        super().__init__(f"{head}{gap}{next_step}" if next_step else head)


class ItemsFailed(SdlabError):
    """The work ended, but some items failed or training stopped at non-finite losses."""

    exit_code = 3


class OutOfResources(SdlabError):
    """No space on a disk, or no memory."""

    exit_code = 4


class Stopped(SdlabError):
    """Ended by a signal, after saving what there was to save."""

    def __init__(self, signum: int, what: str, *, next_step: str = "") -> None:
        super().__init__(what, next_step=next_step)
        self.exit_code = 128 + signum


def gathered(faults: list[str], *, where: str, next_step: str = "") -> SdlabError:
    """One error out of all the faults found, so that a user mends them in one go."""
    return SdlabError("; ".join(faults), where=where, next_step=next_step)
