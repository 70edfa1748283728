"""The super-res transformer (§2.4): what may and may not influence its logits, on grids of any size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled
from flax import nnx
from tiny import SUPERRES

from muse.config import SuperresConfig
from muse.decode import decode_steps, noise_keys
from muse.errors import UserError
from muse.models.superres import Superres
from muse.nn.attention import KeysValues

SIZES = {'codebook_size': 17, 'low_codebook_size': 11, 'low_grid': (2, 2), 'text_width': 24, 'text_length': 7}
CONFIG = dataclasses.replace(SUPERRES, **SIZES, block=2, heads=4, remat='none')


def make(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    graphdef, params = nnx.split(filled(lambda: Superres(config, rngs=nnx.Rngs(params=0))), nnx.Param)
    # Larger weights than at the start of training, so that an influence that should not be there would show.
    return graphdef, jax.tree.map(lambda x: 2 * x, params)


def jitted(graphdef, params):
    return jax.jit(lambda *batch: nnx.merge(graphdef, params)(*batch))


@pytest.fixture(scope='module')
def batch():
    keys = jax.random.split(jax.random.key(0), 3)
    tok = jax.random.randint(keys[0], (3, 64), 0, 18)
    low = jnp.stack([jax.random.permutation(key, 11)[:4] for key in jax.random.split(keys[1], 3)])
    return tok, low, jax.random.normal(keys[2], (3, 7, 24)), jnp.array([0, 3, 7])


@pytest.fixture(scope='module')
def model():
    return jitted(*make())


def change(a, b, row):
    return np.abs(np.asarray(a - b))[row].max()


def test_it_reads_where_its_low_res_tokens_are(model, batch):
    tok, low, txt, length = batch
    logits = model(tok, low, txt, length)
    permuted = model(tok, low[:, jnp.array([1, 0, 3, 2])], txt, length)
    assert all(change(permuted, logits, row) > 1e-2 for row in range(3)), 'the same tokens at other places'
    assert all(change(model(tok, low.at[:, 3].set(low[:, 2]), txt, length), logits, row) > 1e-2 for row in range(3))


def test_text_pads_never_matter(model, batch):
    tok, low, txt, length = batch
    garbage = jnp.where(jnp.arange(7)[None, :, None] >= length[:, None, None], 1e4, txt)
    np.testing.assert_array_equal(model(tok, low, txt, length), model(tok, low, garbage, length))
    short = model(tok, low, txt[:, :3], jnp.minimum(length, 3))
    np.testing.assert_allclose(short[:2], model(tok, low, txt, length)[:2], atol=2e-5)


@pytest.fixture(scope='module')
def cached():
    graphdef, params = make()
    memory = jax.jit(lambda low, txt: nnx.merge(graphdef, params).memory(low, txt))
    return memory, jax.jit(lambda tok, memory, length: nnx.merge(graphdef, params).logits(tok, memory, length))


def test_cached_memory_equals_the_training_path(model, cached, batch):
    (tok, low, txt, length), (memory, logits) = batch, cached
    np.testing.assert_allclose(logits(tok, memory(low, txt), length), model(*batch), atol=2e-5)


def test_no_text_leaves_the_null_and_the_low_res_tokens(model, cached, batch):
    (tok, low, txt, _), (memory, logits) = batch, cached
    keys, values, unread = memory(low, txt)
    assert keys.shape == values.shape == (2, 3, 1 + 4 + 7, 4, 8)
    nothing = jnp.zeros(3, int)
    none = model(tok, low, txt, nothing)
    assert bool(jnp.isfinite(none).all())
    bare = logits(tok, KeysValues(keys[:, :, :5], values[:, :, :5], unread), nothing)
    np.testing.assert_allclose(none, bare, atol=2e-5)  # the null and 4 low-res tokens are all that is read
    np.testing.assert_array_equal(none, model(tok, low, txt * 7 + 1, nothing))
    assert change(model(tok, low, txt, jnp.full(3, 7)), none, 1) > 1e-2, 'text does matter'
    assert change(model(tok, low[::-1], txt, nothing), none, 0) > 1e-2, 'low-res tokens stay'


def test_batch_mates_never_matter(model, batch):
    tok, low, txt, length = batch
    other = model(tok.at[0].set(3), low.at[0].set(2), txt.at[0].set(5.0), length.at[0].set(7))
    np.testing.assert_array_equal(other[1:], model(tok, low, txt, length)[1:])


def gradients(batch, **changes):
    """Of a loss on one corner's logits, in the weights and in soft inputs; the text has 5 real rows."""
    graphdef, params = make(**changes)
    tok, low, txt, _ = batch
    soft = jax.nn.one_hot(tok, 18)[:1], jax.nn.one_hot(low, 11)[:1], txt[:1]

    def loss(params, tok_BTW, low_BTW, txt_BSD):
        logits = nnx.merge(graphdef, params)(tok_BTW, low_BTW, txt_BSD, jnp.array([5]))
        return jnp.sum(jnp.square(logits[0, 0] - jnp.arange(17.0))), logits

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(params, *soft)


@pytest.fixture(scope='module')
def plain(batch):
    return gradients(batch)


def test_soft_one_hots_equal_ids(model, plain, batch):
    tok, low, txt, _ = batch
    np.testing.assert_allclose(plain[0][1][0], model(tok, low, txt, jnp.full(3, 5))[0], atol=2e-5)


def test_every_token_reaches_every_token_in_two_layers_and_all_weights_learn(plain):
    weights, tok, low, txt = plain[1]
    reached = [np.abs(np.asarray(grad[0])).max(-1) for grad in (tok, low, txt)]
    assert (reached[0] > 0).all() and (reached[1] > 0).all() and (reached[2][:5] > 0).all()
    np.testing.assert_array_equal(reached[2][5:], 0)
    for path, grad in nnx.to_flat_state(weights):
        assert float(jnp.abs(grad[...]).max()) > 0, path


@pytest.mark.parametrize(
    'changes', [pytest.param({'remat': 'dots'}, marks=pytest.mark.slow), {'remat': 'full', 'unroll': 2}], ids=str
)
def test_remat_and_unroll_change_nothing(batch, plain, changes):
    def near(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * float(jnp.abs(a).max()))

    jax.tree.map(near, plain, gradients(batch, **changes))


def test_other_canvases_take_a_low_res_grid_of_the_same_ratio(batch):
    _, _, txt, length = batch
    graphdef, params = make()
    net = nnx.merge(graphdef, params)
    assert net.low_grid() == (2, 2) and net.low_grid((4, 12)) == (1, 3)
    run = jax.jit(lambda *batch: nnx.merge(graphdef, params)(*batch, (4, 12)))
    tok, low = jnp.full((3, 48), net.mask_id), jnp.arange(9).reshape(3, 3)
    wide = run(tok, low, txt, length).reshape(3, 4, 12, 17)
    other = run(tok, low.at[:, 2].set(0), txt, length).reshape(3, 4, 12, 17)
    assert wide.shape == (3, 4, 12, 17) and bool(jnp.isfinite(wide).all())
    assert change(wide, other, 0) > 1e-3, 'all low-res tokens of the wide canvas are read'
    columns = np.asarray(net.positions((4, 12))).reshape(4, 12, -1)[0]
    assert np.abs(np.diff(columns, axis=0)).max(-1).min() > 0, 'every column has a position of its own'


def test_logits_lie_at_their_tokens_place(batch):
    """With one layer a token reaches its block and the tokens at its place in the other blocks, in raster order."""
    tok, low, txt, length = batch
    model = jitted(*make(layers=1))
    moved = model(tok.at[:, 8 * 5 + 2].set((tok[:, 8 * 5 + 2] + 1) % 17), low, txt, length)
    changed = np.abs(np.asarray(moved - model(tok, low, txt, length))).max(-1).reshape(3, 8, 8) > 0
    rows, columns = np.indices((8, 8))
    block = (rows // 2 == 5 // 2) & (columns // 2 == 2 // 2)
    across = (rows % 2 == 5 % 2) & (columns % 2 == 2 % 2)
    np.testing.assert_array_equal(changed, np.broadcast_to(block | across, (3, 8, 8)))


def test_the_one_decoder_runs_on_it(batch):
    _, low, txt, length = batch
    graphdef, params = make()

    @jax.jit
    def draw(low, txt, length, index):
        net = nnx.merge(graphdef, params)
        memory = net.memory(low, txt)
        canvas = jnp.zeros((low.shape[0], 64), jnp.int32)
        keys = noise_keys(0, index)
        return decode_steps(
            lambda tok, _: net.logits(tok, memory, length),
            canvas,
            canvas > 0,
            keys,
            steps=3,
            temperature=1.0,
            choice_temperature=4.5,
            schedule='cosine',
        )[-1]

    drawn = np.asarray(draw(low, txt, length, jnp.arange(3)))
    assert drawn.min() >= 0 and drawn.max() < 17
    swapped = draw(low.at[0].set(low[2]), txt, length, jnp.arange(3))
    np.testing.assert_array_equal(swapped[1:], drawn[1:])
    assert (swapped[0] != drawn[0]).any()


def test_without_low_res_layers_their_embedding_is_read(batch):
    graphdef, params = make(low_layers=0)
    model = jitted(graphdef, params)
    assert nnx.merge(graphdef, params).low_blocks is None
    logits = model(*batch)
    assert change(model(batch[0], batch[1][:, ::-1], *batch[2:]), logits, 0) > 1e-2


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'heads': 1}, r'model.heads is 1 and model.width 32: heads must be even'),
        ({'heads': 6}, r'heads must be even and divide the width'),
        ({'grid': (8, 9)}, r'model.grid is \(8, 9\): it must be a multiple of model.low_grid'),
        ({'low_grid': (0, 2)}, r'must be a multiple of model.low_grid \(0, 2\)'),
        ({'block': 3}, r'8x8 tokens do not fit the super-res: both sides must be multiples of 3'),
        ({'block': 0}, r'model.block is 0'),
    ],
)
def test_a_shape_that_cannot_be_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Superres(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(params=0))


def test_a_canvas_that_does_not_fit_is_refused(batch):
    tok, low, txt, length = batch
    graphdef, params = make()
    with pytest.raises(UserError, match=r'8x6 tokens do not fit .* multiples of 2 \(its block\) and of 4'):
        nnx.merge(graphdef, params)(tok[:, :48], low, txt, length, (8, 6))


@pytest.mark.parametrize(
    ('shape', 'millions'),
    [({'layers': 16, 'low_layers': 0}, 298), ({}, 768)],
    ids=['268M of table 1', 'table 6'],
)
def test_paper_sizes(shape, millions):
    config = SuperresConfig(**shape)
    abstract = nnx.split(nnx.eval_shape(lambda: Superres(config, rngs=nnx.Rngs(params=0))), nnx.Param)[1]
    assert round(sum(x.size for x in jax.tree.leaves(abstract)) / 1e6) == millions
    if not config.low_layers:
        assert round(sum(x.size for x in jax.tree.leaves(abstract['blocks'])) / 1e6, 1) == 268.5
