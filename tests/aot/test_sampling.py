"""`sample.py --aot`: which nets it compiles, and what stops it. Compiling itself needs the TPU compiler."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from muse import canvas
from muse.aot.nets import describe_runs
from muse.aot.sampling import Plan, drawing_flops
from muse.config import DecodeConfig
from muse.errors import UserError
from muse.release.format import describe_release, shipped
from muse.train.flops import base_draw_flops, decoder_flops

ROOT = Path(__file__).parents[2]
PAPER = [
    str(ROOT / f'configs/paper/{name}.py') for name in ('base_3b', 'tokenizer_f16', 'superres_770m', 'tokenizer_f8')
]


def parameters(part) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(part.params))


def test_the_nets_of_the_paper_without_their_weights():
    release = describe_runs(PAPER)
    assert round(parameters(release.base) / 1e6) == 3264 and round(parameters(release.superres) / 1e6) == 768
    assert release.tokenizer.config.factor == 16 and release.superres_tokenizer.config.factor == 8
    assert canvas.native(release, True).size == (512, 512) and canvas.native(release, False).size == (256, 256)
    assert describe_runs(PAPER[:2]).superres is None


def test_a_release_is_read_without_its_weights():
    release = describe_release(shipped())
    assert release.decode.steps == 16 and canvas.native(release, False).size == (256, 256)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(release.base.params))


@pytest.mark.parametrize(
    ('files', 'said'),
    [
        ([PAPER[1]], '0 of a base; give 1'),
        ([PAPER[0]], '0 of a tokenizer; give 1'),
        ([PAPER[0], PAPER[0], PAPER[1]], '2 of a base'),
        (PAPER[:3], '1 of a tokenizer; give 2'),
        ([PAPER[0], str(ROOT / 'configs/tiny/tokenizer.py')], 'draws 8192 codes'),
        (['configs/none.py'], "'configs/none.py' does not exist"),
        ([__file__], 'has no get_config'),
        ([str(ROOT / 'README.md')], 'cannot be run'),
    ],
)
def test_configs_that_make_no_release(files, said):
    with pytest.raises(UserError, match=said) as caught:
        describe_runs(files)
    assert '\n' not in str(caught.value)


def test_operations_of_a_larger_canvas_are_those_of_its_tokens():
    release, decoding = describe_release(shipped()), DecodeConfig(steps=5)
    base, tokenizer = release.base.config, release.tokenizer.config

    def flops(size):
        where = canvas.of_size(release, size, False)
        return drawing_flops(Plan(release=release, canvas=where, batch_size=2, decoding=decoding, superres=None))

    assert flops((256, 256)) == base_draw_flops(base, 2, 5) + decoder_flops(tokenizer, 2 * 256**2)
    # Self-attention grows with the square of the tokens, all else with the tokens.
    tokens = base.grid[0] * base.grid[1]
    more = 2 * 5 * base.layers * 4 * (2 * 1.5 * tokens) * base.width * (0.5 * tokens)
    rows = 2 * base.text_length * base.width * (4 * base.width * base.layers + 2 * base.text_width)
    assert flops((256, 384)) == pytest.approx(1.5 * flops((256, 256)) - 0.5 * rows + more, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('flags', 'code', 'said'),
    [
        (['--aot=v5e:2x2', '--steps=3', '--batch_size=4'], 0, 'ms a picture at best'),
        (['--aot=v5e:4x4'], 2, 'has 4 hosts, and each draws alone: give one, v5e:2x2'),
        (['--aot=v5e:2x2', '--batch_size=6'], 2, 'no multiple of 4 devices'),
        (['--aot=v9:2x2'], 2, 'is not known'),
        (['--aot=v5e:2x2', '--superres_steps=2'], 2, 'holds no super-res'),
    ],
)
def test_the_script(flags, code, said):
    pytest.importorskip('libtpu')
    command = [sys.executable, str(ROOT / 'sample.py'), *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {'JAX_PLATFORMS': 'cpu'}
    )
    assert done.returncode == code, done.stderr
    assert said in (done.stderr if code else done.stdout)
    assert code == 0 or (done.stderr.startswith('error: ') and done.stderr.count('\n') == 1)
