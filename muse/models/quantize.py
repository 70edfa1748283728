"""Vector quantisation of the tokenizer (§2.2): nearest codes, the losses that train the codebook, dead-code revival.

Pure functions of arrays; `muse.models.vqgan` owns the codebook. Distances are float32 and are made in chunks of the
codebook, so that the tokens x codes matrix never exists: at 64x64 tokens and 8192 codes it is 134 MB a picture. The
paper leaves out how codes are kept alive; ours move a code that stays unused onto an encoder output.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_DISTANCE_BYTES = 64 * 2**20
_ENTROPY_BYTES = 16 * 2**20  # several arrays of this size live at once, more so backwards
_ENTROPY_TEMPERATURE = 0.01


def unit(x: Float[Array, '... C']) -> Float[Array, '... C']:
    """x on the unit sphere of its last axis; a zero vector stays zero, with a finite gradient."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


def nearest(
    latents_NC: Float[Array, 'N C'], codebook_VC: Float[Array, 'V C'], *, max_bytes: int = _DISTANCE_BYTES
) -> Int[Array, ' N']:
    """Ids of the nearest codes (squared Euclidean distance, float32; the lowest id wins a tie).

    Args:
        latents_NC: vectors to look up.
        codebook_VC: the codes.
        max_bytes: most memory for distances; the codebook is walked in as many chunks as that asks for. Chunks run
            over codes and not over tokens so that a batch sharded over devices stays where it is.
    """
    tokens, codes = latents_NC.shape[0], codebook_VC.shape[0]
    chunks = min(codes, max(1, -(-tokens * codes * 4 // max_bytes)))
    size = -(-codes // chunks)
    chunks = -(-codes // size)
    padded_VC = jnp.pad(codebook_VC.astype(jnp.float32), ((0, chunks * size - codes), (0, 0)))
    # |z - e|² = |z|² - 2 z·e + |e|²; the first term does not change the order.
    norms_V = jnp.where(jnp.arange(chunks * size) < codes, jnp.sum(jnp.square(padded_VC), axis=-1), jnp.inf)
    latents_NC = latents_NC.astype(jnp.float32)

    def look(best, chunk):
        best_N, ids_N = best
        start, codes_vC, norms_v = chunk
        product_Nv = jnp.matmul(latents_NC, codes_vC.T, precision='highest')
        # The barrier keeps the product a call of the matrix library on GPUs, whatever reads it; and the id is a second
        # plain minimum, for which every backend has a fast reduction, where arg-min is a reduction of pairs. Doubling
        # is exact: the distance is the same number in both, however it is computed.
        distance_Nv = norms_v - 2.0 * jax.lax.optimization_barrier(product_Nv)
        closest_N = jnp.min(distance_Nv, axis=-1)
        places_Nv = jnp.where(distance_Nv == closest_N[:, None], jnp.arange(size, dtype=jnp.int32), size)
        closer_N = closest_N < best_N
        chunk_ids_N = start + jnp.min(places_Nv, axis=-1)
        return (jnp.where(closer_N, closest_N, best_N), jnp.where(closer_N, chunk_ids_N, ids_N)), None

    first = (jnp.full((tokens,), jnp.inf), jnp.zeros((tokens,), jnp.int32))
    starts = jnp.arange(chunks, dtype=jnp.int32) * size
    slices = (starts, padded_VC.reshape(chunks, size, -1), norms_V.reshape(chunks, size))
    return jax.lax.scan(look, first, slices)[0][1]


def straight_through(latents: Float[Array, '... C'], codes: Float[Array, '... C']) -> Float[Array, '... C']:
    """The codes in value; in the gradient the identity of the latents (and nothing of the codes)."""
    return latents + jax.lax.stop_gradient(codes - latents)


def commitment_loss(latents: Float[Array, '... C'], codes: Float[Array, '... C']) -> Float[Array, '']:
    """Mean squared distance that moves the latents alone."""
    return jnp.mean(jnp.square(latents - jax.lax.stop_gradient(codes)))


def codebook_loss(latents: Float[Array, '... C'], codes: Float[Array, '... C']) -> Float[Array, '']:
    """Mean squared distance that moves the codes alone."""
    return jnp.mean(jnp.square(jax.lax.stop_gradient(latents) - codes))


def entropy_loss(
    latents_NC: Float[Array, 'N C'],
    codebook_VC: Float[Array, 'V C'],
    *,
    temperature: float = _ENTROPY_TEMPERATURE,
    max_bytes: int = _ENTROPY_BYTES,
) -> Float[Array, '']:
    """Entropy of each token's soft assignment less the entropy of their mean: sure choices, evenly spread codes.

    Softmax over negative squared distances, in chunks of tokens that the backward pass computes again.
    """
    codes = codebook_VC.shape[0]
    norms_V = jnp.sum(jnp.square(codebook_VC), axis=-1)

    @jax.checkpoint
    def add(total: tuple[Array, Array], latents_nC: Array) -> tuple[tuple[Array, Array], None]:
        logits_nV = (2.0 * latents_nC @ codebook_VC.T - norms_V) / temperature
        log_nV = jax.nn.log_softmax(logits_nV)
        return (total[0] + jnp.sum(jnp.exp(log_nV), axis=0), total[1] - jnp.sum(jnp.exp(log_nV) * log_nV)), None

    first = (jnp.zeros((codes,)), jnp.zeros(()))
    (mass_V, entropy), _ = jax.lax.scan(add, first, _token_chunks(latents_NC, codes * 4, max_bytes))
    return (entropy - _mean_entropy(mass_V, latents_NC.shape[0])) / latents_NC.shape[0]


def bits_entropy_loss(latents_NC: Float[Array, 'N C'], *, max_bytes: int = _ENTROPY_BYTES) -> Float[Array, '']:
    """`entropy_loss` at temperature 1 against all 2^C codes of coordinates -1 and 1, without ever comparing with them.

    Given a token its bits are independent: its entropy is a sum over bits, and its shares of the codes are an outer
    product of those of the first bits and of the last. Summed over tokens that is one matrix product.
    """
    half = latents_NC.shape[1] // 2
    sizes = (2**half, 2 ** (latents_NC.shape[1] - half))

    def shares(log_no: Array, log_yes: Array) -> Array:
        p_nv = jnp.ones((log_no.shape[0], 1))
        for bit in range(log_no.shape[1]):
            no_n1, yes_n1 = (jnp.exp(log[:, bit : bit + 1]) for log in (log_no, log_yes))
            p_nv = jnp.concatenate([p_nv * no_n1, p_nv * yes_n1], axis=1)
        return p_nv

    @jax.checkpoint
    def add(total: tuple[Array, Array], latents_nC: Array) -> tuple[tuple[Array, Array], None]:
        # Softmax over the two codes of a bit: (z + 1)² - (z - 1)² = 4z.
        no_nC, yes_nC = jax.nn.log_sigmoid(-4.0 * latents_nC), jax.nn.log_sigmoid(4.0 * latents_nC)
        entropy = -jnp.sum(jnp.exp(no_nC) * no_nC + jnp.exp(yes_nC) * yes_nC)
        first, last = (shares(no_nC[:, part], yes_nC[:, part]) for part in (slice(None, half), slice(half, None)))
        return (total[0] + jnp.matmul(first.T, last, precision='highest'), total[1] + entropy), None

    start = (jnp.zeros(sizes), jnp.zeros(()))
    (mass_uv, entropy), _ = jax.lax.scan(add, start, _token_chunks(latents_NC, 4 * sum(sizes), max_bytes))
    return (entropy - _mean_entropy(mass_uv, latents_NC.shape[0])) / latents_NC.shape[0]


def _mean_entropy(mass: Float[Array, '*codes'], tokens: int) -> Float[Array, '']:
    """`tokens` times the entropy of the tokens' mean assignment, given their sum."""
    mean = mass / tokens
    return -tokens * jnp.sum(mean * jnp.log(mean + 1e-9))


def _token_chunks(latents_NC: Float[Array, 'N C'], token_bytes: int, max_bytes: int) -> Float[Array, 'k n C']:
    """Tokens in chunks of at most `max_bytes`. Chunk i takes rows i, i + k …: devices keep the rows that they hold."""
    tokens, width = latents_NC.shape
    divisors = (n for n in range(1, tokens + 1) if tokens % n == 0)
    chunks = next((n for n in divisors if tokens // n * token_bytes <= max_bytes), tokens)
    return latents_NC.reshape(tokens // chunks, chunks, width).swapaxes(0, 1)


def counts(ids: Int[Array, '*tokens'], codes: int) -> Float[Array, ' V']:
    """How often each of `codes` codes occurs in ids, float32."""
    return jnp.zeros((codes,), jnp.float32).at[ids.reshape(-1)].add(1.0)


def usage(counts_V: Float[Array, ' V']) -> Float[Array, '']:
    """Share of the codebook that occurs at all, 0..1."""
    return jnp.mean(counts_V > 0)


def perplexity(counts_V: Float[Array, ' V']) -> Float[Array, '']:
    """exp of the entropy of the code frequencies: V when all codes are equally frequent, 1 when one has all."""
    share_V = counts_V / jnp.maximum(jnp.sum(counts_V), 1.0)
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(share_V, share_V)))


def count_idle(idle_steps_V: Int[Array, ' V'], counts_V: Float[Array, ' V']) -> Int[Array, ' V']:
    """Steps each code has gone unused: 0 for those just used, one more for the others."""
    return jnp.where(counts_V > 0, 0, idle_steps_V + 1)


def revive(
    codebook_VC: Float[Array, 'V C'],
    idle_steps_V: Int[Array, ' V'],
    latents_NC: Float[Array, 'N C'],
    key: Array,
    after_steps: int,
) -> tuple[Float[Array, 'V C'], Int[Array, ' V']]:
    """Moves every code idle for `after_steps` steps or more onto a random latent and sets its count to 0.

    Latents are drawn without replacement while they last. Other codes and counts are returned as they were.
    """
    dead_V = idle_steps_V >= after_steps
    order_N = jax.random.permutation(key, latents_NC.shape[0])
    # The k-th dead code takes the k-th latent of a random order.
    chosen_V = order_N[(jnp.cumsum(dead_V) - 1) % latents_NC.shape[0]]
    moved_VC = jnp.where(dead_V[:, None], latents_NC[chosen_V].astype(codebook_VC.dtype), codebook_VC)
    return moved_VC, jnp.where(dead_V, 0, idle_steps_V)
