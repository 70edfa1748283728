"""What products of one-byte numbers cost in quality: the base of a release in each precision, beside float32.

    python tools/eval_precision.py --data=EMOJI_FOLDER [--model=RELEASE_FOLDER] [--num=64] [--masks=2] [--draw=8]
    python tools/eval_precision.py --random_layers=2        the paper's 632M width, random weights: logits alone

Prints one JSON line a precision. 'loss' and 'caption_wins' are those of tools/eval_base.py on held-out pictures, 'cost'
is the loss beyond that of float32 with its standard error over the pictures. 'logits_error' is the root mean square of
the logits' error over that of the logits, both around their mean over the codes; 'same_top' how often the likeliest
code is the same. 'same_tokens' is the share of equal tokens in --draw pictures drawn from the same seeds, and for
float32 itself, as what chance gives, from other seeds. 'mib' is what a GPU holds the parameters in. Besides
the products, 'int8' and 'fp8' compute in float32 here.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1]))

import muse
from muse import drawing
from muse.config import DataConfig, DecodeConfig
from muse.data.sources import open_source
from muse.data.splits import HELDOUT_PAIRS
from muse.errors import UserError
from muse.evals import masked
from muse.jobs.command_line import guarded, parse_only_flags
from muse.masking import mask_ratio, random_mask
from muse.models.transformer import Transformer
from muse.nn.layers import cast_matrices
from muse.nn.quantized import Precision, quantized
from muse.release.format import Part, graphdef_and_template, load_part, shipped
from tools import cases, eval_base

FLAGS = flags.FLAGS
BATCH = 8

Net = tuple[nnx.GraphDef, nnx.State]


def nets(config: Any, params: nnx.State) -> Iterator[tuple[str, Net]]:
    """A base in each precision, float32 first."""

    def graph(dtype: str) -> nnx.GraphDef:
        return graphdef_and_template('base', dataclasses.replace(config, dtype=dtype, attention='xla'))[0]

    yield 'float32', (graph('float32'), params)
    yield 'bfloat16', (graph('bfloat16'), cast_matrices(params, 'bfloat16'))
    for precision in get_args(Precision):
        yield precision, quantized(graph('float32'), params, precision)


def mebibytes(name: str, params: nnx.State) -> float:
    """What drawing in a precision holds the parameters in; in all but float32 other kernels are bfloat16."""
    held = params if name == 'float32' else jax.eval_shape(partial(cast_matrices, dtype='bfloat16'), params)
    return round(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held)) / 2**20, 2)


@partial(jax.jit, static_argnums=0)
def _logits(graph: nnx.GraphDef, params: nnx.State, *inputs: Any) -> jax.Array:
    logits_BTV = nnx.merge(graph, params)(*inputs).astype(jnp.float32)
    return logits_BTV - logits_BTV.mean(-1, keepdims=True)


def logits(net: Net, canvas_NT: np.ndarray, txt_NSD: np.ndarray, len_N: np.ndarray) -> np.ndarray:
    """Logits around their mean over the codes, float32, of the canvases that fill whole batches."""
    starts = range(0, len(canvas_NT) - BATCH + 1, BATCH)
    inputs = ([x[start : start + BATCH] for x in (canvas_NT, txt_NSD, len_N)] for start in starts)
    return np.concatenate([np.asarray(_logits(*net, *some)) for some in inputs])


def compared(found_NTV: np.ndarray, true_NTV: np.ndarray) -> dict[str, float]:
    """'logits_error' and 'same_top'."""
    error = np.linalg.norm(found_NTV - true_NTV) / np.linalg.norm(true_NTV)
    return {'logits_error': float(error), 'same_top': float((found_NTV.argmax(-1) == true_NTV.argmax(-1)).mean())}


def drawn(net: Net, txt_BSD: np.ndarray, len_B: np.ndarray, config: DecodeConfig, grid: Any, seed: int) -> np.ndarray:
    """Tokens `[B, T]` drawn under captions, guided against no text."""
    canvas_BT = np.zeros((len(len_B), grid[0] * grid[1]), np.int32)
    len_GB = np.stack([len_B, np.zeros_like(len_B)])
    seed_B, index_B = np.full(len(len_B), seed, np.uint32), np.arange(len(len_B), dtype=np.int32)
    batch = drawing.batch_of(config, jnp.asarray(txt_BSD)[None], len_GB, seed_B, index_B)
    program = drawing.program_of(config)
    graph, params = net
    return np.asarray(
        drawing.fill_base(params, canvas_BT, canvas_BT > 0, batch, graph=graph, grid=grid, program=program)
    )[-1]


def measure(
    model: muse.Muse, base: Part, data: DataConfig, *, number: int, seed: int, masks: int, draw: int
) -> Iterator[dict[str, Any]]:
    """One case a precision of the weights `base`, on held-out pictures."""
    tok_NT, txt_NSD, len_N, captions = eval_base.examples(model, open_source(data), number, seed)
    if len(tok_NT) < BATCH:
        raise UserError(f'{len(tok_NT)} pictures can be used: give at least {BATCH} (--num)')
    wrong_N, grid = masked.wrong_rows(captions, seed), base.config.grid
    key = jax.random.key(seed)
    mask_NT = np.asarray(random_mask(key, mask_ratio(key, len(tok_NT)), tok_NT.shape[1]))
    inputs = np.where(mask_NT, base.config.codebook_size, tok_NT), txt_NSD, len_N
    texts = txt_NSD[:draw], len_N[:draw], model.release.decode, grid
    first: Any = None
    for name, net in nets(base.config, base.params):
        losses = masked.masked_losses(
            *net, tok_NT, txt_NSD, len_N, wrong_N, seed=seed, masks=masks, batch_size=min(BATCH, len(tok_NT))
        )
        found = losses['right'], logits(net, *inputs), drawn(net, *texts, seed)
        first = first or found
        cost_N = found[0] - first[0]
        others = drawn(net, *texts, seed + 1) if found is first else first[2]
        yield {
            'precision': name,
            **{key: masked.summary(losses, tok_NT)[key] for key in ('loss', 'caption_wins')},
            'cost': float(cost_N.mean()),
            'cost_error': float(cost_N.std(ddof=1) / np.sqrt(len(cost_N))),
            **compared(found[1], first[1]),
            'same_tokens': float((found[2] == others).mean()),
            'mib': mebibytes(name, net[1]),
            'pictures': len(tok_NT),
            'masks': masks,
            'drawn': len(found[2]),
            'model': model.release.name,
        }


def measure_random(layers: int) -> Iterator[dict[str, Any]]:
    """The logits' error with so many random layers of the paper's 632M base."""
    config = cases.net('base_632m', tiny=False, layers=layers, dtype='float32', remat='none')
    params = nnx.split(Transformer(config, rngs=nnx.Rngs(params=0)), nnx.Param)[1]
    rng = np.random.default_rng(0)
    tok_NT = rng.integers(0, config.codebook_size + 1, (BATCH, config.grid[0] * config.grid[1]), np.int32)
    txt_NSD = rng.normal(size=(BATCH, config.text_length, config.text_width)).astype(np.float32)
    len_N = rng.integers(1, config.text_length + 1, BATCH, np.int32)
    first: Any = None
    for name, net in nets(config, params):
        found = logits(net, tok_NT, txt_NSD, len_N)
        first = found if first is None else first
        yield {'precision': name, 'layers': layers, **compared(found, first), 'mib': mebibytes(name, net[1])}


def main(_: list[str]) -> None:
    for name, least in {'num': BATCH, 'masks': 1, 'draw': 1, 'random_layers': 0}.items():
        if int(FLAGS[name].value or 0) < least:
            raise UserError(f'--{name}={FLAGS[name].value}: give {least} or more')
    logging.set_verbosity(logging.WARNING)
    if FLAGS.random_layers:
        for case in measure_random(FLAGS.random_layers):
            print(json.dumps(case), flush=True)
        return
    folder = FLAGS.model or shipped()
    model, base = muse.load(folder), load_part(folder, 'base')
    side = base.config.grid[0] * model.release.tokenizer.config.factor
    data = DataConfig(kind='scenes', path=FLAGS.data, split=FLAGS.split, image_size=side)
    knobs = {'number': FLAGS.num, 'seed': FLAGS.seed, 'masks': FLAGS.masks, 'draw': FLAGS.draw}
    for case in measure(model, base, data, **knobs):
        print(json.dumps(case), flush=True)


if __name__ == '__main__':
    flags.DEFINE_string('model', '', 'release folder; the shipped one when empty')
    flags.DEFINE_string('data', '', 'folder of the emoji data; the sample in the package when empty')
    flags.DEFINE_string('split', HELDOUT_PAIRS, 'split to measure on')
    flags.DEFINE_integer('num', 64, 'pictures to measure on, at most')
    flags.DEFINE_integer('masks', 2, 'masks a picture')
    flags.DEFINE_integer('draw', 8, 'pictures to draw')
    flags.DEFINE_integer('seed', 0, 'of the masks, the wrong captions and the drawings')
    flags.DEFINE_integer('random_layers', 0, "instead: so many random layers of the paper's 632M base")
    app.run(guarded(main), flags_parser=parse_only_flags)
