"""The recipe in small learns: pictures far better than their token frequencies, and to read captions. Three seeds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parent / 'recipe.py'


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp('recipe')
    environment = os.environ | {
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': '',
        'PYTHONPATH': str(RECIPE.parents[2]),
        'JAX_COMPILATION_CACHE_DIR': str(folder / 'jax'),  # the seeds compile the same programs
    }
    command = [sys.executable, str(RECIPE), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith('RESULT ')]
    return [json.loads(line.removeprefix('RESULT ')) for line in lines]


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_it_learns_pictures_and_reads_captions(results, seed):
    found = results[seed]
    print(found)
    assert found['pictures'] >= 20
    assert found['right'] <= found['unigram'] - 0.5, 'nats per masked token'
    assert found['wins'] >= 0.7, 'share of held-out pictures on which the right caption beats a shuffled one'
