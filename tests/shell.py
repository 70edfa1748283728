"""Runs several command lines of a script in one process, to import JAX once; a traceback ends it and fails the test."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Processes of one test run share what they compile; nothing is left in the home folder.
CACHE = tempfile.mkdtemp(prefix='muse-tests-')
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
ENVIRONMENT = os.environ | {
    'JAX_ENABLE_COMPILATION_CACHE': 'true',
    'JAX_COMPILATION_CACHE_DIR': CACHE,
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
}

DRIVER = """
import contextlib, importlib, io, json, sys
from absl.testing import flagsaver
from muse.jobs.command_line import guarded, parse

name, command_lines = json.load(sys.stdin)
script, results = importlib.import_module(name), []
for args in command_lines:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with flagsaver.flagsaver(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            guarded(script.main)(parse([name + '.py', *args]))
        except SystemExit as stop:
            code = stop.code
    results.append([code, out.getvalue(), err.getvalue()])
json.dump(results, sys.stdout)
"""


def run_all(script: str, command_lines: list[list[str]]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each command line of 'sample' or 'edit'."""
    done = subprocess.run(
        [sys.executable, '-c', DRIVER],
        input=json.dumps([script, command_lines]),
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(result) for result in json.loads(done.stdout)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
