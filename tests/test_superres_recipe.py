"""The emoji super-res: it fits the nets that ship, and all together stays small enough to ship."""

from __future__ import annotations

import math

import jax.numpy as jnp
from flax import nnx
from test_configs import ROOT, config

from muse.config import SuperresRun, TokenizerRun, read_run
from muse.release.format import graphdef_and_template, load_part
from muse.release.storage import kinds
from muse.train.flops import step_flops

ASSETS = ROOT / 'muse' / 'assets'
SHIPPED = ('tokenizer', 'text_encoder', 'base')
MOST, MOST_SUPERRES = 28e6, 8e6  # bytes: of all that ships, and of the super-res


def stored_bytes(part: str, model) -> int:
    """Of a part's tensors in a release, as int8."""
    total = 0
    for path, variable in nnx.to_flat_state(graphdef_and_template(part, model)[1]):
        layer_axes = int((variable.get_metadata().get('axes') or (None,))[0] == 'layers')
        written = kinds('.'.join(map(str, path)), tuple(variable.shape), layer_axes, 'int8')
        total += sum(math.prod(shape) * jnp.dtype(dtype).itemsize for dtype, shape in written.values())
    return total


def runs() -> tuple[TokenizerRun, SuperresRun]:
    tokenizer, superres = read_run(config('emoji/superres_tokenizer')), read_run(config('emoji/superres'))
    assert isinstance(tokenizer, TokenizerRun) and isinstance(superres, SuperresRun)
    return tokenizer, superres


def test_sizes_are_those_of_the_files():
    for part in SHIPPED:
        file = (ASSETS / f'{part}.safetensors').stat().st_size
        assert 0 <= file - stored_bytes(part, load_part(ASSETS, part).config) < 64e3, part  # the header is the rest


def test_all_that_ships_is_small():
    tokenizer, superres = runs()
    new = stored_bytes('superres', superres.model), stored_bytes('superres_tokenizer', tokenizer.model)
    there = sum((ASSETS / f'{part}.safetensors').stat().st_size for part in SHIPPED) + 316_737  # the vocabulary
    assert new[0] < MOST_SUPERRES and there + sum(new) + 128e3 < MOST, (there, new)


def test_it_reads_what_ships():
    tokenizer, superres = runs()
    low, base, text = (load_part(ASSETS, part).config for part in SHIPPED[:1] + SHIPPED[2:] + SHIPPED[1:2])
    model, side = superres.model, tokenizer.data.image_size // tokenizer.model.factor
    assert (superres.tokenizer, superres.text_encoder) == ('muse/assets', '')
    assert model.grid == (side, side) and model.low_grid == base.grid
    assert (model.codebook_size, model.low_codebook_size) == (tokenizer.model.codebook_size, low.codebook_size)
    assert model.text_width == text.width and model.text_length == base.text_length == superres.data.text_length
    assert tokenizer.data.image_size == 2 * base.grid[0] * low.factor, 'the base sees half of the size'


def test_training_takes_minutes_by_its_operations():
    for run in runs():
        assert run.train.steps * step_flops(run) / (0.35 * 989e12) < 8 * 60
