"""T5 checkpoints of Hugging Face and T5X: whatever the layout, the states are those of the golden."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore
from flax import nnx
from flax.serialization import msgpack_restore, msgpack_serialize
from safetensors.numpy import load_file, save_file
from t5_folders import ENCODERS, golden, write_huggingface, write_t5x

from muse.config import MeshConfig, T5Config
from muse.errors import UserError
from muse.mesh import make_mesh
from muse.models.t5 import T5Encoder
from muse.release import huggingface, stored, t5x
from muse.release.format import graphdef_and_template
from muse.release.stored import all_finite
from muse.release.t5_checkpoints import T5Checkpoint, load_t5

HUGGING_FACE = {
    'float32': {},
    'float16 in 3 shards': {'dtype': np.float16, 'shards': 3},
    'with a decoder, 2 shards': {'decoder': True, 'shards': 2},
}


def error(loaded: T5Checkpoint, name: str) -> float:
    """Largest distance from the golden's states, as a share of the largest of these."""
    _, expected, _ = golden(name)
    graphdef, _ = graphdef_and_template('text_encoder', loaded.config)
    apply = jax.jit(lambda params, ids, lengths: nnx.merge(graphdef, params)(ids, lengths))
    found = np.asarray(apply(loaded.params, expected['ids'].astype(np.int32), expected['lengths']), np.float32)
    found, theirs = found[:, expected['positions']], expected['states']
    real = expected['positions'][None] < expected['lengths'][:, None]
    scale = np.abs(theirs[real]).max()
    assert real.sum() > 20 and scale > 0.5 and (found[~real] == 0).all()
    return float(np.abs(found - theirs)[real].max() / scale)


def values(loaded: T5Checkpoint) -> dict[str, np.ndarray]:
    return {'.'.join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(loaded.params)}


@pytest.mark.parametrize('name', ENCODERS)
def test_states_equal_hugging_face(name, tmp_path):
    loaded = load_t5(write_huggingface(tmp_path, name))
    assert error(loaded, name) <= 2e-5
    _, _, config = golden(name)
    assert loaded.config.gated == (config['feed_forward_proj'] == 'gated-gelu')
    assert loaded.config.relative_max_distance == config.get('relative_attention_max_distance', 128)
    assert (loaded.config.width, loaded.config.heads, loaded.config.max_length) == (
        config['d_model'],
        config['num_heads'],
        512,
    )


@pytest.mark.parametrize('name', ['t5_v1_1', 't5_v1_0'])
def test_bfloat16_parameters_stay_close(name, tmp_path):
    loaded = load_t5(write_huggingface(tmp_path, name), dtype='bfloat16')
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(loaded.params)} == {'bfloat16'}
    assert loaded.config.dtype == 'bfloat16'
    assert error(loaded, name) <= 2e-2


@pytest.mark.parametrize('layout', HUGGING_FACE)
def test_every_layout_of_hugging_face_holds_the_same(layout, tmp_path):
    plain = load_t5(write_huggingface(tmp_path / 'plain', 't5_v1_1'))
    other = load_t5(write_huggingface(tmp_path / 'other', 't5_v1_1', **HUGGING_FACE[layout]))
    for key, value in values(plain).items():
        np.testing.assert_array_equal(values(other)[key], value, err_msg=key)  # the golden's weights are float16
    assert (other.hash == plain.hash) == ('float16' not in layout)


def test_bfloat16_file(tmp_path):
    loaded = load_t5(write_huggingface(tmp_path, 't5_v1_1', dtype=ml_dtypes.bfloat16))
    weights, _, _ = golden('t5_v1_1')
    table = weights['encoder.embed_tokens.weight'].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(values(loaded)['token_embedder.embedding'], table)
    assert 1e-4 < error(loaded, 't5_v1_1') <= 2e-2


@pytest.mark.parametrize('scanned', [False, True])
@pytest.mark.parametrize('name', ['t5_v1_1', 't5_v1_0'])
def test_t5x_holds_the_same(name, scanned, tmp_path):
    loaded = load_t5(write_t5x(tmp_path / 't5x', name, scanned=scanned))
    plain = load_t5(write_huggingface(tmp_path / 'plain', name))
    assert loaded.config == plain.config
    for key, value in values(plain).items():
        np.testing.assert_array_equal(values(loaded)[key], value, err_msg=key)


def test_t5x_bfloat16_and_placeholders(tmp_path):
    folder = write_t5x(tmp_path, 't5_v1_1', dtype='bfloat16')
    first = values(load_t5(folder))
    from flax.serialization import msgpack_restore, msgpack_serialize

    content = msgpack_restore((folder / 'checkpoint').read_bytes())
    target = content['optimizer']['target']
    target['token_embedder']['embedding'] = 'PLACEHOLDER://target.token_embedder.embedding'
    (folder / 'checkpoint').write_bytes(msgpack_serialize({'target': target}))
    assert all((value == first[key]).all() for key, value in values(load_t5(folder)).items())


@pytest.mark.parametrize('sizes', [{'fsdp': 8}, {'fsdp': 4, 'tensor': 2}, {'data': 2, 'tensor': 4}])
@pytest.mark.parametrize('write', [write_huggingface, write_t5x, lambda *a: write_t5x(*a, scanned=True)])
def test_shards_are_slices_of_the_whole(sizes, write, tmp_path, monkeypatch):
    monkeypatch.setattr(stored, 'BLOCK_BYTES', 1000)  # several reads a tensor
    monkeypatch.setattr(t5x, 'BLOCK_BYTES', 1000)
    mesh = make_mesh(MeshConfig(**{'data': 1} | sizes))
    folder = write(tmp_path, 't5_v1_1')
    whole, split = load_t5(folder), load_t5(folder, mesh=mesh)
    assert split.hash == whole.hash
    for key, value in values(whole).items():
        np.testing.assert_array_equal(values(split)[key], value, err_msg=key)
    leaves = jax.tree.leaves(split.params)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    share = held / sum(leaf.nbytes for leaf in leaves)
    assert share < (0.135 if sizes == {'fsdp': 8} else 0.45)  # 3 heads: not everything divides over 'tensor'


def test_xxl_has_the_published_names_and_shapes():
    """google/t5-v1_1-xxl: 24 layers of 9 tensors, the table, the bias and the last norm."""
    shapes = {
        'encoder.final_layer_norm.weight': (4096,),
        'encoder.embed_tokens.weight': (32128, 4096),
        'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight': (32, 64),
    }
    for layer in range(24):
        block = f'encoder.block.{layer}'
        shapes |= {f'{block}.layer.0.SelfAttention.{x}.weight': (4096, 4096) for x in 'qkvo'}
        shapes |= {f'{block}.layer.1.DenseReluDense.wi_{i}.weight': (10240, 4096) for i in (0, 1)}
        shapes[f'{block}.layer.1.DenseReluDense.wo.weight'] = (4096, 10240)
        shapes |= {f'{block}.layer.{i}.layer_norm.weight': (4096,) for i in (0, 1)}
    assert len(shapes) == 219
    template = nnx.state(nnx.eval_shape(lambda: T5Encoder(T5Config(), rngs=nnx.Rngs(params=0))), nnx.Param)
    ours = {}
    theirs = {ours: their for their, ours in huggingface.LAYER_NAMES.items()}
    for path, variable in nnx.to_flat_state(template):
        name = '.'.join(map(str, path))
        if name.startswith('encoder.layers.'):
            shape = variable.shape[1:][::-1]
            for layer in range(variable.shape[0]):
                ours[f'encoder.block.{layer}.{theirs[name.removeprefix("encoder.layers.")]}'] = shape
        else:
            flipped = name == 'encoder.relpos_bias.rel_embedding'
            single = {
                'encoder.encoder_norm.scale': 'encoder.final_layer_norm.weight',
                'token_embedder.embedding': 'encoder.embed_tokens.weight',
                'encoder.relpos_bias.rel_embedding': huggingface.BIAS,
            }
            ours[single[name]] = variable.shape[::-1] if flipped else variable.shape
    assert ours == shapes


def rewrite(folder, change):
    tensors = load_file(folder / 'model.safetensors')
    change(tensors)
    save_file(tensors, folder / 'model.safetensors')


def set_config(folder, **changes):
    settings = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(settings | changes))


def retype(folder, name, dtype, shape=None):
    """Writes another type and shape into the header."""
    file = folder / 'model.safetensors'
    content = file.read_bytes()
    length = int.from_bytes(content[:8], 'little')
    header = json.loads(content[8 : 8 + length])
    header[name] |= {'dtype': dtype, 'shape': shape or header[name]['shape']}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, 'little') + text + content[8 + length :])


def keep_decoder_alone(folder):
    save_file({'decoder.embed_tokens.weight': np.ones((4, 4), np.float32)}, folder / 'model.safetensors')


def only_a_pickle(folder):
    (folder / 'model.safetensors').unlink()
    (folder / 'pytorch_model.bin').write_bytes(b'\x80\x02')


Q = 'encoder.block.1.layer.0.SelfAttention.q.weight'
TABLE = 'encoder.embed_tokens.weight'
BAD = {
    'decoder alone': (keep_decoder_alone, 'holds a decoder alone .* give a T5 with its encoder'),
    'pickle': (only_a_pickle, "'pytorch_model.bin', a pickle, .*save_pretrained"),
    'no config': (lambda f: (f / 'config.json').unlink(), 'config.json.*cannot be read'),
    'another model': (lambda f: set_config(f, model_type='bert'), "type 'bert': only t5 and mt5"),
    'silu': (lambda f: set_config(f, feed_forward_proj='gated-silu'), "feed_forward_proj is 'gated-silu'"),
    'another epsilon': (lambda f: set_config(f, layer_norm_epsilon=1e-5), 'layer_norm_epsilon is 1e-05'),
    'another vocabulary': (lambda f: set_config(f, vocab_size=95), 'config.json says vocab_size 95, .* have 96'),
    'another activation': (lambda f: set_config(f, feed_forward_proj='relu'), 'says gated False'),
    'heads': (lambda f: set_config(f, num_heads=6), 'says heads 6'),
    'activation in a list': (lambda f: set_config(f, feed_forward_proj=['relu']), r"feed_forward_proj is \['relu'\]"),
    'a word for a number': (lambda f: set_config(f, d_model='48'), "d_model is '48'; it must be a number"),
    'half a bucket': (lambda f: set_config(f, relative_attention_max_distance=0.5), 'max_distance is 0.5; it must be'),
    'no distance': (lambda f: set_config(f, relative_attention_max_distance=None), 'max_distance is None; it must be'),
    'too near': (lambda f: set_config(f, relative_attention_max_distance=2), 'max_distance is 2, and .* need more'),
    'eight bits': (lambda f: retype(f, Q, 'F8_E4M3'), f"'{Q}' is F8_E4M3, which is not read"),
    'negative sides': (lambda f: retype(f, Q, 'F32', [-48, -48]), f"corrupted.*tensor '{Q}' is of another size"),
    'lost tensor': (lambda f: rewrite(f, lambda t: t.pop(Q)), f"lacks tensor '{Q}'"),
    'odd shape': (
        lambda f: rewrite(f, lambda t: t.update({Q: t[Q][:-1].copy()})),
        'layer 1 has the shape .*is damaged',
    ),
    'NaN': (lambda f: rewrite(f, lambda t: t[Q].__setitem__((3, 5), np.nan)), f"model': tensor '{Q}' holds NaN or inf"),
    'infinity': (lambda f: rewrite(f, lambda t: t[TABLE].__setitem__(-1, -np.inf)), f"tensor '{TABLE}' holds NaN or"),
    'integers': (lambda f: rewrite(f, lambda t: t.update({Q: t[Q].astype(np.int32)})), f"lacks tensor '{Q}'"),
    'empty folder': (lambda f: (shutil.rmtree(f), f.mkdir()), 'no T5 checkpoint: it needs config.json'),
    'no folder': (shutil.rmtree, 'does not exist'),
}


@pytest.mark.parametrize('kind', BAD)
def test_bad_checkpoints(kind, tmp_path):
    folder = write_huggingface(tmp_path / 'model', 't5_v1_1')
    spoil, message = BAD[kind]
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_t5(folder)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('share', [0.0, 0.00002, 0.01, 0.5, 0.999])
def test_truncated_file(share, tmp_path):
    file = write_huggingface(tmp_path, 't5_v1_1') / 'model.safetensors'
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match='truncated'):
        load_t5(tmp_path)


def test_missing_shard_is_named(tmp_path):
    write_huggingface(tmp_path, 't5_v1_1', shards=3)
    (tmp_path / 'model-00002-of-00003.safetensors').unlink()
    with pytest.raises(UserError, match=r"lacks shard 'model-00002-of-00003.safetensors' \(2 of 3 needed\)"):
        load_t5(tmp_path)
    (tmp_path / 'model.safetensors.index.json').write_text('{"weight_map": ')
    with pytest.raises(UserError, match='index.json. cannot be read'):
        load_t5(tmp_path)


def test_bad_t5x(tmp_path):
    folder = write_t5x(tmp_path, 't5_v1_1')
    zarr = folder / 'target.encoder.layers_1.mlp.wo.kernel'
    chunk = next(path for path in zarr.iterdir() if path.name != '.zarray')
    content = chunk.read_bytes()
    chunk.write_bytes(content[:40])
    with pytest.raises(UserError, match='wo.kernel. is damaged'):
        load_t5(folder)
    chunk.unlink()
    with pytest.raises(UserError, match='holds 3 of its 4 chunks'):
        load_t5(folder)
    shutil.rmtree(zarr)
    with pytest.raises(UserError, match="lacks 'target.encoder.layers_1.mlp.wo.kernel'"):
        load_t5(folder)
    whole = (folder / 'checkpoint').read_bytes()
    for content in (whole[:100], b'', b'model_checkpoint_path: "x"'):
        (folder / 'checkpoint').write_bytes(content)
        with pytest.raises(UserError, match='truncated or no T5X checkpoint'):
            load_t5(folder)
    (folder / 'checkpoint').write_bytes(msgpack_serialize({'target': [1, 2]}))
    with pytest.raises(UserError, match="its 'target' is a list"):
        load_t5(folder)


def test_a_t5x_layer_that_is_lost(tmp_path):
    folder = write_t5x(tmp_path, 't5_v1_1')
    tree = msgpack_restore((folder / 'checkpoint').read_bytes())
    del tree['optimizer']['target']['encoder']['layers_0']
    (folder / 'checkpoint').write_bytes(msgpack_serialize(tree))
    with pytest.raises(UserError, match="lacks 'encoder.layers_0': copy the checkpoint again"):
        load_t5(folder)
    tree['optimizer']['target']['encoder']['layers_0'] = np.ones(3, np.float32)
    (folder / 'checkpoint').write_bytes(msgpack_serialize(tree))
    with pytest.raises(UserError, match='has ndarray in place of a layer: copy it again'):
        load_t5(folder)


@pytest.mark.parametrize('scanned', [False, True])
def test_a_t5x_tensor_that_is_not_finite_is_named(scanned, tmp_path):
    folder = write_t5x(tmp_path, 't5_v1_1', scanned=scanned, dtype='bfloat16')
    name = 'encoder.layers.mlp.wo.kernel' if scanned else 'encoder.layers_1.mlp.wo.kernel'
    place = {'driver': 'file', 'path': str(folder / f'target.{name}')}
    store = tensorstore.open({'driver': 'zarr', 'kvstore': place}).result()
    values = store.read().result()
    values[-1, -1] = np.inf
    store.write(values).result()
    shown = 'mlp.wo.kernel' if scanned else name
    with pytest.raises(UserError, match=f"tensor '{shown}' holds NaN or infinity"):
        load_t5(folder)


@pytest.mark.parametrize('dtype', [np.float16, np.float32, ml_dtypes.bfloat16])
def test_all_finite(dtype):
    values = np.array([0, -0.0, ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).min, 1e-7], dtype)
    assert all_finite(values) and all_finite(values[:0]) and all_finite(np.full(3, -1, np.int16))
    for wrong in (np.inf, -np.inf, np.nan, -np.nan):
        assert not all_finite(np.append(values, np.array(wrong, dtype)))


def test_half_precision_rounds_to_nearest(tmp_path):
    loaded = load_t5(write_huggingface(tmp_path, 't5_v1_0'), dtype='bfloat16')
    weights, _, _ = golden('t5_v1_0')
    expected = jnp.asarray(weights['encoder.embed_tokens.weight']).astype(jnp.bfloat16)
    assert (loaded.params['token_embedder']['embedding'][...] == expected).all()
