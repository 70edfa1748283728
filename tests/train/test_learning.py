"""The recipe in small learns: pictures far better than their token frequencies, and to read captions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parent / 'recipe.py'


def results(folder: Path, *seeds: int) -> list[dict]:
    """What a base reached under each seed, all on the tokens of one tokenizer."""
    environment = os.environ | {
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': '',
        'PYTHONPATH': str(RECIPE.parents[2]),
        'JAX_COMPILATION_CACHE_DIR': str(folder / 'jax'),  # the seeds compile the same programs
    }
    command = [sys.executable, str(RECIPE), str(folder), *map(str, seeds)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith('RESULT ')]
    return [json.loads(line.removeprefix('RESULT ')) for line in lines]


def check(found: dict) -> None:
    print(found)
    assert found['pictures'] >= 20
    assert found['right'] <= found['unigram'] - 0.5, 'nats per masked token'
    assert found['wins'] >= 0.7, 'share of held-out pictures on which the right caption beats a shuffled one'


def test_it_learns_pictures_and_reads_captions(tmp_path):
    [found] = results(tmp_path, 0)
    check(found)


@pytest.mark.slow
def test_it_learns_under_other_seeds(tmp_path):
    one, other = results(tmp_path, 1, 2)
    check(one)
    check(other)
