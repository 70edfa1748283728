"""Real runs of train.py in processes of their own: what they train on, and how they are started and watched."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from shell import ENVIRONMENT
from toys import CODES, SIDE, TEXT_LENGTH, TEXT_WIDTH, toy_batch

from muse.config import VQConfig
from muse.data.precomputed import Meta, encode_record
from muse.data.shards import ShardWriter, begin_split, finish_split
from muse.models.vqgan import VQGAN
from muse.release.format import load_part, save_part

ROOT = Path(__file__).parents[2]
RECORDS = 160

CONFIG = """
from muse.train.command_line import complete


def get_config():
    data = {{'kind': 'precomputed', 'path': '{folder}/tokens', 'image_size': 16, 'text_length': {text_length}}}
    return complete(
        {{
            'task': 'base',
            'tokenizer': '{folder}/tokenizer',
            'model': {{
                'codebook_size': {codes},
                'grid': ({side}, {side}),
                'width': 32,
                'mlp_dim': 64,
                'heads': 2,
                'layers': 2,
                'text_width': {text_width},
                'text_length': {text_length},
                'remat': 'none',
            }},
            'data': data,
            'eval_data': data,
            'optim': {{'learning_rate': 1e-2, 'warmup_steps': 2}},
            'train': {{
                'steps': 10,
                'batch_size': 16,
                'log_every_steps': 1,
                'save_every_steps': 4,
                'save_every_minutes': 0.0,
                'eval_every_steps': 0,
                'grid_every_steps': 0,
            }},
        }}
    )
"""


def write_inputs(folder: Path) -> Path:
    """A tokenizer, tokens that it might have made, and a config of 10 steps over them; returns the config's path."""
    config = VQConfig(
        channels=4, channel_mult=(1, 1, 1), num_res_blocks=1, codebook_size=CODES, code_dim=4, dtype='float32'
    )
    shapes = nnx.state(nnx.eval_shape(lambda: VQGAN(config, rngs=nnx.Rngs(params=0))), nnx.Param)
    rng = np.random.default_rng(0)  # nothing looks through it here: numbers that need no compiler will do
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    (folder / 'tokenizer').mkdir(parents=True)
    save_part(folder / 'tokenizer', 'tokenizer', config=config, params=params, storage='float32')
    write_tokens(folder / 'tokens', load_part(folder / 'tokenizer', 'tokenizer').ids_hash)
    values = {'codes': CODES, 'side': SIDE, 'text_width': TEXT_WIDTH, 'text_length': TEXT_LENGTH}
    (folder / 'config.py').write_text(CONFIG.format(folder=folder, **values))
    return folder / 'config.py'


def write_tokens(folder: Path, tokenizer_hash: str) -> None:
    """The rows of `toys.toy_batch` as precomputed records."""
    meta = Meta(
        tokenizer_hash=tokenizer_hash, text_encoder_hash='of the text', grid=(SIDE, SIDE), text_width=TEXT_WIDTH
    )
    begin_split(folder, 'train', meta, {}, 1)
    rows = toy_batch(0, RECORDS)
    with ShardWriter(folder, 'train', 0, 1) as writer:
        for i in range(RECORDS):
            txt_SD = rows['txt'][i, : rows['len'][i]]
            record = encode_record(rows['tok'][i], txt_SD, f'row {i}')
            writer.write(record, text=len(txt_SD), limit=TEXT_LENGTH)
    finish_split(folder, 'train', [])


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(('localhost', 0))
        return found.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    """So many CPU devices, quickly compiled programs."""
    flags = f'--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0'
    return ENVIRONMENT | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags, 'PYTHONUNBUFFERED': '1'}


def start(config: Path, workdir: Path, *flags: str, env: dict[str, str], code: str = '') -> subprocess.Popen[str]:
    """Starts train.py; `code` is Python that runs before it in the same process."""
    program = [sys.executable, 'train.py']
    if code:
        driver = f"import sys, runpy\nsys.argv[0] = 'train.py'\n{code}\nrunpy.run_path('train.py', run_name='__main__')"
        program = [sys.executable, '-c', driver]
    return subprocess.Popen(
        [*program, f'--config={config}', f'--workdir={workdir}', *flags],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(config: Path, workdir: Path, *flags: str, devices: int, code: str = '') -> list[subprocess.Popen[str]]:
    """Two processes of one run on this machine, with `devices` each."""
    both = {'JAX_COORDINATOR_ADDRESS': f'localhost:{free_port()}', 'JAX_NUM_PROCESSES': '2'}
    return [
        start(
            config,
            workdir,
            '--distributed',
            *flags,
            env=environment(devices) | both | {'JAX_PROCESS_ID': str(i)},
            code=code,
        )
        for i in range(2)
    ]


def end(process: subprocess.Popen[str], seconds: float = 600) -> tuple[int, str, str]:
    """Waits; (exit code, stdout, stderr)."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def wait_for(workdir: Path, step: int, processes: list[subprocess.Popen[str]], seconds: float = 600) -> None:
    """Waits until a run has logged `step`."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if (workdir / 'metrics.jsonl').exists() and f'"step": {step},' in (workdir / 'metrics.jsonl').read_text():
            return
        assert all(process.poll() is None for process in processes), [end(process) for process in processes]
        time.sleep(0.05)
    for process in processes:
        process.kill()
    raise AssertionError(f'step {step} did not come in {seconds} s')


def losses(workdir: Path) -> dict[int, float]:
    """Step → loss."""
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    return {line['step']: line['loss'] for line in map(json.loads, lines)}


def close(one: dict[int, float], other: dict[int, float]) -> float:
    """The largest relative difference of two runs' losses."""
    assert one.keys() == other.keys()
    return max(abs(one[step] - other[step]) / abs(one[step]) for step in one)
