"""Training of the super-res (§2.4) over two frozen tokenizers and a frozen text encoder.

Batches hold either both grids of tokens and text states ('tok' high-res, 'low', 'txt', 'len': written by
tools/precompute.py) or pictures and text ids ('img', 'ids', 'len'), which the frozen nets encode ahead of the step. The
masks are the base's law over the high-res tokens. The low-res tokens always stay, each example's with another share
of them wrong; only the text is dropped for guidance. The step is that of `muse.train.masked`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from muse import drawing, masking
from muse.config import SuperresRun, to_dict
from muse.errors import UserError
from muse.mesh import batch_sharding
from muse.models.superres import Superres
from muse.release.format import save_part
from muse.train import masked
from muse.train.frozen import Net, encode_sheet
from muse.train.init_from import start_from
from muse.train.optim import fresh_state
from muse.train.superres_nets import SuperresNets, load_superres_nets, low_sheet
from muse.train.task import Batch, Metrics, State, Task

GRID_PICTURES = 4


def init_state(run: SuperresRun, key: Key[Array, '']) -> State:
    """Fresh weights, their average, and the optimiser's state."""
    return fresh_state(run, Superres(run.model, rngs=nnx.Rngs(params=key)))


def corrupt(run: SuperresRun, batch: Batch, key: Key[Array, '']) -> Batch:
    """Masks and dropped texts as in the base, and low-res tokens of which some are replaced."""
    low_key, key = jax.random.split(key)
    low_BT = masking.corrupt_tokens(low_key, batch['low'], run.loss.low_corruption, run.model.low_codebook_size)
    return masked.corrupt(run, {**batch, 'low': low_BT}, key)


def predict(model: Superres, batch: Batch) -> Float[Array, 'B T V']:
    """Logits for high-res tokens with [MASK] in place of the masked ones."""
    canvas_BT = jnp.where(batch['mask'], model.mask_id, batch['tok'])
    return model(canvas_BT, batch['low'], batch['txt'], batch['len'])


def train_step(
    run: SuperresRun, graphdef: Any, state: State, batch: Batch, key: Key[Array, '']
) -> tuple[State, Metrics]:
    """One step of the optimiser on a batch of true tokens; see `muse.train.masked`."""
    return masked.update(run, predict, graphdef, state, corrupt(run, batch, key))


def evaluate(graphdef: Any, state: State, batch: Batch, key: Key[Array, '']) -> Metrics:
    """Held-out losses, low-res tokens uncorrupted; 'loss_other_low' is under those of the picture in the row above."""
    others = {'other_low': lambda batch: {**batch, 'low': jnp.roll(batch['low'], 1, axis=0)}}
    return masked.evaluate(predict, graphdef, state, batch, key, others)


def sheet(
    run: SuperresRun, nets: SuperresNets, graphdef: Any, state: State, batch: Batch, key: Key[Array, '']
) -> Array:
    """Rows of pictures: the low-res tokens as they are, what the averaged weights draw over them, the known truth."""
    low_img = _pixels(nets.low, batch['low'], run.model.low_grid).repeat(nets.ratio, axis=1).repeat(nets.ratio, axis=2)
    rows = [low_img, draw(run, nets, graphdef, state, batch, key)]
    return jnp.concatenate(rows + ([_pixels(nets.high, batch['tok'], run.model.grid)] if 'tok' in batch else []))


def draw(run: SuperresRun, nets: SuperresNets, graphdef: Any, state: State, batch: Batch, key: Key[Array, '']) -> Array:
    """Pictures that the averaged weights draw over the low-res tokens and texts of a batch."""
    canvas_BT = jnp.zeros((len(batch['low']), run.model.grid[0] * run.model.grid[1]), jnp.int32)
    high_BT = drawing.fill_superres(
        state['ema'],
        batch['low'],
        canvas_BT,
        jnp.zeros(canvas_BT.shape, bool),
        drawing.sheet_batch(run.decode, batch['txt'], batch['len'], jax.random.randint(key, (), 0, 2**31 - 1)),
        graph=graphdef,
        grid=run.model.grid,
        program=drawing.program_of(run.decode),
    )[-1]
    return _pixels(nets.high, high_BT, run.model.grid)


def _pixels(net: Net, ids_BT: Array, grid: tuple[int, int]) -> Array:
    return drawing.decode_pixels(net.params, ids_BT.reshape(-1, *grid), graph=net.graphdef)


def first(batch: Batch, number: int) -> Batch:
    """The first rows of a prepared batch."""
    return {name: batch[name][:number] for name in ('tok', 'low', 'txt', 'len')}


def export_superres(run: SuperresRun, nets: SuperresNets, state: State, folder: str) -> None:
    """Writes the averaged weights as the part 'superres', naming the frozen nets they belong to."""
    extra = {
        'tokenizer_sha256': nets.low.hash,
        'superres_tokenizer_sha256': nets.high.hash,
        'text_encoder_sha256': nets.text.hash,
        'decode': to_dict(run.decode),
        'step': int(state['step']),
    }
    save_part(folder, 'superres', config=run.model, params=state['ema'], storage='float32', extra=extra)


def superres_task(run: SuperresRun, mesh: Mesh) -> Task:
    """The `Task` of a super-res run; loads its frozen nets onto `mesh`.

    Raises:
        UserError: missing or foreign frozen parts, or shapes that do not fit the model's.
    """
    if not 0 <= run.loss.low_corruption <= 1:
        raise UserError(f'loss.low_corruption is {run.loss.low_corruption}: give a share from 0 to 1')
    nets = load_superres_nets(run, mesh)
    fixed = low_sheet(run, nets, encode_sheet(run, nets.text, mesh), mesh)
    abstract = nnx.eval_shape(lambda: Superres(run.model, rngs=nnx.Rngs(params=0)))
    graphdef, shapes = nnx.split(abstract, nnx.Param)
    below = {'tokenizer': nets.low.hash, 'superres_tokenizer': nets.high.hash, 'text_encoder': nets.text.hash}

    def pictures(state: State, batch: Batch, key: Key[Array, ''], number: int) -> tuple[Array, Array]:
        batch = first(batch, number)
        return draw(run, nets, graphdef, state, batch, key), _pixels(nets.high, batch['tok'], run.model.grid)

    return Task(
        init=lambda key: init_state(run, key),
        step=lambda state, batch, key: train_step(run, graphdef, state, batch, key),
        evaluate=lambda state, batch, key: evaluate(graphdef, state, batch, key),
        export=lambda state, folder: export_superres(run, nets, state, folder),
        grid=lambda state, batch, key: sheet(run, nets, graphdef, state, fixed or first(batch, GRID_PICTURES), key),
        prepare=lambda batch: nets.encode(batch, batch_sharding(mesh)),
        encode_text=nets.text.encode,
        pictures=pictures,
        start=start_from(run.init_from, 'superres', shapes, mesh, below=below),
    )
