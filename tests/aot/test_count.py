"""Counting on optimised HLO: loops as often as they run, convolutions and kernels by formula, groups of collectives."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import SUPERRES

from muse.aot.count import BETWEEN_SLICES, Collective, count, first_group
from muse.aot.hlo import parse
from muse.config import MeshConfig, TransformerConfig
from muse.mesh import batch_sharding, make_mesh, shardings
from muse.models.superres import Superres
from muse.models.transformer import Transformer
from muse.train.flops import superres_flops, transformer_flops

SMALL = TransformerConfig(
    codebook_size=48, grid=(4, 4), width=32, mlp_dim=64, heads=2, layers=2, text_width=24, text_length=7, remat='none'
)


def counted(function, *args, devices=1, **options):
    return count(parse(jax.jit(function, **options).lower(*args).compile().as_text()), devices)


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def test_a_product_and_a_product_in_a_loop_of_seven():
    x, w = shape(8, 16), shape(16, 16)
    once = counted(lambda x, w: x @ w, x, w)
    assert once.flops == 2 * 8 * 16 * 16
    assert once.hbm_bytes == 4 * (8 * 16 + 16 * 16 + 8 * 16)
    loop = counted(lambda x, w: jax.lax.fori_loop(0, 7, lambda _, x: x @ w, x), x, w)
    assert loop.flops == 7 * once.flops
    nested = counted(
        lambda x, w: jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.fori_loop(0, 5, lambda _, x: x @ w, x), x), x, w
    )
    assert nested.flops == 15 * once.flops


def test_a_loop_of_unknown_length_is_named():
    found = counted(
        lambda x, w: jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ w, x), shape(8, 8), shape(8, 8)
    )
    assert found.flops == 2 * 8 * 8 * 8 and found.unknown['loops counted once'] == 1


@pytest.mark.parametrize('kind', [Transformer, Superres])
def test_the_models_formula_is_the_count_of_the_unrolled_program(kind):
    if kind is Superres:
        sizes = {'codebook_size': 48, 'low_codebook_size': 40, 'text_width': 24, 'text_length': 7}
        config = dataclasses.replace(SUPERRES, **sizes, remat='none', unroll=2)
        formula, extra = superres_flops(config, 3), [shape(3, 16, dtype=jnp.int32)]
    else:
        config, extra = dataclasses.replace(SMALL, unroll=2), []
        formula = transformer_flops(config, 3)
    model = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(params=0)))
    graphdef, params = nnx.split(model, nnx.Param)
    tokens = config.grid[0] * config.grid[1]
    args = [shape(3, tokens, dtype=jnp.int32), *extra, shape(3, 7, 24), shape(3, dtype=jnp.int32)]
    found = counted(lambda params, *args: nnx.merge(graphdef, params)(*args), params, *args)
    # The formula leaves out the row of the null, which a layer's product makes and then overwrites (`with_null`).
    nulls = 2 * 2 * 3 * config.width**2 * config.layers
    assert found.flops == pytest.approx(formula + nulls, rel=1e-6)
    assert not found.unknown


def train_program(config, mesh, rows=8):
    """One gradient step of the base on eight devices."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(params=0))), nnx.Param)
    layout = shardings(params, mesh)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, layout)
    layout_rows = batch_sharding(mesh)
    args = [
        jax.ShapeDtypeStruct((rows, *dims), dtype, sharding=layout_rows)
        for dims, dtype in (((16,), jnp.int32), ((7, 24), jnp.float32), ((), jnp.int32))
    ]

    def loss(params, *args):
        return jnp.mean(jnp.square(nnx.merge(graphdef, params)(*args)))

    return counted(jax.grad(loss), params, *args, devices=8, out_shardings=layout)


def test_two_scanned_layers_count_as_two_unrolled():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        scanned, unrolled = (
            train_program(dataclasses.replace(SMALL, remat='full', unroll=unroll), mesh) for unroll in (1, 2)
        )
    assert scanned.flops == pytest.approx(unrolled.flops, rel=0.01)
    assert not scanned.unknown

    def sent(totals):
        return sum(totals.collectives.values())

    assert sent(scanned) > 1e5 and sent(scanned) == pytest.approx(sent(unrolled), rel=0.15)


def naive_products(lhs, window, out, stride, low, dilate):
    """Pairs that a convolution multiplies along one dimension, one at a time."""
    pairs = itertools.product(range(out), range(window))
    places = [o * stride + w - low for o, w in pairs]
    return sum(p >= 0 and p % dilate == 0 and p // dilate < lhs for p in places)


def test_a_convolution_counts_what_it_multiplies():
    """Same padding: products with padding are none. 3x3 over 6x5 pixels, 4 → 8 channels."""
    found = counted(
        lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')),
        shape(2, 6, 5, 4),
        shape(3, 3, 4, 8),
    )
    assert found.flops == 2 * 2 * 4 * 8 * naive_products(6, 3, 6, 1, 1, 1) * naive_products(5, 3, 5, 1, 1, 1)


TPU = """HloModule jit_step, is_scheduled=true

%all-reduce-scatter.1 (input: bf16[1024,64]) -> bf16[256,64] {
  %input = bf16[1024,64]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.1 = bf16[1024,64]{1,0:T(8,128)(2,1)} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %dynamic-slice.1 = bf16[256,64]{1,0} dynamic-slice(%all-reduce.1, %i, %j), dynamic_slice_sizes={256,64}
}

%start (a: bf16[1,256,64]) -> bf16[1,1024,64] {
  %a = bf16[1,256,64]{2,1,0} parameter(0)
  %all-gather.1 = bf16[1,1024,64]{2,1,0} all-gather(%a), channel_id=9, replica_groups=mesh['x'=4,'y'=1] {'x'}, \
dimensions={1}, backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
  ROOT %custom-call.1 = (bf16[1,256,64]{2,1,0}, bf16[1,1024,64]{2,1,0}) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%going_on (b: bf16[1,256,64]) -> bf16[1,1024,64] {
  %b = bf16[1,256,64]{2,1,0} parameter(0)
  ROOT %all-gather.2 = bf16[1,1024,64]{2,1,0} all-gather(%b), channel_id=9, replica_groups=mesh['x'=4,'y'=1] {'x'}, \
dimensions={1}, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
}

%body (p: (s32[], bf16[4,256,64])) -> (s32[], bf16[4,256,64]) {
  %p = (s32[]{:T(128)}, bf16[4,256,64]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %w = bf16[4,256,64]{2,1,0} get-tuple-element(%p), index=1
  %q = f32[2,3,16,5]{3,2,1,0} constant(0)
  %k = f32[2,3,9,5]{3,2,1,0} constant(0)
  %lhs = f32[2,3,16,5]{2,3,1,0} constant(0)
  %rhs = f32[2,3,9,5]{2,3,1,0} constant(0)
  %conv = f32[2,3,16,9]{2,3,1,0:T(8,128)} convolution(%lhs, %rhs), \
window={size=2x3 stride=1x2 lhs_dilate=2x3}, dim_labels=01bf_01oi->01bf
  %splash_mha_fwd_residuals.2 = (f32[8,128]{1,0}, bf16[2,3,16,5]{3,2,1,0:T(8,128)S(1)}) custom-call(%q, %k, %k), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128}"
}}, metadata={op_name="x"}
  %w1 = bf16[1,256,64]{2,1,0} slice(%w), slice={[0:1], [0:256], [0:64]}
  %f1 = bf16[1,1024,64]{2,1,0} fusion(%w1), kind=kCustom, calls=%start
  %f2 = bf16[1,1024,64]{2,1,0} fusion(%w1), kind=kCustom, calls=%going_on
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %t = (s32[]{:T(128)}, bf16[4,256,64]{2,1,0}) tuple(%next, %w)
}

%condition (p: (s32[], bf16[4,256,64])) -> pred[] {
  %p = (s32[]{:T(128)}, bf16[4,256,64]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(4)
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main (w: bf16[4,256,64], g: bf16[1024,64]) -> bf16[256,64] {
  %w = bf16[4,256,64]{2,1,0} parameter(0)
  %g = bf16[1024,64]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %host = f32[100]{0} constant(0)
  %zero = s32[]{:T(128)} constant(0)
  %copy = s32[]{:T(128)} copy(%zero)
  %state = (s32[]{:T(128)}, bf16[4,256,64]{2,1,0}) tuple(%copy, %w)
  %loop = (s32[]{:T(128)}, bf16[4,256,64]{2,1,0}) while(%state), condition=%condition, body=%body
  %token = token[] after-all()
  %send.1 = (f32[100]{0}, u32[]{:S(2)}, token[]) send(%host, %token), channel_id=4, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  ROOT %r = bf16[256,64]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_what_the_tpu_compiler_writes():
    """Its own forms: a batched product as a dilated convolution, kernels, asynchronous and fused collectives."""
    found = count(parse(TPU), 4)
    product, kernel = 2 * 2 * 3 * 16 * 9 * 5, 2 * 2 * 2 * 3 * 16 * 9 * 5
    assert found.kernel_flops == 4 * kernel
    assert found.flops == 4 * (product + kernel)
    assert found.kernels == {'splash_mha_fwd_residuals': 4}
    shard = 256 * 64 * 2
    group = (0, 1, 2, 3)
    assert found.collectives == {
        Collective('all-gather', group): 4 * 3 * shard,  # the fusion that carries it on adds nothing
        Collective('reduce-scatter', group): 1024 * 64 * 2 * 3 / 4,
        Collective(BETWEEN_SLICES, ()): 400,
    }


@pytest.mark.parametrize(
    'text, group',
    [
        ('replica_groups={{0,4},{1,5}}', (0, 4)),
        ('replica_groups={}, x', tuple(range(8))),
        ('replica_groups=[2,4]<=[8]', (0, 1, 2, 3)),
        ('replica_groups=[4,2]<=[2,4]T(1,0), x', (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, x", (0, 2)),
        ('replica_groups=?', None),
    ],
)
def test_groups(text, group):
    assert first_group(f', channel_id=1, {text}', 8) == group


def test_hbm_traffic_of_a_loop_is_the_slices_it_reads():
    """A scan over stacked weights reads each once, not the stack in every turn."""
    layers, width = 16, 64
    found = counted(
        lambda x, w: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0],
        shape(8, width),
        shape(layers, width, width),
    )
    weights = layers * width * width * 4
    assert weights < found.hbm_bytes < 4 * weights
    assert np.isclose(found.flops, layers * 2 * 8 * width * width)


def test_weights_travel_and_activations_stay(monkeypatch):
    """Split over 'fsdp', a step sends each weight a few times; the rows of the batch stay where they are.

    Forward, recomputation and backward gather the weights, and their gradients are summed (twice the bytes as an
    all-reduce): five times the parameters. Without `split_rows` the compiler gathers rows instead.
    """
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    config = dataclasses.replace(SMALL, remat='full')
    params = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(params=0))), nnx.Param)[1]
    weights = 4 * sum(x.size for x in jax.tree.leaves(params))
    with jax.set_mesh(mesh):
        found = train_program(config, mesh, rows=256)
        monkeypatch.setattr('muse.nn.layers.split_rows', lambda x: x)
        loose = train_program(config, mesh, rows=256)
    sent = sum(found.collectives.values())
    assert 2 * weights < sent < 5.5 * weights, sent / weights
    assert sum(loose.collectives.values()) > 2 * sent
