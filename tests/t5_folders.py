"""Checkpoints of small T5 encoders as others lay them out, written from the goldens (tools/make_t5_golden.py)."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from flax.serialization import msgpack_serialize
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).parent / 'golden'
VOCABULARY = GOLDEN / 't5_vocabulary'
ENCODERS = ('t5_v1_1', 't5_v1_0', 't5_many_buckets', 't5_few_buckets')


def golden(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict]:
    """Float32 weights under Hugging Face's names; ids, lengths, positions and states; config.json."""
    path = GOLDEN / f'{name}.safetensors'
    tensors = load_file(path)
    with safe_open(path, 'np') as file:
        config = json.loads(file.metadata()['config'])
    weights = {k.removeprefix('weight.'): v.astype(np.float32) for k, v in tensors.items() if k.startswith('weight.')}
    return weights, {k: v for k, v in tensors.items() if not k.startswith('weight.')}, config


def write_huggingface(folder: Path, name: str, *, dtype=np.float32, shards: int = 1, decoder: bool = False) -> Path:
    """Writes the golden's encoder; with `decoder` under the names of a whole T5, beside tensors nobody should read."""
    weights, _, config = golden(name)
    if decoder:
        weights['shared.weight'] = weights.pop('encoder.embed_tokens.weight')
        weights['decoder.block.0.layer.0.SelfAttention.q.weight'] = np.ones((4, 4), np.float32)
        weights['lm_head.weight'] = np.ones((4, 4), np.float32)
    weights = {k: v.astype(dtype) for k, v in weights.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(config))
    if shards == 1:
        save_file(weights, folder / 'model.safetensors', {'format': 'pt'})
        return folder
    names = sorted(weights)
    places = {key: f'model-{i % shards + 1:05d}-of-{shards:05d}.safetensors' for i, key in enumerate(names)}
    for file in set(places.values()):
        save_file({k: weights[k] for k in names if places[k] == file}, folder / file, {'format': 'pt'})
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': places}))
    return folder


T5X_NAMES = {
    'layer.0.layer_norm': 'pre_attention_layer_norm/scale',
    'layer.0.SelfAttention.q': 'attention/query/kernel',
    'layer.0.SelfAttention.k': 'attention/key/kernel',
    'layer.0.SelfAttention.v': 'attention/value/kernel',
    'layer.0.SelfAttention.o': 'attention/out/kernel',
    'layer.1.layer_norm': 'pre_mlp_layer_norm/scale',
    'layer.1.DenseReluDense.wi': 'mlp/wi/kernel',
    'layer.1.DenseReluDense.wi_0': 'mlp/wi_0/kernel',
    'layer.1.DenseReluDense.wi_1': 'mlp/wi_1/kernel',
    'layer.1.DenseReluDense.wo': 'mlp/wo/kernel',
}


def t5x_tree(name: str, scanned: bool) -> dict[str, np.ndarray]:
    """'/'-joined T5X path → array: kernels [in, out]; scanned layers stacked along axis 1."""
    weights, _, config = golden(name)
    tree = {
        'token_embedder/embedding': weights['encoder.embed_tokens.weight'],
        'encoder/encoder_norm/scale': weights['encoder.final_layer_norm.weight'],
        'encoder/relpos_bias/rel_embedding': weights[
            'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight'
        ].T,
    }
    for theirs, ours in T5X_NAMES.items():
        keys = [f'encoder.block.{i}.{theirs}.weight' for i in range(config['num_layers'])]
        if keys[0] in weights:
            layers = [weights[key].T for key in keys]
            if scanned:
                tree[f'encoder/layers/{ours}'] = np.stack(layers, axis=1)
            else:
                tree |= {f'encoder/layers_{i}/{ours}': layer for i, layer in enumerate(layers)}
    return tree


def write_t5x(folder: Path, name: str, *, scanned: bool = False, dtype: str = 'float32') -> Path:
    """Writes the golden's encoder as T5X does: matrices as zarr with gzip, norms inside the msgpack file."""
    import tensorstore

    leaves: dict = {}
    for path, values in t5x_tree(name, scanned).items():
        *parents, last = path.split('/')
        branch = leaves
        for parent in parents:
            branch = branch.setdefault(parent, {})
        if last == 'scale':
            branch[last] = values
            continue
        chunks = [max(1, size // 2) for size in values.shape]
        spec = {
            'driver': 'zarr',
            'dtype': dtype,
            'kvstore': {'driver': 'file', 'path': f'target.{path.replace("/", ".")}'},
            'metadata': {'compressor': {'id': 'gzip'}, 'shape': list(values.shape), 'chunks': chunks},
        }
        where = spec | {'kvstore': {'driver': 'file', 'path': str(folder / spec['kvstore']['path'])}}
        kind = ml_dtypes.bfloat16 if dtype == 'bfloat16' else dtype
        tensorstore.open(where, create=True).result().write(np.ascontiguousarray(values).astype(kind)).result()
        branch[last] = spec
    folder.mkdir(parents=True, exist_ok=True)
    content = {'version': 3, 'optimizer': {'target': leaves, 'state': {'step': np.int32(7)}}}
    (folder / 'checkpoint').write_bytes(msgpack_serialize(content))
    return folder


def add_vocabulary(folder: Path, *names: str) -> Path:
    """Puts the golden vocabulary beside the weights, in the formats named."""
    for name in names:
        (folder / name).write_bytes((VOCABULARY / name).read_bytes())
    return folder
