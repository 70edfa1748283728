"""Runs a peer as a process of its own, so that it sits in nobody's memory and can be ended when time is up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_peer(script: Path, setting: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What the last line that a peer prints says; {'failed': …} where it ends without one, or takes too long.

    Args:
        script: of tools/peers/; it is given the setting as JSON.
        setting: what to measure.
        seconds: after them it is ended, with the compile workers that it started.
    """
    process = subprocess.Popen(
        [sys.executable, str(script), json.dumps(setting)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, problems = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {'failed': f'not done within the {seconds:.0f} s that were left of --peer_seconds'}
    if process.returncode:
        return {'failed': (problems.strip().splitlines() or ['no message'])[-1][:300]}
    return json.loads(out.strip().splitlines()[-1])
