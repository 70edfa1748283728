"""The launch scripts (docs/launch.md): SLURM with a stand-in for srun, and what the others would run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_own_data import DATA, MODEL, ONE_DEVICE, TRAIN, flags

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / 'tools' / 'launch').glob('*.sh'))

# As srun: each task knows the job, the nodes of the step, its own number and its number on the node.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & tasks+=($!); done
worst=0
for task in "${tasks[@]}"; do wait "$task"; code=$?; ((code > worst)) && worst=$code; done
exit $worst
"""


def run(script: str, *arguments: str, folder: Path | None = None, **environment: Any) -> subprocess.CompletedProcess:
    path = f'{folder}:{os.environ["PATH"]}' if folder else os.environ['PATH']
    return subprocess.run(
        [str(ROOT / 'tools' / 'launch' / script), *arguments],
        cwd=ROOT,
        env={'HOME': str(folder), 'PATH': path, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def stand_in(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_whole_and_say_how_they_are_used(script):
    assert subprocess.run(['bash', '-n', script], capture_output=True).returncode == 0
    assert os.access(script, os.X_OK) and f'tools/launch/{script.name} ' in script.read_text().split('\nset -')[0]


@pytest.mark.parametrize(
    ('code', 'restarts', 'again'),
    [(0, '0', False), (143, '50', True), (75, '3', True), (75, '20', False), (2, '0', False)],
)
def test_slurm_queues_again_what_can_go_on(tmp_path, code, restarts, again):
    stand_in(tmp_path, 'srun', f'#!/bin/bash\necho "$@" >> {tmp_path}/called\nexit {code}\n')
    stand_in(tmp_path, 'scontrol', f'#!/bin/bash\necho "$@" >> {tmp_path}/queued\n')
    done = run('slurm.sh', '--workdir=a b', folder=tmp_path, SLURM_JOB_ID='7', SLURM_RESTART_COUNT=restarts)
    assert (tmp_path / 'called').read_text().endswith('python train.py --distributed --workdir=a b\n')
    assert (tmp_path / 'queued').exists() is again and done.returncode == (0 if again else code)
    assert not again or (tmp_path / 'queued').read_text() == 'requeue 7\n'


def test_what_the_pod_script_would_run():
    pod: dict[str, Any] = {
        'TPU_NAME': 'muse',
        'ZONE': 'z',
        'ACCELERATOR': 'v5litepod-16',
        'RUNTIME': 'r',
        'DRY_RUN': '1',
    }
    lines = {name: run('tpu_pod.sh', name, **pod).stdout for name in ('create', 'setup', 'log', 'stop', 'delete')}
    assert lines['create'] == (
        'gcloud compute tpus tpu-vm create muse --zone=z --accelerator-type=v5litepod-16 --version=r \n'
    )
    assert lines['setup'].count('--worker=all') == 3 and 'tpu\\,data' in lines['setup']
    assert '--worker=0' in lines['log'] and '-TERM' in lines['stop'] and lines['delete'].endswith('--quiet \n')
    train = run('tpu_pod.sh', 'train', '--config=c.py', '--workdir=/a b', **pod).stdout
    command = subprocess.run(['bash', '-c', f'printf "%s\\n" {train}'], capture_output=True, text=True).stdout
    assert 'train.py --distributed --config=c.py --workdir=/a\\ b >>train.log' in command
    assert run('tpu_pod.sh', 'dance', **pod).returncode == 2 and run('tpu_pod.sh', 'create').returncode != 0


def test_what_the_gke_script_would_run():
    place: dict[str, Any] = {
        'IMAGE': 'i:1',
        'CLUSTER': 'c',
        'PROJECT': 'p',
        'ZONE': 'z',
        'TPU_TYPE': 'v5litepod-16',
        'STORAGE': 's',
    }
    image = run('gke.sh', 'image', DRY_RUN='1', **place).stdout.splitlines()
    assert image[0].startswith('docker build ') and image[1].strip() == 'docker push i:1'
    train = run('gke.sh', 'train', 'one', '--config=c.py', DRY_RUN='1', **place).stdout
    assert train.startswith('xpk workload create --workload=one ') and '--restart-on-exit-codes=75' in train
    assert 'python\\ train.py\\ --distributed\\ --config=c.py' in train


@pytest.mark.slow
def test_slurm_joins_two_tasks(tmp_path, release_folder):
    """JAX's own detection of SLURM, on this machine: two tasks are one run over both their devices."""
    stand_in(tmp_path, 'srun', SRUN)
    job: dict[str, Any] = {'SLURM_JOB_ID': str(os.getpid()), 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_NTASKS': '2'}
    small = flags({'model': MODEL | {'text_length': 24}, 'data': DATA, 'eval_data': DATA, 'train': TRAIN})
    small += flags({name: {'kind': 'scenes', 'path': ''} for name in ('data', 'eval_data')})
    frozen = [f'--config.tokenizer={release_folder}', f'--config.text_encoder={release_folder}']
    machine: dict[str, Any] = {key: ONE_DEVICE[key] for key in ('XLA_FLAGS', 'JAX_PLATFORMS')} | {
        'PYTHON': sys.executable
    }
    line = ['--config=configs/tiny/base.py', f'--workdir={tmp_path}/run', *small, *frozen]
    done = run('slurm.sh', *line, folder=tmp_path, **job, **machine)
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / 'run' / 'run.json').read_text())
    assert about['devices'].startswith('2 x '), about
    rows = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    assert [row['step'] for row in rows] == [1, 2, 3, 4]
    assert (tmp_path / 'run' / 'export' / 'base.safetensors').is_file()
