"""Run sdlab as a user does: in this process (quick), or as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

from sdlab.cli import main

ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONWARNINGS": "default",
}


def sdlab(*args: object) -> int:
    """The exit code of ``sdlab ARGS`` run in this process."""
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in args])
    return int(ended.value.code or 0)


def start(
    *args: object, cwd: object = None, module: Sequence[str] = ("-m", "sdlab")
) -> subprocess.Popen[str]:
    """``sdlab ARGS`` as a process in a group of its own, its output piped."""
    return subprocess.Popen(
        [sys.executable, *module, *map(str, args)],
        env=ENVIRONMENT,
        cwd=str(cwd) if cwd else None,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
