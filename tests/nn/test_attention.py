"""The attention backends against each other and against a plain formula."""

import jax
import jax.numpy as jnp
import numpy as np

from muse.nn.attention import attention


def plain(q, k, v, lengths, scale, bias):
    """One row, one head, one query at a time, in float64."""
    out = np.zeros(q.shape)
    for b in range(q.shape[0]):
        for n in range(q.shape[2]):
            for t in range(q.shape[1]):
                logits = k[b, : lengths[b], n] @ q[b, t, n] * scale + bias[0, n, t, : lengths[b]]
                weights = np.exp(logits - logits.max())
                out[b, t, n] = weights @ v[b, : lengths[b], n] / weights.sum()
    return out


def test_xla_backend_is_softmax_attention_over_a_prefix():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(2, 5, 3, 8)), rng.normal(size=(2, 6, 3, 8)), rng.normal(size=(2, 6, 3, 8))
    bias = rng.normal(size=(1, 3, 5, 6))
    to32 = [jnp.array(x, jnp.float32) for x in (q, k, v)]
    out = attention(*to32, lengths_B=jnp.array([1, 4]), bias_1NTS=jnp.array(bias, jnp.float32), scale=0.7)
    np.testing.assert_allclose(out, plain(q, k, v, [1, 4], 0.7, bias), atol=2e-6)


def test_splash_kernel_matches_xla_with_lengths_and_gradients():
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 128, 2, 64))
    k, v = (jax.random.normal(key, (2, 256, 2, 64)) for key in keys[1:])
    lengths = jnp.array([1, 130])

    def run(backend):
        def loss(q, k, v):
            out = attention(q, k, v, lengths_B=lengths, scale=0.125, backend=backend)
            return (out * jnp.cos(jnp.arange(64))).sum(), out

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    (grads, out), (splash_grads, splash_out) = run('xla'), run('splash')
    np.testing.assert_allclose(splash_out, out, atol=1e-5)
    for ours, theirs in zip(splash_grads, grads, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-5)
