"""The convolution of a doubled picture: its two forms against each other and against plain repetition."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from muse.config import MeshConfig
from muse.mesh import batch_sharding, make_mesh, shardings
from muse.nn import convolutions


def test_merged_doubling_is_doubling_then_convolving():
    """What runs on GPUs and TPUs against what runs here, values and gradients; and both against plain repetition."""
    rng = np.random.default_rng(1)
    x, kernel, weights = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 5, 3, 4), (3, 3, 4, 6), (2, 10, 6, 6))
    )
    doubled = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    plain = jax.lax.conv_general_dilated(doubled, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    for form in (convolutions._convolve_doubled, convolutions._convolve_doubled_merged, convolutions._up_convolve):
        np.testing.assert_allclose(jax.jit(form)(x, kernel), plain, atol=3e-5)
    expected = jax.grad(lambda x, k: jnp.sum(weights * convolutions._convolve_doubled(x, k)), argnums=(0, 1))(x, kernel)
    merged = convolutions._convolve_doubled_merged_backward(x, kernel, weights)
    chosen = jax.jit(jax.grad(lambda x, k: jnp.sum(weights * convolutions._up_convolve(x, k)), argnums=(0, 1)))(
        x, kernel
    )
    for found in (merged, chosen):
        for ours, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, other, atol=1e-4)


def test_pictures_stay_split_where_kernels_are_split_by_channels():
    """What devices exchange is kernels and their gradients: no picture changes hands, forward or backward."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))

    def make():
        rngs = nnx.Rngs(params=0)
        convolution = convolutions.Conv(8, 16, rngs=rngs)
        return nnx.List([convolution, convolutions.UpConv(16, 16, rngs=rngs), convolutions.Conv(16, 8, rngs=rngs)])

    graphdef, params = nnx.split(nnx.eval_shape(make), nnx.Param)
    layout = shardings(params, mesh)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, layout)
    x_BHWC = jax.ShapeDtypeStruct((8, 32, 32, 8), jnp.float32, sharding=batch_sharding(mesh))

    def loss(params, x_BHWC):
        for layer in nnx.merge(graphdef, params):
            x_BHWC = jax.nn.silu(layer(x_BHWC))
        return jnp.sum(jnp.square(x_BHWC))

    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss), out_shardings=layout).lower(params, x_BHWC).compile()
    moved = re.findall(r'= \(?f32\[([\d,]*)\]\S* (all-\w+|collective-permute)\(', program.as_text())
    largest = max(math.prod(map(int, filter(None, dims.split(',')))) for dims, _ in moved)
    assert moved and largest <= 3 * 3 * 16 * 16, moved  # the largest kernel; a device's two pictures are larger
