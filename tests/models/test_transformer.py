"""The base transformer (§2.3): what may and may not influence its logits, and its paper sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from muse.config import TransformerConfig
from muse.models.transformer import GridPositions, Transformer

CONFIG = TransformerConfig(
    codebook_size=17, grid=(4, 4), width=32, mlp_dim=64, heads=2, layers=3, text_width=24, text_length=7, remat='none'
)


def make(**changes):
    config = TransformerConfig(**{**CONFIG.__dict__, **changes})
    graphdef, params = nnx.split(Transformer(config, rngs=nnx.Rngs(params=0)), nnx.Param)
    # Larger weights than at the start of training, so that an influence that should not be there would show.
    params = jax.tree.map(lambda x: x * 3 + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    return jax.jit(lambda tok, txt, length: nnx.merge(graphdef, params)(tok, txt, length)), graphdef, params


@pytest.fixture(scope='module')
def batch():
    keys = jax.random.split(jax.random.key(0), 2)
    return jax.random.randint(keys[0], (3, 16), 0, 18), jax.random.normal(keys[1], (3, 7, 24)), jnp.array([0, 3, 7])


@pytest.fixture(scope='module')
def model():
    return make()[0]


def test_pads_never_matter(model, batch):
    tok, txt, length = batch
    garbage = jnp.where(jnp.arange(7)[None, :, None] >= length[:, None, None], 1e4, txt)
    np.testing.assert_array_equal(model(tok, txt, length), model(tok, garbage, length))
    np.testing.assert_allclose(model(tok[1:2], txt[1:2, :3], length[1:2])[0], model(tok, txt, length)[1], atol=2e-5)


def test_batch_mates_never_matter(model, batch):
    tok, txt, length = batch
    other = model(tok.at[0].set(3), txt.at[0].set(5.0), length.at[0].set(7))
    np.testing.assert_array_equal(other[1:], model(tok, txt, length)[1:])


def test_text_and_tokens_do_matter(model, batch):
    tok, txt, length = batch
    logits = model(tok, txt, length)
    assert float(jnp.abs(model(tok, jnp.roll(txt, 1, axis=0), length)[1] - logits[1]).max()) > 1e-2
    assert float(jnp.abs(model(tok, txt, jnp.zeros(3, int))[1] - logits[1]).max()) > 1e-2
    swapped = tok.at[1, 0].set((tok[1, 0] + 1) % 17)
    assert (jnp.abs(model(swapped, txt, length)[1] - logits[1]).max(-1) > 1e-4).all()  # every token sees every token


def test_no_text_is_a_finite_condition_of_its_own(model, batch):
    tok, txt, _ = batch
    none = model(tok, txt, jnp.zeros(3, int))
    assert bool(jnp.isfinite(none).all())
    np.testing.assert_array_equal(none, model(tok, txt * 7 + 1, jnp.zeros(3, int)))


def test_soft_one_hots_equal_ids_and_carry_a_gradient(batch):
    tok, txt, length = batch
    model, graphdef, params = make()
    soft = jax.nn.one_hot(tok, 18)
    np.testing.assert_allclose(model(soft, txt, length), model(tok, txt, length), atol=1e-5)
    grad = jax.grad(lambda w: nnx.merge(graphdef, params)(w, txt, length)[:, 0, 0].sum())(soft)
    assert float(jnp.abs(grad[:, 5]).max()) > 1e-5


def test_cached_memory_equals_the_training_path(batch):
    tok, txt, length = batch
    _, graphdef, params = make()
    net = nnx.merge(graphdef, params)
    np.testing.assert_allclose(net.logits(tok, net.memory(txt), length), net(tok, txt, length), atol=2e-5)


SLOW = [pytest.param(changes, marks=pytest.mark.slow) for changes in ({'remat': 'full'}, {'unroll': 3})]


@pytest.mark.parametrize('changes', [{'remat': 'dots', 'unroll': 3}, *SLOW])
def test_remat_and_unroll_change_nothing(batch, changes):
    def value_and_grad(**changes):
        _, graphdef, params = make(**changes)
        loss = lambda p: jnp.square(nnx.merge(graphdef, p)(*batch)).mean()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    plain, changed = value_and_grad(), value_and_grad(**changes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), plain, changed)


def test_embedding_gradient_equals_the_scatters(batch):
    from muse.nn.layers import take_rows

    table = jax.random.normal(jax.random.key(0), (18, 8))
    weigh = jax.random.normal(jax.random.key(1), (3, 16, 8))
    ours = jax.grad(lambda t: (take_rows(t, batch[0]) * weigh).sum())(table)
    np.testing.assert_allclose(ours, jax.grad(lambda t: (t[batch[0]] * weigh).sum())(table), atol=1e-5)


def test_positions_index_smaller_canvases_and_interpolate_larger_ones():
    positions = GridPositions((4, 4), 8, rngs=nnx.Rngs(params=0))
    whole = positions((4, 4)).reshape(4, 4, 8)
    np.testing.assert_array_equal(positions((2, 3)).reshape(2, 3, 8), whole[:2, :3])
    assert positions((8, 6)).shape == (48, 8)
    assert len(np.unique(np.asarray(whole.reshape(16, 8)).round(6), axis=0)) == 16


@pytest.mark.parametrize(
    ('shape', 'millions'),
    [({'width': 1024, 'mlp_dim': 4096, 'heads': 16, 'layers': 36}, 625), ({}, 3264)],
    ids=['632M row of table 1', '3B of table 4'],
)
def test_paper_sizes(shape, millions):
    config = TransformerConfig(**shape)
    abstract = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(params=0)))
    count = sum(x.size for x in jax.tree.leaves(nnx.split(abstract, nnx.Param)[1]))
    assert round(count / 1e6) == millions
